"""The step: the loaded reference model, the matrices that count, a projector; a batch to features, norms, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tive.features.batches import Batches, bytes_a_token, tokens_that_fit
from tive.features.chunk import Match
from tive.features.gradient_kind import GradientKind, transform_of
from tive.method.gradients import Measure, Transform, gradient_features, unmeasured
from tive.method.projection import Projector, make_projector
from tive.method.value import visual_gain
from tive.models import Encoded, Family, ModelFiles, RecordLosses, Reference
from tive.models.common import freeze, target_modules
from tive.util.device import leave_a_core
from tive.util.errors import UserError

# Small gradients vanish in float16 below 6e-8; this lifts them, and an overflow is met with a smaller scale.
_FLOAT16_LOSS_SCALE = 2.0**12
# Of a batch on a CPU, where the memory does not decide: a run that is continued has the same batches.
_TOKENS_ON_A_CPU = 16384
# The longest record, where the model has no limit of its own: LLaVA's.
_LONGEST = 2048


@dataclass(frozen=True)
class GradientStep:
    """What turns a batch of records into features.

    Attributes:
        matrices: canonical name -> target module.
        transform: of each matrix's per-record gradients; None for the gradients as they are.
        el2n, visual_gain: whether they are computed too.
    """

    family: Family
    reference: Reference
    matrices: Mapping[str, nn.Linear]
    projector: Projector
    transform: Transform | None = None
    el2n: bool = False
    visual_gain: bool = False
    measure: Measure = unmeasured

    @property
    def counted_parameters(self) -> int:
        return sum(matrix.weight.numel() for matrix in self.matrices.values())

    @property
    def optional(self) -> list[str]:
        """The columns that were asked for."""
        return [name for name in ("el2n", "visual_gain") if getattr(self, name)]

    def relieved(self) -> int:
        """Turn gradient checkpointing on; the tokens that fit in a batch then."""
        freeze(self.reference.model, gradient_checkpointing=True)
        print("gradient checkpointing is on from here: less memory, about a third more time, the same gradients")
        if self.reference.device.type != "cuda":
            return _TOKENS_ON_A_CPU
        return tokens_that_fit(self.reference, torch.cuda.mem_get_info(self.reference.device)[0], True)

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Of a batch of one group: `features` float16 `[B, d]`, `norms`, `losses` and the `optional` columns `[B]`.

        They stay on the device.
        """
        last: list[RecordLosses] = []

        def forward() -> Tensor:
            last[:] = [self.family.record_losses(self.reference, batch, self.el2n)]
            return last[0].losses

        scale = _FLOAT16_LOSS_SCALE if self.reference.dtype == torch.float16 else 1.0
        computed = gradient_features(forward, self.matrices, self.projector, self.transform, scale, self.measure)
        results = {"features": computed.features.half(), "norms": computed.norms, "losses": computed.losses}
        if last[0].el2n is not None:
            results["el2n"] = last[0].el2n
        if self.visual_gain:
            results["visual_gain"] = self.visual_gains(batch, computed.losses)
        return results

    @torch.no_grad()
    def visual_gains(self, batch: Sequence[Encoded], losses: Tensor) -> Tensor:
        """The visual gain of each record `[B]`; NaN without images, or where they cost it a part of its answer.

        Args:
            losses: with the images, `[B]`.
        """
        gains = torch.full_like(losses, math.nan)
        groups: dict[str, list[tuple[int, Encoded]]] = {}
        for place, record in enumerate(batch):
            alone = record.text_alone
            if alone is not None and alone.supervised == record.supervised:
                groups.setdefault(alone.group, []).append((place, alone))
        for members in groups.values():
            places = [place for place, _ in members]
            without = self.family.record_losses(self.reference, [alone for _, alone in members]).losses
            gains[places] = visual_gain(without, losses[places])
        return gains


def load_step(
    family: Family,
    files: ModelFiles,
    device: torch.device,
    match: Match,
    gradient: GradientKind,
    gradient_checkpointing: bool,
) -> GradientStep:
    """Load the reference model and build what computes its gradients; prints what counts and how it is projected.

    Raises:
        UserError: the model's files, the optimizer's state or the projector cannot be used.
    """
    # Sums over a record's tokens: in bfloat16 they would lose what float32 keeps.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    reference = family.load(files, device, getattr(torch, str(match.dtype)), gradient_checkpointing)
    matrices = target_modules(reference, match.grad_modules)
    if device.type == "cpu":
        leave_a_core(max(matrix.in_features for matrix in matrices.values()))
    try:
        projector = make_projector(match.projector or "auto", match.proj_seed, match.proj_dim, device)
    except ValueError as error:
        raise UserError(f"cannot project: {error}; take the projector auto or sparse") from error
    transform = transform_of(gradient, reference, matrices, files.model_path)
    step = GradientStep(family, reference, matrices, projector, transform, match.el2n, match.visual_gain)
    print(
        f"reference model {files.model_path}: {step.counted_parameters:,} parameters count, in {len(matrices)} LoRA "
        f"matrices of {len(reference.layers)} layers\nprojector {projector.kind}: {projector.about}"
    )
    return step


def batches_for(step: GradientStep, records: int, tokens: int | None, gradient_checkpointing: bool) -> Batches:
    """The memory policy for a step; prints how many tokens a batch may have, and why.

    Where nobody chose, a GPU's free memory gives the limit. Gradient checkpointing is turned on where the longest
    record would not fit without it, or where one does not.

    Args:
        records: most of a batch.
        tokens: most of a batch; None for what fits.
        gradient_checkpointing: whether it is on already.
    """
    reference = step.reference
    if reference.device.type != "cuda":
        return Batches(records, tokens or _TOKENS_ON_A_CPU, None if gradient_checkpointing else step.relieved)
    free, _ = torch.cuda.mem_get_info(reference.device)
    free += torch.cuda.memory_reserved(reference.device) - torch.cuda.memory_allocated(reference.device)
    longest = getattr(reference.processor, "max_length", None) or _LONGEST
    if not gradient_checkpointing and tokens_that_fit(reference, free, False) < longest:
        print(f"a record of {longest} tokens would not fit in memory without gradient checkpointing")
        step.relieved()
        gradient_checkpointing = True
    fitting = tokens_that_fit(reference, free, gradient_checkpointing)
    each = bytes_a_token(reference, gradient_checkpointing)
    print(
        f"memory: {free / 1e9:.1f} GB free, about {each / 1e6:.2f} MB of activations a token, so about {fitting} "
        "tokens fit in a batch" + (f"; {tokens} were asked for" if tokens else "")
    )
    return Batches(records, tokens or fitting, None if gradient_checkpointing else step.relieved)
