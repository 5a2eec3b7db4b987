"""transformers' Trainer with our objective, parameter groups, schedules, checkpoints and metrics.

Over 400 lines, because a Trainer is one class with many hooks, and its clock (`_Clockwork`) reaches into all of them.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import rewrite_logs
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from slipstream.training.config import TrainingConfig
from slipstream.training.data import IGNORE, Encoded
from slipstream.training.events import CheckpointSaved, Message, Metrics, Observer
from slipstream.training.metrics import named_metrics
from slipstream.training.model import ForwardSums, TurboModel
from slipstream.training.packing import NO_SEGMENT, MicroBatches, pack
from slipstream.training.schedule import Clock, gate_value, learning_rate_factor
from slipstream.training.sharding import average_gradients
from slipstream.training.states import StateCache

CLOCK = "clock.json"
CPU_PACK, CUDA_PACK = 256, 4096  # columns of a pack where no row is longer


class TurboTrainer(Trainer):  # type: ignore[misc]
    """Trains a `TurboModel`. A batch of its data loader is one micro-batch of rows; see `packing.MicroBatches`."""

    # Trainer's own, which it does not declare:
    optimizer: AdamW | None
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: TurboModel,
        config: TrainingConfig,
        train: Sequence[Encoded],
        valid: Sequence[Encoded],
        pad_id: int,
        observer: Observer,
        *,
        output: Path,
        workers: int = 1,
    ) -> None:
        self._options = config
        self._rows = [*train, *valid[: config.eval_rows]]  # a row's number is its place here
        self._num_train = len(train)
        self._pad_id = pad_id
        self._pack_length = CUDA_PACK if next(model.parameters()).is_cuda else CPU_PACK
        per_step = _micro_batches(config, workers, len(train))
        self._items = MicroBatches(
            len(train), epochs=config.epochs, batch_size=config.batch_size, per_step=per_step, seed=config.seed
        )
        steps = max(1, len(self._items) // per_step)
        self.clock = Clock(min(steps, config.max_steps or steps), config.max_minutes and config.max_minutes * 60)
        self._streams = model.streams.num_streams if model.streams is not None else 0
        self._sums = ForwardSums.zeros(self._streams)
        self.tokens = 0  # that all workers have seen, padding left out
        self._tokens_of_step = 0  # of this worker
        self.judged_by = judged_by(trains_lora=model.trains_trunk)
        self.states = self._state_cache(model, workers)
        arguments = _arguments(
            config, output, per_step // workers, self.clock.total_steps, self.judged_by if self._valid else None
        )
        callbacks = [_Clockwork(self, observer)]
        if config.negatives is not None and self._streams:
            model.limit_drafts(torch.tensor(sorted({i for row in train for i in row.labels if i != IGNORE})))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=self._items,
            eval_dataset=list(self._valid) or None,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # our loss is a sum over num_items_in_batch, not a mean per micro-batch
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    @property
    def turbo(self) -> TurboModel:
        """The model without what distributed training wraps around it."""
        found = self.accelerator.unwrap_model(self.model)
        assert isinstance(found, TurboModel)
        return found

    # --- what a step is -------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective; its sums are kept for the log."""
        numbers = inputs.pop("numbers").tolist()
        out = model(**inputs, num_items=num_items_in_batch, states=self._states(numbers, inputs["segments"]))
        if model.training:
            self._sums += out.stacked().cpu()
            self._tokens_of_step += int((inputs["segments"] != NO_SEGMENT).sum())
        # As Trainer does: gradients are averaged over workers, but ours are already divided by everybody's tokens.
        loss = out.loss * self.accelerator.num_processes if num_items_in_batch is not None else out.loss
        return (loss, out) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for LoRA and for the speculator, without weight decay."""
        if self.optimizer is None:
            turbo = self.turbo
            groups = [
                {"params": list(turbo.lora_parameters()), "lr": self._options.learning_rate},
                {"params": list(turbo.stream_parameters()), "lr": self._options.stream_learning_rate},
            ]
            self.optimizer = AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Driven by the clock, so that a time limit stretches it."""
        if self.lr_scheduler is None:
            assert self.optimizer is not None

            def factor(step: int) -> float:
                return learning_rate_factor(self.clock.progress, self._options.warmup)

            self.lr_scheduler = LambdaLR(self.optimizer, factor)
        return self.lr_scheduler

    def clip(self) -> None:
        """Clip LoRA and speculator each by its own norm: the streams' large early gradients must not slow the LoRA."""
        for parameters in (self.turbo.lora_parameters(), self.turbo.stream_parameters()):
            found = [p for p in parameters if p.grad is not None]
            if found:
                torch.nn.utils.clip_grad_norm_(found, self._options.clip)

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches in their planned order."""
        loader = DataLoader(self._items, batch_size=1, collate_fn=lambda items: self._pack(items[0]))
        prepared: DataLoader[Any] = self.accelerator.prepare_data_loader(loader)
        return prepared

    @property
    def _valid(self) -> range:
        """The numbers of the validation rows."""
        return range(self._num_train, len(self._rows))

    def _pack(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """A `PackedBatch` of rows, and their `numbers`."""
        packed = pack([self._rows[i] for i in numbers], self._pack_length, self._pad_id)
        return {**packed.as_dict(), "numbers": torch.tensor(numbers)}

    def _state_cache(self, model: TurboModel, workers: int) -> StateCache | None:
        """Where a frozen trunk's states are kept, if there is use for them."""
        capacity = int(self._options.state_cache_gib * 2**30) // workers
        # A sharded trunk is read by all workers together, so none may skip it.
        if model.trains_trunk or self._options.fsdp or not capacity:
            return None
        # With several workers a row comes to another one in each epoch: reading along would read most rows everywhere.
        return StateCache(self._read_states, self._companions if workers == 1 else None, capacity)

    def _states(self, numbers: Sequence[int], segments: torch.Tensor) -> torch.Tensor | None:
        """What a frozen trunk says to a batch, [N, H], in the order in which its rows are packed. None: it is to be asked."""
        if self.states is None:
            return None
        order = segments[segments != NO_SEGMENT].unique_consecutive().tolist()  # type: ignore[no-untyped-call]
        states = self.states.states(numbers)
        return torch.cat([states[i] for i in order]).to(segments.device)

    def _read_states(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        batch = {n: t.to(self.args.device) for n, t in self._pack(numbers).items() if n != "numbers"}
        return self.turbo.read_states(**batch)

    def _companions(self, number: int) -> Sequence[int]:
        if number < self._num_train:
            return self._items.companions(number)
        start = number - (number - self._num_train) % self._eval_size
        return self._valid[start - self._num_train : start - self._num_train + self._eval_size]

    # --- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Teacher-forced metrics on the validation rows, logged and returned with their prefix."""
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """`named_metrics` with chains, over the validation rows, shared out among the workers."""
        model = self.turbo
        training = model.training
        model.eval()
        sums = torch.zeros_like(self._sums)
        size, world, rank = self._eval_size, self.accelerator.num_processes, self.accelerator.process_index
        for start in range(0, len(self._valid), world * size):
            mine = self._valid[start + rank * size : start + (rank + 1) * size]
            # Nothing left for this worker? It makes the pass all the same: a sharded model takes all of them.
            batch = {n: t.to(self.args.device) for n, t in self._pack(mine or self._valid[:1]).items()}
            numbers = batch.pop("numbers").tolist()
            found = model(**batch, states=self._states(numbers, batch["segments"])).stacked().cpu()
            if mine:
                sums += found
        model.train(training)
        return named_metrics(self._all(sums), self._streams, self._options.stream_decay, chains=True)

    @property
    def _eval_size(self) -> int:
        """Rows of one forward pass of an evaluation."""
        return self._options.micro_batch_size or self._options.batch_size

    def _all(self, sums: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        gathered: torch.Tensor = self.accelerator.reduce(sums.to(self.args.device), "sum")
        return gathered.cpu()

    def take_metrics(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        sums, self._sums = self._all(self._sums), torch.zeros_like(self._sums)
        if sums[0] <= 0:
            return {}
        found = named_metrics(sums, self._streams, self._options.stream_decay, chains=False)
        if not self.turbo.trains_trunk:  # it does not move, and here it was asked about the drafts' vocabulary alone
            found["loss"] -= found.pop("lora_loss")
            del found["lora_top1"]
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with our sums in place of its running loss."""
        if "loss" in logs:
            logs = {**logs, **self.take_metrics(), "gate": self.turbo.gate, "tokens_per_second": self._speed()}
        super().log(logs, start_time)

    def _speed(self) -> float:
        """Input tokens/s over all workers, evaluations and checkpoints included."""
        return self.tokens / max(1e-9, self.clock.seconds)

    # --- several workers ------------------------------------------------------------------------------------------

    def agree(self, stop: bool) -> bool:
        """After each step: whether any worker wants to stop. Their clocks are made one too, for learning rates and gates
        that differed would let their weights drift apart."""
        told = torch.tensor([[self.clock.seconds, float(stop), float(self._tokens_of_step)]], dtype=torch.float64)
        self._tokens_of_step = 0
        if self.accelerator.num_processes > 1:
            told = self.accelerator.gather(told.to(self.args.device)).cpu()
            self.clock.agreed = float(told[:, 0].max())
        self.tokens += int(told[:, 2].sum())
        return bool(told[:, 1].any())

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if self._options.fsdp and training and model is self.model:
            return average_gradients(model)  # accelerate's DDP refuses a model that is partly sharded
        return super()._wrap_model(model, training, dataloader)

    # --- checkpoints: only what is trained ------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.turbo.save_trainable(folder)
        (folder / CLOCK).write_text(
            json.dumps({"seconds": self.clock.seconds, "tokens": self.tokens}), encoding="utf-8"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.turbo.load_trainable(folder)
        before = json.loads((folder / CLOCK).read_text("utf-8"))
        self.clock.seconds_before, self.tokens = float(before["seconds"]), int(before["tokens"])

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            self.turbo.load_trainable(Path(best))


class _Clockwork(TrainerCallback):  # type: ignore[misc]
    """Ties clock, gate, clipping, stopping and reporting to Trainer's events."""

    def __init__(self, trainer: TurboTrainer, observer: Observer) -> None:
        self._trainer = trainer
        self._observer = observer
        self._stop = threading.Event()
        self._stopping = False  # agreed by all workers
        self.should_stop: Callable[[], bool] = self._stop.is_set
        self.stopped_by_signal = False
        self._best = math.inf
        self._worse = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        clock = self._trainer.clock
        clock.step = state.global_step
        clock.start()
        for row in state.log_history:  # of a resumed run: its patience goes on
            if self._trainer.judged_by in row:
                self._judge(row[self._trainer.judged_by])

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        options = self._trainer._options
        self._trainer.turbo.gate = gate_value(self._trainer.clock.progress, options.gate_warmup, options.gate)
        self._trainer.turbo.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.clip()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.clock.step = state.global_step + 1  # the scheduler steps next, for the step after this one
        self._stopping = self._trainer.agree(self.should_stop())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        clock = self._trainer.clock
        if self._stopping:
            self.stopped_by_signal = True
            control.should_save = True
            control.should_training_stop = True
        if clock.is_over:
            control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"  # what is exported, as at the last step
            control.should_save = True  # it may be the best one, and then it is what is loaded again

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        clock = self._trainer.clock
        total = None if clock.max_seconds else clock.total_steps
        data = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float) and math.isfinite(v)}
        if "train_runtime" not in data:
            self._observer(Metrics(state.global_step, total, clock.progress, rewrite_logs(data)))

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        patience = self._trainer._options.patience
        self._judge(metrics[self._trainer.judged_by])
        if patience is not None and self._worse >= patience:
            self._observer(
                Message(f"Stopped early: {patience} evaluations without a lower loss than {self._best:.4f}.")
            )
            control.should_training_stop = True

    def _judge(self, loss: float) -> None:
        self._worse = 0 if loss < self._best else self._worse + 1
        self._best = min(self._best, loss)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._observer(CheckpointSaved(state.global_step, str(path), {}))

    def request_stop(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: save after the running step, and stop."""
        self._stop.set()


@contextmanager
def stop_on_sigterm(trainer: TurboTrainer, should_stop: Callable[[], bool] | None = None) -> Iterator[_Clockwork]:
    """While the body runs, SIGTERM means: save a checkpoint after the running step, then stop.

    With `should_stop`, asked after each step, that means it instead: what a worker has that is told to stop otherwise.
    """
    clockwork = next(c for c in trainer.callback_handler.callbacks if isinstance(c, _Clockwork))
    if should_stop is not None:
        clockwork.should_stop = should_stop
    if should_stop is not None or threading.current_thread() is not threading.main_thread():
        yield clockwork  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGTERM, clockwork.request_stop)
    try:
        yield clockwork
    finally:
        signal.signal(signal.SIGTERM, before)


def judged_by(*, trains_lora: bool) -> str:
    """What tells a phase's best weights: the LoRA's own loss where it is trained, as in a plain run; else the streams'."""
    return "eval_lora_loss" if trains_lora else "eval_loss"


def _micro_batches(config: TrainingConfig, workers: int, rows: int) -> int:
    """Forward passes of one optimiser step, over all workers."""
    size = config.micro_batch_size or config.batch_size
    wanted = -(-min(config.batch_size, rows) // size)
    return max(workers, -(-wanted // workers) * workers)


def _arguments(
    config: TrainingConfig, output: Path, accumulation: int, steps: int, judge: str | None
) -> TrainingArguments:
    """judge: the metric that tells the best weights; None: nothing is evaluated."""
    cadence: dict[str, Any] = {"save_strategy": "steps", "save_steps": config.save_every, "save_total_limit": 2}
    if judge is not None:
        cadence |= {"eval_strategy": "steps", "eval_steps": config.eval_every}
        if config.patience is not None:
            cadence |= {
                "load_best_model_at_end": True,
                "metric_for_best_model": judge,
                "greater_is_better": False,
            }
            cadence["save_steps"] = config.eval_every  # the best one must be there to go back to
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        max_grad_norm=0.0,  # ours: see `TurboTrainer.clip`
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=1,
        logging_first_step=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **cadence,
    )
    # On a machine with several GPUs transformers would wrap the model in DataParallel, which knows only tensors and dicts.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
