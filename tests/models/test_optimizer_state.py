"""Adam's state of a checkpoint: read from every form, mapped to the right matrices, or refused in one line."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.forked_python import PYTHON
from tests.helpers.golden_model import Finished
from tests.helpers.less import CHECKPOINTS, DEEPSPEED, load_less, run_less
from tive.models import Reference
from tive.models.common import target_modules
from tive.models.optimizer_state import (
    MOMENTS_FILE,
    Moments,
    find_optimizer_state,
    moments_of_matrices,
    read_optimizer_state,
    read_trainer_state,
)
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


def moments(path: Path, reference: Reference, step: int = STEP) -> dict[str, Moments]:
    """The moments of all LoRA matrices."""
    stored = read_optimizer_state(find_optimizer_state(str(path)), step)
    return moments_of_matrices(stored, reference.model, target_modules(reference, "all"), str(path))


def constants(path: Path, step: int = STEP) -> dict[str, float]:
    return read_optimizer_state(find_optimizer_state(str(path)), step).constants


def assert_equal(first: dict[str, Moments], second: dict[str, Moments]) -> None:
    assert first.keys() == second.keys()
    for name, of in first.items():
        assert torch.equal(of.m, second[name].m) and torch.equal(of.v, second[name].v), name


# optimizer.pt: what the order gives is in the golden numbers of tests/features/test_adam_gradients.py.


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


def test_moments_by_name_are_those_by_number(checkpoint: Path, state: dict[str, Any], reference: Reference) -> None:
    """FSDP writes its state whole, as optimizer.bin, with names for numbers."""
    names = [f"base_model.model.{name}" for name, _ in reference.model.named_parameters()]
    projector = [name for name in names if "mm_projector" in name]
    flat = [name for name in names if ".lora_" in name]
    flat += [name for end in (".weight", ".bias") for name in projector if name.endswith(end)]
    for group in state["param_groups"]:
        group["params"] = [flat[number] for number in group["params"]]
    named = {flat[number]: of for number, of in state["state"].items()}
    torch.save(state | {"state": named}, checkpoint / "optimizer.bin")
    (checkpoint / "optimizer.pt").unlink()
    assert_equal(moments(checkpoint, reference), moments(GOLDEN, reference))


def test_moments_that_bitsandbytes_keeps_in_full_are_adams(
    checkpoint: Path, state: dict[str, Any], reference: Reference
) -> None:
    """paged_adamw_32bit: other names for the same two moments, and a number where torch has a tensor."""
    for of in state["state"].values():
        of |= {"state1": of.pop("exp_avg"), "state2": of.pop("exp_avg_sq"), "step": int(of["step"])}
    for group in state["param_groups"]:
        for option in set(group) - {"params", "lr", "betas", "eps", "weight_decay"}:
            del group[option]
        group |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    torch.save(state, checkpoint / "optimizer.pt")
    assert_equal(moments(checkpoint, reference), moments(GOLDEN, reference))


# DeepSpeed's checkpoints are real ones, of this project's trainer: tests/helpers/make_deepspeed_states.py.


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint as another trainer under DeepSpeed leaves it: without the moments by name."""

    def of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("with space") / "checkpoint-2"
        shutil.copytree(DEEPSPEED / kind, folder)
        (folder / MOMENTS_FILE).unlink()
        for rank in range(1, 3 if kind == "zero3" else 0):  # they differ in nothing that is read
            name = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
            shutil.copy(folder / "global_step2" / name.format(0), folder / "global_step2" / name.format(rank))
        return folder

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_the_moments_gathered_in_training_are_those_that_deepspeeds_tool_makes_of_its_parts(
    kind: str, foreign: Callable[[str], Path]
) -> None:
    """And the command that the refusal of the parts names is the remedy."""
    folder = foreign(kind)
    reference = load_less(DEEPSPEED / kind)
    with pytest.raises(UserError) as refusal:
        moments(folder, reference, DEEPSPEED_STEP)
    (command,) = re.findall("`(python [^`]*)`", str(refusal.value))
    ended = subprocess.run([PYTHON, *shlex.split(command)[1:]], cwd="/", capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    converted = moments(folder, reference, DEEPSPEED_STEP)
    gathered = moments(DEEPSPEED / kind, reference, DEEPSPEED_STEP)
    assert_equal(gathered, converted)
    assert constants(folder, DEEPSPEED_STEP) == constants(DEEPSPEED / kind, DEEPSPEED_STEP)
    assert constants(folder, DEEPSPEED_STEP)["t"] == DEEPSPEED_STEP
    for name, matrix in target_modules(reference, "all").items():
        of = gathered[name]
        assert of.m.dtype == torch.float32 and of.m.shape == matrix.weight.shape and of.m.any() and of.v.any()


def test_moments_of_another_adapter_are_refused() -> None:
    reference = load_less(DEEPSPEED / "zero2")
    with pytest.raises(UserError, match="not the adapter's"):
        moments(DEEPSPEED / "zero3", reference, DEEPSPEED_STEP)


def test_fsdps_shards_are_named_as_what_they_are(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0" / ".metadata").touch()
    with pytest.raises(UserError, match="FSDP") as refusal:
        find_optimizer_state(str(checkpoint))
    assert str(checkpoint) in str(refusal.value)


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


# What is done to the checkpoint, and the words of the refusal that say what is wrong.
UNREADABLE: dict[str, tuple[Change, str]] = {
    "no state": (lambda folder: (folder / "optimizer.pt").unlink(), MOMENTS_FILE),
    "not a state": (lambda folder: (folder / "optimizer.pt").write_bytes(b"half a file"), "cannot read"),
    "a pickle that runs": (lambda folder: torch.save({"state": Path}, folder / "optimizer.pt"), "cannot read"),
    "another file": (lambda folder: torch.save({"a": 1}, folder / "optimizer.pt"), "param_groups"),
    "SGD": (changed(lambda content: [g.pop("betas") for g in content["param_groups"]]), "not Adam's"),
    "RAdam": (changed(lambda content: [g.pop("amsgrad") for g in content["param_groups"]]), "not Adam's"),
    "Adafactor": (of_every_state(lambda state: state.pop("exp_avg_sq")), "another optimizer"),
    "one key more": (of_every_state(lambda state: state.update(kahan=torch.zeros(1))), "another optimizer"),
    "one option more": (of_the_second_group(momentum_decay=0.004), "momentum_decay"),
    "8-bit": (of_every_state(eight_bit), "8-bit"),
    "amsgrad": (of_the_second_group(amsgrad=True), "amsgrad"),
    "no correction": (of_the_second_group(bias_correction=False), "bias_correction"),
    "betas": (of_the_second_group(betas=(0.9, 0.95)), "betas"),
    "eps": (of_the_second_group(eps=1e-6), "eps"),
    "steps": (changed(lambda content: content["state"][3].update(step=torch.tensor(9.0))), "step"),
    "step": (of_every_state(lambda state: state.update(step=torch.tensor(9.0))), "step 10"),
    "numbers": (changed(lambda content: content["param_groups"][0]["params"].reverse()), "numbers"),
    "no trainer's state": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json"),
    "trainer's state": (lambda folder: (folder / "trainer_state.json").write_text("{}"), "global_step"),
    "another moments file": (lambda folder: (folder / MOMENTS_FILE).write_bytes(b"half a file"), MOMENTS_FILE),
}
UNFITTING: dict[str, tuple[Change, str]] = {
    "one parameter less": (changed(lambda content: content["param_groups"][0]["params"].pop()), "numbers"),
    "one parameter more": (
        changed(
            lambda content: (
                content["param_groups"][0]["params"].append(154),
                content["param_groups"][1]["params"].remove(154),
            )
        ),
        "155 parameters",
    ),
    "shapes": (changed(lambda content: content["state"][0].update(exp_avg=torch.zeros(8, 64))), "154 parameters"),
    "second moment's shape": (
        changed(lambda content: content["state"][0].update(exp_avg_sq=torch.zeros(8, 64))),
        "layers.0.self_attn.q_proj.A",
    ),
    "never stepped": (changed(lambda content: content["state"].pop(5)), "never stepped"),
    "not finite": (changed(lambda content: content["state"][1]["exp_avg"].fill_(float("nan"))), "q_proj.B"),
    "twice the second": (
        changed(lambda content: content["state"][1].update(exp_avg=content["state"][1]["exp_avg_sq"])),
        "q_proj.B",
    ),
    "below zero": (changed(lambda content: content["state"][1]["exp_avg_sq"].neg_()), "q_proj.B"),
}


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
    step, rates = read_trainer_state(str(checkpoint)) or (None, {})
    assert (step, rates["logged"]) == (10, 10) and rates["sum"] == pytest.approx(10 * 0.00763157894)
    assert read_trainer_state(str(tmp_path)) is None
