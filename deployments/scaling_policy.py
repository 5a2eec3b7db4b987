"""Serve's autoscaling policy: `slipstream.cluster.scaling` fed with what replicas report. Runs in Serve's controller, which
must never wait for anything: what was decided, and why, is written down by a thread of its own."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.config import AutoscalingContext

from slipstream.cluster.scaling import Cause, Decision, Load, ScalingOptions, ScalingPolicy
from slipstream.cluster.view import ScalingHistory, ScalingRecord

KEPT = 32  # changes that people can look back on
REQUESTS, TOKENS, WAIT, PRESSURE = "requests_per_s", "tokens_per_s", "queue_wait_s", "slot_pressure"
_NAMESPACE = "slipstream-scaling"
_NOTE_EVERY_S = 5.0  # a reason that changed alone is written this often
log = logging.getLogger("ray.serve")


class RequestRatePolicy:
    """One deployment's policy. Serve makes it once, in the controller, and calls it at each tick."""

    def __init__(self, **options: Any) -> None:
        self._policy = ScalingPolicy(ScalingOptions(**options))
        self._changes: deque[ScalingRecord] = deque(maxlen=KEPT)
        self._counts: Counter[str] = Counter()
        self._noted: tuple[float, str] = (float("-inf"), "")
        self._target: int | None = None  # as we left it
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slipstream-scaling")

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted now."""
        if self._target is None:
            before = _read(context)  # by the controller before this one
            self._changes.extend(before.changes)
            self._counts.update(before.counts)
        elif self._target == 0 < context.target_num_replicas:  # Serve wakes a deployment without asking
            woken = ScalingRecord(time.time(), 0, context.target_num_replicas, "a request waits for a replica")
            self._count(woken, Cause.HELD)
        decision = self._policy.decide(load_of(context), time.monotonic())
        self._note(context, decision)
        self._target = decision.replicas
        return decision.replicas, {}

    def _note(self, context: AutoscalingContext, decision: Decision) -> None:
        now, before = time.time(), context.target_num_replicas
        changed = decision.replicas != before
        if not changed and (decision.reason == self._noted[1] or now - self._noted[0] < _NOTE_EVERY_S):
            return
        record = ScalingRecord(now, before, decision.replicas, decision.reason)
        if changed:
            self._count(record, decision.cause)
            log.warning(
                "%s: %d -> %d replicas: %s", context.deployment_name, before, decision.replicas, decision.reason
            )
        self._noted = (now, decision.reason)
        changes = [asdict(change) for change in self._changes]
        page = json.dumps({"steady": asdict(record), "changes": changes, "counts": self._counts})
        self._writer.submit(_write, f"{context.app_name}/{context.deployment_name}", page)

    def _count(self, record: ScalingRecord, cause: Cause) -> None:
        self._changes.append(record)
        self._counts[f"{'up' if record.after > record.before else 'down'}/{cause}"] += 1


def load_of(context: AutoscalingContext) -> Load:
    """Serve's view of a deployment as ours."""
    found: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}

    def values(name: str) -> list[float]:
        return [value for value in found.get(name, {}).values() if value is not None]

    def mean(name: str) -> float:
        return sum(values(name)) / len(values(name)) if values(name) else 0.0

    return Load(
        replicas=context.current_num_replicas,
        target=context.target_num_replicas,
        requests_per_s=sum(values(REQUESTS)),
        tokens_per_s=sum(values(TOKENS)),
        queue_wait_s=mean(WAIT),
        slot_pressure=mean(PRESSURE),
        held=round(context.total_queued_requests or 0),
        ongoing=round(context.total_running_requests),
    )


def _read(context: AutoscalingContext) -> ScalingHistory:
    try:
        return read_decisions(str(context.app_name), context.deployment_name)
    except Exception:  # history is nice to have; the controller must go on without
        log.exception("scaling decisions of %s could not be read", context.deployment_name)
        return ScalingHistory()


def _write(key: str, page: str) -> None:
    try:
        _internal_kv_put(key, page, overwrite=True, namespace=_NAMESPACE)
    except Exception:  # a thread's top: what cannot be written now is written with the next change
        log.exception("scaling decisions of %s could not be written", key)


def read_decisions(app: str, deployment: str) -> ScalingHistory:
    """What the deployment's policy has written down. Blocks for a call to Ray's own store."""
    page = _internal_kv_get(f"{app}/{deployment}", namespace=_NAMESPACE)
    if page is None:
        return ScalingHistory()
    found = json.loads(page)
    changes = tuple(ScalingRecord(**change) for change in found["changes"])
    return ScalingHistory(ScalingRecord(**found["steady"]), changes, found.get("counts", {}))
