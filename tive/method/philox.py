"""Philox-4x32-10, the counter-based generator of Salmon et al. (SC 2011): the same random bits on every machine.

A random bit is a function of key, stream and position alone, so it can be drawn anywhere, in any order, without state.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_HALF = np.uint64(32)


def key_of(seed: int, name: str) -> tuple[int, int]:
    """The key (two words of 32 bits) of a seed and a name; every bit of both counts."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """The generator itself: counters `[n, 4]` to random words uint32 `[n, 4]`."""
    c0, c1, c2, c3 = np.asarray(counters, np.uint64).T
    word = np.uint64(_WORD)
    for number in range(_ROUNDS):
        k0, k1 = (np.uint64((part + number * step) & _WORD) for part, step in zip(key, _WEYL, strict=True))
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # two words make one number of 64 bits
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & word, (first >> _HALF) ^ c3 ^ k1, first & word
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def random_words(count: int, key: tuple[int, int], stream: int) -> np.ndarray:
    """The first words of a stream, uint32 `[count]`: word i is word `i % 4` of the counter (i // 4, stream, 0, 0)."""
    counters = np.zeros((-(-count // 4), 4), np.uint64)
    counters[:, 0], counters[:, 1] = np.arange(len(counters)), stream
    return philox(counters, key).ravel()[:count]
