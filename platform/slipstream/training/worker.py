"""`python -m slipstream.training.worker JOB/config.json`: one run in a process of its own, told line by line.

Events go to `events.jsonl` beside the configuration; the last line is a `result` or an `error`. SIGTERM saves a checkpoint
and ends with status 143, so that the same command goes on from there with `resume`.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError

from slipstream.errors import ClientError, SlipstreamError
from slipstream.training.config import TrainingConfig
from slipstream.training.events import EventLog
from slipstream.training.memory import OUT_OF_MEMORY, is_out_of_memory

EVENTS = "events.jsonl"
STOPPED = 143  # 128 + SIGTERM, as shells report it


def main(config_path: Path) -> int:
    """Run; returns the exit status."""
    with closing(EventLog(config_path.parent / EVENTS)) as log:
        return _run(config_path, log)


def _run(config_path: Path, log: EventLog) -> int:
    try:
        config = TrainingConfig.model_validate_json(config_path.read_text("utf-8"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        log.write(_error("bad_config", f"{first['msg']}.", ".".join(map(str, first["loc"])) or None))
        return 1
    # Imported here: a configuration that cannot be used is told at once.
    from slipstream.training.run import Interrupted, train  # noqa: PLC0415

    try:
        result = train(config, log)
    except Interrupted:
        return STOPPED
    except ClientError as error:
        log.write(_error(error.code, error.message, error.param))
    except SlipstreamError as error:
        log.write(_error(error.code, error.message, None))
    except Exception as error:  # the last place that can say anything
        traceback.print_exc()
        if is_out_of_memory(error):
            log.write(_error("out_of_memory", OUT_OF_MEMORY, "micro_batch_size"))
        else:
            log.write(
                _error("training_failed", f"The training failed: {type(error).__name__}. Its log says more.", None)
            )
    else:
        log.write({"type": "result", **result.to_json()})
        return 0
    return 1


def _error(code: str, message: str, param: str | None) -> dict[str, str | None]:
    return {"type": "error", "code": code, "message": message, "param": param}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
