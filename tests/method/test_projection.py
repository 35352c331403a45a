"""Projectors: the same signs everywhere, bounded memory, and none that is silently wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compute_gradient_features
from tests.helpers.reference import CPU, EXPECTED, encode_golden, in_batches, load_golden, step_of
from tive.method.projection import TrakBasic, make_projector, prove
from tive.method.signs import TorchSigns, draw_signs, key_of, philox, scaled
from tive.util.errors import UserError

GIB = 2**30


def make(kind: str, proj_dim: int = 256, seed: int = 0):
    return make_projector(kind, seed, proj_dim, CPU, 16384, GIB)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_the_generator_gives_the_published_philox_words(counter, key, expected):
    words = philox(torch.tensor([counter[0]]), torch.tensor([counter[1]]), key)
    assert words.flatten().tolist() == expected


def philox_in_plain_integers(row: int, group: int, key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 with Python's unbounded integers, from the definition in the paper."""
    c, k = [row, group, 0, 0], list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_a_sign_is_a_function_of_seed_matrix_row_and_column_alone():
    key = key_of(3, "layers.1.self_attn.q_proj.A")
    signs = draw_signs(key, 0, 300, 700)
    for row, column in [(0, 0), (7, 31), (7, 32), (299, 699), (128, 127), (128, 128)]:
        word = philox_in_plain_integers(row, column // 128, key)[column % 128 // 32]
        assert signs[row, column] == 1 - 2 * (word >> (column % 32) & 1)
    assert torch.equal(draw_signs(key, 100, 200, 260), signs[100:200, :260])
    assert set(signs.unique().tolist()) == {-1, 1}


def test_signs_are_balanced_and_the_streams_of_matrices_and_seeds_are_unlike():
    streams = [draw_signs(key_of(seed, name), 0, 512, 256).float().flatten() for seed in (0, 1) for name in ("a", "b")]
    products = torch.stack(streams) @ torch.stack(streams).T / streams[0].numel()
    assert (products - torch.eye(4)).abs().max() < 6 / 512
    rows = streams[0].view(512, 256)
    assert (rows @ rows.T / 256 - torch.eye(512)).abs().max() < 7 / 16
    assert (rows.T @ rows / 512 - torch.eye(256)).abs().max() < 7 / 512**0.5


@pytest.mark.parametrize("proj_dim, size", [(64, 10), (300, 1000), (1024, 257)])
def test_kept_and_redrawn_signs_give_the_plain_product(proj_dim, size):
    gradients = torch.randn(5, size)
    expected = gradients @ draw_signs(key_of(0, "m"), 0, size, proj_dim).float()
    for budget in (GIB, 0):
        projector = TorchSigns(0, proj_dim, CPU, size, budget)
        assert projector.keep == bool(budget)
        for _ in range(2):
            assert torch.allclose(projector.project("m", gradients), expected, rtol=1e-5, atol=1e-3)
        assert bool(projector.kept) == bool(budget)


def in_a_process_of_its_own(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )


def test_the_triton_kernel_draws_the_same_signs_and_gives_the_same_sums():
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    done = in_a_process_of_its_own("-m", "tests.helpers.triton_interpreter", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tive.method.signs_triton import _project_kernel
arguments = dict(gradients="*fp16", partial="*fp32", batch="i32", rows="i32", columns="i32", rows_per_part="i32",
                 key0="i64", key1="i64", BATCH="constexpr", BLOCK="constexpr")
source = ASTSource(_project_kernel, arguments, constexprs=dict(BATCH=16, BLOCK=64))
print(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"].count("mma.sync"))
"""


def test_the_triton_kernel_compiles_for_a_gpu_and_uses_its_matrix_units(tmp_path):
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    done = in_a_process_of_its_own("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_gradients_are_scaled_before_they_are_rounded_to_half():
    gradients = torch.tensor([[1e-9, 2e-9, -5e-10], [1e9, 3e8, -7e5], [0.0, 0.0, 0.0]])
    half, scale = scaled(gradients, torch.float16)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float() * scale, gradients, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["auto", "rademacher", "trak_basic"])
def test_each_projector_is_linear_and_repeats_itself_and_tells_matrices_and_seeds_apart(kind):
    projector, other_seed = make(kind), make(kind, seed=1)
    x, y = torch.randn(3, 50), torch.randn(3, 50)
    first = projector.project("a", x)
    projector.project("b", y)
    assert torch.equal(projector.project("a", x), first)
    assert torch.allclose(projector.project("a", x + 2 * y), first + 2 * projector.project("a", y), atol=1e-3)
    assert not torch.allclose(projector.project("b", x), first)
    assert not torch.allclose(other_seed.project("a", x), first)


@pytest.mark.parametrize("kind", ["rademacher", "trak_basic"])
def test_the_golden_cosines_survive_projection_at_every_batch_size(kind):
    reference = load_golden()
    encoded = encode_golden(reference)[:10]
    projector = make(kind, proj_dim=512)
    results = [in_batches(step_of(reference, projector), encoded, size) for size in (3, 16)]
    for result in results:
        assert (result.norms - torch.tensor(EXPECTED["norms"])[:10]).abs().max() < 2e-4
        # 45 pairs, each off by about 1/sqrt(512): five of those do not happen by chance.
        assert (result.cosines - torch.tensor(EXPECTED["cosines"])[:10, :10]).abs().max() < 5 / 512**0.5
        assert torch.allclose(result.features, results[0].features, atol=2e-3)


def test_a_projector_that_returns_zeros_or_nonsense_is_refused(monkeypatch):
    monkeypatch.setattr(TrakBasic, "project", lambda self, matrix, gradients: torch.zeros(len(gradients), 256))
    with pytest.raises(UserError, match="trak_basic does not work here: the sketch is zero"):
        make("trak_basic")
    for wrong, complaint in [
        (lambda x: x.float() @ torch.ones(x.shape[1], 256), "norms are not kept"),
        (lambda x: x.float() @ draw_signs((9, 9), 0, x.shape[1], 256).float(), "differ from the torch reference"),
        (lambda x: torch.full((len(x), 256), torch.nan), "not finite"),
        (lambda x: (x.float() @ draw_signs((9, 9), 0, x.shape[1], 256).float()) ** 3, "not linear"),
    ]:
        monkeypatch.setattr(TorchSigns, "project", lambda self, matrix, x, wrong=wrong: wrong(x))
        with pytest.raises(UserError, match=complaint):
            make("rademacher")


def test_auto_says_what_it_took_and_a_named_one_that_cannot_work_is_an_error():
    assert "torch" in make("auto").about
    with pytest.raises(UserError, match=r"--projector trak_cuda does not work here: .*use --projector auto"):
        make("trak_cuda")
    with pytest.raises(UserError, match="--proj_dim 0"):
        make("auto", proj_dim=0)


def test_signs_are_kept_only_within_the_budget():
    assert make_projector("auto", 0, 64, CPU, 1000, 64_000).about == "torch, signs kept between batches"
    assert make_projector("auto", 0, 64, CPU, 1000, 63_999).about == "torch, signs drawn for each batch"


def test_every_projector_of_the_command_line_proves_itself_or_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compute_gradient_features.py", "--help"])
    with pytest.raises(SystemExit):
        compute_gradient_features.parse_arguments()
    kinds = re.search(r"--projector \{([^}]*)\}", capsys.readouterr().out)[1].split(",")
    assert set(kinds) == {"auto", "rademacher", "trak_cuda", "trak_basic"}
    for kind in kinds:
        try:
            prove(make(kind), CPU)
        except UserError as error:
            assert f"--projector {kind} does not work here" in str(error)
