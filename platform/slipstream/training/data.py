"""Rows of training data: read, checked with their row number, and turned into tokens."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from pydantic import BaseModel, ConfigDict, ValidationError

from adapter_registry.records import PromptFormat
from slipstream.errors import InvalidRequest

IGNORE = -100  # the label of a token that is not trained, as everywhere in this field
MAX_ROW_CHARS = 1 << 20
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class InvalidData(InvalidRequest):
    """A training file that cannot be used; the message names the file and the row."""

    code = "invalid_training_file"


class Turn(BaseModel):
    """One chat message."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # OpenAI's rows may carry name, weight and the like

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a prompt with its completion, or a chat that ends with the assistant. `number` counts from 1."""

    number: int
    prompt: str | None = None
    completion: str = ""  # for a chat: its last message
    messages: tuple[Turn, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether it came as `messages`."""
        return bool(self.messages)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row in tokens; `labels[i]` is `ids[i]` where it is trained, else IGNORE."""

    ids: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """Tokens that count in the loss."""
        return sum(label != IGNORE for label in self.labels)


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """All rows of a .jsonl or .csv file, or the first `limit`. Raises `InvalidData` naming the first bad row."""
    if not path.is_file():
        raise InvalidData(f"There is no file {path}.", param="data")
    if path.suffix.lower() not in (".jsonl", ".json", ".csv"):
        raise InvalidData(f"{path.name} must end in .jsonl or .csv, so that it is plain how to read it.", param="data")
    rows: list[Row] = []
    for number, raw in _raw_rows(path):
        rows.append(_row(path, number, raw))
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise InvalidData(f"{path.name} has no rows.", param="data")
    if len({row.is_chat for row in rows}) > 1:
        odd = next(row for row in rows if row.is_chat != rows[0].is_chat)
        raise _bad(
            path, odd.number, "has another form than the rows before it: use prompt/completion or messages throughout"
        )
    return rows


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file: what a training card names its data by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def format_of(rows: Sequence[Row], wanted: PromptFormat | None) -> PromptFormat:
    """The prompt format that these rows train. Raises `InvalidData` for chats that are asked to be raw."""
    if wanted is PromptFormat.RAW and rows[0].is_chat:
        raise InvalidData("Rows with messages train the chat format; prompt_format raw needs prompt and completion.")
    return wanted or (PromptFormat.CHAT if rows[0].is_chat else PromptFormat.RAW)


def encode_prompt(tokenizer: Any, row: Row, prompt_format: PromptFormat) -> list[int]:
    """The tokens that the serving side would make of this row's prompt."""
    if prompt_format is PromptFormat.RAW:
        assert row.prompt is not None
        return list(tokenizer(row.prompt)["input_ids"])
    return _chat_ids(tokenizer, _turns(row)[:-1], answer_next=True)


def encode_row(tokenizer: Any, row: Row, prompt_format: PromptFormat) -> Encoded:
    """Prompt and completion in tokens. The end-of-sequence token is trained; prompts, and what a chat template puts
    after an assistant's end token, are not. Raises `InvalidData` for a template that rewrites earlier turns."""
    if prompt_format is PromptFormat.CHAT:
        return _encode_chat(tokenizer, row)
    prompt = encode_prompt(tokenizer, row, prompt_format)
    answer = [*tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Encoded(prompt + answer, [IGNORE] * len(prompt) + answer)


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Row],
    prompt_format: PromptFormat,
    max_length: int,
) -> tuple[list[Encoded], int]:
    """Every row of at most `max_length` tokens, and how many were longer. Raises `InvalidData` when none is left."""
    if tokenizer.eos_token_id is None:
        raise InvalidRequest("The base model's tokenizer has no end-of-sequence token, so no answer could ever end.")
    kept: list[Encoded] = []
    for row in rows:
        try:
            encoded = encode_row(tokenizer, row, prompt_format)
        except (ValueError, TypeError, TemplateError) as error:
            message = f"Row {row.number}: the base model's chat template refuses it, or there is none: {error}"
            raise InvalidData(message, param="data") from error
        if len(encoded.ids) <= max_length:
            kept.append(encoded)
    if not kept:
        raise InvalidData(f"Every row is longer than max_length = {max_length} tokens. Raise it.", param="max_length")
    return kept, len(rows) - len(kept)


