"""Training rows: what is refused and how it is told, and which tokens are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_model import tiny_tokenizer

from adapter_registry.records import PromptFormat
from slipstream.engine.admission import Admission
from slipstream.errors import InvalidRequest
from slipstream.protocol import ChatMessage, GenerateRequest, SamplingParams
from slipstream.training.data import (
    IGNORE,
    Encoded,
    InvalidData,
    Row,
    encode_prompt,
    encode_row,
    encode_rows,
    file_sha256,
    format_of,
    read_rows,
)

GOOD = {"prompt": "2+2=", "completion": "4"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
# A template with an end token after every turn, and a line break after that: as ChatML has it.
WITH_END = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def message(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def refusal(path: Path) -> str:
    with pytest.raises(InvalidData) as caught:
        read_rows(path)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "data")
    return caught.value.message


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "a"}', "'completion' is missing"),
        ('{"completion": "a"}', "'prompt' is missing"),
        ('{"text": "a"}', "'prompt' is missing"),
        ('{"prompt": "", "completion": "b"}', "'prompt' must be text that is not empty"),
        ('{"prompt": "a", "completion": " \\n"}', "'completion' must be text that is not empty"),
        ('{"prompt": 3, "completion": "b"}', "'prompt' must be text"),
        ('{"prompt": "a", "completion": null}', "'completion' must be text"),
        ('{"prompt": "a", "completion": ["b"]}', "'completion' must be text"),
        ('["a", "b"]', "is not a JSON object"),
        ("null", "is not a JSON object"),
        ('{"prompt": "a", ', "is not JSON"),
        ("prompt,completion", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "' + "a" * (1 << 20) + '", "completion": "b"}', "is longer than 1048576 characters"),
        (json.dumps(CHAT), "has another form than the rows before it"),
        ('{"prompt": "a\\ud800", "completion": "b"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 16 + [bad, json.dumps(GOOD)]), encoding="utf-8")
    text = refusal(path)
    assert text.startswith("rows.jsonl, row 17: ")
    assert words in text
    assert "Mend or remove the row." in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (message(("user", "a")), "must end with an assistant message"),
        (message(("assistant", "b"), ("user", "a")), "must end with an assistant message"),
        (message(("user", "a"), ("assistant", " ")), "must end with an assistant message that is not empty"),
        (message(("user", "a"), ("robot", "b")), "'messages.1.role'"),
        (message(("user", ["a"]), ("assistant", "b")), "'messages.0.content'"),
        (message(("user", None), ("assistant", "b")), "'messages.0.content'"),
        ({"messages": [{"role": "user"}]}, "'messages.0.content'"),
        ({"messages": ["a"]}, "'messages.0'"),
        ({"messages": []}, "at least one message"),
        ({"messages": "a"}, "must be a list"),
        (message(("user", "\ud800"), ("assistant", "b")), "'messages.0.content' holds half of a surrogate pair"),
        (GOOD, "has another form than the rows before it"),
    ],
)
def test_a_bad_chat_is_named_by_its_number(tmp_path: Path, bad: dict[str, Any], words: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (CHAT, CHAT, bad, CHAT)), encoding="utf-8")
    text = refusal(path)
    assert text.startswith("chats.jsonl, row 3: ")
    assert words in text


def test_empty_lines_count_so_that_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n   \noops\n")
    assert refusal(path).startswith("rows.jsonl, row 5: ")
    path.write_text(f"\n{json.dumps(GOOD)}\n")
    assert [row.number for row in read_rows(path)] == [2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion\na,b\nc\n", "rows.csv, row 2: cannot be used: 'completion'"),
        ("prompt,completion\na,b\n,d\n", "rows.csv, row 2: cannot be used: 'prompt'"),
        ('prompt,completion\na,b\nc,"d\n', "rows.csv, row 2: is not CSV"),
        ('prompt,completion\na,b\nc,"d"e\n', "rows.csv, row 2: is not CSV"),
        ("question,answer\na,b\n", "needs the columns prompt and completion; it has question, answer"),
        ("", "needs the columns prompt and completion; it has nothing"),
        ("prompt,completion\n", "has no rows"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert words in refusal(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.jsonl").startswith("There is no file ")
    assert refusal(tmp_path).startswith("There is no file ")
    (tmp_path / "rows.txt").write_text(json.dumps(GOOD))
    assert "must end in .jsonl or .csv" in refusal(tmp_path / "rows.txt")
    for nothing in ("", "\n\n"):
        (tmp_path / "none.jsonl").write_text(nothing)
        assert refusal(tmp_path / "none.jsonl") == "none.jsonl has no rows."
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}'.encode("latin-1"))
    assert "latin.jsonl is not UTF-8 text" in refusal(tmp_path / "latin.jsonl")
    (tmp_path / "utf16.jsonl").write_text(json.dumps(GOOD), encoding="utf-16")
    assert "utf16.jsonl is not UTF-8 text" in refusal(tmp_path / "utf16.jsonl")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", json.dumps(GOOD)), ("a.csv", "prompt,completion\n2+2=,4\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_rows(tmp_path / name) == [Row(1, prompt="2+2=", completion="4")]


def test_csv_keeps_quotes_commas_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.CSV"
    path.write_bytes(b'id,prompt,completion\r\n1,"a, ""b""\r\nc"," d "\r\n')
    assert read_rows(path) == [Row(1, prompt='a, "b"\r\nc', completion=" d ")]


def test_what_else_a_row_carries_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat = {**message(("user", "a"), ("assistant", "b")), "tools": []}
    chat["messages"][1]["weight"] = 1
    path.write_text(json.dumps(chat) + "\n" + json.dumps(CHAT))
    rows = read_rows(path, limit=1)
    assert len(rows) == 1
    assert rows[0].is_chat
    assert (rows[0].completion, [turn.role for turn in rows[0].messages]) == ("b", ["user", "assistant"])


def test_a_limit_stops_before_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\noops\n")
    assert len(read_rows(path, limit=1)) == 1


def test_the_hash_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_format_follows_the_rows() -> None:
    raw, chat = [Row(1, "a", "b")], [row_of(("user", "a"), ("assistant", "b"))]
    assert format_of(raw, None) is PromptFormat.RAW
    assert format_of(chat, None) is PromptFormat.CHAT
    assert format_of(raw, PromptFormat.CHAT) is PromptFormat.CHAT
    with pytest.raises(InvalidData, match="prompt_format raw needs prompt and completion"):
        format_of(chat, PromptFormat.RAW)


# --- tokens -------------------------------------------------------------------------------------------------------


def row_of(*turns: tuple[str, str]) -> Row:
    from slipstream.training.data import Turn  # noqa: PLC0415

    return Row(1, completion=turns[-1][1], messages=tuple(Turn(role=r, content=c) for r, c in turns))


def trained_text(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The stretches that are trained, decoded."""
    stretches: list[list[int]] = []
    before = IGNORE
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            stretches = [*stretches, []] if before == IGNORE else stretches
            stretches[-1].append(token)
        before = label
    return [tokenizer.decode(s) for s in stretches]


