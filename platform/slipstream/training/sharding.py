"""FSDP for a model whose weights are nearly all frozen: those are spread over the workers, the few that move are not.

torch's `fully_shard` (FSDP2) keeps a share of every frozen weight on each worker and puts a layer together when it runs.
LoRA and speculator stay whole on every worker, their gradients averaged by DDP: so optimiser, clipping, checkpoints and
export are the same as without. transformers' own FSDP arguments would shard these too, and want a GPU.
"""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from slipstream.errors import ModelUnsupported
from slipstream.training.model import TurboModel


def shard_frozen(model: TurboModel, device: torch.device) -> None:
    """Spread `model`'s frozen weights over all workers, on `device`. Called by every worker, torch.distributed being up.

    `model` comes on the CPU: one layer at a time is whole on the device. Its root is the unit that holds embeddings,
    final norm and LM head, so they are whole throughout `TurboModel.forward`, which reads them. Raises `ModelUnsupported`.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    whole = {p for p in model.parameters() if p.requires_grad or p.dtype != model.causal.dtype}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    kinds = set(model.causal._no_split_modules or ())
    layers = [m for m in model.causal.get_decoder().modules() if type(m).__name__ in kinds]
    if not layers:
        raise ModelUnsupported(f"{type(model.causal).__name__} does not name its layers: train it without fsdp.")
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def average_gradients(model: TurboModel) -> DistributedDataParallel:
    """DDP around a sharded model, for the parameters that are not sharded."""
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model, forward_sync_buffers=False)
