"""What a run tells, as lines that another process reads while they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from slipstream.training.events import CheckpointSaved, Event, EventLog, Fan, Message, Metrics, Phase
from slipstream.training.progress import TerminalObserver, describe

EVENTS: list[Event] = [
    Phase("Training"),
    Metrics(10, 20, 0.5, {"train/lora_loss": 1.25, "train/turbo_0_top1": 0.5}),
    Message("Too few rows.", "warning"),
    CheckpointSaved(10, "/run/checkpoint-10"),
]


def test_events_are_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "job" / "events.jsonl"
    log = EventLog(path)
    for event in EVENTS:
        log(event)
        assert path.read_text().endswith("\n"), "whole lines at any time"
    log.write({"type": "result", "steps": 20})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"phase": "Training", "type": "phase"},
        {
            "step": 10,
            "total": 20,
            "progress": 0.5,
            "data": {"train/lora_loss": 1.25, "train/turbo_0_top1": 0.5},
            "type": "metrics",
        },
        {"message": "Too few rows.", "level": "warning", "type": "message"},
        {"step": 10, "path": "/run/checkpoint-10", "data": {}, "type": "checkpoint"},
        {"type": "result", "steps": 20},
    ]
    log.close()
    again = EventLog(path)
    again(Phase("Resumed"))
    again.close()
    assert len(path.read_text().splitlines()) == 6, "a resumed run adds to its log"


def test_what_json_cannot_say_is_not_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log(Metrics(1, 2, 0.5, {"loss": float("nan")}))
    log.close()
    assert (tmp_path / "events.jsonl").read_text() == ""


def test_several_may_watch() -> None:
    first: list[Event] = []
    second: list[Event] = []
    fan = Fan(first.append, second.append)
    for event in EVENTS:
        fan(event)
    assert first == second == EVENTS


def test_a_pipe_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalObserver(Console(force_terminal=False, width=200)) as observer:
        for event in EVENTS:
            observer(event)
        observer(Metrics(11, 20, 0.55, {"train/lora_loss": 1.0}))
        observer(
            Metrics(12, None, 0.6, {"eval/lora_loss": 2.0, "eval/turbo_0_top1": 0.25, "eval/expected_tokens": 1.5})
        )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training"
    assert "step 10 of 20" in lines[1]
    assert "loss 1.250" in lines[1]
    assert lines[2] == "Warning: Too few rows."
    assert lines[3] == "step 10: checkpoint saved"
    assert "step 12: evaluation" in lines[4]
    assert "1.50 tokens/step" in lines[4]
    assert len(lines) == 5, "step 11 is one of many"


def test_numbers_on_one_line() -> None:
    data = {"lora_loss": 1.23456, "turbo_0_top1": 0.876, "turbo_1_top1": 0.999, "tokens_per_second": 1234.5}
    assert describe(data) == "loss 1.235  top-1 .88/1  1234 tok/s"
    assert describe({}) == ""
