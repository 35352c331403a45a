"""`--gradient none`: the scores of a forward pass, in a folder like any other, without features and norms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.helpers.golden_model import GOLDEN, RECORDS, run_step, write_records
from tive.data.records import open_records
from tive.features.lookup import open_features

# The helper's arguments name another number of features, which has no meaning here.
NONE = ("--gradient", "none", "--proj_dim", 8192)
SCORES = ("losses", "el2n", "visual_gain", "supervised_tokens", "tokens")


def test_the_scores_are_those_of_a_pass_with_gradients(tmp_path):
    data = write_records(tmp_path / "data.json", RECORDS[:12])
    for kind, more in (("sgd", ["--el2n"]), ("none", NONE)):
        arguments = ("--input_file", data, "--visual_gain", *more)
        assert run_step(tmp_path / kind, *arguments).code == 0
    whole, alone = (torch.load(tmp_path / kind / "output_0.pt", weights_only=True) for kind in ("sgd", "none"))
    for name in SCORES:
        np.testing.assert_allclose(alone[name], whole[name], rtol=1e-5, atol=1e-6)
    assert not {"features", "norms"} & alone.keys()
    assert {path.name for path in (tmp_path / "none").iterdir()} == {".lock_0", "manifest_0.json", "output_0.pt"}
    manifest = json.loads((tmp_path / "none" / "manifest_0.json").read_text())
    assert manifest["match"]["gradient"] == "none" and manifest["match"]["proj_dim"] == 0


def test_its_chunks_are_computed_continued_and_opened_like_any_other(tmp_path):
    for chunk in (0, 1, 1):
        done = run_step(tmp_path, *NONE, "--num_chunks", 2, "--chunk_idx", chunk)
        assert done.code == 0
    assert "is complete" in done.out
    features = open_features(tmp_path, open_records(GOLDEN / "data.json"))
    assert np.isfinite(features.column("losses")).all() and features.column("norms") is None
    refused = run_step(tmp_path, "--num_chunks", 2, "--chunk_idx", 0)
    assert refused.code == 2 and "gradient none, now sgd" in refused.err


@pytest.mark.parametrize("option", [("--proj_dim", 64), ("--grad_modules", "mlp"), ("--projector", "sparse")])
def test_what_only_gradients_have_is_refused(tmp_path, option):
    refused = run_step(tmp_path / "out", *NONE, *option)
    assert refused.code == 2 and option[0] in refused.err and not (tmp_path / "out").exists()


def test_its_cost_can_be_tried_first(tmp_path):
    done = run_step(tmp_path / "out", *NONE, "--dry_run", 4)
    assert done.code == 0 and "forward" in done.out and "backward" not in done.out
