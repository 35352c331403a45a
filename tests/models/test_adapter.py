"""Every tensor of an adapter finds its one place in any model, at the scale of its training, or is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tive.models.adapter import attach_adapter, check_adapter
from tive.models.common import prepare_torchvision
from tive.util.errors import UserError

prepare_torchvision()  # before peft is imported
Tensors = dict[str, torch.Tensor]
WIDTH, RANK, ALPHA = 6, 2, 3.0
PREFIX = "base_model.model.model.language_model.layers"


class Block(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.self_attn.values():
            x = x + part(x)
        return x


class Tiny(nn.Module):
    """A vision tower, a language model and a head, nested as transformers 5 does it."""

    def __init__(self, tower: str = "visual", text: str = "language_model") -> None:
        super().__init__()
        torch.manual_seed(0)
        towers = {
            tower: nn.ModuleDict({"blocks": nn.ModuleList([Block("qkv", "proj"), Block("qkv", "proj")])}),
            text: nn.ModuleDict({"layers": nn.ModuleList([Block("q_proj", "v_proj"), Block("q_proj", "v_proj")])}),
        }
        self.model = nn.ModuleDict(towers)
        self.lm_head = nn.Linear(WIDTH, 9, bias=False)
        self.text = text

    @property
    def layers(self) -> nn.ModuleList:
        return self.model[self.text]["layers"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.model.values():
            for blocks in part.values():
                for block in blocks:
                    x = block(x)
        return self.lm_head(x)


def matrices(prefix: str, names: tuple[str, ...], rank: int = RANK) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(2):
        for name in names:
            path = f"{prefix}.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=generator) / 4
            tensors[f"{path}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=generator) / 4
    return tensors


TEXT = matrices(PREFIX, ("q_proj", "v_proj"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(TEXT, tmp_path / "adapter_model.safetensors")
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)


def attached(folder: Path, model: Tiny | None = None) -> Tiny:
    model = model or Tiny()
    attach_adapter(model, folder, model.layers, torch.float32)
    return model


X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))


def wanted(scales: Callable[[str], float], tensors: Tensors = TEXT) -> torch.Tensor:
    """The outputs with each pair of matrices added to its map's weight."""
    model = Tiny()
    for name, a in tensors.items():
        path, is_a, _ = name.partition(".lora_A.")
        if is_a:
            module: Any = model.get_submodule(path.removeprefix("base_model.model."))
            module.weight.data += scales(path) * tensors[f"{path}.lora_B.weight"] @ a
    return model(X)


def test_each_pair_is_added_at_the_scale_of_its_training(folder: Path) -> None:
    torch.testing.assert_close(attached(folder)(X), wanted(lambda _: ALPHA / RANK), rtol=1e-4, atol=1e-5)
    configure(folder, use_rslora=True)
    torch.testing.assert_close(attached(folder)(X), wanted(lambda _: ALPHA / RANK**0.5), rtol=1e-4, atol=1e-5)
    configure(folder, use_rslora=False, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12})
    scale = wanted(lambda path: (12 if path.endswith("1.self_attn.q_proj") else ALPHA) / RANK)
    torch.testing.assert_close(attached(folder)(X), scale, rtol=1e-4, atol=1e-5)


