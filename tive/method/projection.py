"""Random projection of per-record gradients, matrix by matrix (paper section 3.2).

A record's feature is its sketch: the sum of its matrices' projections, each linear, with random numbers of its own for
each matrix name. For every projector `E <Rx, Ry> = proj_dim <x, y>`.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

KINDS = ("auto", "sparse", "trak")
# Entries of a block from which a CPU adds block by block faster than it gathers.
_LEAST_BLOCK = 512
# Entries that are gathered at once: enough to keep a GPU busy.
_ENTRIES_AT_ONCE = 2**24
_ROOM_BYTES = 2**24
# TRAK sets it to the GPU's number of multiprocessors, so two kinds of GPU would give features that do not match.
_FEATURE_TILES = 128
_BASIC_BLOCK = 128


class Projector(Protocol):
    """`kind` tells its features from others' in the manifest; `about` is for people."""

    kind: str
    about: str
    proj_dim: int

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        """Add the projection of the gradients `[B, P]` of one matrix to `sketch`, float32 `[B, proj_dim]`."""


def project(projector: Projector, matrix_name: str, gradients: Tensor) -> Tensor:
    """The projection `[B, proj_dim]` of one matrix's gradients `[B, P]`."""
    sketch = torch.zeros(len(gradients), projector.proj_dim, device=gradients.device)
    projector.add(sketch, matrix_name, gradients)
    return sketch


