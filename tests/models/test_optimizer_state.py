"""Adam's state of a checkpoint: found, read from every form, mapped to the right matrices, or refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.golden_model import Finished
from tests.helpers.less import CHECKPOINTS, DEEPSPEED, load_less, run_less
from tive.models import Reference
from tive.models.common import target_modules
from tive.models.optimizer_state import (
    NAMES_FILE,
    AdamState,
    adam_state,
    find_optimizer_state,
    plain_name,
    read_optimizer_state,
)
from tive.models.trainer_state import read_trainer_state
from tive.util.errors import UserError

STEP = 10
GOLDEN = CHECKPOINTS[STEP]
DEEPSPEED_STEP = 2
KINDS = ("zero2", "zero2_bfloat16", "zero3")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_less(GOLDEN)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN, tmp_path / "checkpoint-10")


@pytest.fixture
def state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


def moments(path: Path, reference: Reference, step: int = STEP) -> AdamState:
    """The moments of all LoRA matrices."""
    stored = read_optimizer_state(find_optimizer_state(str(path)), step)
    return adam_state(stored, reference.model, target_modules(reference, "all"), str(path))


def assert_equal(first: AdamState, second: AdamState) -> None:
    assert first.m.keys() == second.m.keys()
    assert all(torch.equal(first.m[name], second.m[name]) for name in first.m)
    assert all(torch.equal(first.v[name], second.v[name]) for name in first.v)
    assert (first.t, first.b1, first.b2, first.eps) == (second.t, second.b1, second.b2, second.eps)


def written_names(reference: Reference) -> list[list[str]]:
    """The names file that the trainer writes, for the golden's groups."""
    names = [f"base_model.model.{name}" for name, _ in reference.model.named_parameters()]
    projector = [name for name in names if "mm_projector" in name]
    ends = (".weight", ".bias")
    return [[name for name in names if ".lora_" in name], *([n for n in projector if n.endswith(end)] for end in ends)]


# optimizer.pt: what the rule gives is in the golden numbers of tests/gradient_pass/test_adam_gradients.py.


def test_the_names_beside_the_state_give_what_the_rule_gives(checkpoint: Path, reference: Reference) -> None:
    by_rule = moments(GOLDEN, reference)
    (checkpoint / NAMES_FILE).write_text(json.dumps(written_names(reference)))
    assert_equal(moments(checkpoint, reference), by_rule)


