"""A whole run: data, training, evaluation, gate, and an adapter folder ready to publish."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from adapter_registry.records import PromptFormat
from slipstream.adapters.peft_config import PEFT_CONFIG
from slipstream.adapters.turbo_config import SLIPSTREAM_CONFIG, read_options, read_stream_config
from slipstream.base_models import PreparedModel, prepare_base_model
from slipstream.config import load_settings
from slipstream.engine.loader import base_digest, load_model
from slipstream.errors import InvalidRequest
from slipstream.evaluation import Evaluation, EvaluationOptions, evaluate, open_adapter
from slipstream.evaluation.variants import BASE
from slipstream.training.config import Method, TrainingConfig
from slipstream.training.data import Encoded, Row, encode_prompt, encode_rows, file_sha256, format_of, read_rows
from slipstream.training.distill import distil, load_rows, save_rows
from slipstream.training.events import EventLog, Fan, Message, Observer, Phase
from slipstream.training.export import BaseIdentity, export_adapter
from slipstream.training.gate import METRICS, Gate, compare_with_lora, decide, reference_loss
from slipstream.training.model import precision
from slipstream.training.phase import Fit, PhaseJob, PhaseOutcome, fit_here, load_phase_model, set_threads
from slipstream.training.report import Report, write_report
from slipstream.training.trainer import judged_by

HELD_OUT, MOST_HELD_OUT = 0.05, 200  # of the training rows, where no validation file is given
GATE_CONCURRENCY = 4
# Of max_minutes: for answering training prompts where only streams are trained; and for answering and for learning from
# the answers where the LoRA is trained first.
ANSWER_SHARE, SECOND_ANSWER_SHARE, SECOND_SHARE = 0.3, 0.1, 0.25
EVENTS, RUN = "events.jsonl", "run.json"
# What a resumed run may set anew: where and how fast it runs, not what comes out.
_MAY_CHANGE = {
    "resume",
    "output",
    "device",
    "threads",
    "report_to",
    "workers",
    "fsdp",
    "base",
    "adapter",
    "lora_reference",
    "name",
    "state_cache_gib",
}


class Interrupted(Exception):
    """SIGTERM came; a checkpoint was saved, and `resume` goes on from it."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run. folder: the adapter, its card, curve and log; metrics: the last evaluation's, by name."""

    folder: Path
    gate: Gate
    metrics: dict[str, float]
    evaluation: Evaluation | None
    steps: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For events and `--json`."""
        gate = {"speculation": self.gate.speculation, "reason": self.gate.reason}
        return {
            "folder": str(self.folder),
            "gate": {**gate, "expected_speedup": self.gate.expected_speedup},
            "metrics": self.metrics,
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def train(config: TrainingConfig, observer: Observer = lambda event: None, fit: Fit = fit_here) -> TrainingResult:
    """Train what `config` says and leave `config.output / "adapter"` ready to publish.

    Raises `InvalidData` for rows that cannot be used, `InvalidRequest` for options that do not go together, `ConfigError`
    for the base model, and `Interrupted` when SIGTERM ended it early. With `config.resume` a run goes on where it was.
    """
    transformers_logging.disable_progress_bar()  # it would draw over ours
    set_threads(config.threads)
    return _Run(config, observer, fit).run()


class _Run:
    """One run's parts, in the order in which they happen."""

    def __init__(self, config: TrainingConfig, observer: Observer, fit: Fit) -> None:
        self._config, self._tell, self._fit = config, observer, fit
        self._notes: list[str] = []
        self._metrics: dict[str, float] = {}  # of what the last phase kept

    def run(self) -> TrainingResult:
        config = self._config
        self._check()
        self._tell(Phase("Preparing"))
        self._settle_precision()
        self._base: PreparedModel = prepare_base_model(config.base, load_settings().home)
        self._tokenizer = AutoTokenizer.from_pretrained(self._base.path)
        rows, held_out = self._read()
        own = None if config.adapter is None else _prompt_format(config.adapter)
        self._format: PromptFormat = format_of(rows, config.prompt_format or own)
        if held_out:
            format_of(held_out, self._format)  # refuses chats that are to be raw
        train_rows, valid_rows = self._encode(rows, "training"), self._encode(held_out, "validation")
        longest = max((row.num_trained for row in [*train_rows, *valid_rows]), default=1)
        # A model that has not learned to stop is not listened to for long: every answer of the data ends well before.
        self._max_answer = min(config.max_length // 2, 2 * longest)
        self._identity = BaseIdentity(self._base.id, base_digest(self._base.path))
        # Only now is there a run: rows that could not be used leave the folder free for the next try.
        config.output.mkdir(parents=True, exist_ok=True)
        self._check_same_run()
        with closing(EventLog(config.output / EVENTS)) as log:
            self._tell = Fan(log, self._tell)
            return self._train_and_judge(rows, held_out, train_rows, valid_rows)

    def _train_and_judge(
        self, rows: list[Row], held_out: list[Row], train_rows: list[Encoded], valid_rows: list[Encoded]
    ) -> TrainingResult:
        config = self._config
        outcome, last = self._train(rows, train_rows, valid_rows)
        metrics = self._metrics
        folder = config.output / "adapter"
        self._export(last, folder)
        evaluation = self._answer(folder, held_out)
        gate = self._gate(folder, evaluation)
        if evaluation is not None and config.method.trains_streams:
            self._export(last, folder, _rates(evaluation, config.streams))
        report = self._report(outcome, metrics, evaluation, gate, rows, held_out)
        write_report(report, folder)
        (config.output / METRICS).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        return TrainingResult(folder, gate, metrics, evaluation, outcome.steps, outcome.tokens, outcome.seconds)

    def _check(self) -> None:
        """What would otherwise fail only after the training, or pass for something else."""
        config = self._config
        if (config.output / EVENTS).exists() and not config.resume:
            raise InvalidRequest(
                f"{config.output} holds a run already. Resume it, or give another folder.", param="output"
            )
        adapter = config.adapter
        if adapter is not None and not (adapter / PEFT_CONFIG).is_file() and read_stream_config(adapter) is None:
            raise InvalidRequest(
                f"{adapter} holds no adapter: there is no {PEFT_CONFIG} in it. That of a run is in its folder 'adapter'.",
                param="adapter",
            )
        if config.method is Method.TURBO_LORA and config.lora_reference is not None:
            reference_loss(config.lora_reference)

    def _settle_precision(self) -> None:
        """One number format for the whole run, also where it goes on on another machine; Ray's workers pick their own."""
        if self._config.bf16 is not None or self._config.workers > 1:
            return
        path = self._config.output / RUN
        before = json.loads(path.read_text("utf-8")).get("bf16") if path.is_file() else None
        bf16 = precision(self._config) is torch.bfloat16 if before is None else before
        self._config = self._config.model_copy(update={"bf16": bf16})

    def _check_same_run(self) -> None:
        """A run goes on as what it began: other rows or options would make an adapter that no card describes."""
        now = self._config.model_dump(mode="json", exclude=_MAY_CHANGE)
        now |= {
            name: file_sha256(path) for name in ("data", "valid") if (path := getattr(self._config, name)) is not None
        }
        path = self._config.output / RUN
        if not path.is_file():
            path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
            return
        before = json.loads(path.read_text("utf-8"))
        changed = next((name for name in sorted({*before, *now}) if before.get(name) != now.get(name)), None)
        if changed is not None:
            raise InvalidRequest(
                f"{self._config.output} holds a run with another {changed}. Resume it as it was, or give another folder.",
                param=changed,
            )

    def _read(self) -> tuple[list[Row], list[Row]]:
        rows = read_rows(self._config.data)
        if self._config.valid is not None:
            return rows, read_rows(self._config.valid)
        count = min(MOST_HELD_OUT, int(len(rows) * HELD_OUT))
        if count == 0:
            self._note("Too few rows to hold any out: nothing is evaluated.")
            return rows, []
        self._note(f"No validation file: {count} rows, drawn by the seed, are held out.")
        held = set(Random(self._config.seed).sample(range(len(rows)), count))  # noqa: S311 - nothing secret
        return (
            [row for i, row in enumerate(rows) if i not in held],
            [row for i, row in enumerate(rows) if i in held],
        )

    def _encode(self, rows: list[Row], what: str) -> list[Encoded]:
        if not rows:
            return []
        encoded, longer = encode_rows(self._tokenizer, rows, self._format, self._config.max_length)
        if longer:
            self._note(
                f"{longer} of {len(rows)} {what} rows are longer than {self._config.max_length} tokens: left out."
            )
        return encoded

    @property
    def _dtype(self) -> str:
        """What the engine answers in: as the training computes."""
        return str(precision(self._config)).removeprefix("torch.")

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._tell(Message(text))

    # --- training -------------------------------------------------------------------------------------------------

    def _train(
        self, rows: list[Row], train_rows: list[Encoded], valid_rows: list[Encoded]
    ) -> tuple[PhaseOutcome, PhaseJob]:
        config = self._config
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._tokenizer.eos_token_id
        if not config.method.trains_lora:
            alone = config
            if config.distills:
                train_rows = self._distilled(rows, config.adapter, ANSWER_SHARE)
                alone = _within(config, 1 - ANSWER_SHARE)
            return self._run_phase(
                PhaseJob(alone, self._base.path, train_rows, valid_rows, pad, config.output / "phase"), "Training"
            )
        second = config.distills
        joint = _within(config, 1 - SECOND_ANSWER_SHARE - SECOND_SHARE) if second else config
        job = PhaseJob(joint, self._base.path, train_rows, valid_rows, pad, config.output / "phase")
        outcome, job = self._run_phase(job, "Training")
        if not second:
            return outcome, job
        adapter = config.output / "phase" / "adapter"
        self._export(job, adapter)
        update = {"epochs": config.distill_epochs, "soft_targets": 1.0, "gate": 0.0}
        follow = replace(
            job,
            config=_within(config, SECOND_SHARE).model_copy(update=update),
            train=self._distilled(rows, adapter, SECOND_ANSWER_SHARE),
            folder=config.output / "phase-distilled",
            after=job.folder,
        )
        after, follow = self._run_phase(follow, "Training on the model's own answers")
        together = PhaseOutcome(
            outcome.steps + after.steps,
            outcome.tokens + after.tokens,
            outcome.seconds + after.seconds,
            history=[*outcome.history, *({**row, "step": row["step"] + outcome.steps} for row in after.history)],
        )
        return together, follow

    def _run_phase(self, job: PhaseJob, title: str) -> tuple[PhaseOutcome, PhaseJob]:
        self._tell(Phase(title))
        job.folder.mkdir(parents=True, exist_ok=True)
        outcome = self._fit(job, self._tell)
        if outcome.stopped:
            raise Interrupted(f"Stopped after step {outcome.steps}; a checkpoint is saved. Go on with resume.")
        by = judged_by(trains_lora=self._config.method.trains_lora and job.after is None)
        self._metrics = _kept_evaluation(outcome, by, best=self._config.patience is not None)
        return outcome, job

    def _distilled(self, rows: list[Row], adapter: Path | None, share: float) -> list[Encoded]:
        config = self._config
        path = config.output / "distilled.jsonl"
        if path.is_file():
            return load_rows(path)
        self._tell(Phase("Answering the training prompts"))
        passes = config.distill_epochs if config.method.trains_lora else config.epochs
        useful = len(rows) if config.max_steps is None else -(-config.max_steps * config.batch_size // passes)
        count = min(len(rows), config.distill_rows, useful)
        drawn = Random(config.seed).sample(rows, count)  # noqa: S311 - nothing secret
        prompts = [encode_prompt(self._tokenizer, row, self._format) for row in drawn]
        loaded = load_model(str(self._base.path), self._dtype, config.device)
        limit_s = None if config.max_minutes is None else 60 * share * config.max_minutes
        answers = distil(
            loaded,
            self._tokenizer,
            adapter,
            prompts,
            config.max_length,
            self._tell,
            max_answer=self._max_answer,
            max_seconds=limit_s,
        )
        save_rows(answers, path)
        return answers

    # --- afterwards -----------------------------------------------------------------------------------------------

    def _export(self, job: PhaseJob, folder: Path, acceptance: tuple[float, ...] = ()) -> None:
        model = load_phase_model(job, finished=True)
        export_adapter(model, self._config, folder, self._identity, self._format, acceptance)

    def _answer(self, folder: Path, held_out: list[Row]) -> Evaluation | None:
        if not held_out or self._config.gate_rows == 0:
            return None
        self._tell(Phase("Answering held-out rows"))
        opened = open_adapter(folder, self._base, self._dtype, GATE_CONCURRENCY, device=self._config.device)
        room = min(opened.engine.max_length, self._config.max_length)
        fits = [row for row in held_out if len(encode_prompt(self._tokenizer, row, self._format)) < room]
        rows = fits[: self._config.gate_rows]
        if not rows:
            return None
        variants = [v for v in opened.variants if v.name != BASE or len(opened.variants) < 3]
        options = EvaluationOptions(GATE_CONCURRENCY, self._max_answer, self._format)
        return evaluate(opened.engine, opened.tokenizer, rows, variants, options)

    def _gate(self, folder: Path, evaluation: Evaluation | None) -> Gate:
        if not self._config.method.trains_streams:
            return decide(None, None, BASE)
        slow = "lora" if (folder / PEFT_CONFIG).is_file() else BASE
        gate = decide(evaluation, None if evaluation is None else _fast(evaluation), slow)
        if evaluation is None:
            gate = Gate(True, "Not measured: there were no held-out rows to answer.")
        self._tell(Message(gate.reason, "info" if gate.speculation else "warning"))
        return gate

    def _report(
        self,
        outcome: PhaseOutcome,
        metrics: dict[str, float],
        evaluation: Evaluation | None,
        gate: Gate,
        rows: list[Row],
        held_out: list[Row],
    ) -> Report:
        config = self._config
        lora = ""
        if config.method is Method.TURBO_LORA and "eval_lora_loss" in metrics:
            lora, warns = compare_with_lora(metrics["eval_lora_loss"], config.gate, config.lora_reference)
            self._tell(Message(lora, "warning" if warns else "info"))
        files = {"training": (config.data.name, file_sha256(config.data), len(rows))}
        if config.valid is not None:
            files["validation"] = (config.valid.name, file_sha256(config.valid), len(held_out))
        return Report(
            config, self._identity.id, self._format.value, files, outcome.steps, outcome.tokens, outcome.seconds,
            outcome.history, metrics, evaluation, gate, lora, tuple(self._notes),
        )  # fmt: skip


def _prompt_format(adapter: Path) -> PromptFormat | None:
    """What a finished adapter says it was trained on: its speculator must see the same prompts."""
    streams = read_stream_config(adapter)
    if streams is not None and streams.prompt_format is not None:
        return streams.prompt_format
    options = adapter / SLIPSTREAM_CONFIG
    return read_options(options).prompt_format if options.is_file() else None


def _fast(evaluation: Evaluation) -> str:
    """The variant that speculates."""
    return next(name for name in ("turbo_lora", "turbo", "medusa") if name in evaluation.variants)


def _rates(evaluation: Evaluation, streams: int) -> tuple[float, ...]:
    """One rate for each stream; the last known one stands for positions that no answer was long enough to judge."""
    found = evaluation.variants[_fast(evaluation)].acceptance
    return found + found[-1:] * (streams - len(found))


def _within(config: TrainingConfig, share: float) -> TrainingConfig:
    """`config` with a share of its time."""
    return config.model_copy(update={"max_minutes": config.max_minutes and share * config.max_minutes})


def _kept_evaluation(outcome: PhaseOutcome, by: str, *, best: bool) -> dict[str, float]:
    """The evaluation of the weights that the phase ended with: the last, or with early stopping the best."""
    rows = [row for row in outcome.history if by in row]
    if not rows:
        return {}
    kept = min(rows, key=lambda row: row[by]) if best else rows[-1]
    return {k: v for k, v in kept.items() if k.startswith("eval_")}
