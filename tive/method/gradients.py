"""Exact gradients of every record of a batch from one backward pass.

LoRA's A and B are linear maps without bias: with input X `[B, T, in]` and the gradient dY `[B, T, out]` of its output,
`dY_b^T X_b` is record b's gradient of that matrix. The batch's loss is the sum of the records' own mean losses, so no
record's gradient knows of the others. Each matrix's gradients are handed on as they come and never kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tive.util.stopwatch import Stopwatch

Consume = Callable[[str, Tensor], None]


class RecordGradients:
    """Hooks on the counted matrices, for one forward and one backward pass.

    Args:
        matrices: canonical name -> linear map without bias.
        consume: is called once a batch with each matrix's name and its gradients `[B, out, in]`.
    """

    def __init__(self, matrices: dict[str, nn.Linear], consume: Consume, stopwatch: Stopwatch | None = None) -> None:
        self.consume = consume
        self.stopwatch = stopwatch or Stopwatch()
        self.matrices = matrices
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
                # No parameter is trainable, so the first counted matrix starts the graph: nothing below it is computed.
                output = output.detach().requires_grad_()
            return _Tap.apply(output, inputs[0].detach(), lambda x, dy: self._collect(name, x, dy))

        return hook

    def _collect(self, name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        with self.stopwatch.measure("per-record gradients"):
            gradients = torch.bmm(output_gradient.transpose(1, 2), inputs)
        if name in self.sums:
            gradients += self.sums.pop(name)
        self.uses[name] -= 1
        if self.uses[name]:
            self.sums[name] = gradients  # the matrix was used again in this pass: its gradients add up
        else:
            self.consume(name, gradients)

    def backward(self, losses: Tensor) -> None:
        """Run the backward pass of the summed losses `[B]`."""
        self.in_backward = True
        losses.sum().backward()


class _Tap(torch.autograd.Function):
    """The identity on a linear map's output, which sees the map's input and its output's gradient.

    The input is a saved tensor, so gradient checkpointing drops it and computes it again.
    """

    @staticmethod
    def forward(ctx, output: Tensor, inputs: Tensor, collect: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.collect = collect
        return output.view_as(output)

    @staticmethod
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.collect(ctx.saved_tensors[0], output_gradient)
        return output_gradient, None, None
