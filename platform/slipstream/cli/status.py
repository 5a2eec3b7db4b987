"""`slipstream status`: what runs where, and why as many."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import typer
from rich.console import Console

from slipstream.cli.session import DEFAULT_URL, JsonOption, KeyOption, UrlOption, session, show_json, show_table

_CHANGES = 5  # of the last ones, for each model


def status(
    context: typer.Context, *, url: UrlOption = DEFAULT_URL, api_key: KeyOption = "", as_json: JsonOption = False
) -> None:
    """Show every base model's replicas, ranks, queues and adapters, and the last scaling decisions. Needs the admin key.

    Example: slipstream status
    """
    found = session(context, url, api_key).run(lambda client: client.cluster())
    if as_json:
        show_json(found)
        return
    for model in found["models"]:
        _show(model)


def _show(model: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    states = ", ".join(f"{count} {state.lower()}" for state, count in model["states"].items()) or "asleep"
    ranks = f", {model['tensor_parallel_size']} ranks each" if model["tensor_parallel_size"] > 1 else ""
    most = model["max_replicas"]
    span = f"{model['min_replicas']} to {most}" if model["min_replicas"] != most else str(most)
    console.print(f"{model['model']}: {states} (of {span}{ranks})", markup=False, soft_wrap=True)
    show_table(
        ["REPLICA", "UP", "RUNNING", "WAITING", "KV FREE", "ON DEVICE", "ADAPTERS", "ACCEPTED", "PROCESSES"],
        [_row(replica) for replica in model["replicas"]],
        "No replica answers now." if model["states"] else "The next request wakes a replica.",
    )
    if model["scaling"] is not None:
        console.print(f"  now: {model['scaling']['reason']}", markup=False, soft_wrap=True)
    for change in model["scaling_changes"][-_CHANGES:]:
        at = f"{datetime.fromtimestamp(change['at']).astimezone():%H:%M:%S}"
        text = f"  {at}  {change['before']} → {change['after']}: {change['reason']}"
        console.print(text, markup=False, soft_wrap=True)


def _row(replica: Mapping[str, Any]) -> list[str]:
    places = list(replica["adapters"].values())
    accepted = replica["acceptance"]
    free = replica["kv_blocks_free"] / max(1, replica["kv_blocks_total"])
    return [
        replica["replica"],
        time.strftime("%H:%M:%S", time.gmtime(replica["up_s"])),
        str(replica["running"]),
        str(replica["waiting"]),
        f"{free:.0%}",
        f"{places.count('on_device')} of {replica['adapter_slots']}",
        str(len(places)),
        "–" if accepted is None else f"{accepted:.0%}",
        " ".join(f"{rank['node']}:{rank['pid']}" for rank in replica["ranks"]),
    ]
