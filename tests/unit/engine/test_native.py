"""The C++ kernels against torch's operations, bit by bit in bfloat16, and a row's independence of its company."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import random_streams
from support.samplers import IdSampler
from torch import nn

from slipstream.engine.attention import AttentionRules, KVCache
from slipstream.engine.batch import segments
from slipstream.engine.flat import Norm, TorchOps
from slipstream.engine.kernels import native_kernels, pick_kernels
from slipstream.engine.linear import RowContext, swap_linears
from slipstream.engine.lora import AdapterBank, LoraKernels
from slipstream.engine.native import build, ops
from slipstream.engine.native.weights import Panels
from slipstream.engine.noise import GumbelNoise
from slipstream.engine.plan import PlannedSequence
from slipstream.engine.sampling import RowRequest, torch_best
from slipstream.engine.stacks import ModulePlace, PreparedLora, PreparedModule
from slipstream.engine.streams import prepare_streams, torch_stream_states
from slipstream.protocol import SamplingParams

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) on this machine")
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HEADS, KV_HEADS, SIZE, BLOCKS = 6, 2, 16, 40


def agree(got: torch.Tensor, expected: torch.Tensor) -> None:
    """bfloat16 hides the order of a sum; float32 does not."""
    if got.dtype == torch.bfloat16:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@BOTH
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("delta", [False, True])
def test_norm(dtype: torch.dtype, rows: int, delta: bool) -> None:
    norm = Norm(normal(96, dtype=dtype, seed=1), 1e-5)
    more = normal(rows, 96, dtype=dtype, seed=2) if delta else None
    ours, theirs = (normal(rows, 96, dtype=dtype, size=30) for _ in range(2))
    agree(ops.NativeOps().add_norm(ours, more, norm), TorchOps().add_norm(theirs, more, norm))
    agree(ours, theirs)


@BOTH
def test_gate(dtype: torch.dtype) -> None:
    gate_up = normal(5, 64, dtype=dtype, size=6)
    gate_up[0, :6] = torch.tensor([0.0, -0.0, 300.0, -300.0, float("inf"), 1e-30])
    agree(ops.NativeOps().gate(gate_up, nn.SiLU()), TorchOps().gate(gate_up, nn.SiLU()))


def test_another_activation_goes_the_way_of_torch() -> None:
    gate_up = normal(5, 64, dtype=torch.float32)
    assert torch.equal(ops.NativeOps().gate(gate_up, nn.GELU()), TorchOps().gate(gate_up, nn.GELU()))


@BOTH
@pytest.mark.parametrize("dim", [16, 32, 48, 64])
@pytest.mark.parametrize("norms", [False, True])
def test_rotary_and_cache(dtype: torch.dtype, dim: int, norms: bool) -> None:
    rows = 5
    qkv = normal(rows, HEADS + 2 * KV_HEADS, dim, dtype=dtype)
    qkv[0, -1, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])  # an adapter that overflowed
    rotary = normal(rows, dim, dtype=dtype, seed=1), normal(rows, dim, dtype=dtype, seed=2)
    both = (Norm(normal(dim, dtype=dtype, seed=3), 1e-6), Norm(normal(dim, dtype=dtype, seed=4), 1e-6))
    slots = torch.tensor([3, 5, 20, 21, 600])
    found = []
    for operations in (ops.NativeOps(), TorchOps()):
        cache = KVCache([(KV_HEADS, dim)], BLOCKS, SIZE, dtype, CPU)
        q = operations.rotate_store(qkv.clone(), rotary, both if norms else None, cache, 0, slots)
        found.append((q, cache.keys[0], cache.values[0]))
    for ours, theirs in zip(*found, strict=True):
        agree(ours, theirs)


def sequence(index: int, start: int, rows: int, blocks: list[int]) -> PlannedSequence:
    return PlannedSequence(index, (1,) * rows, start, tuple(blocks), False, 0, -1, GREEDY, 0)


def filled(dim: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache([(KV_HEADS, dim)], BLOCKS, SIZE, dtype, CPU)
    cache.keys[0].copy_(normal(*cache.keys[0].shape, dtype=dtype, seed=8))
    cache.values[0].copy_(normal(*cache.values[0].shape, dtype=dtype, seed=9))
    return cache


SHAPES = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5)  # (start, rows)


@BOTH
@settings(max_examples=30, deadline=None)
@given(
    shapes=SHAPES,
    seed=st.integers(0, 99),
    window=st.sampled_from([None, 1, 7, 40]),
    softcap=st.sampled_from([None, 5.0]),
    dim=st.sampled_from([16, 32, 48, 64, 240, 256]),
)
def test_attention(
    dtype: torch.dtype, shapes: list[tuple[int, int]], seed: int, window: int | None, softcap: float | None, dim: int
) -> None:
    """Any sequences, blocks anywhere, against gathered segments."""
    cache = filled(dim, dtype)
    free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    parts, first_row, row = [], [], 0
    for i, (start, rows) in enumerate(shapes):
        width = -(-(start + rows) // SIZE)
        parts.append(sequence(i, start, rows, free[:width]))
        free = free[width:]
        first_row.append(row)
        row += rows
    query = normal(HEADS, row, dim, dtype=dtype, seed=seed)
    rules = AttentionRules(0.3, window, softcap)
    got, expected = (
        lay_out(parts, first_row, SIZE, CPU).attend(query, cache.keys[0], cache.values[0], rules)
        for lay_out in (ops.paged, segments)
    )
    if softcap is None and dtype == torch.float32:
        agree(got, expected)
    else:  # a sum in another order is now and then rounded the other way; the two tanh differ by an ulp
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=2e-2)


@BOTH
def test_what_lies_beyond_a_sequence_is_not_seen(dtype: torch.dtype) -> None:
    """Stale keys of a block's last owner, even if they are not numbers."""
    cache = filled(32, dtype)
    query = normal(HEADS, 1, 32, dtype=dtype)
    part, rules = [sequence(0, 20, 1, [4, 2])], AttentionRules(0.3, None, None)
    before = ops.paged(part, [0], SIZE, CPU).attend(query, cache.keys[0], cache.values[0], rules)
    cache.keys[0][:, 2, 5:] = float("nan")
    cache.values[0][:, 2, 5:] = 1e30
    assert torch.equal(ops.paged(part, [0], SIZE, CPU).attend(query, cache.keys[0], cache.values[0], rules), before)


