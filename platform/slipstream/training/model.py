"""The base model under PEFT, with its speculator beside it: one module that a Trainer trains.

LoRA stays in stock PEFT; the speculator is a module of its own (methods.md 1.6): no new PEFT type, no copied LM head.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from slipstream.adapters.load import load_adapter
from slipstream.adapters.peft_config import PEFT_CONFIG
from slipstream.engine.loader import pick_device, pick_dtype
from slipstream.errors import InvalidRequest, ModelUnsupported
from slipstream.training.config import Method, TrainingConfig
from slipstream.training.objective import Chains, HeadShape, find_chains, find_positions, head_losses
from slipstream.training.streams import MedusaHeads, TurboStreams

TRAINABLE = "trainable.safetensors"
EAGER_UP_TO = 256  # columns: on a CPU, plain matmuls beat the fused attention's backward pass up to about here


@dataclass(frozen=True, slots=True)
class ForwardSums:
    """What one forward pass gives: a differentiable `loss` (divided by `num_items`) and sums for the log, all detached.

    losses, hits, counts: [K+1], the LM first; chains: [K] each; their steps are counted in evaluations only.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    hits: torch.Tensor
    counts: torch.Tensor
    chains: Chains

    @staticmethod
    def zeros(streams: int) -> torch.Tensor:
        """What `stacked` sums of no positions are."""
        return torch.zeros(3 * (streams + 1) + 3 * streams, dtype=torch.float64)

    def stacked(self) -> torch.Tensor:
        """All sums as one float64 vector, for adding up over batches and workers: [6 K + 3]."""
        chains = self.chains
        parts = (self.losses, self.hits, self.counts, chains.judged, chains.right, chains.steps)
        return torch.cat([part.detach().double().flatten() for part in parts])


