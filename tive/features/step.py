"""The step: the loaded reference model, the matrices that count, a projector; a batch to features, norms, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tive.features.chunk import Match
from tive.features.gradient_kind import GradientKind, transform_of
from tive.method.gradients import Measure, Transform, gradient_features, unmeasured
from tive.method.projection import Projector, make_projector
from tive.models import Encoded, Family, ModelFiles, RecordLosses, Reference
from tive.models.common import target_modules
from tive.util.device import leave_a_core
from tive.util.errors import UserError

# Small gradients vanish in float16 below 6e-8; this lifts them, and an overflow is met with a smaller scale.
_FLOAT16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class GradientStep:
    """What turns a batch of records into features.

    Attributes:
        matrices: canonical name -> target module.
        transform: of each matrix's per-record gradients; None for the gradients as they are.
        el2n: whether EL2N is computed too.
    """

    family: Family
    reference: Reference
    matrices: Mapping[str, nn.Linear]
    projector: Projector
    transform: Transform | None = None
    el2n: bool = False
    measure: Measure = unmeasured

    @property
    def counted_parameters(self) -> int:
        return sum(matrix.weight.numel() for matrix in self.matrices.values())

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Of a batch of one group: `features` float16 `[B, d]`, `norms`, `losses` and perhaps `el2n` `[B]`.

        They stay on the device.
        """
        last: list[RecordLosses] = []

        def forward() -> Tensor:
            last[:] = [self.family.record_losses(self.reference, batch, self.el2n)]
            return last[0].losses

        scale = _FLOAT16_LOSS_SCALE if self.reference.dtype == torch.float16 else 1.0
        computed = gradient_features(forward, self.matrices, self.projector, self.transform, scale, self.measure)
        results = {"features": computed.features.half(), "norms": computed.norms, "losses": computed.losses}
        return results if last[0].el2n is None else results | {"el2n": last[0].el2n}


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
    reference = family.load(files, device, getattr(torch, str(match.dtype)), gradient_checkpointing)
    matrices = target_modules(reference, match.grad_modules)
    if device.type == "cpu":
        leave_a_core(max(matrix.in_features for matrix in matrices.values()))
    try:
        projector = make_projector(match.projector or "auto", match.proj_seed, match.proj_dim, device)
    except ValueError as error:
        raise UserError(f"cannot project: {error}; take the projector auto or sparse") from error
    transform = transform_of(gradient, reference, matrices, files.model_path)
    step = GradientStep(family, reference, matrices, projector, transform, match.el2n)
    print(
        f"reference model {files.model_path}: {step.counted_parameters:,} parameters count, in {len(matrices)} LoRA "
        f"matrices of {len(reference.layers)} layers\nprojector {projector.kind}: {projector.about}"
    )
    return step
