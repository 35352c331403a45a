"""On a GPU nothing waits: batches come ready-made, no value is read back for a batch, host memory is bounded."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.features.test_batches import record
from tests.helpers.golden_model import RECORDS, run_step, write_records
from tests.helpers.reference import encode_golden, load_golden
from tive.features.batches import Batches
from tive.features.step import GradientStep
from tive.method.gradients import RecordGradients
from tive.method.projection import Sparse
from tive.models import llava
from tive.models.common import target_modules

READ_BACK = {"cpu", "item", "tolist", "numpy", "nonzero", "masked_select", "equal", "allclose", "is_nonzero"}
READ_BACK |= {"__bool__", "__float__", "__int__", "__index__"}


class ReadBacks(TorchFunctionMode):
    """Counts what a GPU would have to be waited for: its numbers read by the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        masked = [part for part in arguments if isinstance(part, torch.Tensor) and part.dtype == torch.bool]
        by_mask = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and masked[:1] == [arguments[1]]
        self.count += by_mask or getattr(function, "__name__", "") in READ_BACK
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_value_is_read_back_for_a_batch(tmp_path, dtype):
    counts, data = [], write_records(tmp_path / "data.json", RECORDS[:12])
    for size in (1, 6):
        arguments = ("--input_file", data, "--dtype", dtype, "--batch_size", size, "--window", 6)
        arguments += ("--el2n", "--visual_gain")
        with ReadBacks() as counted:
            assert run_step(tmp_path / str(size), *arguments).code == 0
        counts.append(counted.count)
    assert counts[0] == counts[1] > 0


def test_the_step_runs_where_no_number_can_be_read():
    reference = load_golden()
    records = encode_golden(reference)
    matrices = target_modules(reference)
    meta = torch.device("meta")
    object.__setattr__(reference, "device", meta)
    reference.model.to(meta)
    step = GradientStep(llava, reference, matrices, Sparse(0, 512, meta), el2n=True)
    results = step(step.ready(records[:8]))
    assert results["features"].shape == (8, 512) and results["el2n"].device == meta


def test_a_vision_tower_keeps_nothing_for_the_backward_pass():
    reference = load_golden()
    tower, seen = reference.model.get_vision_tower(), []
    hook = tower.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    with RecordGradients(target_modules(reference), lambda name, gradients: None):
        llava.record_losses(
            reference, [item for item in encode_golden(reference) if item.inputs.pixels is not None][:2]
        )
    hook.remove()
    assert seen == [False]


def test_while_a_batch_is_computed_the_next_is_made():
    made, next_is_made = [], threading.Event()

    def make(records):
        made.append(threading.current_thread())
        if len(made) > 1:
            next_is_made.set()
        return records

    def compute(batch):
        assert next_is_made.wait(5)

    computed = list(Batches(2, 16384).compute(compute, enumerate([record(9)] * 4), make, in_thread=True))
    assert len(computed) == 2 and threading.main_thread() not in made


def test_an_error_of_what_reads_or_makes_batches_reaches_the_run():
    def reading():
        yield 0, record(9)
        raise OSError("of its own")

    with pytest.raises(OSError, match="of its own"):
        list(Batches(1, 16384).compute(list, reading(), in_thread=True))


def test_records_that_wait_for_others_of_their_length_are_bounded_and_none_is_lost():
    batches, read, most, done = Batches(4, 10**6), [], 0, []

    def reading():
        for number in range(400):
            read.append(number)
            yield number, record(2 ** (1 + number % 60))

    for batch in batches.filled(reading()):
        done += [number for number, _ in batch]
        most = max(most, len(read) - len(done))
    assert most < 8 * 4 and sorted(done) == list(range(400))


def test_the_run_says_how_much_host_memory_its_records_take(tmp_path):
    done = run_step(tmp_path / "one", "--num_workers", 1)
    assert done.code == 0 and "records in host memory at most" in done.out
    dry = run_step(tmp_path / "two", "--dry_run", 4)
    assert "host memory: at most" in dry.out


def test_float16_gradients_that_overflow_are_computed_again_with_a_smaller_scale(tmp_path, monkeypatch):
    norms, data = [], write_records(tmp_path / "data.json", RECORDS[:12])
    for scales in ((2.0**24, 2.0**18, 2.0**12), (2.0**12,)):
        for module in ("step", "gradient_pass"):
            monkeypatch.setattr(f"tive.features.{module}.FLOAT16_LOSS_SCALES", scales)
        folder = tmp_path / str(len(scales))
        assert run_step(folder, "--input_file", data, "--dtype", "float16").code == 0
        norms.append(torch.load(folder / "output_0.pt", weights_only=True)["norms"])
    assert torch.allclose(*norms, rtol=0.01)
