"""Projectors: inner products kept, the same numbers everywhere, bounded memory, and none that is silently wrong."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import compute_gradient_features
from tests.helpers.reference import CPU, EXPECTED, encode_golden, in_batches, load_golden, step_of
from tive.method.projection import (
    KINDS,
    Sparse,
    TrakBasic,
    block_rotations,
    make_projector,
    project,
    prove,
    scaled,
    sign_octets,
    sparse_projection,
)

SIGNS = [250, 55, 113, 24, 81, 109, 251, 173, 182, 78, 0, 130, 247, 59, 190, 139]
ROTATIONS = [69, 28, 61, 41, 34, 28, 47, 60, 64, 54]
SIZES = [(64, 10), (64, 64), (64, 65), (300, 1000), (1024, 257), (7, 1000), (1, 5)]


def make(kind: str, proj_dim: int = 256, seed: int = 0):
    return make_projector(kind, seed, proj_dim, CPU)


def test_signs_and_rotations_are_the_same_on_every_machine_and_do_not_depend_on_how_many_are_drawn():
    assert sign_octets(0, "layers.0.self_attn.q_proj.A", 128).tolist() == SIGNS
    assert block_rotations(0, "layers.0.self_attn.q_proj.A", 1000, 100).tolist() == ROTATIONS
    assert np.array_equal(sign_octets(3, "m", 1000)[:8], sign_octets(3, "m", 64))


def test_every_bit_of_the_seed_and_the_name_count_and_their_streams_are_unlike():
    seeds = [0, 1, 2**31, 2**32, 2**33 + 2**32, 2**40, 2**63, 2**64, -1]
    streams = [np.unpackbits(sign_octets(seed, "layers.0.A", 4096)) for seed in seeds]
    streams.append(np.unpackbits(sign_octets(0, "layers.0.B", 4096)))
    signs = 1.0 - 2.0 * np.array(streams)
    assert abs(signs @ signs.T / 4096 - np.eye(len(signs))).max() < 6 / 64
    assert abs(signs.mean(axis=1)).max() < 6 / 64
    rotations = np.array([block_rotations(seed, "m", 4096, 16) for seed in seeds])
    assert rotations.min() == 0 and rotations.max() == 15
    assert abs((rotations[:, :, None] == np.arange(16)).mean(axis=1) - 1 / 16).max() < 6 * (1 / 16 / 256) ** 0.5
    x = torch.randn(1, 1000)
    sketches = [project(Sparse(seed, 64, CPU), "m", x) for seed in seeds]
    assert len({tuple(sketch.flatten().tolist()) for sketch in sketches}) == len(seeds)


def sparse(proj_dim: int, way: str, seed: int = 0) -> Sparse:
    """The projector as it works on a CPU, block by block, or on a GPU, gathered."""
    projector = Sparse(seed, proj_dim, CPU)
    projector.block_by_block = way == "blocks"
    return projector


@pytest.mark.parametrize("way", ["blocks", "gathered"])
@pytest.mark.parametrize("proj_dim, entries", SIZES)
def test_the_sparse_projection_is_its_formula(proj_dim, entries, way):
    vectors = torch.randn(5, entries)
    expected = torch.from_numpy(sparse_projection(2, "m", vectors.double().numpy(), proj_dim))
    sketch = project(sparse(proj_dim, way, 2), "m", vectors)
    assert torch.allclose(sketch.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["sparse", "trak"])
def test_small_gradients_are_projected_as_large_ones_are(kind):
    vectors = torch.randn(4, 3000)
    vectors[1] *= 1e3
    small, large = (project(make(kind), "m", scale * vectors) for scale in (1e-6, 1.0))
    assert ((1e6 * small - large).norm(dim=1) < 1e-5 * large.norm(dim=1)).all()


def test_what_a_projector_that_rounds_to_half_is_given_has_a_largest_entry_of_one():
    unit, scale = scaled(torch.tensor([[1e-8, -4e-8], [0.0, 0.0], [3e5, 1.0]]))
    assert unit.abs().amax(dim=1).tolist() == [1, 0, 1]
    assert torch.allclose((unit.half().float() * scale)[0], torch.tensor([1e-8, -4e-8]), rtol=1e-3)


@pytest.mark.parametrize("way", ["blocks", "gathered"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_summed_in_float32(dtype, way):
    # Sums of a thousand blocks, in half precision off by a tenth of themselves; and entries that float16 barely holds.
    for scale in (1.0, 1e-7):
        vectors = (1 + torch.rand(2, 64 * 1000)).mul(scale).to(dtype)
        expected = torch.from_numpy(sparse_projection(0, "m", vectors.double().numpy(), 64))
        sketch = project(sparse(64, way), "m", vectors)
        assert sketch.dtype == torch.float32
        assert (sketch.double() - expected).norm() < 1e-5 * expected.norm()


def pairs_of_vectors(proj_dim: int, entries: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs that are hard in different ways: unlike, alike, equal, few entries, large entries in one column."""
    generator = torch.Generator().manual_seed(entries)
    x, y = torch.randn(2, entries, generator=generator)
    few = torch.zeros(entries)
    few[:: max(1, entries // 4)] = 1.0
    column = torch.full((entries,), 0.01)
    column[::proj_dim] = 3.0
    return [(x, y), (x, x + 0.5 * y), (x, x), (few, few), (column, column), (column, x)]


@pytest.mark.parametrize(
    "proj_dim, sizes",
    [(32, [32 * 40]), (32, [20]), (32, [50]), (32, [128, 20, 20, 128]), (48, [48 * 9 + 5] * 2)],
    ids=["many blocks", "part of a block", "a block and a part", "several matrices", "blocks and matrices"],
)
def test_inner_products_are_unbiased_and_within_the_dense_projections_bound(proj_dim, sizes):
    pairs = pairs_of_vectors(proj_dim, sum(sizes))
    vectors = torch.stack([vector for pair in pairs for vector in pair])
    seeds = 500
    products = torch.zeros(seeds, len(pairs), dtype=torch.float64)
    for seed in range(seeds):
        projector = Sparse(seed, proj_dim, CPU)
        parts = vectors.split(sizes, dim=1)
        sketch = sum(project(projector, f"matrix {number}", part) for number, part in enumerate(parts)).double()
        products[seed] = (sketch[0::2] * sketch[1::2]).sum(dim=1) / proj_dim
    x, y = vectors[0::2].double(), vectors[1::2].double()
    true = (x * y).sum(dim=1)
    bound = (x.square().sum(dim=1) * y.square().sum(dim=1) + true.square()) / proj_dim
    assert ((products.mean(dim=0) - true).abs() < 5 * (bound / seeds).sqrt() + 1e-5).all()
    # The products of few entries have heavy tails, so their variance over the seeds is itself known to a third or so.
    assert (products.var(dim=0) < 1.35 * bound + 1e-9).all()


@pytest.mark.parametrize("way", ["blocks", "gathered"])
def test_a_batch_gives_the_same_bits_as_its_records_alone_every_time(way, monkeypatch):
    vectors = torch.randn(9, 5000)
    whole = project(sparse(128, way), "m", vectors)
    assert torch.equal(project(sparse(128, way), "m", vectors), whole)
    assert torch.equal(torch.cat([project(sparse(128, way), "m", vector[None]) for vector in vectors]), whole)
    monkeypatch.setattr("tive.method.projection._ENTRIES_AT_ONCE", 1)
    assert torch.equal(project(sparse(128, way), "m", vectors), whole)


def test_what_is_kept_between_batches_is_a_bit_for_each_entry_and_eight_bytes_for_each_block():
    projector = Sparse(0, 512, CPU)
    for number in range(3):
        project(projector, f"m{number}", torch.randn(2, 100_000))
        project(projector, f"m{number}", torch.randn(2, 100_000))
    kept = sum(part.nbytes for parts in projector.drawn.values() for part in parts)
    assert kept == 3 * 8 * (-(-100_000 // 64) + 196)


def test_on_a_gpu_the_number_of_operations_does_not_grow_with_the_blocks():
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.count += 1
            return function(*arguments, **(options or {}))

    counts = []
    for entries in (100, 100_000):
        projector = sparse(64, "gathered")
        with Counter() as counter:
            project(projector, "m", torch.randn(1, entries))
        counts.append(counter.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["auto", "sparse", "trak"])
def test_each_projector_is_linear_and_repeats_itself_and_tells_matrices_and_seeds_apart(kind):
    projector, other_seed = make(kind), make(kind, seed=1)
    x, y = torch.randn(3, 50), torch.randn(3, 50)
    first = project(projector, "a", x)
    project(projector, "b", y)
    assert torch.equal(project(projector, "a", x), first)
    assert torch.allclose(project(projector, "a", x + 2 * y), first + 2 * project(projector, "a", y), atol=1e-3)
    assert not torch.allclose(project(projector, "b", x), first)
    assert not torch.allclose(project(other_seed, "a", x), first)


@pytest.mark.parametrize("kind", ["sparse", "trak"])
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
    monkeypatch.setattr(TrakBasic, "add", lambda self, sketch, matrix, gradients: None)
    with pytest.raises(ValueError, match="trak does not work here: the sketch is zero"):
        make("trak")

    def other_signs(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(sparse_projection(9, "proof", x.numpy(), 256)).float()

    for wrong, complaint in [
        (lambda x: x @ torch.ones(x.shape[1], 256), "norms are not kept"),
        (other_signs, "differs from the formula"),
        (lambda x: torch.full((len(x), 256), torch.nan), "not finite"),
        (lambda x: other_signs(x) ** 3, "not linear"),
        (lambda x: other_signs(x).half().float() * (x.abs().amax(1, keepdim=True) > 1e-3), "sketch is zero"),
        (lambda x: other_signs(x.half().float()), "small gradients are lost"),
    ]:
        monkeypatch.setattr(Sparse, "add", lambda self, sketch, matrix, x, wrong=wrong: sketch.add_(wrong(x)))
        with pytest.raises(ValueError, match=f"sparse does not work here: .*{complaint}"):
            make("sparse")


def test_auto_is_sparse_without_a_gpu_and_a_named_one_that_cannot_work_is_an_error():
    assert make("auto").kind == "sparse/2"
    with pytest.raises(ValueError, match="trak does not work here: "):
        make_projector("trak", 0, 64, torch.device("cuda"))
    with pytest.raises(ValueError, match="to 0 features"):
        make("auto", proj_dim=0)
    with pytest.raises(ValueError, match="rademacher is none of the projectors auto, sparse"):
        make("rademacher")


def test_auto_takes_traks_on_a_gpu_where_it_works_and_says_what_else_there_is(monkeypatch):
    class Working(TrakBasic):
        def __init__(self, seed, proj_dim, device):
            super().__init__(seed, proj_dim, CPU)
            self.kind, self.about = "trak_cuda", "a stand-in"

    gpu = torch.device("cuda")
    monkeypatch.setattr("tive.method.projection.prove", lambda projector, device: None)
    monkeypatch.setattr("tive.method.projection.TrakCuda", Working)
    taken = make_projector("auto", 0, 64, gpu)
    assert taken.kind == "trak_cuda" and "sparse gives features of the same quality for less time" in taken.about

    def broken(seed, proj_dim, device):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr("tive.method.projection.TrakCuda", broken)
    monkeypatch.setattr("tive.method.projection.Sparse", lambda seed, proj_dim, device: Sparse(seed, proj_dim, CPU))
    taken = make_projector("auto", 0, 64, gpu)
    assert taken.kind == "sparse/2" and taken.about.endswith("trak does not work here: no kernel image is available")


def test_every_projector_of_the_command_line_proves_itself_or_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compute_gradient_features.py", "--help"])
    with pytest.raises(SystemExit):
        compute_gradient_features.parse_arguments()
    kinds = re.search(r"--projector \{([^}]*)\}", capsys.readouterr().out)[1].split(",")
    assert tuple(kinds) == KINDS
    for kind in kinds:
        try:
            prove(make(kind), CPU)
        except ValueError as error:
            assert f"{kind} does not work here" in str(error)
