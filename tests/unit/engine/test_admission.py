"""Admission: every number bounded, every message useful, nothing expensive before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.tiny_model import tiny_tokenizer

from slipstream.engine.admission import MAX_CHOICES, MAX_LOGPROBS, Admission, check_params
from slipstream.engine.noise import choice_seed
from slipstream.errors import ContextOverflow, InvalidRequest
from slipstream.protocol import ChatMessage, GenerateRequest, SamplingParams, Speculation

VOCAB = 259
NAN, INF = float("nan"), float("inf")


class CountingTokenizer:
    """A byte tokeniser that counts what it is made to do."""

    def __init__(self) -> None:
        self._real = tiny_tokenizer()
        self.chat_template: str | None = self._real.chat_template
        self.calls: list[str] = []

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "abcd": 1}

    def __call__(self, text: str, **kwargs: Any) -> Any:
        self.calls.append("tokenise")
        return self._real(text, **kwargs)

    def apply_chat_template(self, turns: Any, **kwargs: Any) -> str:
        self.calls.append("template")
        text = self._real.apply_chat_template(turns, chat_template=self.chat_template, **kwargs)
        assert isinstance(text, str)
        return text


def make(tokenizer: Any = None, length: int = 32, max_draft: int = 5) -> Admission:
    return Admission(tokenizer or CountingTokenizer(), VOCAB, length, max_draft)


def request(params: SamplingParams | None = None, **fields: Any) -> GenerateRequest:
    if not fields.keys() & {"text", "token_ids", "messages"}:
        fields["text"] = "hello"
    return GenerateRequest("r", "t", params or SamplingParams(), **fields)


BAD: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 100.5, NAN, INF, -INF, 10**400]),
    ("top_p", [0.0, -1.0, 1.0001, NAN, INF]),
    ("min_p", [-0.01, 1.01, NAN, INF]),
    ("repetition_penalty", [0.0, -1.0, 100.5, NAN, INF]),
    ("presence_penalty", [-2.01, 2.01, NAN, INF, -INF]),
    ("frequency_penalty", [-2.01, 2.01, NAN, INF, -INF]),
    ("top_k", [-1, 2**31 + 1, 10**400, -(10**400)]),
    ("n", [0, -1, MAX_CHOICES + 1, 10**400]),
    ("min_tokens", [-1, 2**31 + 1, 10**400]),
    ("max_tokens", [0, -1, 2**31 + 1, 10**400]),
    ("logprobs", [-1, MAX_LOGPROBS + 1, 10**400]),
    ("logit_bias", [{0: 100.1}, {0: -100.1}, {0: NAN}, {0: INF}, {-1: 0.0}, {VOCAB: 0.0}, {10**400: 1.0}]),
    ("stop_token_ids", [(-1,), (VOCAB,), (0, 10**400)]),
    ("stop", [("",), ("a", "")]),
]
GOOD: list[tuple[str, list[Any]]] = [
    ("temperature", [0.0, 1e-320, 100.0, 1]),
    ("top_p", [1e-9, 1.0]),
    ("min_p", [0.0, 1.0]),
    ("repetition_penalty", [1e-9, 100.0]),
    ("presence_penalty", [-2.0, 2.0]),
    ("frequency_penalty", [-2.0, 2.0]),
    ("top_k", [0, 2**31]),
    ("n", [1, MAX_CHOICES]),
    ("min_tokens", [0, 2**31]),
    ("max_tokens", [None, 1, 2**31]),
    ("logprobs", [None, 0, MAX_LOGPROBS]),
    ("logit_bias", [{}, {0: -100.0, VOCAB - 1: 100.0}]),
    ("stop_token_ids", [(), (0, VOCAB - 1)]),
    ("stop", [(), ("a", " ")]),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD for v in values], ids=lambda v: str(v)[:24])
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_params(replace(SamplingParams(), **{name: value}), VOCAB)
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD for v in values], ids=lambda v: str(v)[:24])
def test_the_ends_of_the_ranges_are_allowed(name: str, value: Any) -> None:
    check_params(replace(SamplingParams(), **{name: value}), VOCAB)


def test_every_parameter_is_covered_here() -> None:
    free = {"seed", "ignore_eos"}
    assert {n for n, _ in BAD} == {n for n, _ in GOOD} == set(SamplingParams.__slots__) - free


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_params(SamplingParams(min_tokens=5, max_tokens=4), VOCAB)
    assert caught.value.param == "min_tokens"
    check_params(SamplingParams(min_tokens=5, max_tokens=5), VOCAB)
    check_params(SamplingParams(min_tokens=5), VOCAB)


def test_parameters_are_checked_before_anything_is_tokenised() -> None:
    tokenizer = CountingTokenizer()
    with pytest.raises(InvalidRequest):
        make(tokenizer).admit(request(SamplingParams(temperature=NAN)))
    assert tokenizer.calls == []


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_without_max_tokens_the_context_is_the_limit() -> None:
    admitted = make().admit(request(text="hello"))
    assert len(admitted.prompt) == 5
    assert admitted.max_total == 32
    assert make().admit(request(SamplingParams(max_tokens=4), text="hello")).max_total == 9
    assert make().admit(request(SamplingParams(max_tokens=27), text="hello")).max_total == 32


@pytest.mark.parametrize(
    ("text", "max_tokens", "said"),
    [("h" * 5, 28, ["32", "5", "max_tokens is 28"]), ("h" * 32, 1, ["32 tokens"]), ("h" * 32, None, ["32 tokens"])],
)
def test_what_does_not_fit_is_refused_with_the_numbers(text: str, max_tokens: int | None, said: list[str]) -> None:
    with pytest.raises(ContextOverflow) as caught:
        make().admit(request(SamplingParams(max_tokens=max_tokens), text=text))
    assert caught.value.param == "prompt"
    assert caught.value.code == "context_length_exceeded"
    assert all(s in caught.value.message for s in said)
    assert ("max_tokens is" in caught.value.message) == (max_tokens is not None)


def test_one_token_of_room_is_enough() -> None:
    assert make().admit(request(text="h" * 31)).max_total == 32


def test_a_conversation_that_does_not_fit_names_messages() -> None:
    with pytest.raises(ContextOverflow) as caught:
        make().admit(request(messages=(ChatMessage("user", "x" * 40),)))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("ids", [(-1,), (0, VOCAB), (10**30,)])
def test_token_ids_outside_the_vocabulary_are_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match="outside 0 … 258") as caught:
        make().admit(request(token_ids=ids))
    assert caught.value.param == "prompt"


def test_token_ids_are_taken_as_they_are() -> None:
    tokenizer = CountingTokenizer()
    assert make(tokenizer).admit(request(token_ids=(0, 258, 7))).prompt == [0, 258, 7]
    assert tokenizer.calls == []


@pytest.mark.parametrize("fields", [{"text": ""}, {"token_ids": ()}])
def test_an_empty_prompt_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        make().admit(request(**fields))


def test_the_chat_template_is_applied_with_a_turn_for_the_answer() -> None:
    tokenizer = CountingTokenizer()
    admitted = make(tokenizer, 64).admit(request(messages=(ChatMessage("system", "s"), ChatMessage("user", "hé"))))
    assert tiny_tokenizer().decode(admitted.prompt) == "<|system|>s\n<|user|>hé\n<|assistant|>"


def test_chat_without_a_template_is_refused_and_told_where_to_go() -> None:
    tokenizer = CountingTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="/v1/completions") as caught:
        make(tokenizer).admit(request(messages=(ChatMessage("user", "x"),)))
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages[7].x.y }}", "{% if %}"]
)
def test_a_template_that_refuses_is_the_callers_error(template: str) -> None:
    tokenizer = CountingTokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InvalidRequest, match="template refuses") as caught:
        make(tokenizer).admit(request(messages=(ChatMessage("user", "x"),)))
    assert caught.value.param == "messages"
    assert "alternate" in caught.value.message or "raise_exception" not in template


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "x" * 2_000_000},
        {"messages": (ChatMessage("user", "x" * 2_000_000),)},
        {"messages": tuple(ChatMessage("user", "x" * 100) for _ in range(20))},
    ],
)
def test_megabytes_are_refused_unread(fields: dict[str, Any]) -> None:
    tokenizer = CountingTokenizer()
    with pytest.raises(ContextOverflow, match="characters"):
        make(tokenizer).admit(request(**fields))
    assert tokenizer.calls == []


def test_the_character_limit_refuses_nothing_that_could_fit() -> None:
    """The longest token has four characters, and the context 32 tokens."""
    tokenizer = CountingTokenizer()
    for chars, calls in [(128, ["tokenise"]), (129, [])]:
        tokenizer.calls.clear()
        with pytest.raises(ContextOverflow):
            make(tokenizer).admit(request(text="x" * chars))
        assert tokenizer.calls == calls


# -- choices and drafts -----------------------------------------------------------------------------------------------


def test_each_choice_has_its_own_seed_and_else_the_same_parameters() -> None:
    params = SamplingParams(seed=2**64 - 1, n=3, temperature=0.5, stop=("x",))
    choices = make().admit(request(params)).choices
    assert [c.seed for c in choices] == [choice_seed(2**64 - 1, i) for i in range(3)]
    assert all(replace(c, seed=params.seed, n=3) == params and c.n == 1 for c in choices)


@pytest.mark.parametrize(
    ("speculation", "cap"), [(None, 5), (True, 5), (False, 0), (0, 0), (1, 1), (5, 5), (6, 5), (10**400, 5)]
)
def test_the_draft_cap_follows_speculation(speculation: Speculation, cap: int) -> None:
    assert make().admit(request(speculation=speculation)).draft_cap == cap


@pytest.mark.parametrize("speculation", [-1, -(10**400)])
def test_negative_draft_lengths_are_refused(speculation: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make().admit(request(speculation=speculation))
    assert caught.value.param == "speculation"
