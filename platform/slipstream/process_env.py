"""The one file besides `slipstream.config` that touches the process environment, and why it must.

Three things can only be told to a program through its environment: Ray reads its switches (`RAY_*`) when it is imported
and hands them on to every worker it starts, pip puts its half-finished downloads where `TMPDIR` says, and OpenTelemetry's
SDK is set up by `OTEL_*`, as its users expect. None is a setting of ours. A test keeps `os.environ` out of every other file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def child_environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """A copy of this process's environment with `overrides`, for a child process."""
    return {**os.environ, **overrides}


def opentelemetry_variables() -> dict[str, str]:
    """`OTEL_*`, for processes elsewhere that are to be set up alike."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and value}


def prepare_environment(values: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> None:
    """Set `values`, and those of `defaults` that the user has not set, for this process and all its children."""
    os.environ.update(values)
    for name, value in (defaults or {}).items():
        os.environ.setdefault(name, value)
