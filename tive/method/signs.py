"""Rademacher signs from a counter-based generator, and the projection with them in plain torch.

The sign at (seed, matrix, row, column) is a bit of Philox-4x32-10 (Salmon et al., SC 2011): bit `column % 32` of word
`column // 32 % 4`, for the counter (row, column // 128, 0, 0) and the key (seed, hash of the matrix's name). A 0 is +1,
a 1 is -1. The sign depends on nothing else, so chunks computed on different machines, by this code or by the Triton
kernel, fit together.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

COLUMNS_PER_COUNTER = 128
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_WORD = 0xFFFFFFFF
# 256 rows x 8192 columns: the fastest on a CPU of 64, 256 and 1024 rows, and as fast as signs kept in float32.
_BLOCK_SIGNS = 256 * 8192


def key_of(seed: int, matrix: str) -> tuple[int, int]:
    """The generator's key for a matrix: two words of 32 bits."""
    name = int.from_bytes(hashlib.sha256(matrix.encode()).digest()[:4], "little")
    return seed & _WORD, name


def philox(rows: Tensor, groups: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10 for the counters (row, group, 0, 0): int64 `[len(rows), len(groups), 4]` of 32-bit words."""
    first, second = key
    shape = (len(rows), len(groups))
    counter = [rows[:, None].expand(shape), groups[None, :].expand(shape), rows.new_zeros(()), rows.new_zeros(())]
    for _ in range(ROUNDS):
        # 64-bit products wrap around as signed numbers; their two halves are right all the same.
        low, high = MULTIPLIERS[0] * counter[0], MULTIPLIERS[1] * counter[2]
        counter = [
            ((high >> 32) & _WORD) ^ counter[1] ^ first,
            high & _WORD,
            ((low >> 32) & _WORD) ^ counter[3] ^ second,
            low & _WORD,
        ]
        first, second = (first + WEYL[0]) & _WORD, (second + WEYL[1]) & _WORD
    return torch.stack([word.expand(shape) for word in counter], dim=-1)


def draw_signs(key: tuple[int, int], start: int, stop: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Signs of the rows `start .. stop` of a matrix, int8 `[stop - start, columns]` of +1 and -1."""
    rows = torch.arange(start, stop, device=device)
    groups = torch.arange(-(-columns // COLUMNS_PER_COUNTER), device=device)
    words = philox(rows, groups, key)
    octets = words.to(torch.int32).view(torch.uint8).flatten().to(torch.int32)
    # One look-up of 8 bytes gives eight signs: 20 times faster on a CPU than shifting out each bit.
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    table = (1 - 2 * bits).to(torch.int8).view(torch.int64).flatten()
    return torch.index_select(table, 0, octets).view(torch.int8).view(stop - start, -1)[:, :columns]


class TorchSigns:
    """Rademacher projection in blocks of torch operations, on any device.

    Args:
        budget_bytes: the signs of all matrices are kept between batches when they fit in this (one byte a sign);
            else each batch draws them again, block by block.
        total_rows: parameters of all the matrices together.
    """

    kind = "rademacher"

    def __init__(self, seed: int, proj_dim: int, device: torch.device, total_rows: int, budget_bytes: int) -> None:
        self.seed, self.proj_dim, self.device = seed, proj_dim, device
        self.keep = total_rows * proj_dim <= budget_bytes
        self.kept: dict[str, Tensor] = {}
        # At most 4096 rows: their sum cannot overflow in half precision.
        self.block_rows = min(4096, max(1, _BLOCK_SIGNS // proj_dim))
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        self.buffer = torch.empty(self.block_rows, proj_dim, dtype=self.dtype, device=device)
        self.about = "torch, signs kept between batches" if self.keep else "torch, signs drawn for each batch"

    def project(self, matrix: str, gradients: Tensor) -> Tensor:
        """Project the gradients `[B, P]` of one matrix to `[B, proj_dim]`, float32."""
        key = key_of(self.seed, matrix)
        gradients, scale = scaled(gradients, self.dtype)
        count = gradients.shape[1]
        if self.keep and matrix not in self.kept:
            blocks = [self._draw(key, start, count) for start in range(0, count, self.block_rows)]
            self.kept[matrix] = torch.cat(blocks)
        sketch = torch.zeros(len(gradients), self.proj_dim, device=self.device)
        for start in range(0, count, self.block_rows):
            stop = min(start + self.block_rows, count)
            signs = self.kept[matrix][start:stop] if self.keep else self._draw(key, start, count)
            block = self.buffer[: stop - start].copy_(signs)
            if self.dtype == torch.float32:
                sketch.addmm_(gradients[:, start:stop], block)
            else:
                sketch += gradients[:, start:stop] @ block
        return sketch * scale

    def _draw(self, key: tuple[int, int], start: int, count: int) -> Tensor:
        return draw_signs(key, start, min(start + self.block_rows, count), self.proj_dim, self.device)


def scaled(gradients: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients `[B, P]` in `dtype`, and the float32 factor `[B, 1]` that undoes their scaling.

    Before half precision each record's largest entry becomes 1, so nothing overflows and entries 2^-14 as large keep
    their full precision.
    """
    gradients = gradients.float()
    if dtype == torch.float32:
        return gradients, gradients.new_ones(len(gradients), 1)
    largest = gradients.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return (gradients / scale).to(dtype), scale
