"""How many threads torch gets on a CPU."""

from __future__ import annotations

import pytest
import torch

from tive.util.device import leave_a_core


@pytest.mark.parametrize(
    "width, threads, chosen, left",
    [(128, 2, None, 1), (128, 1, None, 1), (512, 8, None, 7), (4096, 2, None, 2), (128, 2, "2", 2)],
)
def test_a_narrow_model_leaves_a_core_to_the_process_that_reads(monkeypatch, width, threads, chosen, left):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    try:
        torch.set_num_threads(threads)
        leave_a_core(width)
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)