def test_raw_trains_the_completion_and_its_end() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_row(tokenizer, Row(1, "Hé: ", "ho"), PromptFormat.RAW)
    prompt = tokenizer("Hé: ")["input_ids"]
    assert encoded.ids == [*prompt, *tokenizer("ho")["input_ids"], tokenizer.eos_token_id]
    assert encoded.labels == [IGNORE] * len(prompt) + encoded.ids[len(prompt) :]
    assert encoded.num_trained == 3
    assert trained_text(tokenizer, encoded) == ["ho</s>"]


def test_chat_trains_every_assistant_turn_up_to_its_end_token_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_END
    turns = (("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    encoded = encode_row(tokenizer, row_of(*turns), PromptFormat.CHAT)
    assert trained_text(tokenizer, encoded) == ["two</s>", "four</s>"]
    # Nothing comes after the last end token: it would be computed for nothing.
    assert (
        tokenizer.decode(encoded.ids)
        == "[system]s</s>\n[user]one</s>\n[assistant]two</s>\n[user]three</s>\n[assistant]four</s>"
    )


def test_a_template_without_an_end_token_trains_what_ends_a_turn() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode_row(tokenizer, row_of(("user", "a"), ("assistant", "b")), PromptFormat.CHAT)
    assert trained_text(tokenizer, encoded) == ["b\n"]


def test_prompt_rows_can_train_the_chat_format() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_END
    encoded = encode_row(tokenizer, Row(1, "a", "b"), PromptFormat.CHAT)
    assert tokenizer.decode(encoded.ids) == "[user]a</s>\n[assistant]b</s>"
    assert trained_text(tokenizer, encoded) == ["b</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + WITH_END
    row = row_of(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(InvalidData, match="Row 1: the base model's chat template changes earlier messages"):
        encode_row(tokenizer, row, PromptFormat.CHAT)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no system turn here') }}"])
def test_a_template_that_refuses_or_is_missing_names_the_row(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InvalidData, match="Row 1: the base model's chat template refuses it, or there is none"):
        encode_rows(tokenizer, [row_of(("user", "a"), ("assistant", "b"))], PromptFormat.CHAT, 64)


@pytest.mark.parametrize("template", [WITH_END, "<s>" + WITH_END])
def test_prompts_are_what_the_serving_side_makes(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    admission = Admission(tokenizer, vocab_size=259, max_model_len=256, max_draft=4)
    chat = row_of(("system", "Be  kind."), ("user", " Ça va? "), ("assistant", "b"))
    messages = tuple(ChatMessage(turn.role, turn.content) for turn in chat.messages[:-1])
    served = admission.admit(request(messages=messages)).prompt
    assert encode_prompt(tokenizer, chat, PromptFormat.CHAT) == served
    assert encode_row(tokenizer, chat, PromptFormat.CHAT).ids[: len(served)] == served
    raw = Row(1, "  Ça va? ", "b")
    served = admission.admit(request(text=raw.prompt)).prompt
    assert encode_prompt(tokenizer, raw, PromptFormat.RAW) == served
    assert encode_row(tokenizer, raw, PromptFormat.RAW).ids[: len(served)] == served


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest(request_id="r", tenant="t", params=SamplingParams(max_tokens=4), **fields)


def test_rows_that_are_too_long_are_left_out_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    rows = [Row(i, "a" * i, "b") for i in range(1, 11)]  # i + 2 tokens
    kept, longer = encode_rows(tokenizer, rows, PromptFormat.RAW, 8)
    assert ([len(row.ids) for row in kept], longer) == ([3, 4, 5, 6, 7, 8], 4)
    with pytest.raises(InvalidData, match=r"Every row is longer than max_length = 2 tokens"):
        encode_rows(tokenizer, rows, PromptFormat.RAW, 2)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        encode_rows(tokenizer, [Row(1, "a", "b")], PromptFormat.RAW, 8)
