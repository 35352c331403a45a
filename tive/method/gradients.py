"""Per-record gradients of a whole batch from one backward pass, their norms and projections (paper, section 3.2).

For record s, `g_s` is the gradient of its loss (mean cross-entropy over its supervised tokens) with respect to the
target modules, `||g_s||` its norm, and `f_s` its projection, the feature. LoRA's A and B are linear maps without bias:
with input X `[B, T, in]` and the gradient dY `[B, T, out]` of its output, `dY_b^T X_b` is record b's gradient of that
matrix. The batch's loss is the sum of the records' own losses, so no record's gradient knows of the others. Each
matrix's gradients are projected as they come and never kept.

LESS (arXiv 2402.04333, section 3.1) takes the gradient as Adam would apply it. With Adam's moments `m` and `v` after
step `t` of the checkpoint, and their decays `b1` and `b2`, one record moves the moments to

    m' = b1 m + (1 - b1) g,    v' = b2 v + (1 - b2) g^2,

and what Adam would take from the weights next is `adam_step` times the learning rate. Neither weight decay nor clipping
is part of it. All is float32, each matrix by itself.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tive.method.projection import Projector

# Of one matrix, by its name: per-record gradients [B, out, in] in float32 to something else of that shape.
Transform = Callable[[str, Tensor], Tensor]
# Measures the time that a named part takes.
Measure = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class GradientFeatures:
    """Of each record of a batch, on the device.

    Attributes:
        features: `f_s / ||g_s||`, float32 `[B, proj_dim]`: entries of size 1, which lose nothing in half precision;
            zero where the norm is zero or not finite.
        norms: `||g_s||` before projection, float32 `[B]`; may hold inf and NaN.
        losses: float32 `[B]`.
    """

    features: Tensor
    norms: Tensor
    losses: Tensor


def gradient_features(
    forward: Callable[[], Tensor],
    matrices: Mapping[str, nn.Linear],
    projector: Projector,
    transform: Transform | None = None,
    loss_scale: float = 1.0,
    measure: Measure = contextlib.nullcontext,
) -> GradientFeatures:
    """`f_s` and `||g_s||` of every record of a batch, from one forward and one backward pass.

    Args:
        forward: the forward pass; returns the losses `[B]` of the batch's records.
        matrices: canonical name -> target module, a linear map without bias.
        transform: is applied to each matrix's per-record gradients, the loss scale taken out, before norm and
            projection.
        loss_scale: lifts small gradients above what half precision loses; a record whose norm is not finite wants a
            smaller one.
    """
    sums: list[Tensor] = []  # projections [B, proj_dim] and squared norms [B] of the matrices so far

    def add(name: str, gradients: Tensor) -> None:
        if transform is not None:
            with measure("transformation"):
                gradients = transform(name, gradients.float() / loss_scale)
        flat = gradients.flatten(1)
        if not sums:
            sums.extend(flat.new_zeros(len(flat), size, dtype=torch.float32) for size in (projector.proj_dim, 1))
        with measure("norms"):
            sums[1] += torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float32).square()
        with measure("projection"):
            projector.add(sums[0], name, flat)

    with RecordGradients(matrices, add, measure) as gradients:
        with measure("forward"):
            losses = forward()
        with measure("backward"):
            gradients.backward(losses * loss_scale)
    sketch, norms = sums[0], sums[1].squeeze(1).sqrt()
    good = torch.isfinite(norms) & (norms > 0) & torch.isfinite(sketch).all(dim=1)
    unit = sketch / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    features = torch.where(good[:, None], unit, torch.zeros_like(unit))
    return GradientFeatures(features, norms if transform is not None else norms / loss_scale, losses.detach().float())


class RecordGradients:
    """Hooks on the target modules for one forward and one backward pass.

    `consume` is called once a batch with each matrix's canonical name and its gradients `[B, out, in]`.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Linear],
        consume: Callable[[str, Tensor], None],
        measure: Measure = contextlib.nullcontext,
    ) -> None:
        self.matrices, self.consume, self.measure = matrices, consume, measure
        self.uses: Counter[str] = Counter()
        self.sums: dict[str, Tensor] = {}
        self.in_backward = False

    def __enter__(self) -> RecordGradients:
        self.hooks = [matrix.register_forward_hook(self._forward_hook(name)) for name, matrix in self.matrices.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _forward_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            # Gradient checkpointing runs the forward pass once more, during backward.
            if not self.in_backward:
                self.uses[name] += 1
            if not output.requires_grad:
                # No parameter is trainable, so the first target module starts the graph: nothing below it is computed.
                output = output.detach().requires_grad_()
            tapped: Tensor = _Tap.apply(output, inputs[0].detach(), self, name)
            return tapped

        return hook

    def backward(self, losses: Tensor) -> None:
        """Run the backward pass of the summed losses `[B]`."""
        self.in_backward = True
        losses.sum().backward()

    def add(self, name: str, gradients: Tensor) -> None:
        """Take a matrix's gradients of one use; those of several uses add up."""
        if name in self.sums:
            gradients += self.sums.pop(name)
        self.uses[name] -= 1
        if self.uses[name]:
            self.sums[name] = gradients
        else:
            self.consume(name, gradients)


class _Tap(torch.autograd.Function):
    """The identity on a linear map's output, which sees the map's input X and its output's gradient dY.

    The input is a saved tensor, so gradient checkpointing drops it and computes it again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, gradients: RecordGradients, name: str) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.gradients, ctx.name = gradients, name
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        with ctx.gradients.measure("per-record gradients"):
            gradients = torch.bmm(output_gradient.transpose(1, 2), inputs)  # dY^T X of each record
        ctx.gradients.add(ctx.name, gradients)
        return output_gradient, None, None, None


def adam_step(g: Tensor, m: Tensor, v: Tensor, t: int, betas: tuple[float, float], eps: float) -> Tensor:
    """`[m' / (1 - b1^(t+1))] / [sqrt(v' / (1 - b2^(t+1))) + eps]`: the paper's, and AdamW's own next step.

    Args:
        g: float32 `[B, out, in]`, each record's gradient, as the result.
        m, v: float32 `[out, in]`, after step `t`.
        betas: `b1` and `b2`.
    """
    b1, b2 = betas
    m, v = _moved_moments(g, m, v, b1, b2)
    denominator = v.div_(1 - b2 ** (t + 1)).sqrt_().add_(eps)
    return m.div_(1 - b1 ** (t + 1)).div_(denominator)


def release_step(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """`m' / sqrt(v' + 1e-8)` with b1 = 0.9 and b2 = 0.999: what LESS's code computes, whatever the checkpoint's are.

    `eps` under the root keeps the denominator above 1e-4. The roots of real second moments are often smaller, so the
    result is close to the momentum alone. Shapes are those of `adam_step`.
    """
    m, v = _moved_moments(g, m, v, 0.9, 0.999)
    return m.div_(v.add_(1e-8).sqrt_())


def _moved_moments(g: Tensor, m: Tensor, v: Tensor, b1: float, b2: float) -> tuple[Tensor, Tensor]:
    """`m' = b1 m + (1 - b1) g` and `v' = b2 v + (1 - b2) g^2`, both float32 `[B, out, in]`."""
    return g.mul(1 - b1).add_(m, alpha=b1), g.square().mul_(1 - b2).add_(v, alpha=b2)
