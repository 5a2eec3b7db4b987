"""What a process does again and again beside its requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

log = logging.getLogger("slipstream.loops")


async def keep_doing(what: str, work: Callable[[], Awaitable[object]], every_s: float) -> NoReturn:
    """`work`, and again `every_s` after each time, until cancelled. What fails is said, and tried again."""
    while True:
        try:
            await work()
        except Exception as error:  # a task's top loop: nobody else would hear of it, and the next time may be fine
            log.warning("%s failed: %s: %s", what, type(error).__name__, error)
        await asyncio.sleep(every_s)
