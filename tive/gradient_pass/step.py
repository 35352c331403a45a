"""From settings to what computes: the run that a chunk belongs to, and the loaded model with what is done on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from tive.data.records import Records, chunk_range
from tive.features.manifest import Run
from tive.gradient_pass.batches import GradientStep
from tive.gradient_pass.optimizer import GradientKind, transform_of
from tive.method.projection import make_projector
from tive.models import Family, ModelFiles
from tive.models.common import target_modules
from tive.util.device import leave_a_core
from tive.util.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What the features depend on beside data, model and projector; the names are those of the manifest."""

    grad_modules: str
    last_layers: int | None
    proj_seed: int
    proj_dim: int
    dtype: str
    batch_size: int
    max_batch_tokens: int
    gradient_checkpointing: bool
    window: int
    el2n: bool


def run_of(
    records: Records, num_chunks: int, chunk_idx: int, model: str, gradient: GradientKind, settings: Settings
) -> Run:
    """The run that chunk `chunk_idx` of `num_chunks` is of, as far as it is known before the model is loaded.

    Args:
        model: SHA-256 of the reference model, the family's `identity`.
    """
    rows = chunk_range(len(records), num_chunks, chunk_idx)
    return Run(
        data_sha256=records.fingerprint,
        data_records=len(records),
        num_chunks=num_chunks,
        chunk_idx=chunk_idx,
        start=rows.start,
        stop=rows.stop,
        model=model,
        gradient=gradient.name,
        optimizer_state=gradient.state_sha256,
        checkpoint=gradient.step,
        **asdict(settings),
    )


def load_step(
    family: Family,
    files: ModelFiles,
    device: torch.device,
    settings: Settings,
    gradient: GradientKind,
    projector_kind: str,
) -> GradientStep:
    """Load the reference model and build what computes its gradients; says what counts and how it is projected.

    Raises:
        UserError: the model's files, the optimizer's state or the projector cannot be used.
    """
    reference = family.load(files, device, getattr(torch, settings.dtype), settings.gradient_checkpointing)
    matrices = target_modules(reference, settings.grad_modules, settings.last_layers)
    if device.type == "cpu":
        leave_a_core(max(matrix.in_features for matrix in matrices.values()))
    parameters = sum(matrix.weight.numel() for matrix in matrices.values())
    layers = len({name.split(".")[1] for name in matrices})
    print(
        f"reference model {files.model_path}: {parameters:,} parameters count, in {len(matrices)} LoRA matrices of "
        f"{layers} of {len(reference.layers)} layers"
    )
    try:
        projector = make_projector(projector_kind, settings.proj_seed, settings.proj_dim, device)
    except ValueError as error:
        remedy = "take the projector auto" if projector_kind.startswith("trak") else "report it with your versions"
        raise UserError(f"cannot project: {error}; {remedy}") from error
    print(f"projector {projector.kind}: {projector.about}")
    transform = transform_of(gradient, reference, matrices, files.model_path)
    return GradientStep(family, reference, matrices, projector, transform, settings.el2n)
