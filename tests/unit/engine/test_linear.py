"""The adapter bank against a plain loop over rows in float64: any mix of adapters, in any order of coming and going.

Over 400 lines: every test here runs through each way of computing it, which are set up once at the top.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from slipstream.adapters.weights import AdapterWeights, LoraModule
from slipstream.engine.head import Head
from slipstream.engine.linear import GroupMember, RowContext, as_is, as_packed, swap_linears
from slipstream.engine.lora import MAX_WASTE, AdapterBank, LoraKernels
from slipstream.engine.packed import can_prepack
from slipstream.engine.stacks import PreparedLora, StackTile

HIDDEN, KV, INNER = 16, 8, 24
SLOTS = 6
SIZES = {
    "attn.q_proj": (HIDDEN, HIDDEN),
    "attn.k_proj": (KV, HIDDEN),
    "attn.v_proj": (KV, HIDDEN),
    "attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel for this platform")
KERNELS = [pytest.param(k, marks=NO_TRITON if k is LoraKernels.TRITON else ()) for k in LoraKernels]


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.k_proj = nn.Linear(HIDDEN, KV, bias=bias)
        self.v_proj = nn.Linear(HIDDEN, KV, bias=False)  # a group may be mixed
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)


class Mlp(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=bias)


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(bias)
        self.mlp = Mlp(bias)


class World:
    """A layer, its swapped twin, and a bank; adapters are kept for the reference."""

    def __init__(
        self, bias: bool = True, dtype: torch.dtype = torch.float32, kernels: LoraKernels = LoraKernels.BATCHED
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = Layer(bias).requires_grad_(False).to(dtype)
        self.plain = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        self.layer = layer
        self.rows = RowContext()
        self.groups = swap_linears(layer, self.rows, as_is if kernels is LoraKernels.PLAIN else as_packed)
        self.bank = AdapterBank(self.groups, self.rows, torch.empty(0, dtype=dtype), kernels)
        self.adapters: dict[int, AdapterWeights] = {}

    def load(self, slot: int, weights: AdapterWeights) -> None:
        self.bank.load(slot, self.bank.prepare(weights))
        self.adapters[slot] = weights

    def unload(self, slot: int) -> None:
        self.bank.unload(slot)
        del self.adapters[slot]

    def reference(self, name: str, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """Row by row, float64, straight from the papers."""
        linear = self.plain[name]
        weight = linear.weight.double()
        out = []
        for row, slot in zip(x.double(), slots, strict=True):
            module = self.adapters[slot].lora.get(name) if slot >= 0 else None
            w = weight
            if module is not None:
                w = weight + module.scale * module.b.double() @ module.a.double()
                if module.magnitude is not None:
                    w = module.magnitude.double().unsqueeze(1) * w / w.norm(dim=1, keepdim=True)
            out.append(w @ row)
        y = torch.stack(out)
        return y + linear.bias.double() if linear.bias is not None else y

    def check(self, slots: list[int], seed: int = 0, tolerance: float = 1e-5) -> None:
        """Every module, for rows of these slots."""
        self.bank.use(slots)
        for name, (_, width) in SIZES.items():
            x = rows_of(len(slots), width, seed).to(self.plain[name].weight.dtype)
            got = self.layer.get_submodule(name)(x)
            expected = self.reference(name, x, slots)
            error = float((got.double() - expected).abs().max() / (1 + expected.abs().max()))
            assert error < tolerance, f"{name}: off by {error:.1e}"


def rows_of(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def adapter(
    seed: int, ranks: Mapping[str, int], dora: frozenset[str] = frozenset(), scale: float = 1.5, size: float = 0.5
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, rank in ranks.items():
        out, width = SIZES[name]
        a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
        magnitude = torch.rand(out, generator=generator) + 0.5 if name in dora else None
        lora[name] = LoraModule(size * a, size * b, scale, magnitude)
    return AdapterWeights(lora, None)


ALL = dict.fromkeys(SIZES, 4)
MIXED_RANKS = {"attn.q_proj": 2, "attn.k_proj": 7, "attn.v_proj": 1, "mlp.gate_proj": 3, "mlp.down_proj": 8}
V_ONLY = {"attn.v_proj": 5}
NOTHING: dict[str, int] = {}
DORA = frozenset({"attn.q_proj", "attn.v_proj", "mlp.down_proj"})


def full_world(
    bias: bool = True, dtype: torch.dtype = torch.float32, kernels: LoraKernels = LoraKernels.BATCHED
) -> World:
    world = World(bias, dtype, kernels)
    world.load(0, adapter(1, ALL))
    world.load(1, adapter(2, MIXED_RANKS, scale=0.25))
    world.load(2, adapter(3, V_ONLY))
    world.load(3, adapter(4, ALL, dora=DORA))
    world.load(4, adapter(5, MIXED_RANKS, dora=DORA & MIXED_RANKS.keys()))
    world.load(5, adapter(6, NOTHING))
    return world


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "slots",
    [
        [-1],
        [-1, -1, -1],
        [0],
        [0, 0, 0],
        [1, -1, 1],
        [2, 2],
        [3],
        [3, 3],
        [3, -1],
        [5, 5],
        [5, 0, -1],
        [0, 1, 2, 3, 4, 5, -1],
        [4, -1, 2, 2, 0, 3, 1, 1, 4, -1, 5],
    ],
    ids=str,
)
def test_every_row_is_served_by_its_own_adapter(slots: list[int], bias: bool, kernels: LoraKernels) -> None:
    full_world(bias, kernels=kernels).check(slots)


def test_adapters_change_the_output() -> None:
    """Or all of this would show nothing."""
    world = full_world()
    x = rows_of(1, HIDDEN)
    for slot, name in [(0, "attn.q_proj"), (1, "attn.k_proj"), (2, "attn.v_proj"), (3, "attn.q_proj")]:
        assert float((world.reference(name, x, [slot]) - world.reference(name, x, [-1])).abs().max()) > 0.1


def test_siblings_are_fused_and_names_kept() -> None:
    world = World()
    assert [g.names for g in world.groups.values()] == [
        ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        ("attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    for name, size in SIZES.items():
        member = world.layer.get_submodule(name)
        assert isinstance(member, GroupMember)
        assert (member.out_features, member.in_features) == size


def test_inputs_of_more_dimensions_keep_their_shape() -> None:
    world = full_world()
    slots = [0, -1, 3, 1, 1, 4]
    world.bank.use(slots)
    x = rows_of(6, HIDDEN)
    for shape in [(1, 6), (2, 3)]:
        cube = x.view(*shape, HIDDEN)
        for name in ("attn.k_proj", "attn.q_proj", "attn.v_proj"):
            got = world.layer.get_submodule(name)(cube)
            assert got.shape == (*shape, SIZES[name][0])
            torch.testing.assert_close(
                got.flatten(0, 1).double(), world.reference(name, x, slots), rtol=2e-5, atol=2e-5
            )


@pytest.mark.parametrize("order", ["qkv", "vkq", "kqv", "qqkkvv", "vvv", "qkqvqk", "v"])
def test_members_may_be_asked_in_any_order_and_again(order: str) -> None:
    world = full_world()
    for seed, slots in enumerate([[0, 1, -1], [3, 3, 3], [2, 4, 0]]):
        world.bank.use(slots)
        x = rows_of(3, HIDDEN, seed)
        for letter in order:
            name = f"attn.{letter}_proj"
            got = world.layer.get_submodule(name)(x)
            torch.testing.assert_close(got.double(), world.reference(name, x, slots), rtol=2e-5, atol=2e-5)


def test_nothing_is_kept_once_every_member_was_asked() -> None:
    world = full_world()
    world.bank.use([0])
    x = rows_of(1, HIDDEN)
    for letter in "qkv":
        world.layer.get_submodule(f"attn.{letter}_proj")(x)
    world.bank.use([1])  # the same tensor, another adapter
    got = world.layer.get_submodule("attn.q_proj")(x)
    torch.testing.assert_close(got.double(), world.reference("attn.q_proj", x, [1]), rtol=2e-5, atol=2e-5)


# -- coming and going -------------------------------------------------------------------------------------------------


def tiles(world: World) -> list[StackTile]:
    found = [t for t in world.rows.adapters if isinstance(t, StackTile)]
    assert len(found) == len(world.rows.adapters)
    return found


def world_of_rank_4(count: int = SLOTS) -> World:
    world = World()
    for slot in range(count):
        world.load(slot, adapter(slot, ALL))
    return world


def test_all_adapters_of_a_decode_step_share_one_tile_without_copies() -> None:
    world = world_of_rank_4()
    world.check([0, 1, 2, 3, 4, 5])
    (tile,) = tiles(world)
    assert (tile.count, tile.width, tile.gather, tile.scatter) == (6, 1, None, None)
    world.check([0, 0, 1, 1, 2, 2])
    assert [(t.count, t.width, t.gather) for t in tiles(world)] == [(3, 2, None)]


def test_the_same_rows_again_cost_no_new_layout() -> None:
    world = world_of_rank_4()
    world.check([0, 1])
    (before,) = tiles(world)
    world.check([-1])
    assert not world.rows.adapters
    world.check([0, 1])
    assert tiles(world) == [before]


def test_a_long_prompt_is_not_padded_to_by_its_neighbours() -> None:
    world = world_of_rank_4()
    slots = [0, 1, 2] + [3] * 64
    order = world.bank.order([3, 0, 1, 2], [64, 1, 1, 1])
    assert order[-1] == 0  # the prompt last, those of one row together
    world.check(slots)
    assert [(t.start, t.stop, t.count * t.width) for t in tiles(world)] == [(0, 3, 3), (3, 67, 64)]


@pytest.mark.parametrize("others", [[3], [5], [2, 4], [1, 5]])
def test_long_prompts_of_adapters_far_apart_are_padded_to_twice_their_rows_at_most(others: list[int]) -> None:
    world = world_of_rank_4()
    world.check([0, 1, 2, 3, 4, 5])
    slots = [0] * 20 + [slot for slot in others for _ in range(18)]
    world.check(slots)
    assert sum(t.count * t.width for t in tiles(world)) <= MAX_WASTE * len(slots)


def test_order_puts_rows_of_an_adapter_together_whatever_came_between() -> None:
    world = full_world()
    slots, counts = [4, -1, 0, 4, 5, 0, -1], [1, 2, 1, 4, 1, 1, 1]
    order = world.bank.order(slots, counts)
    assert sorted(order) == list(range(7))
    laid_out = [slots[i] for i in order]
    assert all(laid_out.count(s) == laid_out[laid_out.index(s) :].count(s) for s in laid_out)
    assert laid_out == sorted(laid_out, key=laid_out.index)
    world.check([slots[i] for i in order for _ in range(counts[i])])


def test_adapters_far_apart_move_together_one_a_step() -> None:
    world = world_of_rank_4()
    world.check([0, 1, 2, 3, 4, 5])
    for _ in range(3):
        world.bank._layouts.clear()
        world.check([0, 5])
    (tile,) = tiles(world)
    assert tile.count <= 4
    world.check([0, 1, 2, 3, 4, 5])  # whoever gave way comes back


@pytest.mark.parametrize("kernels", [k for k in KERNELS if LoraKernels(str(k.values[0])).from_anywhere])
def test_kernels_that_take_adapters_anywhere_find_each_where_it_was_put(kernels: LoraKernels) -> None:
    world = World(kernels=kernels)
    for slot in range(6):
        world.load(slot, adapter(slot, dict.fromkeys(SIZES, 4)))
        world.check([slot])
    written: list[int] = []
    (stack,) = world.bank._stacks.values()
    write = stack._write

    def watch(place: int, slot: int, lora: PreparedLora) -> None:
        written.append(slot)
        write(place, slot, lora)

    stack._write = watch  # type: ignore[method-assign]
    for slots in ([0, 5], [3], [0, 1, 2, 3, 4, 5], [5, 0]):
        world.check(slots)
    assert not written
    world.unload(2)
    world.load(7, adapter(7, dict.fromkeys(SIZES, 4)))
    world.check([7, 0])
    assert written == [7]
    assert len(stack._slots) == 8, "in the place of the one that went"


def test_ranks_far_apart_are_not_padded_to_each_other() -> None:
    world = World()
    world.load(0, adapter(0, {"attn.q_proj": 8}))
    world.load(1, adapter(1, {"attn.q_proj": 2}))
    world.load(2, adapter(2, {"attn.q_proj": 64}))
    world.check([0, 1, 2])
    assert [(t.stack.rank, t.count) for t in tiles(world)] == [(8, 2), (64, 1)]


def test_an_adapter_whose_weights_overflow_harms_nobody_else() -> None:
    world = World()
    world.load(0, adapter(0, ALL))
    world.load(1, adapter(1, ALL, size=1e30))
    world.bank.use([0, 1, 0, -1])
    x = rows_of(4, HIDDEN)
    got = world.layer.get_submodule("attn.q_proj")(x)
    assert not got[1].isfinite().all()
    for row, slot in [(0, 0), (2, 0), (3, -1)]:
        expected = world.reference("attn.q_proj", x[row : row + 1], [slot])[0]
        torch.testing.assert_close(got[row].double(), expected, rtol=2e-5, atol=2e-5)


def test_an_unloaded_adapter_leaves_no_trace() -> None:
    world = full_world()
    for slots in ([0, 1, 3], [1, 1], [1, 4]):
        world.check(slots)
    world.unload(1)
    world.load(1, adapter(77, MIXED_RANKS, dora=frozenset({"attn.k_proj"})))
    for slots in ([1, 4], [1, 1], [0, 1, 3]):
        world.check(slots)
    world.unload(3)
    world.check([0, 1])
    world.load(3, adapter(78, NOTHING))
    world.check([0, 3, 1])


def test_a_taken_slot_cannot_be_loaded() -> None:
    world = full_world()
    with pytest.raises(AssertionError):
        world.load(0, adapter(1, ALL))


@pytest.mark.parametrize("shapes", [((4, HIDDEN + 1), (HIDDEN, 4)), ((4, HIDDEN), (HIDDEN - 1, 4))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    world = World()
    module = LoraModule(torch.zeros(shapes[0]), torch.zeros(shapes[1]), 1.0)
    with pytest.raises(ValueError, match="q_proj: LoRA shapes do not fit"):
        world.bank.prepare(AdapterWeights({"attn.q_proj": module}, None))


KINDS = st.sampled_from([ALL, MIXED_RANKS, V_ONLY, NOTHING])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("swap"), st.integers(0, SLOTS - 1), KINDS, st.booleans()),
        st.tuples(st.just("use"), st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=5)),
    ),
    max_size=8,
)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=30, deadline=None)
@given(actions=ACTIONS)
def test_any_order_of_loads_and_steps_serves_everybody(
    kernels: LoraKernels, actions: list[tuple[str, int, dict[str, int], bool] | tuple[str, list[int]]]
) -> None:
    world = World(kernels=kernels)
    for i, action in enumerate(actions):
        if len(action) == 4:
            _, slot, ranks, dora = action
            if slot in world.adapters:
                world.unload(slot)
            else:
                world.load(slot, adapter(i, ranks, dora=frozenset(ranks) & DORA if dora else frozenset()))
        else:
            world.check([s if s in world.adapters else -1 for s in action[1]], seed=i)


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_bf16_base_rows_are_those_of_a_plain_bf16_linear() -> None:
    world = full_world(dtype=torch.bfloat16)
    linear = world.plain["attn.q_proj"]
    assert can_prepack(linear.weight) == (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    for slots in ([-1] * 5, [-1, 0, -1, 1, -1]):
        world.bank.use(slots)
        base = torch.tensor([i for i, s in enumerate(slots) if s < 0])
        for name, (_, width) in SIZES.items():
            x = rows_of(5, width).bfloat16()
            got = world.layer.get_submodule(name)(x)
            plain = F.linear(x, world.plain[name].weight, world.plain[name].bias)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got[base], plain[base], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("kernels", [k for k in LoraKernels if k is not LoraKernels.TRITON])
@pytest.mark.parametrize("slots", [[0, 0], [0, 1, 2, 3, 4, 5, -1], [1, 0, 0, 0, 0, 0, 0]])
def test_bf16_adapters_are_right_to_bf16_rounding(slots: list[int], kernels: LoraKernels) -> None:
    full_world(dtype=torch.bfloat16, kernels=kernels).check(slots, tolerance=0.02)


# -- the head's second opinion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slot", [-1, 0])
def test_the_head_rescored_is_the_head(dtype: torch.dtype, dora: bool, bias: bool, slot: int) -> None:
    """With its bias (Phi has one), its adapter, scale and soft cap."""
    world = World(bias, dtype)
    name = "attn.o_proj"
    if slot == 0:
        world.load(0, adapter(9, {name: 4}, dora=frozenset({name}) if dora else frozenset()))
    member = world.layer.get_submodule(name)
    weight = world.plain[name].weight.data
    config = SimpleNamespace(final_logit_softcapping=30.0, logits_scaling=2.0)
    head = Head(member, name, weight, config, world.bank)
    hidden = rows_of(3, HIDDEN).to(dtype)
    ids = torch.tensor([0, 3, 15])
    whole = head(hidden, [slot] * 3)
    for row in range(3):
        exact = head.exact(hidden[row], slot, ids)
        assert exact.dtype == torch.float32
        raw = world.reference(name, hidden[row : row + 1], [slot])[0, ids] / 2.0
        expected = 30.0 * torch.tanh(raw / 30.0)
        tight = 1e-4 if dtype == torch.float32 else 0.02  # the adapter itself is rounded to bf16
        torch.testing.assert_close(exact.double(), expected, rtol=tight, atol=tight)
        torch.testing.assert_close(whole[row, ids].double(), expected, rtol=10 * tight, atol=5 * tight)
