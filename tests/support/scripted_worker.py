"""A trainer that trains nothing: it says what the real one would, as the job's name tells it. Standard library only.

Run as `python scripted_worker.py …/config.json`. An adapter that is ready to be published lies in `finished` inside the
base model's folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    config = json.loads(Path(sys.argv[1]).read_text())
    events = (Path(sys.argv[1]).parent / "events.jsonl").open("a", buffering=1)
    output = Path(config["output"])

    def say(kind: str, **fields: Any) -> None:
        events.write(json.dumps({"type": kind, **fields}) + "\n")

    def save(*_: Any) -> None:
        say("checkpoint", step=3, path="x", data={"train_loss": 0.5})
        sys.exit(143)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if config["name"] == "stubborn" else save)
    print("the worker has started")
    say("phase", phase="Preparing")
    if config["name"] == "bad-row":
        say("error", code="invalid_training_file", message=bad_row(Path(config["data"])), param="data")
        return 1
    if config["name"] == "elsewhere":
        say("error", code="bad_config", message=f"{output}/adapter holds no adapter.", param="adapter")
        return 1
    say("phase", phase="Training")
    for step in range(1, 4):
        say("metrics", step=step, total=3, progress=step / 4, data={"train/loss": 1 / step})
    return end(config, output, say)


def end(config: dict[str, Any], output: Path, say: Any) -> int:
    """What becomes of it, by the job's name."""
    name = config["name"]
    if name == "oom":
        say(
            "error",
            code="out_of_memory",
            message="The GPU's memory is full. Lower 'micro_batch_size'.",
            param="micro_batch_size",
        )
        return 1
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "crash":
        print("Traceback: secret")
        return 3
    if name == "silent":
        return 0
    if name in ("hang", "stubborn") or (name == "hang-once" and not config["resume"]):
        say("checkpoint", step=3, path="x", data={"train_loss": 0.5, "valid_loss": 0.4})
        time.sleep(600)
    output.mkdir(parents=True, exist_ok=True)
    shutil.copytree(Path(config["base"]) / "finished", output / "adapter", dirs_exist_ok=True)
    if name == "refused":
        (output / "adapter" / "evil.bin").write_bytes(b"pickle")
    pays = name != "slow"
    gate = {"speculation": pays, "reason": "It pays." if pays else "Expected speed-up 1.02.", "expected_speedup": 1.9}
    say("result", folder=str(output / "adapter"), metrics={"eval_loss": 0.5}, gate=gate, tokens=1234)
    return 0


def bad_row(data: Path) -> str:
    """As the real reader says it."""
    for number, line in enumerate(data.read_text().splitlines(), 1):
        if "completion" not in json.loads(line):
            return f"{data.name}, row {number}: cannot be used: 'completion' is missing. Mend or remove the row."
    return "no bad row"


if __name__ == "__main__":
    sys.exit(main())
