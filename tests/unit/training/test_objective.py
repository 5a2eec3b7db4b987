"""The objective against a reference written as plain loops from its definition (methods.md 1.3), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from slipstream.training import objective
from slipstream.training.data import IGNORE
from slipstream.training.objective import HeadShape, ObjectiveSums, Positions, find_positions, head_losses

VOCAB, HIDDEN, STREAMS = 37, 6, 3
SHAPES = [HeadShape(), HeadShape(0.5, 3.0), HeadShape(2.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen positions at a time, the fewest there are: several chunks even here."""
    monkeypatch.setattr(objective, "CPU_CHUNK_BYTES", 1)


@dataclass(frozen=True)
class Case:
    """Labels with prompts, gaps, several rows in a pack and padding, and random states."""

    labels: torch.Tensor
    segments: torch.Tensor
    positions: Positions
    h: torch.Tensor
    streams: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    own: torch.Tensor
    factors: torch.Tensor  # what each loss is multiplied with before the backward pass

    @property
    def targets(self) -> list[list[tuple[int, int]]]:
        """For each stream, the (index of the position, target token) pairs that it has, from the definition."""
        length = self.labels.shape[1]
        found: list[list[tuple[int, int]]] = [[] for _ in range(STREAMS)]
        for i, row in enumerate(self.positions.rows.tolist()):
            b, t = divmod(row, length)
            for k in range(STREAMS):
                last = t + 2 + k
                within = last < length and all(self.segments[b, j] == self.segments[b, t] for j in range(t, last + 1))
                if within and all(self.labels[b, j] != IGNORE for j in range(t + 1, last + 1)):
                    found[k].append((i, int(self.labels[b, last])))
        return found


