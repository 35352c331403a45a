"""Random projection of per-record gradients, matrix by matrix (paper section 3.2).

A projector has a `kind`, which the features' manifest carries, an `about` line, and one function:
`project(matrix, gradients [B, P]) -> sketch [B, proj_dim]`, float32, linear, with its own stream of random signs for
each matrix name. A record's feature is the sum of its matrices' sketches, not divided by sqrt(proj_dim).
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor

from tive.method.signs import TorchSigns, draw_signs, key_of
from tive.util.errors import UserError

# TRAK sets it to the GPU's number of multiprocessors, so two kinds of GPU would give features that do not match.
_FEATURE_TILES = 128
_BASIC_BLOCK = 128


class Projector(Protocol):
    kind: str
    about: str
    proj_dim: int

    def project(self, matrix: str, gradients: Tensor) -> Tensor: ...


class TrakCuda:
    """TRAK's CudaProjector (fast_jl), with the number of feature tiles fixed."""

    kind = "trak_cuda"
    about = "TRAK's CudaProjector (fast_jl)"

    def __init__(self, seed: int, proj_dim: int, device: torch.device) -> None:
        from trak.projectors import CudaProjector, ProjectionType

        self.seed, self.proj_dim = seed, proj_dim
        self.projector = CudaProjector(0, proj_dim, seed, ProjectionType.rademacher, device, max_batch_size=16)
        self.projector.num_sms = _FEATURE_TILES

    def project(self, matrix: str, gradients: Tensor) -> Tensor:
        """Project the gradients `[B, P]` of one matrix to `[B, proj_dim]`, float32."""
        self.projector.seed = trak_seed(self.seed, matrix)
        sketches = []
        for part in gradients.float().split(16):
            # The kernel is built for 8 or 16 records; the missing ones are zeros.
            size = 8 if len(part) <= 8 else 16
            padded = torch.nn.functional.pad(part, (0, 0, 0, size - len(part))).contiguous()
            sketches.append(self.projector.project(padded, model_id=0)[: len(part)].float())
        return torch.cat(sketches)


class TrakBasic:
    """TRAK's BasicProjector; its streams differ between CPU and GPU, so its kind names the device."""

    about = "TRAK's BasicProjector"

    def __init__(self, seed: int, proj_dim: int, device: torch.device) -> None:
        self.kind = f"trak_basic/{device.type}"
        self.seed, self.proj_dim, self.device = seed, proj_dim, device
        self.projectors: dict[int, object] = {}

    def project(self, matrix: str, gradients: Tensor) -> Tensor:
        """Project the gradients `[B, P]` of one matrix to `[B, proj_dim]`, float32."""
        from trak.projectors import BasicProjector, ProjectionType

        size = gradients.shape[1]
        if size not in self.projectors:
            self.projectors[size] = BasicProjector(
                size, self.proj_dim, self.seed, ProjectionType.rademacher, self.device, _BASIC_BLOCK, torch.float32
            )
        projector = self.projectors[size]
        projector.seed = trak_seed(self.seed, matrix)
        projector.get_generator_states()
        if projector.num_blocks == 1:  # it draws its one block when it is made and not again
            projector.generate_sketch_matrix(projector.generator_states[0])
        return projector.project(gradients.float(), model_id=0)


def trak_seed(seed: int, matrix: str) -> int:
    """A seed of 30 bits for one matrix: room for the offsets that TRAK adds within 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {matrix}".encode()).digest()[:4], "little") >> 2


def own_projector(seed: int, proj_dim: int, device: torch.device, total_rows: int, budget_bytes: int) -> Projector:
    """Our Rademacher projector: the Triton kernel on a GPU that has Triton, else torch in blocks; the same signs."""
    if device.type == "cuda":
        try:
            from tive.method.signs_triton import TritonSigns

            kernel = TritonSigns(seed, proj_dim, device)
            prove(kernel, device)
            return kernel
        except Exception as error:  # no Triton, no compiler for it, or a GPU it does not know
            reason = f"; the Triton kernel does not work here: {_first_line(error)}"
            torch_signs = TorchSigns(seed, proj_dim, device, total_rows, budget_bytes)
            torch_signs.about += reason
            return torch_signs
    return TorchSigns(seed, proj_dim, device, total_rows, budget_bytes)


def make_projector(
    wanted: str, seed: int, proj_dim: int, device: torch.device, total_rows: int, budget_bytes: int
) -> Projector:
    """Build the projector that `--projector` names and let it prove itself; `auto` takes the first that works.

    Raises:
        UserError: a named projector does not work here, or `proj_dim` is no positive number.
    """
    if proj_dim < 1:
        raise UserError(f"--proj_dim {proj_dim} is not a positive number")
    if wanted == "auto" and device.type == "cuda":
        try:
            projector: Projector = TrakCuda(seed, proj_dim, device)
            prove(projector, device)
            return projector
        except Exception as error:  # not installed, not built for this GPU, or silently wrong (trak issue 81)
            projector = own_projector(seed, proj_dim, device, total_rows, budget_bytes)
            projector.about += f"; TRAK's CudaProjector does not work here: {_first_line(error)}"
    elif wanted in ("auto", "rademacher"):
        projector = own_projector(seed, proj_dim, device, total_rows, budget_bytes)
    else:
        make = {"trak_cuda": TrakCuda, "trak_basic": TrakBasic}[wanted]
        try:
            projector = make(seed, proj_dim, device)
            prove(projector, device)
            return projector
        except Exception as error:
            raise UserError(
                f"--projector {wanted} does not work here: {_first_line(error)}; use --projector auto"
            ) from error
    try:
        prove(projector, device)
    except ValueError as error:
        raise UserError(f"the projector fails its own test: {error}; report it with your versions") from error
    return projector


def prove(projector: Projector, device: torch.device) -> None:
    """Project known vectors: not zero, linear, norm kept within the Johnson-Lindenstrauss bound, signs as in torch.

    Raises:
        ValueError: what is wrong with the result.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 1024, generator=generator)
    vectors = torch.stack([vectors[0], vectors[1], vectors[0] - 2 * vectors[1]])
    sketch = projector.project("proof", vectors.to(device)).float().cpu()
    if sketch.shape != (3, projector.proj_dim) or not torch.isfinite(sketch).all():
        raise ValueError("the sketch has the wrong shape or numbers that are not finite")
    if not sketch.any(dim=1).all():
        raise ValueError("the sketch is zero")
    size = sketch.norm(dim=1)
    if (sketch[2] - sketch[0] + 2 * sketch[1]).norm() > 0.01 * size[2]:
        raise ValueError("the projection is not linear")
    ratio = size.square() / (projector.proj_dim * vectors.square().sum(dim=1))
    # The squared norm's relative deviation is about sqrt(2 / proj_dim); six of them do not happen by chance.
    if (ratio - 1).abs().max() > 6 * math.sqrt(2 / projector.proj_dim) + 0.01:
        raise ValueError(f"norms are not kept: squared ratio {ratio.tolist()}")
    if projector.kind == "rademacher":
        columns = min(projector.proj_dim, 256)
        expected = vectors @ draw_signs(key_of(projector.seed, "proof"), 0, 1024, columns).float()
        if (sketch[:, :columns] - expected).abs().max() > 0.005 * expected.abs().max():
            raise ValueError("the signs differ from the torch reference")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
