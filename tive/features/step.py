"""The step: the loaded reference model, the matrices that count, a projector; a batch to features, norms, losses."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tive.features.chunk import Match
from tive.method.gradients import Measure, Transform, adam_step, gradient_features, release_step
from tive.method.projection import Projector, make_projector
from tive.method.value import visual_gain
from tive.models import Collated, Encoded, Family, ModelFiles, RecordLosses, Reference
from tive.models.common import target_modules
from tive.models.optimizer_state import (
    StoredState,
    find_optimizer_state,
    moments_of_matrices,
    read_optimizer_state,
    read_trainer_state,
)
from tive.util.device import leave_a_core
from tive.util.errors import UserError

# Small gradients vanish in float16 below 6e-8; this lifts them. Where they overflow, a smaller one is tried.
FLOAT16_LOSS_SCALES = (2.0**12, 2.0**6, 1.0)
# A batch for the device: the records, and by group the places `[b]` of those that are computed without images too.
Ready = tuple[Collated, list[tuple[Tensor, Collated]]]


@dataclass(frozen=True)
class GradientKind:
    """What is known of the gradient before the model is loaded.

    Attributes:
        name: `sgd`, `none` for losses alone, or as the checkpoint's Adam would apply it: `adam`, its own step, and
            `adam_release`, that of LESS's code.
        step: the checkpoint's, None for a model without a trainer's state.
        learning_rates: how many rates the trainer logged up to the checkpoint, and their sum, for the manifest.
        state: Adam's as it is on disk, None for `sgd`.
    """

    name: str
    step: int | None = None
    learning_rates: dict[str, float] | None = None
    state: StoredState | None = None


def gradient_kind(model_path: str, name: str = "sgd", optimizer_state: str | None = None) -> GradientKind:
    """What the gradient needs beside the model; a `UserError` where Adam's state is not there or does not fit it.

    Args:
        optimizer_state: where Adam's state is, if not beside the model.
    """
    step, learning_rates = read_trainer_state(model_path) or (None, None)
    if not name.startswith("adam"):
        return GradientKind(name, step, learning_rates)
    path = find_optimizer_state(model_path, optimizer_state)
    if step is None:
        raise UserError(
            f"{model_path} holds no trainer_state.json, so the step that {path} belongs to is not known; take a "
            "checkpoint-N folder as the model, whole"
        )
    return GradientKind(name, step, learning_rates, read_optimizer_state(path, step))


def transform_of(
    kind: GradientKind, reference: Reference, matrices: Mapping[str, nn.Linear], model_path: str
) -> Transform | None:
    """What each matrix's gradients become before norm and projection; a `UserError` where the state is another model's.

    None where they stay as they are; else two moments a target module, in float32, stay on the device.
    """
    if kind.state is None:
        return None
    moments = moments_of_matrices(kind.state, reference.model, matrices, model_path)
    t, b1, b2, eps = (kind.state.constants[name] for name in ("t", "b1", "b2", "eps"))
    print(f"optimizer's state {kind.state.path}: Adam after step {t}, betas {b1:g} and {b2:g}, eps {eps:g}")
    dtype = next(iter(moments.values())).m.dtype
    if dtype != torch.float32:
        print(
            f"warning: Adam's moments were kept in {str(dtype).removeprefix('torch.')}, in which v cannot decay with "
            f"b2 = {b2:g} and stays too large; DeepSpeed keeps them in float32"
        )
    m = {name: of.m.to(reference.device, torch.float32) for name, of in moments.items()}
    v = {name: of.v.to(reference.device, torch.float32) for name, of in moments.items()}
    if kind.name == "adam_release":
        return lambda name, g: release_step(g, m[name], v[name])
    return lambda name, g: adam_step(g, m[name], v[name], t, (b1, b2), eps)


@dataclass(frozen=True)
class GradientStep:
    """What turns a batch of records into features.

    Attributes:
        matrices: canonical name -> target module.
        projector: None for losses alone, without gradients.
        transform: of each matrix's per-record gradients; None for the gradients as they are.
    """

    family: Family
    reference: Reference
    matrices: Mapping[str, nn.Linear]
    projector: Projector | None
    transform: Transform | None = None
    el2n: bool = False
    visual_gain: bool = False
    loss_scale: float = 1.0
    measure: Measure = contextlib.nullcontext

    @property
    def counted_parameters(self) -> int:
        return sum(matrix.weight.numel() for matrix in self.matrices.values())

    def ready(self, records: Sequence[Encoded]) -> Ready:
        """Records of one group as tensors, in pinned memory beside a GPU; another thread may do it ahead."""

        def pinned(tensor: Tensor) -> Tensor:
            if self.reference.device.type != "cuda":
                return tensor
            with torch.cuda.device(self.reference.device):  # a thread begins with the first GPU
                return tensor.pin_memory()

        def collated(some: Sequence[Encoded]) -> Collated:
            return self.family.collate(self.reference, some).each(pinned)

        alone = defaultdict[str, dict[int, Encoded]](dict)
        for place, record in enumerate(records):
            # Without its image a record that was cut may keep more of its answer: two losses of different tokens.
            if self.visual_gain and record.text_alone and record.text_alone.supervised == record.supervised:
                alone[record.text_alone.group][place] = record.text_alone
        groups = [(pinned(torch.tensor([*group])), collated([*group.values()])) for group in alone.values()]
        return collated(records), groups

    def __call__(self, batch: Ready) -> dict[str, Tensor]:
        """`features` float16 `[B, d]`, `norms`, `losses` and the columns that were asked for `[B]`.

        Without a projector there are neither features nor norms. All stay on the device, and nothing is read from it.
        """
        records, text_alone = batch
        last: list[RecordLosses] = []

        def forward() -> Tensor:
            last[:] = [self.family.record_losses(self.reference, records, self.el2n)]
            return last[0].losses

        if self.projector is None:
            with torch.no_grad(), self.measure("forward"):
                results = {"losses": forward().float()}
        else:
            computed = gradient_features(
                forward, self.matrices, self.projector, self.transform, self.loss_scale, self.measure
            )
            results = {"features": computed.features.half(), "norms": computed.norms, "losses": computed.losses}
        if last[0].el2n is not None:
            results["el2n"] = last[0].el2n
        if self.visual_gain:
            # NaN without images, or where they cost the record a part of its answer.
            losses, gains = results["losses"], torch.full_like(results["losses"], math.nan)
            with self.measure("visual gain"), torch.no_grad():
                for places, without in text_alone:
                    to = places.to(losses.device, non_blocking=True)
                    losses_without = self.family.record_losses(self.reference, without).losses
                    gains.index_copy_(0, to, visual_gain(losses_without, losses.index_select(0, to)))
            results["visual_gain"] = gains
        return results


def load_step(
    family: Family,
    files: ModelFiles,
    device: torch.device,
    match: Match,
    gradient: GradientKind,
    gradient_checkpointing: bool,
) -> GradientStep:
    """Load the reference model and what computes its gradients; prints what counts and how it is projected.

    Raises:
        UserError: the model's files, the optimizer's state or the projector cannot be used.
    """
    # Sums over a record's tokens: in bfloat16 they would lose what float32 keeps.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    reference = family.load(files, device, getattr(torch, str(match.dtype)), gradient_checkpointing)
    if gradient.name == "none":
        return GradientStep(family, reference, {}, None, None, match.el2n, match.visual_gain)
    matrices = target_modules(reference, match.grad_modules)
    if device.type == "cpu":
        leave_a_core(max(matrix.in_features for matrix in matrices.values()))
    try:
        projector = make_projector(match.projector or "auto", match.proj_seed, match.proj_dim, device)
    except ValueError as error:
        raise UserError(f"cannot project: {error}; take the projector auto or sparse") from error
    transform = transform_of(gradient, reference, matrices, files.model_path)
    scale = FLOAT16_LOSS_SCALES[0] if reference.dtype == torch.float16 else 1.0
    step = GradientStep(family, reference, matrices, projector, transform, match.el2n, match.visual_gain, scale)
    print(
        f"reference model {files.model_path}: {step.counted_parameters:,} parameters count, in {len(matrices)} LoRA "
        f"matrices of {len(reference.layers)} layers\nprojector {projector.kind}: {projector.about}"
    )
    return step
