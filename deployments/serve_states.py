"""What Serve's controller says of its replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError

from slipstream.errors import Unavailable

_TIMEOUT_S = 5.0
T = TypeVar("T")
States = Mapping[str, int]  # Serve's replica states → replicas
_asking: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Task[Any]] = {}


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
            status: Any = await asyncio.shield(once("status", serve.status))
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


def once(question: str, ask: Callable[[], T]) -> asyncio.Task[T]:
    """What is under way about this, or asked anew, in a thread: one that waits for a dead controller or store waits long, so
    there is at most one. Shield it."""
    key = (asyncio.get_running_loop(), question)
    under_way = _asking.get(key)
    if under_way is not None:
        return under_way
    task = _asking[key] = asyncio.create_task(asyncio.to_thread(ask))

    def asked(done: asyncio.Task[Any]) -> None:
        del _asking[key]
        if not done.cancelled():
            done.exception()  # whoever still waits raises it

    task.add_done_callback(asked)
    return task
