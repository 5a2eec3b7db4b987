"""What a worker pod does before it is stopped (Kubernetes' preStop): `python -m deployments.drain_node 110`.

Ray gives its node nothing new, Serve starts replicas elsewhere and stops the ones here when those are ready; each finishes
what it has. Without this a pod that is told to stop takes its open streams with it.
"""

from __future__ import annotations

import sys
import time

import ray
import ray._raylet
from ray._private import state
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

from slipstream.errors import Unavailable

_SERVING = ("SERVE_REPLICA::", "SERVE_PROXY_ACTOR")  # how Serve's actors are named
_POLL_S = 0.5


def drain(node_id: str, within_s: float) -> bool:
    """Say that a node goes, and wait until Serve has left it; whether it did in time. Ray must be connected.

    Raises `Unavailable` when Ray does not take it.
    """
    # Preemption, since the other reason is for idle nodes; Serve stops what has found no other place before the deadline.
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline_ms = int((time.time() + within_s) * 1000)
    taken, why = client.drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, "its pod is being stopped", deadline_ms)
    if not taken:
        raise Unavailable(f"Ray did not drain node {node_id}: {why}")
    end = time.monotonic() + within_s
    while serving(node_id):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def serving(node_id: str) -> list[str]:
    """Names of Serve's actors that live on a node."""
    alive = state.actors(actor_state_name="ALIVE").values()
    return [a["Name"] for a in alive if a["Address"]["NodeID"] == node_id and a["Name"].startswith(_SERVING)]


def main() -> None:
    """Entry point: seconds that the pod has left."""
    within_s = float(sys.argv[1])
    began = time.monotonic()
    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    try:
        node_id = ray.get_runtime_context().get_node_id()
        done = drain(node_id, within_s - (time.monotonic() - began))
        print(f"{'Drained' if done else 'Not wholly drained'} in {time.monotonic() - began:.0f} s.")  # noqa: T201
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