class Sparse:
    """The sparse projection: a random sign for each entry, a random rotation for each block, and a sum.

    A matrix's gradient x is cut into blocks of `proj_dim` entries. With a random sign `s_i` for entry i and a random
    rotation `o_n` for block n, feature k of the sketch is `sqrt(proj_dim)` times the sum of `s_i x_i` over the entries
    i with `(i + o_n) mod proj_dim = k`, n being i's block. This is a count sketch (Charikar, Chen, Farach-Colton 2002;
    as a Johnson-Lindenstrauss transform: Kane and Nelson 2014) whose hash has no collisions within a block. Entries of
    different blocks collide with probability `1 / proj_dim`. So the inner products of sketches, over `proj_dim`, are
    unbiased, with a variance of at most `(|x|^2 |y|^2 + <x, y>^2) / proj_dim`: the dense Rademacher projection's bound.

    Signs and rotations depend on seed, matrix name and position alone, so they are the same on every machine. No two
    sums meet in memory, so a device gives the same bits on every run. Kept between batches: one bit for each entry of a
    matrix and eight bytes for each block.
    """

    kind = "sparse/2"  # drew its signs from another generator before

    def __init__(self, seed: int, proj_dim: int, device: torch.device) -> None:
        self.about = "sparse projection in torch"
        self.seed, self.proj_dim, self.device = seed, proj_dim, device
        self.drawn: dict[tuple[str, int], tuple[Tensor, np.ndarray]] = {}
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        self.signs_of_octets = (math.sqrt(proj_dim) * (1 - 2 * bits)).float().to(device)
        self.room = torch.empty(0, dtype=torch.uint8, device=device)
        # A CPU is quickest with what its cache holds, unless blocks are short and many; a GPU with few operations.
        self.block_by_block = device.type == "cpu" and proj_dim >= _LEAST_BLOCK

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        entries = gradients.shape[1]
        if (matrix_name, entries) not in self.drawn:
            octets = torch.from_numpy(sign_octets(self.seed, matrix_name, entries))
            # In one large piece of memory: small ones that stay, between large ones that go, would tear holes.
            if len(self.room) < len(octets):
                self.room = torch.empty(max(_ROOM_BYTES, len(octets)), dtype=torch.uint8, device=self.device)
            kept, self.room = self.room.split([len(octets), len(self.room) - len(octets)])
            rotations = block_rotations(self.seed, matrix_name, entries, self.proj_dim)
            self.drawn[matrix_name, entries] = kept.copy_(octets), rotations
        octets, rotations = self.drawn[matrix_name, entries]
        signs = self.signs_of_octets.index_select(0, octets.int()).flatten()[:entries]
        if self.block_by_block or len(rotations) == 1:
            self._add_blocks(sketch, gradients.float(), signs, rotations)
        else:
            records = max(1, _ENTRIES_AT_ONCE // entries)
            for part, sums in zip(gradients.split(records), sketch.split(records), strict=True):
                sums += self._gathered(part * signs, rotations)

    def _add_blocks(self, sketch: Tensor, gradients: Tensor, signs: Tensor, rotations: np.ndarray) -> None:
        """Each block in two pieces: up to the last feature, and from the first on."""
        size, entries = self.proj_dim, gradients.shape[1]
        for block, rotation in enumerate(rotations.tolist()):
            start, stop = block * size, min((block + 1) * size, entries)
            turn = min(start + size - rotation, stop)
            sketch[:, rotation : rotation + turn - start].addcmul_(gradients[:, start:turn], signs[start:turn])
            if turn < stop:
                sketch[:, : stop - turn].addcmul_(gradients[:, turn:stop], signs[turn:stop])

    def _gathered(self, signed: Tensor, rotations: np.ndarray) -> Tensor:
        """The sum of all blocks of the signed gradients `[B, P]`, each turned to its place."""
        size, blocks = self.proj_dim, len(rotations)
        turns = torch.from_numpy(rotations).to(self.device, non_blocking=True)
        places = (torch.arange(size, device=self.device) - turns[:, None]) % size
        places += size * torch.arange(blocks, device=self.device)[:, None]
        whole = torch.nn.functional.pad(signed, (0, blocks * size - signed.shape[1]))
        return whole.index_select(1, places.flatten()).view(-1, blocks, size).sum(dim=1)


def sign_octets(seed: int, matrix_name: str, entries: int) -> np.ndarray:
    """A matrix's signs, uint8 `[8 ceil(entries / 64)]`: where bit `i % 8` of octet `i // 8` is set, `s_i` is -1."""
    return _random_words(seed, matrix_name, "signs", -(-entries // 64)).astype("<u8").view(np.uint8)


def block_rotations(seed: int, matrix_name: str, entries: int, proj_dim: int) -> np.ndarray:
    """The rotation `o_n` of each block of a matrix, int64 `[ceil(entries / proj_dim)]`, of `0 .. proj_dim - 1`."""
    words = _random_words(seed, matrix_name, "rotations", -(-entries // proj_dim))
    return ((words >> np.uint64(32)).astype(np.int64) * proj_dim) >> 32


def _random_words(seed: int, matrix_name: str, use: str, count: int) -> np.ndarray:
    """The first words, uint64 `[count]`, of NumPy's Philox: the same on every machine (Salmon et al., SC 2011)."""
    key = hashlib.sha256(f"{seed} {use} {matrix_name}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def sparse_projection(seed: int, matrix_name: str, vectors: np.ndarray, proj_dim: int) -> np.ndarray:
    """`Sparse`'s formula written out, entry by entry, in float64: vectors `[n, P]` to `[n, proj_dim]`."""
    position = np.arange(vectors.shape[1])
    bits = np.unpackbits(sign_octets(seed, matrix_name, len(position)), bitorder="little")[: len(position)]
    rotations = block_rotations(seed, matrix_name, len(position), proj_dim)
    sketch = np.zeros((proj_dim, len(vectors)))
    feature = (position + rotations[position // proj_dim]) % proj_dim
    np.add.at(sketch, feature, (vectors * (1.0 - 2.0 * bits)).T)
    return math.sqrt(proj_dim) * sketch.T


class TrakCuda:
    """TRAK's CudaProjector (fast_jl), with the number of feature tiles fixed."""

    kind = "trak_cuda"

    def __init__(self, seed: int, proj_dim: int, device: torch.device) -> None:
        from trak.projectors import CudaProjector, ProjectionType

        self.about = "TRAK's CudaProjector (fast_jl)"
        self.seed, self.proj_dim = seed, proj_dim
        self.projector = CudaProjector(0, proj_dim, seed, ProjectionType.rademacher, device, max_batch_size=16)
        self.projector.num_sms = _FEATURE_TILES

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        self.projector.seed = trak_seed(self.seed, matrix_name)
        for part, sums in zip(gradients.float().split(16), sketch.split(16), strict=True):
            unit, scale = scaled(part)  # fast_jl rounds to half
            # The kernel is built for 8 or 16 records; the missing ones are zeros.
            size = 8 if len(part) <= 8 else 16
            padded = torch.nn.functional.pad(unit, (0, 0, 0, size - len(part))).contiguous()
            sums += self.projector.project(padded, model_id=0)[: len(part)].float() * scale


def scaled(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients `[B, P]` each over its largest absolute value, `[B, 1]`, and that: what is small survives in half."""
    scale = gradients.abs().amax(dim=1, keepdim=True)
    return gradients / scale.clamp_min(torch.finfo(torch.float32).tiny), scale


class TrakBasic:
    """TRAK's BasicProjector; its streams differ between CPU and GPU, so its kind names the device."""

    def __init__(self, seed: int, proj_dim: int, device: torch.device) -> None:
        self.kind, self.about = f"trak_basic/{device.type}", "TRAK's BasicProjector"
        self.seed, self.proj_dim, self.device = seed, proj_dim, device
        self.projectors: dict[int, Any] = {}

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        from trak.projectors import BasicProjector, ProjectionType

        size = gradients.shape[1]
        if size not in self.projectors:
            self.projectors[size] = BasicProjector(
                size, self.proj_dim, self.seed, ProjectionType.rademacher, self.device, _BASIC_BLOCK, torch.float32
            )
        projector = self.projectors[size]
        projector.seed = trak_seed(self.seed, matrix_name)
        projector.get_generator_states()
        if projector.num_blocks == 1:  # it draws its one block when it is made and not again
            projector.generate_sketch_matrix(projector.generator_states[0])
        unit, scale = scaled(gradients.float())
        sketch += projector.project(unit, model_id=0) * scale


def trak_seed(seed: int, matrix_name: str) -> int:
    """A seed of 30 bits for one matrix: room for the offsets that TRAK adds within 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {matrix_name}".encode()).digest()[:4], "little") >> 2


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def make_projector(kind: str, seed: int, proj_dim: int, device: torch.device) -> Projector:
    """A projector of one of `KINDS` that has proven itself; a `ValueError` where it does not work here.

    `trak` is TRAK's CudaProjector, the paper's, on a GPU, and its BasicProjector on a CPU. `auto` is `trak` on a GPU
    where it works, else the sparse one.
    """
    if proj_dim < 1:
        raise ValueError(f"a projection to {proj_dim} features: not a positive number")
    if kind not in KINDS:
        raise ValueError(f"{kind} is none of the projectors {', '.join(KINDS)}")
    if kind == "auto":
        note = ""
        if is_gpu(device):
            try:
                projector = make_projector("trak", seed, proj_dim, device)
                projector.about += "; sparse gives features of the same quality for less time"
                return projector
            except ValueError as error:
                note = f"; {error}"
        projector = make_projector("sparse", seed, proj_dim, device)
        projector.about += note
        return projector
    maker = Sparse if kind == "sparse" else TrakCuda if is_gpu(device) else TrakBasic
    try:
        projector = maker(seed, proj_dim, device)
        prove(projector, device)
    except Exception as error:  # not installed, not built for this GPU, or silently wrong (trak issue 81)
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{kind} does not work here: {reason}") from error
    return projector


def prove(projector: Projector, device: torch.device) -> None:
    """Project known vectors; a `ValueError` says what is wrong with the result."""
    proj_dim = projector.proj_dim
    # Several blocks and a part of one; TRAK's cost grows with entries x features, and one block tells all of it.
    entries = 2 * proj_dim + 1024 if isinstance(projector, Sparse) else 1024
    first, second = torch.randn(2, entries, generator=torch.Generator().manual_seed(0))
    vectors = torch.stack([first, second, first - 2 * second, 1e-6 * first])
    sketch = project(projector, "proof", vectors.to(device)).float().cpu()
    if not torch.isfinite(sketch).all():
        raise ValueError("the sketch has numbers that are not finite")
    if not sketch.any(dim=1).all():
        raise ValueError("the sketch is zero")
    size = sketch.norm(dim=1)
    if (sketch[2] - sketch[0] + 2 * sketch[1]).norm() > 0.01 * size[2]:
        raise ValueError("the projection is not linear")
    if (1e6 * sketch[3] - sketch[0]).norm() > 0.01 * size[0]:
        raise ValueError("small gradients are lost")
    ratio = size.square() / (proj_dim * vectors.square().sum(dim=1))
    # The squared norm's relative deviation is about sqrt(2 / proj_dim); six of them do not happen by chance.
    if (ratio - 1).abs().max() > 6 * math.sqrt(2 / proj_dim) + 0.01:
        raise ValueError(f"norms are not kept: squared ratio {ratio.tolist()}")
    if isinstance(projector, Sparse):
        expected = torch.from_numpy(sparse_projection(projector.seed, "proof", vectors.numpy(), proj_dim))
        if (sketch - expected).abs().max() > 1e-4 * expected.abs().max():
            raise ValueError("the sketch differs from the formula's")
