"""Text as it grows: multi-byte characters, stop strings, and the bytes of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.tiny_model import tiny_tokenizer

from slipstream.engine.text import ChoiceText, IncrementalText, token_bytes
from slipstream.protocol import SamplingParams

TEXTS = [
    "plain words, and more.",
    "naïve café — “quotes” …",
    "日本語のテキストと中文字符，한국어도.",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 end",
    "combining e\u0301 a\u0308\u0323 \u0928\u093f z͑ͫ̓ͪ̂ͫ̽",
    "العربية עברית ไทย",
    "  leading, double  and trailing spaces  ",
    "line\nline\r\n\ttab\x00nul",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff",
]


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def encode(text: str) -> list[int]:
    """One token a byte."""
    return list(tokenizer()(text)["input_ids"])


def ids_of_bytes(data: bytes) -> list[int]:
    table = {token_bytes(tokenizer(), i): i for i in range(256)}
    return [table[bytes([b])] for b in data]


def pieces(tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    text = IncrementalText(tokenizer(), prompt)
    return [*(text.push(t) for t in tokens), text.flush()]


@pytest.mark.parametrize("prompt", ["", "Hi", "a much longer prompt 😀"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_are_never_half_a_character(text: str, prompt: str) -> None:
    got = pieces(encode(text), encode(prompt))
    assert "".join(got) == text
    assert all("\ufffd" not in p for p in got)
    assert got[-1] == "", "complete text needs no flush"
    assert len([p for p in got if p]) == len(text), "every character is given out as soon as it is complete"


@given(st.text(max_size=40), st.text(max_size=10))
def test_any_text_comes_through(text: str, prompt: str) -> None:
    assume("\ufffd" not in text + prompt)
    got = pieces(encode(text), encode(prompt))
    assert "".join(got) == text
    assert len([p for p in got if p]) == len(text)


@given(st.binary(max_size=24))
def test_any_bytes_come_through_as_the_full_decode(data: bytes) -> None:
    got = pieces(ids_of_bytes(data))
    assert "".join(got) == data.decode("utf-8", "replace")


def test_half_a_character_is_held_back_until_the_end() -> None:
    tokens = encode("a😀")
    assert pieces(tokens[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_real_replacement_character_is_kept() -> None:
    assert "".join(pieces(encode("x\ufffdy"))) == "x\ufffdy"
    assert "".join(pieces(encode("x\ufffd"))) == "x\ufffd"


def test_special_tokens_are_no_text() -> None:
    special = tokenizer().eos_token_id
    tokens = [special, *encode("aé")[:2], special, *encode("aé")[2:], special]
    assert "".join(pieces(tokens, [tokenizer().bos_token_id])) == "aé"


# -- stop strings -----------------------------------------------------------------------------------------------------


class Pieces:
    """A tokeniser whose tokens are strings of any length: token i is text i."""

    all_special_ids: tuple[int, ...] = ()

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(self._texts[i] for i in ids)


def stream(texts: Sequence[str], params: SamplingParams, steps: Sequence[int] = (1,)) -> tuple[list[str], bool]:
    """Push everything, taking text after each step of so many tokens; (what was given out, whether a stop was found)."""
    fake: Any = Pieces(texts)
    choice = ChoiceText(fake, [], params)
    out: list[str] = []
    at, turn = 0, 0
    while at < len(texts):
        for token in range(at, min(len(texts), at + steps[turn % len(steps)])):
            if choice.push(token):
                return [*out, choice.take(finished=True)], True
            at += 1
        turn += 1
        out.append(choice.take(finished=False))
    return [*out, choice.take(finished=True)], False


def cut(texts: Sequence[str], stops: Sequence[str], min_tokens: int = 0) -> tuple[str, bool]:
    """The definition: after the first token, from min_tokens on, that completes a stop, cut where the earliest completed
    one starts."""
    text = ""
    for i, piece in enumerate(texts):
        old, text = len(text), text + piece
        found = [(at, at + len(s)) for s in stops for at in range(len(text)) if text.startswith(s, at)]
        starts = [start for start, end in found if end > old]
        if starts and i + 1 >= min_tokens:
            return text[: min(starts)], True
    return text, False


LETTERS = st.text("ab😀", min_size=1, max_size=4)
STOPS = st.lists(st.text("ab😀", min_size=1, max_size=4), max_size=3, unique=True)
STEPS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.lists(LETTERS, max_size=12), STOPS, STEPS, st.integers(0, 6))
def test_streams_are_cut_at_the_first_stop_however_steps_fall(
    texts: list[str], stops: list[str], steps: list[int], min_tokens: int
) -> None:
    """Speculation changes how many tokens a step brings, and must not change the text."""
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens)
    out, stopped = stream(texts, params, steps)
    assert ("".join(out), stopped) == cut(texts, stops, min_tokens)


@given(st.text("abc", max_size=30), STOPS, st.data())
def test_piece_borders_do_not_matter(text: str, stops: list[str], data: st.DataObject) -> None:
    """For stops that do not contain one another; those that do may differ in which is complete first."""
    assume(not any(a != b and a in b for a in stops for b in stops))
    borders = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))))
    texts = [p for p in (text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)) if p]
    first = min((at for at in (text.find(s) for s in stops) if at >= 0), default=len(text))
    out, stopped = stream(texts, SamplingParams(stop=tuple(stops)))
    assert "".join(out) == text[:first]
    assert stopped == (first < len(text))


@pytest.mark.parametrize(
    ("texts", "stops", "given_out"),
    [
        (["a", "b", "c"], ["bc"], ["a", "", ""]),
        (["a", "b", "d"], ["bc"], ["a", "", "bd", ""]),
        (["x", "\n", "\n", "y"], ["\n\n"], ["x", "", ""]),
        (["one STOP two"], ["STOP"], ["one "]),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", ""]),
        (["ab", "ab", "ac"], ["abac"], ["", "ab", ""]),
        (["he", "llo", " wor", "ld"], ["o w", "low"], ["he", "l", "l"]),
        (["b", "c"], ["abc", "bc", "c"], ["", ""]),
        (["ab"], ["abc"], ["", "ab"]),
        (["x"], [], ["x", ""]),
    ],
)
def test_only_certain_text_is_given_out(texts: list[str], stops: list[str], given_out: list[str]) -> None:
    assert stream(texts, SamplingParams(stop=tuple(stops)))[0] == given_out


@pytest.mark.parametrize("steps", [[1], [2], [3], [9]])
def test_a_stop_completed_before_min_tokens_is_passed_over(steps: list[int]) -> None:
    params = SamplingParams(stop=("b",), min_tokens=3)
    out, stopped = stream(["a", "b", "c", "b", "d"], params, steps)
    assert ("".join(out), stopped) == ("abc", True)


@pytest.mark.parametrize("text", ["fin 終わり😀 rest", "😀😀終わり", "é終わ り終わり!"])
@pytest.mark.parametrize("stop", ["終わり", "終わり😀", "😀"])
def test_stops_of_many_bytes_span_tokens(text: str, stop: str) -> None:
    choice = ChoiceText(tokenizer(), encode("p"), SamplingParams(stop=(stop,)))
    out = ""
    for token in encode(text):
        if choice.push(token):
            break
        out += choice.take(finished=False)
    out += choice.take(finished=True)
    assert out == text.split(stop, maxsplit=1)[0]


def test_a_stop_token_ends_the_answer_and_is_no_text() -> None:
    (stop,) = encode("!")
    params = SamplingParams(stop_token_ids=(stop,), min_tokens=3)
    choice = ChoiceText(tokenizer(), [], params)
    for token in encode("a!b!"):
        assert choice.push(token) is False
    assert choice.take(finished=True) == "a!b"  # the first came before min_tokens and is an ordinary token


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    choice = ChoiceText(tokenizer(), [], SamplingParams(stop=("zz",)))
    for token in [*encode("z"), *encode("😀")[:2]]:
        assert not choice.push(token)
    assert choice.take(finished=False) == ""
    assert choice.take(finished=True) == "z\ufffd"


# -- token_bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_join_to_utf8(text: str) -> None:
    assert b"".join(token_bytes(tokenizer(), t) for t in encode(text)) == text.encode()


def test_every_byte_has_one_token() -> None:
    assert sorted(token_bytes(tokenizer(), i) for i in range(256)) == [bytes([b]) for b in range(256)]


class Vocabulary:
    """Tokens as sentencepiece writes them."""

    all_special_ids = (3,)
    _tokens = ("<0xE2>", "▁the", "plain", "</s>", "▁", "日")

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._tokens[token] if token < len(self._tokens) else None


@pytest.mark.parametrize(
    ("token", "raw"),
    [(0, b"\xe2"), (1, b" the"), (2, b"plain"), (3, b"</s>"), (4, b" "), (5, "日".encode()), (99, b"")],
)
def test_token_bytes_of_other_vocabularies(token: int, raw: bytes) -> None:
    fake: Any = Vocabulary()
    assert token_bytes(fake, token) == raw


def test_special_tokens_have_their_name_as_bytes() -> None:
    assert token_bytes(tokenizer(), tokenizer().eos_token_id) == b"</s>"