def make_case(seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(VOCAB, (3, 24), generator=generator)
    segments = torch.tensor([[0] * 12 + [1] * 12, [3] * 24, [4] * 14 + [5] * 2 + [-1] * 8])
    labels[:, :4] = IGNORE
    labels[0, 12:14] = IGNORE  # the second row's prompt
    labels[1, 9:13] = IGNORE  # a user's turn between two of the assistant's
    labels[2, 16:] = IGNORE
    positions = find_positions(labels, segments, STREAMS)
    n = positions.rows.numel()
    return Case(
        labels, segments, positions, randn(n, HIDDEN), randn(STREAMS, n, HIDDEN), randn(VOCAB, HIDDEN), randn(VOCAB),
        randn(STREAMS, VOCAB, HIDDEN), randn(STREAMS + 1),
    )  # fmt: skip


def test_positions_are_those_whose_next_token_is_trained_in_the_same_row() -> None:
    case = make_case()
    expected = [
        b * 24 + t
        for b in range(3)
        for t in range(23)
        if case.labels[b, t + 1] != IGNORE and case.segments[b, t] == case.segments[b, t + 1]
    ]
    assert case.positions.rows.tolist() == expected
    assert case.positions.next_ids.tolist() == [int(case.labels.flatten()[row + 1]) for row in expected]
    for k, pairs in enumerate(case.targets):
        assert case.positions.has_target(k).nonzero().flatten().tolist() == [i for i, _ in pairs]
        target = case.positions.target(k)
        assert all(int(target[i]) == token for i, token in pairs)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(deadline=None, max_examples=100)
def test_no_target_lies_beyond_a_border_or_a_gap(seed: int, streams: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (2, 17), generator=generator)
    labels[torch.rand(2, 17, generator=generator) < 0.2] = IGNORE
    segments = (torch.rand(2, 17, generator=generator) < 0.2).long().cumsum(1) + torch.tensor([[0], [50]])
    positions = find_positions(labels, segments, streams)
    reach = dict(zip(positions.rows.tolist(), positions.reach.tolist(), strict=True))
    for row in range(labels.numel()):
        b, t = divmod(row, 17)
        run = 0  # trained tokens after t, in t's row, without a break
        while t + 1 + run < 17 and segments[b, t + 1 + run] == segments[b, t] and labels[b, t + 1 + run] != IGNORE:
            run += 1
        assert (row in reach) == (run > 0)
        if run:
            assert reach[row] == min(run - 1, streams)


def reference(case: Case, shape: HeadShape, beta: float, ids: list[int] | None, own: bool, bias: bool) -> ObjectiveSums:
    """Losses and hits, position by position."""
    subset = torch.tensor(ids if ids is not None else range(VOCAB))
    add = case.bias if bias else torch.zeros(VOCAB, dtype=torch.float64)
    z = [shape.apply(case.weight @ case.h[i] + add) for i in range(len(case.h))]
    losses = [sum((F.cross_entropy(z[i], case.positions.next_ids[i]) for i in range(len(z))), torch.zeros(()))]
    correct = torch.zeros(STREAMS + 1, len(z), dtype=torch.bool)
    for i in range(len(z)):
        correct[0, i] = z[i].argmax() == case.positions.next_ids[i]
    row_of = {row: i for i, row in enumerate(case.positions.rows.tolist())}
    for k, pairs in enumerate(case.targets):
        head = case.own[k] if own else case.weight
        total = torch.zeros((), dtype=torch.float64)
        for i, token in pairs:
            logp = shape.apply(head @ case.streams[k, i] + add)[subset].log_softmax(-1)
            at = subset.tolist().index(token)
            teacher = z[row_of[int(case.positions.rows[i]) + 1 + k]].detach()[subset].softmax(-1)
            total = total - (1 - beta) * logp[at] - beta * (teacher * logp).sum()
            correct[k + 1, i] = logp.argmax() == at
        losses.append(total)
    counts = torch.tensor([len(z), *map(len, case.targets)])
    return ObjectiveSums(torch.stack(losses), correct, counts)


def gradients(case: Case, sums: ObjectiveSums, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad((sums.losses * case.factors).sum(), leaves))


def check(
    shape: HeadShape, beta: float, *, ids: list[int] | None = None, own: bool = False, bias: bool = False, seed: int = 0
) -> None:
    case = make_case(seed)
    leaves = [case.h.requires_grad_(), case.streams.requires_grad_(), *([case.own.requires_grad_()] if own else [])]
    expected = reference(case, shape, beta, ids, own, bias)
    found = head_losses(
        case.h, case.streams, case.positions, case.weight, shape, beta,
        own_heads=case.own if own else None, bias=case.bias if bias else None,
        draft_ids=None if ids is None else torch.tensor(ids),
    )  # fmt: skip
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.correct, expected.correct)
    assert torch.equal(found.counts, expected.counts)
    for mine, plain in zip(gradients(case, found, leaves), gradients(case, expected, leaves), strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "capped", "scaled"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-heads"])
def test_losses_and_gradients_are_the_definitions(shape: HeadShape, beta: float, own: bool) -> None:
    check(shape, beta, own=own, seed=int(10 * beta))


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "capped", "scaled"])
def test_a_head_with_a_bias(shape: HeadShape) -> None:
    check(shape, 0.5, bias=True)


def some_ids(case: Case) -> list[int]:
    """Every target and a few others, but not all."""
    targets = {token for pairs in case.targets for _, token in pairs}
    ids = sorted(targets | {0, 1, VOCAB - 1})
    assert len(ids) < VOCAB
    return ids


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own-heads"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=["plain", "capped"])
def test_drafts_over_some_of_the_vocabulary(beta: float, own: bool, shape: HeadShape) -> None:
    # The streams' softmax and the teacher's both run over the subset; the LoRA's own loss over everything.
    check(shape, beta, ids=some_ids(make_case(3)), own=own, bias=True, seed=3)