def test_matrices_may_have_ranks_of_their_own(folder: Path) -> None:
    configure(folder, rank_pattern={"v_proj": 4})
    tensors = matrices(PREFIX, ("q_proj",)) | matrices(PREFIX, ("v_proj",), rank=4)
    save_file(tensors, folder / "adapter_model.safetensors")
    model = attached(folder)
    torch.testing.assert_close(
        model(X), wanted(lambda path: ALPHA / (4 if "v_proj" in path else RANK), tensors), rtol=1e-4, atol=1e-5
    )
    assert model.layers[0].self_attn["v_proj"].lora_A["default"].out_features == 4


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (r"model\.language_model\.", "language_model.model."),
        (r"model\.language_model\.", "model."),
        (r"^base_model\.model\.", ""),
        (r"\.lora_(A|B)\.", r".lora_\1.default."),
        (r"^base_model\.model\.", "base_model.model._orig_mod."),
        (r"\.layers\.(\d)\.", r".layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_names_of_other_releases_and_of_wrappers_are_the_same_adapter(folder: Path, now: str, before: str) -> None:
    rewrite(folder, lambda tensors: {re.sub(now, before, name): value for name, value in tensors.items()})
    torch.testing.assert_close(attached(folder)(X), wanted(lambda _: ALPHA / RANK), rtol=1e-4, atol=1e-5)


def test_a_file_that_torch_wrote_is_read_too(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save(TEXT, folder / "adapter_model.bin")
    torch.testing.assert_close(attached(folder)(X), wanted(lambda _: ALPHA / RANK), rtol=1e-4, atol=1e-5)


def test_what_was_trained_whole_takes_the_place_of_the_bases(folder: Path) -> None:
    configure(folder, modules_to_save=["lm_head"], bias="all")
    head, bias = torch.randn(9, WIDTH), torch.randn(WIDTH)
    bias_name = f"{PREFIX}.0.self_attn.q_proj.base_layer.bias"
    rewrite(folder, lambda t: t | {"base_model.model.lm_head.modules_to_save.weight": head, bias_name: bias})
    model = attached(folder)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.layers[0].self_attn["q_proj"].base_layer.bias, bias)


PATTERNS: tuple[Any, ...] = (
    r"^(model)(?!.*(lm_head|embed)).*",
    r".*\.(qkv|proj|q_proj|v_proj)",
    ["q_proj", "v_proj", "qkv", "proj"],
)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_that_also_names_a_tower_that_was_not_trained_is_no_lack(folder: Path, pattern: Any) -> None:
    configure(folder, target_modules=pattern)
    torch.testing.assert_close(attached(folder)(X), wanted(lambda _: ALPHA / RANK), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gone", ["language_model.layers.1", "0.self_attn.v_proj", "visual.blocks.1"])
def test_a_part_that_was_trained_lacks_no_matrix(folder: Path, gone: str) -> None:
    tower = matrices("base_model.model.model.visual.blocks", ("qkv", "proj"))
    configure(folder, target_modules=PATTERNS[1])
    rewrite(folder, lambda t: {name: value for name, value in (t | tower).items() if gone not in name})
    with pytest.raises(UserError, match="lacks the weights of") as refused:
        attached(folder)
    assert gone in str(refused.value) and "adapter_model.safetensors" in str(refused.value)


def test_where_shortened_names_meet_the_longer_ones_decide(folder: Path) -> None:
    """Llama 4: `vision_model` and `language_model` are both names that come and go."""

    class Two(Tiny):
        def __init__(self) -> None:
            super().__init__("vision_model", "language_model")
            self.model["vision_model"] = nn.ModuleDict({"layers": nn.ModuleList([Block("q_proj", "v_proj")] * 2)})

    model = attached(folder, Two())
    assert hasattr(model.layers[1].self_attn["q_proj"], "lora_A")
    assert not any("vision_model" in name for name, _ in model.named_parameters() if "lora" in name)
    rewrite(folder, lambda t: {name.replace("language_model.", ""): value for name, value in t.items()})
    with pytest.raises(UserError, match="2 places"):
        attached(folder, Two())


def test_experts_that_are_one_tensor_are_named_as_the_reason(folder: Path) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, WIDTH, WIDTH))

    model = Tiny()
    model.layers[0].experts = Fused()
    expert = matrices(PREFIX, ("x",))
    named = {name.replace("self_attn.x", "experts.0.gate_proj"): value for name, value in expert.items()}
    rewrite(folder, lambda t: t | named)
    with pytest.raises(UserError, match=r"experts\.0\.gate_proj.*transformers 4\.57") as refused:
        attached(folder, model)
    assert "name the base" not in str(refused.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, "pissa"),
    "quantised in training": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "layers that are repeated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "tokens that were trained": ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    "parameters that are no module": ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    "QA-LoRA": ({"use_qalora": True}, "use_qalora"),
    "a key of the future": ({"a_key_of_the_future": "on"}, "a_key_of_the_future"),
    "another rank than the tensors'": ({"r": 0}, "r 0"),
    "no scale": ({"lora_alpha": None}, "lora_alpha"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_is_more_than_lora_is_refused_by_its_key(folder: Path, name: str) -> None:
    changes, named = CONFIGS[name]
    configure(folder, **changes)
    with pytest.raises(UserError, match=r"adapter_config\.json.*; ") as refused:
        check_adapter(folder)
    assert named in str(refused.value)


def test_keys_of_a_later_release_at_rest_are_no_obstacle(folder: Path) -> None:
    configure(folder, of_a_later_release=None, another=False, third={}, fourth=[], use_dora=False, lora_bias=False)
    check_adapter(folder)


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


FROM_THE_FILE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "LoRA on an embedding": (
        lambda t: t | {"base_model.model.embed.lora_embedding_A": torch.ones(2, 9)},
        "embedding_A",
    ),
    "empty tensors": (lambda t: {name: value[:0] for name, value in t.items()}, "stage3_gather_16bit_weights"),
    "empty B matrices": (
        lambda t: {name: value[:0] if "lora_B" in name else value for name, value in t.items()},
        "stage3_gather_16bit_weights",
    ),
    "no matrices": (lambda t: {"base_model.model.lm_head.weight": torch.ones(9, WIDTH)}, "no LoRA matrices"),
}
WHEN_LOADED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a tensor without a place": (lambda t: t | {"stray.weight": torch.ones(2)}, "stray.weight"),
    "a lacking matrix": (without("0.self_attn.q_proj.lora_B"), "0.self_attn.q_proj"),
    "never trained": (lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()}, "never trained"),
    "not finite": (lambda t: {name: value / 0 for name, value in t.items()}, "finite"),
    "another width": (lambda t: {n: torch.cat([v, v], 1) if "lora_A" in n else v for n, v in t.items()}, "shape"),
    "two ranks in a pair": (lambda t: {n: v[:, :1] if "lora_B" in n else v for n, v in t.items()}, "ranks"),
}


@pytest.mark.parametrize("name", [*FROM_THE_FILE, *WHEN_LOADED])
def test_tensors_that_do_not_fit_are_refused_with_their_file(folder: Path, name: str) -> None:
    change, named = (FROM_THE_FILE | WHEN_LOADED)[name]
    rewrite(folder, change)
    with pytest.raises(UserError) as refused:
        check_adapter(folder) if name in FROM_THE_FILE else attached(folder)
    assert named in str(refused.value) and "adapter_model.safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_adapter_config_lists_as_trained_whole_has_to_be_there(folder: Path) -> None:
    configure(folder, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="lm_head"):
        attached(folder)
