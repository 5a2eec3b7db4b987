"""What a log line carries, and what it never holds."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator

import pytest
from support.log_lines import KeptLines

from adapter_registry.keys import new_key
from slipstream.errors import EngineFailed
from slipstream.telemetry.exchange import CURRENT, Exchange
from slipstream.telemetry.logs import (
    MAX_TEXT_CHARS,
    OURS,
    SHOWS_ERROR,
    RequestContext,
    forward_logs,
    redacted,
    shortened,
)

HOST = "host-of-test"
PROMPT = "what was asked"  # never spelt out where it is raised: tracebacks show source lines


@pytest.fixture
def host() -> Iterator[KeptLines]:
    """A host's logger, as Serve's; what is set up for it is undone."""
    names = (*OURS, "opentelemetry", "asyncio")
    before = {name: (logging.getLogger(name).level, logging.getLogger(name).handlers) for name in names}
    logger, kept = logging.getLogger(HOST), KeptLines()
    logger.handlers, logger.propagate = [kept], False
    yield kept
    logger.handlers, logger.filters = [], []
    for name, (level, handlers) in before.items():
        undone = logging.getLogger(name)
        undone.level, undone.handlers, undone.propagate = level, handlers, True
        undone.setLevel(level)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    found = Exchange("req-1", tenant="acme", model="sql@2", adapter="sha256:ab", trace_id="f" * 32)
    token = CURRENT.set(found)
    yield found
    CURRENT.reset(token)


def test_a_line_carries_its_request_as_fields(host: KeptLines, exchange: Exchange) -> None:
    forward_logs(HOST, "INFO", as_text=False)
    logging.getLogger("slipstream.x").info("loaded %d", 3, extra={"seconds": 0.5})
    (record,) = host.records
    fields = {
        name: getattr(record, name) for name in ("request_id", "tenant", "model", "adapter", "trace_id", "seconds")
    }
    assert fields == {**exchange.context(), "seconds": 0.5}
    assert host.lines == ["loaded 3"]


def test_text_shows_the_same_behind_the_message(host: KeptLines, exchange: Exchange) -> None:
    forward_logs(HOST, "INFO", as_text=True)
    logging.getLogger("adapter_registry.x").warning("gone", extra={"seconds": 0.5})
    (line,) = host.lines
    assert line.startswith("gone ")
    assert {"request_id=req-1", "tenant=acme", "adapter=sha256:ab", "seconds=0.5"} <= set(line.split())


def test_what_belongs_to_no_request_says_so_by_carrying_none(host: KeptLines) -> None:
    forward_logs(HOST, "INFO", as_text=True)
    logging.getLogger("slipstream.x").info("swept")
    assert host.lines == ["swept"]


def test_levels_hold_and_setting_up_twice_says_nothing_twice(host: KeptLines) -> None:
    for _ in range(2):
        forward_logs(HOST, "WARNING", as_text=True)
    logging.getLogger("slipstream.x").info("quiet")
    logging.getLogger("slipstream.x").warning("loud")
    logging.getLogger("opentelemetry.sdk").warning("a collector that is away is no news")
    assert host.lines == ["loud"]


def fail(what: str) -> None:
    raise ValueError(f"cannot take {what}")


def test_what_an_error_says_is_withheld_while_it_may_quote_a_request(host: KeptLines, exchange: Exchange) -> None:
    forward_logs(HOST, "INFO", as_text=False)
    try:
        try:
            fail(PROMPT)
        except ValueError as error:
            raise EngineFailed("The engine has stopped.") from error
    except EngineFailed as error:
        logging.getLogger("slipstream.x").error("failed", exc_info=error)
    (line,) = host.lines
    assert PROMPT not in line
    assert "builtins.ValueError (what it says is withheld)" in line
    assert 'raise ValueError(f"cannot take {what}")' in line, "where it was raised is shown"
    assert "EngineFailed: The engine has stopped." in line, "our own sentences quote nobody"


@pytest.mark.parametrize("log_prompts", [True, None])
def test_what_an_error_says_is_shown_where_it_can_hurt_nobody(
    host: KeptLines, exchange: Exchange, log_prompts: bool | None
) -> None:
    """Outside of requests, and for a tenant that has its prompts logged."""
    forward_logs(HOST, "INFO", as_text=False)
    exchange.log_prompts = bool(log_prompts)
    token = CURRENT.set(exchange if log_prompts else None)
    try:
        fail("what I got")
    except ValueError:
        logging.getLogger("slipstream.x").exception("failed")
    finally:
        CURRENT.reset(token)
    assert "ValueError: cannot take what I got" in host.lines[0]


def test_what_an_error_of_ours_alone_says_is_shown(host: KeptLines, exchange: Exchange) -> None:
    """An adapter that cannot be read says why; no field is left of the mark."""
    forward_logs(HOST, "INFO", as_text=True)
    try:
        fail("this adapter")
    except ValueError:
        logging.getLogger("slipstream.x").exception("not loaded", extra={SHOWS_ERROR: True})
    assert "ValueError: cannot take this adapter" in host.lines[0]
    assert SHOWS_ERROR not in host.lines[0]


def test_a_task_that_failed_unseen_is_told_without_its_error(host: KeptLines) -> None:
    """Python says so when the task is collected, in whatever context that is."""
    forward_logs(HOST, "INFO", as_text=False)

    async def main() -> None:
        async def lost() -> None:
            fail(PROMPT)

        task = asyncio.ensure_future(lost())
        await asyncio.wait([task])

    asyncio.run(main())
    gc.collect()
    assert len(host.lines) == 1
    assert host.lines[0].startswith("Task exception was never retrieved")
    assert PROMPT not in host.lines[0]


def test_what_has_more_than_a_word_forges_no_line(host: KeptLines) -> None:
    forward_logs(HOST, "INFO", as_text=True)
    logging.getLogger("slipstream.x").info("prompt", extra={"prompt": "one\nERROR two", "n": 3})
    assert host.lines == ["prompt prompt='one\\nERROR two' n=3"]


def test_keys_headers_and_passwords_are_taken_out(host: KeptLines) -> None:
    secret, _ = new_key("acme")
    forward_logs(HOST, "INFO", as_text=True)
    said = f"{secret} 'authorization': 'Bearer my-own-admin-key', redis://:hunter2@host/0 https://me:pw@x/"
    logging.getLogger("slipstream.x").info("%s", said)
    try:
        raise ValueError(secret)
    except ValueError:
        logging.getLogger("slipstream.x").exception("again")
    text = "\n".join(host.lines)
    for each in (secret, "my-own-admin-key", "hunter2", "pw@"):
        assert each not in text
    assert "redis://:[redacted]@host/0" in text
    assert "Bearer [redacted]" in text


def test_what_looks_like_no_secret_stays() -> None:
    text = "POST /v1/keys 200 https://host/path sha256:abc user@example.com key_12ab basic"
    assert redacted(text) == text


def test_texts_are_bounded() -> None:
    assert shortened(["a", "b"]) == "a\nb"
    long = shortened(["x" * (MAX_TEXT_CHARS + 5)])
    assert len(long) < MAX_TEXT_CHARS + 40
    assert f"({MAX_TEXT_CHARS + 5} characters)" in long


def test_a_record_may_pass_twice() -> None:
    record = logging.makeLogRecord({"msg": "a %s", "args": ("b",), "tenant": "acme"})
    for _ in range(2):
        RequestContext(as_text=True).filter(record)
    assert record.getMessage() == "a b tenant=acme"
