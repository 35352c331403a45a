"""The gradient step through its command line: the golden numbers reach the files, whatever the chunks."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers.golden_model import GOLDEN, RECORDS, ROOT, run_step, write_records
from tive.data.trained import record_hash
from tive.features.step import GradientStep
from tive.method.projection import TrakBasic

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def read(folder, chunk=0):
    return torch.load(folder / f"output_{chunk}.pt", weights_only=True, mmap=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = run_step(folder, "--proj_dim", 4096, "--window", 512)
    assert result.code == 0, result.err
    return folder, result


def test_the_files_hold_the_golden_norms_and_the_projected_golden_cosines(whole):
    folder, result = whole
    features = read(folder)
    assert features["features"].dtype == torch.float16 and features["features"].shape == (48, 4096)
    norms = features["norms"].numpy()
    assert features["norms"].dtype == torch.float32
    assert np.abs(norms / EXPECTED["norms"] - 1).max() < 1e-4
    assert np.allclose(json.loads((folder / "output_norm_0.json").read_text()), norms)
    unit = torch.nn.functional.normalize(features["features"].float(), dim=1)
    # 1128 pairs, each off by about 1/sqrt(4096): six of those do not happen by chance.
    assert (unit @ unit.T - torch.tensor(EXPECTED["cosines"])).abs().max() < 6 / 64
    assert "16,384 parameters count, in 16 LoRA matrices" in result.out
    assert "projector sparse" in result.out and "48 features, 0 records left out" in result.out


def test_the_manifest_says_what_the_features_depend_on_and_what_they_cost(whole):
    manifest = json.loads((whole[0] / "manifest_0.json").read_text())
    assert manifest["match"]["counted_parameters"] == 16384 and manifest["match"]["proj_seed"] == 0
    assert (manifest["match"]["start"], manifest["match"]["stop"]) == (0, 48)
    assert manifest["match"] == read(whole[0])["match"]
    assert manifest["left_out"] == [] and manifest["dtype"] == "float32"
    assert manifest["records_per_second"] > 0 and 0.9 < manifest["padding_efficiency"] <= 1
    assert {"python", "torch", "transformers", "peft"} <= set(manifest["versions"])


def test_chunks_put_together_are_the_whole_and_a_chunk_past_the_end_is_empty(whole, tmp_path):
    # ceil(48 / 13) = 4 records a chunk: the 13th chunk starts past the end.
    for chunk in (0, 5, 11, 12):
        assert run_step(tmp_path, "--proj_dim", 4096, "--num_chunks", 13, "--chunk_idx", chunk).code == 0
    together = read(whole[0])
    for chunk in (0, 5, 11):
        part, rows = read(tmp_path, chunk), slice(4 * chunk, 4 * chunk + 4)
        assert torch.allclose(part["norms"], together["norms"][rows], rtol=1e-5)
        assert part["content"].tolist() == [list(record_hash(one)) for one in RECORDS[rows]]
        assert torch.allclose(part["features"].float(), together["features"][rows].float(), atol=4e-3)
    assert read(tmp_path, 12)["features"].shape == (0, 4096)


def test_json_lines_and_an_image_in_a_list_give_the_same_features(whole, tmp_path):
    records = [dict(record) for record in RECORDS[:6]]
    for record in records:
        if "image" in record:
            record["image"] = [record["image"]]
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run_step(tmp_path / "out", "--input_file", lines, "--proj_dim", 4096)
    assert result.code == 0, result.err
    assert torch.allclose(read(tmp_path / "out")["norms"], read(whole[0])["norms"][:6], rtol=1e-5)


def test_fewer_counted_matrices_give_smaller_norms_and_other_features(whole, tmp_path):
    result = run_step(tmp_path, "--grad_modules", "q_proj,v_proj")
    assert result.code == 0 and "8,192 parameters count, in 8 LoRA matrices" in result.out
    assert (read(tmp_path)["norms"] < read(whole[0])["norms"]).all()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--num_chunks", 4, "--chunk_idx", 4], "0 .. 3"),
        (["--device", "cuda:7"], "the device cuda:7"),
        (["--device", "toaster"], "'toaster' is not a device"),
        (["--batch_size", 0], "--batch_size"),
        (["--projector", "trak_cuda"], "--projector"),
        (["--grad_modules", "attention"], "grad_modules attention names no"),
    ],
)
def test_a_mistake_in_the_arguments_ends_in_one_line_and_writes_nothing(tmp_path, arguments, complaint):
    result = run_step(tmp_path / "out", *arguments)
    assert result.code == 2 and complaint in result.err
    assert "Traceback" not in result.err
    assert not list((tmp_path / "out").glob("output*"))


def test_records_that_cannot_be_read_end_in_one_line(tmp_path):
    for name, content in [("broken.json", "[{"), ("text.json", "hello"), ("empty.json", "[]")]:
        path = tmp_path / name
        path.write_text(content)
        result = run_step(tmp_path / "out", "--input_file", path)
        assert result.code == 2 and name in result.err and result.err.count("\n") == 1
    records = write_records(tmp_path / "system.json", [{"conversations": [{"from": "system", "value": "hi"}]}])
    result = run_step(tmp_path / "out", "--input_file", records)
    assert result.code == 2 and "record 0 has no turns" in result.err


def test_products_of_half_precision_are_summed_in_float32(tmp_path, monkeypatch):
    settings, computed, seen = torch.backends.cuda.matmul, GradientStep.__call__, []
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    for name in names:
        monkeypatch.setattr(settings, name, True)

    def watched(step, batch):
        seen.extend(getattr(settings, name) for name in names)
        return computed(step, batch)

    monkeypatch.setattr(GradientStep, "__call__", watched)
    assert run_step(tmp_path, "--dry_run", 2).code == 0
    assert seen and not any(seen)


@pytest.mark.parametrize("works", [True, False])
def test_on_a_gpu_auto_takes_traks_projector_where_it_works_and_the_dry_run_prints_what_each_costs(
    tmp_path, monkeypatch, works
):
    class StandIn(TrakBasic):
        def __init__(self, *arguments):
            if not works:
                raise RuntimeError("no kernel image is available")
            super().__init__(*arguments)
            self.kind = "trak_cuda"

    for module in ("method.projection", "features.dry_run"):
        monkeypatch.setattr(f"tive.{module}.is_gpu", lambda device: True)
    monkeypatch.setattr("tive.method.projection.TrakCuda", StandIn)
    done = run_step(tmp_path / "out", "--dry_run", 2, "--proj_dim", 64)
    assert done.code == 0, done.err
    assert f"projector {'trak_cuda' if works else 'sparse/2'}: " in done.out
    assert re.search(r"projector sparse: [\d.]+ ms a record", done.out)
    cost = r"[\d.]+ ms a record" if works else "trak does not work here: no kernel image is available"
    assert re.search(f"projector trak: {cost}", done.out)


def test_help_teaches_and_does_not_wait_for_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "compute_gradient_features.py"), "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "all GPUs of this machine" in done.stdout and "--chunk_idx" in done.stdout
    assert "| torch\n" not in done.stderr and "transformers" not in done.stderr