def _encode_chat(tokenizer: Any, row: Row) -> Encoded:
    turns = _turns(row)
    ids = _chat_ids(tokenizer, turns, answer_next=False)
    labels = [IGNORE] * len(ids)
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _chat_ids(tokenizer, turns[:i], answer_next=True)
        upto = _chat_ids(tokenizer, turns[: i + 1], answer_next=False)
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise InvalidData(
                f"Row {row.number}: the base model's chat template changes earlier messages when later ones come, so the "
                "answers cannot be told apart. Train on prompt/completion rows.",
                param="data",
            )
        end = len(upto)
        if tokenizer.eos_token_id in upto[len(before) :]:
            end = len(before) + upto[len(before) :].index(tokenizer.eos_token_id) + 1
        labels[len(before) : end] = ids[len(before) : end]
    last = max(i for i, label in enumerate(labels) if label != IGNORE) + 1
    return Encoded(ids[:last], labels[:last])


def _turns(row: Row) -> tuple[Turn, ...]:
    if row.messages:
        return row.messages
    assert row.prompt is not None
    return Turn(role="user", content=row.prompt), Turn(role="assistant", content=row.completion)


def _chat_ids(tokenizer: Any, turns: Sequence[Turn], *, answer_next: bool) -> list[int]:
    messages = [turn.model_dump() for turn in turns]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, tokenize=True, return_dict=True)
    return list(found["input_ids"])


def _raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None) as file:
            if path.suffix.lower() == ".csv":
                yield from enumerate(_csv_rows(path, csv.DictReader(file, strict=True)), 1)
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if len(line) > MAX_ROW_CHARS:
                    raise _bad(path, number, f"is longer than {MAX_ROW_CHARS} characters")
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _bad(path, number, f"is not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path.name} is not UTF-8 text (byte {error.start}).", param="data") from error


def _csv_rows(path: Path, reader: csv.DictReader[str]) -> Iterator[Any]:
    number = 0
    csv.field_size_limit(MAX_ROW_CHARS)  # the module's own limit is an eighth of what a JSON row may have
    try:
        names = reader.fieldnames or ()  # reads the first line
        if not {"prompt", "completion"} <= set(names):
            found = ", ".join(names)[:200] or "nothing"
            raise InvalidData(f"{path.name} needs the columns prompt and completion; it has {found}.", param="data")
        for number, row in enumerate(reader, 1):  # noqa: B007 - named in the error below
            yield {k: row[k] for k in ("prompt", "completion")}
    except csv.Error as error:
        raise _bad(path, number + 1, f"is not CSV ({error})") from error


def _row(path: Path, number: int, raw: Any) -> Row:
    if not isinstance(raw, dict):
        raise _bad(path, number, "is not a JSON object")
    if "messages" in raw:
        return _chat_row(path, number, raw["messages"])
    for field in ("prompt", "completion"):
        value = raw.get(field)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if field not in raw else "must be text that is not empty"
            raise _bad(path, number, f"cannot be used: {field!r} {found}")
        if _HALF_PAIR.search(value):  # JSON can spell it, no tokeniser can read it
            raise _bad(path, number, f"cannot be used: {field!r} holds half of a surrogate pair")
    return Row(number, prompt=raw["prompt"], completion=raw["completion"])


def _chat_row(path: Path, number: int, messages: Any) -> Row:
    if not isinstance(messages, list) or not messages:
        raise _bad(path, number, "cannot be used: 'messages' must be a list with at least one message")
    turns = []
    for i, message in enumerate(messages):
        try:
            turns.append(Turn.model_validate(message))
            if _HALF_PAIR.search(turns[-1].content):
                raise _bad(path, number, f"cannot be used: 'messages.{i}.content' holds half of a surrogate pair")
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["messages", str(i), *map(str, first["loc"])])
            raise _bad(path, number, f"cannot be used: {where!r}: {first['msg']}") from error
    if turns[-1].role != "assistant" or not turns[-1].content.strip():
        raise _bad(path, number, "cannot be used: 'messages' must end with an assistant message that is not empty")
    return Row(number, completion=turns[-1].content, messages=tuple(turns))


def _bad(path: Path, number: int, what: str) -> InvalidData:
    return InvalidData(f"{path.name}, row {number}: {what}. Mend or remove the row.", param="data")
