"""What is saved of an optimizer beside a checkpoint; under DeepSpeed: tests/models/test_optimizer_state.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tive.models.optimizer_state import MOMENTS_FILE, read_optimizer_state, save_moments
from tive.util.errors import UserError


def trainer_after_a_step(optimizer: type[torch.optim.Optimizer]) -> SimpleNamespace:
    """What of transformers' trainer is used; the second matrix has had no gradient."""
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("lora_A", "lora_B", "projector")})
    stepping = optimizer(model.parameters(), lr=1e-2)
    (model["lora_A"](torch.ones(1, 4)) + model["projector"](torch.ones(1, 4))).sum().backward()
    stepping.step()
    of = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False, "is_world_process_zero": lambda: True}
    return SimpleNamespace(model=model, optimizer=stepping, **of)


def test_the_moments_of_every_lora_matrix_that_was_stepped_are_saved(tmp_path: Path) -> None:
    trainer = trainer_after_a_step(torch.optim.AdamW)
    save_moments(trainer, str(tmp_path))
    saved = read_optimizer_state(tmp_path / MOMENTS_FILE, 1)
    weight = trainer.model["lora_A"].weight
    assert list(saved.by_name) == ["lora_A.weight"] and saved.constants["t"] == 1
    moments = saved.by_name["lora_A.weight"]
    assert torch.equal(moments.m, trainer.optimizer.state[weight]["exp_avg"])
    assert torch.equal(moments.v, trainer.optimizer.state[weight]["exp_avg_sq"])
    assert moments.weight is not None and torch.equal(moments.weight, weight)


@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.RAdam, torch.optim.SGD, torch.optim.Adamax])
def test_of_another_optimizer_nothing_is_saved_and_a_line_says_so(
    optimizer: type[torch.optim.Optimizer], deepspeed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_after_a_step(optimizer)
    if deepspeed:
        pytest.importorskip("deepspeed")
        trainer.is_deepspeed_enabled = True
        trainer.model_wrapped = SimpleNamespace(global_steps=1, skipped_steps=0)
    save_moments(trainer, str(tmp_path))
    assert not list(tmp_path.iterdir()) and MOMENTS_FILE in capsys.readouterr().out


@pytest.mark.parametrize("name", [rb"t\"", rb"b1\"", rb"b2\"", rb"eps\"", b'adam"'])
def test_a_file_without_a_number_that_adams_step_needs_is_refused(name: bytes, tmp_path: Path) -> None:
    save_moments(trainer_after_a_step(torch.optim.AdamW), str(tmp_path))
    path = tmp_path / MOMENTS_FILE
    path.write_bytes(path.read_bytes().replace(name, b"x" + name[1:], 1))
    with pytest.raises(UserError, match=MOMENTS_FILE):
        read_optimizer_state(path, 1)