class TurboModel(nn.Module):
    """Base model, LoRA and speculator. Only what is trained has `requires_grad`."""

    def __init__(self, base: nn.Module, streams: TurboStreams | None, config: TrainingConfig) -> None:
        super().__init__()
        self.base = base  # a PeftModel, or the bare model
        self.streams = streams
        causal = base.get_base_model() if isinstance(base, PeftModel) else base
        self._causal: list[PreTrainedModel] = [causal]  # in a list: not a second registration of the same weights
        config_of_model: Any = causal.config
        self.config = config_of_model  # transformers' Trainer looks here
        self._shape = HeadShape.of(config_of_model.get_text_config())
        self._options = config
        self._bf16 = causal.dtype is torch.bfloat16
        self.trains_trunk = any(p.requires_grad for p in base.parameters())
        self.gate = 0.0
        self.step = 0  # of the optimiser: what this step's random drafts are drawn by
        self._seen: torch.Tensor | None = None

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, its linears wrapped by PEFT if there is a LoRA."""
        return self._causal[0]

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segments: torch.Tensor,
        num_items: torch.Tensor | int | None = None,
        states: torch.Tensor | None = None,
    ) -> ForwardSums:
        """A `PackedBatch` → `ForwardSums`. `num_items`: trained tokens of the whole optimiser step; default this batch's.
        states: [N, H], what `read_states` gave for the batch's rows, in the order in which they are packed."""
        depth = self.streams.num_streams if self.streams is not None else 0
        positions = find_positions(labels, segments, depth + 1)
        with self._autocast(input_ids.device):
            h = self._final_states(input_ids, position_ids)[positions.rows] if states is None else states
            states = self._stream_states(h, positions.next_ids)
            head = self.causal.get_output_embeddings()
            own = self.streams.head if isinstance(self.streams, MedusaHeads) else None
            soft = self._options.soft_targets if depth else 0.0
            weight = head.weight.to(h.dtype)
            ids = self._draft_ids() if self.training and depth else None
            sums = head_losses(
                h, states, positions, weight, self._shape, soft,
                own_heads=own, bias=getattr(head, "bias", None), draft_ids=ids,
            )  # fmt: skip
        items = positions.rows.numel() if num_items is None else num_items
        lm = sums.losses[0] if self.trains_trunk else sums.losses[0].detach()
        decay = self._options.stream_decay
        loss = lm + sum(decay ** (k + 1) * sums.losses[k + 1] for k in range(depth))
        chains = find_chains(sums.correct[1:], positions, walk=not self.training)
        return ForwardSums(loss / max(1, items) if isinstance(items, int) else loss / items, sums.losses.detach(),
                           sums.correct.sum(1), sums.counts, chains)  # fmt: skip

    @torch.no_grad()
    def read_states(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor, segments: torch.Tensor
    ) -> list[torch.Tensor]:
        """A `PackedBatch` → the states of each row's trained positions [n, H], row by row, on the CPU."""
        positions = find_positions(labels, segments, 0)
        with self._autocast(input_ids.device):
            h = self._final_states(input_ids, position_ids)[positions.rows].cpu()
        owner = segments.flatten()[positions.rows].cpu()
        return [h[owner == row] for row in range(int(segments.max()) + 1)]

    def _final_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """[packs * length, H]."""
        with nullcontext() if self.trains_trunk else torch.no_grad():
            decoder = self.causal.get_decoder()
            out = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            states: torch.Tensor = out.last_hidden_state.flatten(0, 1)
        return states

    def _stream_states(self, h: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor | None:
        if self.streams is None:
            return None
        # The gate (methods.md 1.3): the streams see h itself, but only `gate` of their gradient goes on into the LoRA.
        seen = h.detach() if self.gate == 0 else self.gate * h + (1 - self.gate) * h.detach()
        embedding = None
        if self.streams.conditioned:
            embedding = self.causal.get_input_embeddings()(next_ids).to(h.dtype).detach()
        states: torch.Tensor = self.streams(seen, embedding)
        return states

    def limit_drafts(self, seen: torch.Tensor) -> None:
        """Let the streams' training softmax run over `seen` (int64 [n], every target among them) and some random others."""
        self._seen = seen

    def _draft_ids(self) -> torch.Tensor | None:
        """The vocabulary of this step's drafts. The random part keeps every other token's logit from drifting upwards."""
        if self._seen is None or self._options.negatives is None:
            return None
        vocab = int(self.causal.get_output_embeddings().weight.shape[0])
        # A generator of its own: the LoRA's dropout must not depend on whether there are streams.
        generator = torch.Generator().manual_seed(self._options.seed * 1_000_003 + self.step)
        others = torch.randint(0, vocab, (self._options.negatives,), generator=generator)
        ids: torch.Tensor = torch.cat([self._seen, others]).unique()  # type: ignore[no-untyped-call]
        return ids.to(self.causal.device)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext()

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """What PEFT trains."""
        return (p for p in self.base.parameters() if p.requires_grad)

    def stream_parameters(self) -> Iterator[nn.Parameter]:
        """What the speculator trains."""
        return iter(()) if self.streams is None else (p for p in self.streams.parameters() if p.requires_grad)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """Name → tensor of everything that moves, on the CPU."""
        return {n: p.detach().cpu().contiguous() for n, p in self.named_parameters() if p.requires_grad}

    def save_trainable(self, folder: Path) -> None:
        """Write `trainable_state` into a checkpoint."""
        save_file(self.trainable_state(), folder / TRAINABLE)

    def load_trainable(self, folder: Path) -> None:
        """Read it back. Raises `InvalidRequest` when the checkpoint is of another run."""
        found = load_file(folder / TRAINABLE)
        mine = {n: p for n, p in self.named_parameters() if p.requires_grad}
        if {n: t.shape for n, t in found.items()} != {n: p.shape for n, p in mine.items()}:
            raise InvalidRequest(
                f"{folder} is a checkpoint of another configuration. Start anew in an empty output folder."
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(found[name])

    def freeze_lora(self) -> None:
        """The LoRA is finished: from here on only the streams move."""
        self.base.requires_grad_(False)
        self.trains_trunk = False
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As any module's, but a frozen model stays as it answers: the streams learn what it says without dropout."""
        super().train(mode)
        if not self.trains_trunk:
            self.base.eval()
        return self


def build_model(config: TrainingConfig, path: Path, longest: int) -> TurboModel:
    """Load the base model and put on it what `config.method` trains. `longest`: tokens of the longest row."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)  # PEFT draws LoRA's A from the global generator
    causal = load_base(config, path, device, longest)
    base = _with_lora(causal, config)
    streams = _speculator(causal, config)
    if config.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = TurboModel(base, streams, config)
    # One that is to be sharded waits in main memory: it may be too large for a device.
    return model if config.fsdp else model.to(device)


def precision(config: TrainingConfig) -> torch.dtype:
    """What the base computes in: bfloat16 or float32."""
    wanted = {None: "auto", True: "bfloat16", False: "float32"}[config.bf16]
    found = pick_dtype(wanted, pick_device(config.device))
    return found if found is torch.bfloat16 else torch.float32


def load_base(config: TrainingConfig, path: Path, device: torch.device, longest: int) -> PreTrainedModel:
    """The base model, frozen, in bf16 (or float32), with the attention that is fastest for packs of rows this long."""
    dtype = precision(config)
    attention = "eager" if device.type == "cpu" and longest <= EAGER_UP_TO else "sdpa"
    try:
        causal = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    except (ValueError, OSError) as error:
        raise ModelUnsupported(f"{path} could not be loaded as a causal language model: {error}") from error
    if type(causal.get_output_embeddings()) is not nn.Linear:
        raise ModelUnsupported(f"{type(causal).__name__} has no plain linear LM head.")
    return (causal if config.fsdp else causal.to(device)).requires_grad_(False)


def _with_lora(causal: PreTrainedModel, config: TrainingConfig) -> nn.Module:
    if config.method.trains_lora:
        targets = config.lora_targets
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
        try:
            with _quiet_peft():
                peft: nn.Module = get_peft_model(causal, lora)
        except ValueError as error:
            raise InvalidRequest(f"lora_targets: {error}", param="lora_targets") from error
        head = causal.get_output_embeddings()
        if any(p.requires_grad for p in head.parameters()):
            raise InvalidRequest("lora_targets names the LM head, which the streams share and nobody may move.")
        return peft
    if config.adapter is not None and (config.adapter / PEFT_CONFIG).is_file():
        try:
            with _quiet_peft():
                frozen: nn.Module = PeftModel.from_pretrained(causal, str(config.adapter), is_trainable=False)
        except (ValueError, RuntimeError, OSError) as error:
            raise InvalidRequest(
                f"The adapter does not fit this base model: {str(error)[:300]}", param="adapter"
            ) from error
        return frozen.requires_grad_(False)
    bare: nn.Module = causal
    return bare


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 for a name that is about to go: nothing that a user could change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _speculator(causal: PreTrainedModel, config: TrainingConfig) -> TurboStreams | None:
    if not config.method.trains_streams:
        return None
    head = causal.get_output_embeddings().weight
    if config.method is Method.MEDUSA:
        return MedusaHeads(config.streams, head)
    embedding = causal.get_input_embeddings().weight
    streams = TurboStreams(
        config.streams,
        head.shape[1],
        config.stream_rank,
        conditioned=config.conditioned and config.stream_rank is not None,
        condition_scale=_condition_scale(embedding),
        seed=config.seed,
    )
    if config.warm_start and config.adapter is not None:
        found = load_adapter(config.adapter).streams
        if found is None or not streams.start_from(found):
            raise InvalidRequest(
                f"{config.adapter} holds no streams of this shape to go on from. Give their number, rank and kind, or "
                "leave warm_start out.",
                param="warm_start",
            )
    return streams


def _condition_scale(embedding: torch.Tensor) -> float:
    """Brings embeddings to unit size."""
    return float(1.0 / embedding.detach().float().pow(2).mean().sqrt().clamp(min=1e-6))
