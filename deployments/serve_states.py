"""What Serve's controller says of its replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError

from slipstream.errors import Unavailable

_TIMEOUT_S = 5.0
States = Mapping[str, int]  # Serve's replica states → replicas
_asking: set[asyncio.Task[Any]] = set()  # at most one a loop: a thread that waits for a dead controller waits long


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One base model's deployment as it was asked for."""

    deployment: str
    min_replicas: int
    max_replicas: int
    tensor_parallel_size: int


async def replica_states(app: str) -> Mapping[str, States]:
    """Of each deployment of an application. Raises `Unavailable` while the controller is away."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            status: Any = await asyncio.shield(_status())
    except (TimeoutError, RayError) as error:
        raise Unavailable("Serve's controller does not answer. Requests go on; try again.") from error
    application = status.applications.get(app)
    if application is None:
        return {}
    return {
        name: {
            str(getattr(state, "value", state)): count for state, count in deployment.replica_states.items() if count
        }
        for name, deployment in application.deployments.items()
    }


def _status() -> asyncio.Task[Any]:
    """The question that is under way, or a new one."""
    loop = asyncio.get_running_loop()
    under_way = next((task for task in _asking if task.get_loop() is loop), None)
    if under_way is not None:
        return under_way
    task = loop.create_task(asyncio.to_thread(serve.status))
    _asking.add(task)
    task.add_done_callback(_asked)
    return task


def _asked(task: asyncio.Task[Any]) -> None:
    _asking.discard(task)
    if not task.cancelled():
        task.exception()  # whoever still waits raises it