def test_the_whole_vocabulary_as_a_subset_is_no_subset() -> None:
    case = make_case()
    leaves = [case.h.requires_grad_(), case.streams.requires_grad_()]
    found = [
        head_losses(case.h, case.streams, case.positions, case.weight, HeadShape(), 0.5, draft_ids=ids)
        for ids in (None, torch.arange(VOCAB))
    ]
    torch.testing.assert_close(found[0].losses, found[1].losses, rtol=1e-13, atol=0)
    assert torch.equal(found[0].correct, found[1].correct)
    for a, b in zip(gradients(case, found[0], leaves), gradients(case, found[1], leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_an_lm_that_is_not_trained_is_told_over_the_drafts_vocabulary(beta: float) -> None:
    case = make_case(4)
    ids = torch.tensor(sorted({*some_ids(case), *case.positions.next_ids.tolist()}))
    frozen, streams = case.h.detach(), case.streams.requires_grad_()
    few, all_of_it = (
        head_losses(h, streams, case.positions, case.weight, HeadShape(), beta, draft_ids=ids)
        for h in (frozen, case.h.requires_grad_())
    )
    torch.testing.assert_close(few.losses[1:], all_of_it.losses[1:], rtol=1e-12, atol=1e-12)
    assert torch.equal(few.correct[1:], all_of_it.correct[1:])
    logits = frozen @ case.weight[ids].t()
    target = torch.searchsorted(ids, case.positions.next_ids)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(few.losses[0], expected, rtol=1e-12, atol=1e-12)
    mine, plain = (gradients(case, sums, [streams])[0] for sums in (few, all_of_it))
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    assert len(case.h) > 2 * objective._chunk(case.h, VOCAB), "several chunks, or this shows nothing"
    leaves = [case.h.requires_grad_(), case.streams.requires_grad_()]

    def run() -> tuple[ObjectiveSums, list[torch.Tensor]]:
        sums = head_losses(case.h, case.streams, case.positions, case.weight, HeadShape(), 0.5)
        return sums, gradients(case, sums, leaves)

    many, by_many = run()
    monkeypatch.setattr(objective, "CPU_CHUNK_BYTES", 1 << 30)
    one, by_one = run()
    torch.testing.assert_close(many.losses, one.losses, rtol=1e-12, atol=0)
    assert torch.equal(many.correct, one.correct)
    for a, b in zip(by_many, by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_a_lora_alone() -> None:
    case = make_case()
    h = case.h.requires_grad_()
    found = head_losses(h, None, case.positions, case.weight, HeadShape(), 0.5)
    assert found.losses.shape == (1,)
    plain = F.cross_entropy(h @ case.weight.t(), case.positions.next_ids, reduction="sum")
    torch.testing.assert_close(found.losses[0], plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, h)[0] for loss in (found.losses[0], plain)))


def test_the_soft_target_is_a_constant() -> None:
    # Only L_lm reaches h: the streams must not teach the LoRA to be easy to guess through their teacher.
    case = make_case()
    h, streams = case.h.requires_grad_(), case.streams.requires_grad_()
    found = head_losses(h, streams, case.positions, case.weight, HeadShape(), 1.0)
    by_h, by_streams = torch.autograd.grad(found.losses[1:].sum(), [h, streams])
    assert not by_h.any()
    assert by_streams.any()


def test_low_precision_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    exact = head_losses(case.h, case.streams, case.positions, case.weight, HeadShape(), 0.5)
    rounded = head_losses(
        case.h.bfloat16(), case.streams.bfloat16(), case.positions, case.weight.bfloat16(), HeadShape(), 0.5
    )
    assert rounded.losses.dtype == torch.float32
    torch.testing.assert_close(rounded.losses.double(), exact.losses, rtol=0.02, atol=0)


def test_head_shapes_are_read_from_configurations() -> None:
    class Granite:
        logits_scaling = 8.0

    class Cohere:
        logit_scale = 0.0625

    class Gemma:
        final_logit_softcapping = 30.0

    assert HeadShape.of(Granite()) == HeadShape(0.125)
    assert HeadShape.of(Cohere()) == HeadShape(0.0625)
    assert HeadShape.of(Gemma()) == HeadShape(1.0, 30.0)
    assert HeadShape.of(object()).plain