@BOTH
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Verification, decoding and prefill are one computation, on any number of threads."""
    cache, rules = filled(64, dtype), AttentionRules(0.3, None, None)
    query = normal(HEADS, 30, 64, dtype=dtype)
    blocks = list(range(5, 12))
    threads(2)
    whole = ops.paged([sequence(0, 60, 30, blocks)], [0], SIZE, CPU).attend(
        query, cache.keys[0], cache.values[0], rules
    )
    threads(1)
    for row in (0, 3, 29):
        one = ops.paged([sequence(0, 60 + row, 1, blocks)], [0], SIZE, CPU)
        alone = one.attend(query[:, row : row + 1], cache.keys[0], cache.values[0], rules)
        assert torch.equal(alone[0], whole[row])


@BOTH
def test_an_adapters_row_does_not_depend_on_its_company(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    rows = RowContext()
    layer = nn.ModuleDict({"down_proj": nn.Linear(100, 72, bias=False, dtype=dtype)}).requires_grad_(False)
    groups = swap_linears(layer, rows)
    bank = AdapterBank(groups, rows, torch.empty(0, dtype=dtype), LoraKernels.NATIVE)
    for slot in range(3):
        a, b = normal(100, 16, dtype=dtype, seed=slot), normal(16, 72, dtype=dtype, seed=slot + 7)
        bank.load(slot, PreparedLora({"down_proj": PreparedModule(a, b, None)}, 16))
    x = normal(9, 100, dtype=dtype)
    slots = [0, 0, 0, 0, 0, -1, 1, 2, 2]
    threads(2)
    bank.use(slots)
    whole = layer["down_proj"](x)
    threads(1)
    base = layer["down_proj"]
    for row, slot in enumerate(slots):
        bank.use([slot])
        alone = base(x[row : row + 1])[0]
        if dtype == torch.bfloat16:  # only there is the base's own product known not to depend on it
            assert torch.equal(alone, whole[row])
        else:
            torch.testing.assert_close(alone, whole[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", [Panels(1), Panels(2)], ids=str)
@pytest.mark.parametrize("outputs", [8, 32, 72])
@BOTH
def test_panels_hold_every_weight_in_its_place(layout: Panels, outputs: int, dtype: torch.dtype) -> None:
    """What the kernels read, element by element; what is beyond the adapter's rank and outputs is zero."""
    k = layout.inputs
    a, b = normal(6, 3, dtype=dtype), normal(3, outputs, dtype=dtype, seed=1)
    shrink = torch.zeros(layout.shrink_shape(6, 40), dtype=dtype)
    expand = torch.ones(layout.expand_shape(16, outputs), dtype=dtype)
    layout.put([ModulePlace(PreparedModule(a, b, None), shrink, 16, expand, 1)])
    for (i, c), value in [((i, c), float(a[i, c])) for i in range(6) for c in range(3)]:
        assert float(shrink[i // k, 16 + c, i % k]) == value
    for r in range(16):
        for o in range(-(-outputs // 32) * 32):
            value = float(b[r, o]) if r < 3 and o < outputs else 0.0
            assert float(expand[o // 32, r // k, o % 32, r % k]) == value
    assert int(shrink.count_nonzero()) == a.numel()


def test_an_odd_number_of_inputs_has_no_pairs() -> None:
    assert Panels.of(torch.bfloat16, all_even=False) == Panels.of(torch.float32, all_even=True) == Panels(1)


@BOTH
@pytest.mark.parametrize("inputs", [33, 34, 100])
@pytest.mark.parametrize("rank", [7, 16, 32])
def test_adapters_of_several_panels(dtype: torch.dtype, inputs: int, rank: int) -> None:
    rows = RowContext()
    layer = nn.ModuleDict({"down_proj": nn.Linear(inputs, 72, bias=False, dtype=dtype)}).requires_grad_(False)
    bank = AdapterBank(swap_linears(layer, rows), rows, torch.empty(0, dtype=dtype), LoraKernels.NATIVE)
    x = normal(7, inputs, dtype=dtype, seed=2)
    expected = layer["down_proj"](x).double()
    slots = [1, 1, 0, -1, 2, 2, 2]
    for slot in range(3):
        a, b = normal(inputs, rank, dtype=dtype, seed=slot), normal(rank, 72, dtype=dtype, seed=slot + 7)
        bank.load(slot, PreparedLora({"down_proj": PreparedModule(a, b, None)}, rank))
        mine = torch.tensor(slots) == slot
        expected[mine] += x[mine].double() @ a.double() @ b.double()
    bank.use(slots)
    error = (layer["down_proj"](x).double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)


@BOTH
@pytest.mark.parametrize("hidden", [16, 48, 24])
@pytest.mark.parametrize(("rank", "conditioned"), [(16, True), (7, True), (20, False), (None, False)])
def test_stream_states(
    dtype: torch.dtype, hidden: int, rank: int | None, conditioned: bool, threads: Callable[[int], None]
) -> None:
    """Of several adapters, each row its own number of them; but for a sum's order the same as torch's."""
    like = torch.empty(0, dtype=dtype)
    kinds = [
        prepare_streams(random_streams(hidden, k, rank=rank, conditioned=conditioned, seed=k), like) for k in (3, 1, 5)
    ]
    streams, counts = [kinds[0], kinds[1], kinds[0], kinds[2]], [2, 1, 3, 4]
    h, embeddings = normal(4, hidden, dtype=dtype), normal(4, hidden, dtype=dtype, seed=1)
    expected = torch_stream_states(h, embeddings, streams, counts)
    for count in (1, 2):
        threads(count)
        got = ops.stream_states(h, embeddings, streams, counts)
        error = float((got - expected).float().abs().max())
        assert error <= (1e-5 if dtype == torch.float32 else 2**-6)
    if hidden % 16 == 0:  # else it went the way of torch
        assert torch.equal(ops.stream_states(h[2:3], embeddings[2:3], streams[2:3], [3]), got[3:6])


@BOTH
@pytest.mark.parametrize("width", [1, 5, 16, 100, 1000])
def test_best(dtype: torch.dtype, width: int) -> None:
    logits = normal(9, width + 3, dtype=dtype, size=3)[:, :width]
    logits[1] = 2.0
    logits[2, -1] = logits[3, 0] = 40.0
    logits[4] = float("-inf")
    ours, theirs = ops.best(logits), torch_best(logits)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.values, theirs.values.float())
    if width > 1:
        finite = theirs.gaps.isfinite()
        torch.testing.assert_close(ours.gaps[finite], theirs.gaps[finite].float(), rtol=1e-2, atol=1e-2)


SAMPLED = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-7, 0.3, 0.8, 1.0, 2.5]),
        "top_k": st.sampled_from([-1, 0, 1, 7, 500]),
        "top_p": st.sampled_from([1e-6, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


@BOTH
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(SAMPLED, min_size=1, max_size=5),
    width=st.sampled_from([1, 5, 16, 333, 4100]),
    spread=st.sampled_from([0.1, 3.0, 20.0]),
)
def test_sampled_rows(dtype: torch.dtype, rows: list[dict[str, Any]], width: int, spread: float) -> None:
    """The kernel's tokens are torch's, alone and with candidates scored again; a row does not depend on its company."""
    full = normal(len(rows), width, dtype=torch.float32, seed=width, size=spread)
    logits = full.to(dtype)
    requests = [RowRequest(SamplingParams(**row), position) for position, row in enumerate(rows)]
    kernel, torchs = (IdSampler(width, frozenset(), CPU, draw=draw) for draw in (ops.draw, None))
    assert kernel.ids(logits, requests, None) == torchs.ids(logits, requests, None)

    def exact(row: int, ids: torch.Tensor) -> torch.Tensor:
        return full[row, ids]

    together = kernel.ids(logits, requests, exact)
    assert together == torchs.ids(logits, requests, exact)
    for i, request in enumerate(requests):
        assert kernel.ids(logits[i : i + 1], [request], lambda _, ids, i=i: exact(i, ids)) == together[i : i + 1]  # type: ignore[misc]


def test_rows_that_are_not_numbers_are_drawn_all_the_same() -> None:
    logits = torch.full((3, 100), float("nan"))
    logits[1] = float("-inf")
    logits[2, 7] = 1.0
    requests = [RowRequest(SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1), 0)] * 3
    assert IdSampler(100, frozenset(), CPU, draw=ops.draw).ids(logits, requests, None) == [0, 0, 7]


def test_the_kernels_noise_is_the_samplers() -> None:
    params = SamplingParams(temperature=1.0, seed=-5)
    found = ops.draw(torch.zeros(1, 5000), [RowRequest(params, 9)], 5000)
    noise = torch.empty(5000)
    noise[found.ids[0]] = found.noise[0]
    torch.testing.assert_close(noise, GumbelNoise(5000, CPU).row(-5, 9), rtol=1e-6, atol=1e-6)


def test_what_they_do_not_serve_goes_the_way_of_torch() -> None:
    plain = native_kernels(torch.float16, [(2, 64)], 16)
    assert plain.attention is segments
    assert plain.lora is LoraKernels.BATCHED
    for shape, size in (((2, 40), 16), ((2, 64), 8), ((2, 512), 16)):
        assert native_kernels(torch.float32, [shape], size).attention is segments
    assert native_kernels(torch.float32, [(2, 64)], 32).attention is ops.paged


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing built yet, and built without optimisation, which takes seconds less; yields the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", tuple(flag for flag in build.FLAGS if flag != "-O3"))
    build.library.cache_clear()
    yield tmp_path / "slipstream"
    build.library.cache_clear()


def test_they_are_built_once(anew: Path) -> None:
    assert build.library() is not None
    built = list(anew.iterdir())
    assert [path.suffix for path in built] == [".so"]
    build.library.cache_clear()
    before = built[0].stat().st_mtime_ns
    assert build.library() is not None
    assert built[0].stat().st_mtime_ns == before


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_engine_runs_on_torch(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "COMPILERS", (compiler,))
    with caplog.at_level(logging.WARNING):
        kernels = pick_kernels(CPU, (), torch.float32, [(2, 64)], 16)
    assert kernels.lora is LoraKernels.BATCHED
    assert kernels.attention is segments
    assert type(kernels.ops) is TorchOps
    assert "torch's own operations" in caplog.text


def test_a_home_that_cannot_be_written_is_no_matter(
    anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    anew.write_text("a file where the folder would be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    assert build.library() is not None
    assert list((tmp_path / "scratch").glob("slipstream-kernels-*/*.so"))


def test_a_library_in_a_folder_of_someone_else_is_not_run(
    anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert build.library() is not None
    assert anew.exists()
    build.library.cache_clear()
    monkeypatch.setattr("os.getuid", lambda: 4242)
    assert build.library() is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")
def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    """Two would compete for the same cores (docs/decisions/0005)."""
    script = (
        "import torch\nfrom slipstream.engine.native.build import library\nassert library() is not None\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(eval(done.stdout)) == 1