def test_the_names_win_over_the_rule(checkpoint: Path, reference: Reference) -> None:
    names = written_names(reference)
    first, second = (names[0].index(f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.default.weight")
                     for layer in (2, 10))  # fmt: skip
    names[0][first], names[0][second] = names[0][second], names[0][first]
    (checkpoint / NAMES_FILE).write_text(json.dumps(names))
    swapped, by_rule = moments(checkpoint, reference), moments(GOLDEN, reference)
    assert torch.equal(swapped.m["layers.2.self_attn.q_proj.A"], by_rule.m["layers.10.self_attn.q_proj.A"])


@pytest.mark.parametrize("form", ["projector with the adapter", "empty group", "adapter alone"])
def test_every_grouping_of_the_trainers_is_read(
    form: str, checkpoint: Path, state: dict[str, Any], reference: Reference
) -> None:
    """Without a learning rate of its own the projector's weights follow the adapter; an empty group has no index."""
    adapter, weights, biases = state["param_groups"]
    if form == "projector with the adapter":
        groups = [adapter | {"params": adapter["params"] + weights["params"]}, biases]
    elif form == "empty group":
        groups = [adapter, adapter | {"params": []}, weights, biases]
    else:
        groups = [adapter]
        state["state"] = {index: state["state"][index] for index in adapter["params"]}
        (checkpoint / "non_lora_trainables.bin").unlink()
    torch.save({"state": state["state"], "param_groups": groups}, checkpoint / "optimizer.pt")
    assert_equal(moments(checkpoint, reference), moments(GOLDEN, reference))


def test_a_projector_that_was_never_stepped_is_no_fault(
    checkpoint: Path, state: dict[str, Any], reference: Reference
) -> None:
    for index in state["param_groups"][1]["params"]:
        del state["state"][index]
    torch.save(state, checkpoint / "optimizer.pt")
    assert_equal(moments(checkpoint, reference), moments(GOLDEN, reference))


# DeepSpeed's checkpoints are real ones: tests/helpers/make_deepspeed_states.py.


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeeds_master_weights_are_the_adapters(kind: str) -> None:
    folder = DEEPSPEED / kind
    stored = read_optimizer_state(find_optimizer_state(str(folder)), DEEPSPEED_STEP)
    adapter = {plain_name(name): weight for name, weight in load_file(folder / "adapter_model.safetensors").items()}
    masters = {
        plain_name(p.name or ""): p.master for group in stored.groups for p in group if "lora_" in (p.name or "")
    }
    assert masters.keys() == adapter.keys() and len(adapter) == 11 * 14
    for name, master in masters.items():
        assert master is not None
        rounded = master.bfloat16().float() if kind.endswith("bfloat16") else master
        torch.testing.assert_close(rounded, adapter[name].float(), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeeds_own_converter_finds_the_same_moments(kind: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DEEPSPEED / kind, tmp_path / kind) / "global_step2"
    for rank in range(1, 3 if kind == "zero3" else 0):  # they differ in nothing that is read
        name = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
        shutil.copy(folder / name.format(0), folder / name.format(rank))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder)]
    command += ["--output_folder", str(tmp_path / "universal"), "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    stored = read_optimizer_state(folder, DEEPSPEED_STEP)
    for parameter in (parameter for group in stored.groups for parameter in group):
        converted = tmp_path / "universal" / "zero" / str(parameter.name)
        for part, name in ((parameter.m, "exp_avg"), (parameter.v, "exp_avg_sq"), (parameter.master, "fp32")):
            content = torch.load(converted / f"{name}.pt", weights_only=False)  # the project's own test file
            whole = content["param"] if isinstance(content, dict) else content
            assert part is not None and torch.equal(part, whole.view_as(part)), (parameter.name, name)


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeeds_moments_are_mapped_to_the_matrices(kind: str) -> None:
    reference = load_less(DEEPSPEED / kind)
    found = moments(DEEPSPEED / kind, reference, DEEPSPEED_STEP)
    shapes = {name: matrix.weight.shape for name, matrix in target_modules(reference, "all").items()}
    assert {name: m.shape for name, m in found.m.items()} == shapes
    assert all(m.any() and (found.v[name] >= 0).all() for name, m in found.m.items())


def test_master_weights_of_another_adapter_are_refused() -> None:
    reference = load_less(DEEPSPEED / "zero2")
    with pytest.raises(UserError, match="are not the adapter's"):
        moments(DEEPSPEED / "zero3", reference, DEEPSPEED_STEP)


# What is refused. Everything before the model is loaded is in the first table.

Change = Callable[[Path], object]


def changed(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of what is in optimizer.pt; what it returns does not matter."""

    def apply(folder: Path) -> None:
        content = torch.load(folder / "optimizer.pt", weights_only=True)
        change(content)
        torch.save(content, folder / "optimizer.pt")

    return apply


def of_every_state(change: Callable[[dict[str, Any]], Any]) -> Change:
    return changed(lambda content: [change(state) for state in content["state"].values()])


def of_the_second_group(**options: Any) -> Change:
    return changed(lambda content: content["param_groups"][1].update(options))


def eight_bit(state: dict[str, Any]) -> None:
    state.update(state1=state.pop("exp_avg").byte(), state2=state.pop("exp_avg_sq").byte(), qmap1=torch.zeros(256))


UNREADABLE: dict[str, tuple[Change, str]] = {
    "no state": (lambda folder: (folder / "optimizer.pt").unlink(), "holds no optimizer's state (optimizer.pt, or"),
    "two states": (
        lambda folder: (folder / "latest").write_text(".\n"),
        "holds two optimizer's states",
    ),
    "not a state": (lambda folder: (folder / "optimizer.pt").write_bytes(b"half a file"), "cannot read"),
    "a pickle that runs": (lambda folder: torch.save({"state": Path}, folder / "optimizer.pt"), "cannot read"),
    "another file": (lambda folder: torch.save({"a": 1}, folder / "optimizer.pt"), "is not an optimizer's state"),
    "SGD": (changed(lambda content: [g.pop("betas") for g in content["param_groups"]]), "is not Adam's state"),
    "Adafactor": (of_every_state(lambda state: state.pop("exp_avg_sq")), "the state of another optimizer"),
    "8-bit": (of_every_state(eight_bit), "the state of 8-bit optimizer"),
    "amsgrad": (of_the_second_group(amsgrad=True), "Adam with amsgrad"),
    "betas": (of_the_second_group(betas=(0.9, 0.95)), "disagree on betas ((0.9, 0.95), (0.9, 0.999))"),
    "eps": (of_the_second_group(eps=1e-6), "disagree on eps"),
    "steps": (
        changed(lambda content: content["state"][3].update(step=torch.tensor(9.0))),
        "disagree on step (10.0, 9.0)",
    ),
    "step": (
        of_every_state(lambda state: state.update(step=torch.tensor(9.0))),
        "after step 9, the checkpoint is of step 10",
    ),
    "numbers": (
        changed(lambda content: content["param_groups"][0]["params"].reverse()),
        "numbers do not count through",
    ),
    "no trainer's state": (lambda folder: (folder / "trainer_state.json").unlink(), "holds no trainer_state.json"),
    "trainer's state": (
        lambda folder: (folder / "trainer_state.json").write_text("[]"),
        "no step (global_step)",
    ),
}
UNFITTING: dict[str, tuple[Change, str]] = {
    "counts": (changed(lambda content: content["param_groups"][0]["params"].pop()), "numbers do not count through"),
    "one more": (
        changed(
            lambda content: (
                content["param_groups"][2]["params"].append(158),
                content["state"].update({158: content["state"][157]}),
            )
        ),
        "holds groups of [154, 2, 3] parameters",
    ),
    "shapes": (
        changed(lambda content: content["state"][0].update(exp_avg=torch.zeros(8, 64))),
        "the moments have shape [8, 64], not [4, 64]",
    ),
    "second moment's shape": (
        changed(lambda content: content["state"][0].update(exp_avg_sq=torch.zeros(8, 64))),
        "the moments of layers.0.self_attn.q_proj.A have shape",
    ),
    "never stepped": (changed(lambda content: content["state"].pop(5)), "was never stepped"),
    "not finite": (
        changed(lambda content: content["state"][1]["exp_avg"].fill_(float("nan"))),
        "layers.0.self_attn.q_proj.B are not finite",
    ),
    "below zero": (
        changed(lambda content: content["state"][1]["exp_avg_sq"].neg_()),
        "second moments of layers.0.self_attn.q_proj.B are below zero",
    ),
    "names": (lambda folder: (folder / NAMES_FILE).write_text('[["a"]]'), f"{NAMES_FILE} names [1]"),
    "no names": (lambda folder: (folder / NAMES_FILE).write_text("{}"), "not a list of each group's"),
}
INCOMPLETE: dict[str, tuple[str, Change, str]] = {
    "latest": ("zero2", lambda folder: (folder / "latest").write_text("global_step9"), "latest names global_step9"),
    "first part": ("zero2", lambda folder: remove(folder, "zero_pp_rank_0_*optim*"), "lacks the part of rank 0 of 3"),
    "last part": ("zero3", lambda folder: remove(folder, "zero_pp_rank_2_*optim*"), "lacks the part of rank 2 of 3"),
    "model states": ("zero3", lambda folder: remove(folder, "*model_states.pt"), "which name the parameters"),
    "a part of another run": (
        "zero2",
        lambda folder: shutil.copy(
            DEEPSPEED / "zero3" / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", folder / "global_step2"
        ),
        "holds other ones",
    ),
    "fewer ranks": ("zero3", lambda folder: fewer_ranks(folder), "numbers where its parameters have"),
    "global": ("zero2", lambda folder: unsafe_part(folder), "cannot read"),
}  # fmt: skip


def remove(folder: Path, pattern: str) -> None:
    for file in (folder / "global_step2").glob(pattern):
        file.unlink()


def fewer_ranks(folder: Path) -> None:
    """Parts that say that there are two ranks, where three were cut."""
    remove(folder, "zero_pp_rank_2_*")
    for file in (folder / "global_step2").glob("*optim_states.pt"):
        content = torch.load(file, weights_only=False)  # the project's own test file
        content["optimizer_state_dict"]["partition_count"] = 2
        torch.save(content, file)


def unsafe_part(folder: Path) -> None:
    torch.save({"optimizer_state_dict": Path("x")}, next((folder / "global_step2").glob("*rank_1_*optim_states.pt")))


def refused(done: Finished, reason: str) -> None:
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and line.startswith("error: ") and reason in line, done.err


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_state_of_this_checkpoint_is_refused_before_the_model_is_loaded(
    case: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, reason = UNREADABLE[case]
    change(checkpoint)
    monkeypatch.setattr("tive.models.llava.load", lambda *_: pytest.fail("the model was loaded"))
    refused(run_less(tmp_path / "features", checkpoint, "target.json", "--gradient", "adam"), reason)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("case", UNFITTING)
def test_a_state_that_does_not_fit_the_adapter_is_refused(case: str, checkpoint: Path, reference: Reference) -> None:
    change, reason = UNFITTING[case]
    change(checkpoint)
    with pytest.raises(UserError) as refusal:
        moments(checkpoint, reference)
    assert reason in str(refusal.value) and str(checkpoint) in str(refusal.value)


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_deepspeed_state_that_is_not_whole_is_refused(case: str, tmp_path: Path) -> None:
    kind, change, reason = INCOMPLETE[case]
    folder = shutil.copytree(DEEPSPEED / kind, tmp_path / kind)
    change(folder)
    with pytest.raises(UserError) as refusal:
        read_optimizer_state(find_optimizer_state(str(folder)), DEEPSPEED_STEP)
    assert reason in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_state_elsewhere_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "optimizer.pt").rename(tmp_path / "state.pt")
    for place in (tmp_path / "state.pt", GOLDEN):
        assert find_optimizer_state(str(checkpoint), str(place)).is_file()
    with pytest.raises(UserError, match=r"the optimizer's state .*nowhere is not there"):
        find_optimizer_state(str(checkpoint), str(tmp_path / "nowhere"))


def test_bfloat16_moments_are_read_and_warned_of(checkpoint: Path, tmp_path: Path) -> None:
    of_every_state(lambda s: s.update(exp_avg=s["exp_avg"].bfloat16(), exp_avg_sq=s["exp_avg_sq"].bfloat16()))(
        checkpoint
    )
    done = run_less(tmp_path / "features", checkpoint, "target.json", "--gradient", "adam", "--dry_run", 1)
    assert done.code == 0, done.err
    assert "warning: Adam's moments were kept in bfloat16" in done.out


def test_a_trainers_log_gives_the_rates_up_to_its_step(checkpoint: Path, tmp_path: Path) -> None:
    trainer = read_trainer_state(str(checkpoint))
    assert trainer is not None and (trainer.step, trainer.logged) == (10, 10)
    assert trainer.learning_rate_sum == pytest.approx(10 * 0.00763157894)
    assert read_trainer_state(str(tmp_path)) is None
