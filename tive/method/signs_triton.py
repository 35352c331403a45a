"""The Rademacher projection as a Triton kernel: signs are drawn inside the matrix product and never reach memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tive.method.signs import COLUMNS_PER_COUNTER, key_of, scaled

_BLOCK_ROWS = 64
# Fixed, not the GPU's number of processors: the order of the sums is then the same on every GPU.
_ROW_PARTS = 32
_LARGEST_BATCH = 64


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    """One round of Philox-4x32 on uint32 counters."""
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    return tl.umulhi(m1, c2) ^ c1 ^ k0, m1 * c2, tl.umulhi(m0, c0) ^ c3 ^ k1, m0 * c0


@triton.jit
def _signs(word):
    """Words `[rows]` to signs `[rows, 32]`, float16: the bit becomes the sign bit of 1.0."""
    bits = (word[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    return ((bits << 15) | 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)


# Keys are never specialised: Triton would turn a key of 1 into a constant, which has no bits to cast.
@triton.jit(do_not_specialize=["key0", "key1"])
def _project_kernel(
    gradients, partial, batch, rows, columns, rows_per_part, key0, key1, BATCH: tl.constexpr, BLOCK: tl.constexpr
):
    """partial[part, b, group * 128 + ...] = sum over the part's rows of gradients[b, row] * sign(row, column)."""
    group = tl.program_id(0)
    part = tl.program_id(1)
    records = tl.arange(0, BATCH)
    sum0 = tl.zeros([BATCH, 32], tl.float32)
    sum1 = tl.zeros([BATCH, 32], tl.float32)
    sum2 = tl.zeros([BATCH, 32], tl.float32)
    sum3 = tl.zeros([BATCH, 32], tl.float32)
    for start in range(0, rows_per_part, BLOCK):
        row = part * rows_per_part + start + tl.arange(0, BLOCK)
        inside = (records[:, None] < batch) & (row[None, :] < rows)
        place = records[:, None].to(tl.int64) * rows + row[None, :]
        block = tl.load(gradients + place, mask=inside, other=0.0)
        c0 = row.to(tl.uint32)
        c1 = tl.zeros([BLOCK], tl.uint32) + group.to(tl.uint32)
        c2 = tl.zeros([BLOCK], tl.uint32)
        c3 = tl.zeros([BLOCK], tl.uint32)
        k0 = tl.zeros([BLOCK], tl.uint32) + key0.to(tl.uint32)
        k1 = tl.zeros([BLOCK], tl.uint32) + key1.to(tl.uint32)
        for _ in tl.static_range(10):
            c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        sum0 = tl.dot(block, _signs(c0), sum0)
        sum1 = tl.dot(block, _signs(c1), sum1)
        sum2 = tl.dot(block, _signs(c2), sum2)
        sum3 = tl.dot(block, _signs(c3), sum3)
    column = group * 128 + tl.arange(0, 32)
    place = partial + (part * batch + records[:, None]) * columns + column[None, :]
    known = records[:, None] < batch
    tl.store(place, sum0, mask=known & (column[None, :] < columns))
    tl.store(place + 32, sum1, mask=known & (column[None, :] + 32 < columns))
    tl.store(place + 64, sum2, mask=known & (column[None, :] + 64 < columns))
    tl.store(place + 96, sum3, mask=known & (column[None, :] + 96 < columns))


class TritonSigns:
    """Rademacher projection by the kernel; the same signs as `tive.method.signs.TorchSigns`."""

    kind = "rademacher"
    about = "Triton kernel, signs drawn inside the product"

    def __init__(self, seed: int, proj_dim: int, device: torch.device) -> None:
        self.seed, self.proj_dim, self.device = seed, proj_dim, device

    def project(self, matrix: str, gradients: Tensor) -> Tensor:
        """Project the gradients `[B, P]` of one matrix to `[B, proj_dim]`, float32."""
        key = key_of(self.seed, matrix)
        half, scale = scaled(gradients, torch.float16)
        return torch.cat([self._product(part.contiguous(), key) for part in half.split(_LARGEST_BATCH)]) * scale

    def _product(self, gradients: Tensor, key: tuple[int, int]) -> Tensor:
        batch, rows = gradients.shape
        rows_per_part = -(-rows // (_ROW_PARTS * _BLOCK_ROWS)) * _BLOCK_ROWS
        partial = torch.empty(_ROW_PARTS, batch, self.proj_dim, device=gradients.device)
        groups = -(-self.proj_dim // COLUMNS_PER_COUNTER)
        _project_kernel[(groups, _ROW_PARTS)](
            gradients,
            partial,
            batch,
            rows,
            self.proj_dim,
            rows_per_part,
            *key,
            BATCH=max(16, triton.next_power_of_2(batch)),
            BLOCK=_BLOCK_ROWS,
        )
        return partial.sum(dim=0)
