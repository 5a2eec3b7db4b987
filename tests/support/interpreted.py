"""Triton's kernels without a GPU: import this before any of them, in tests that run them on the processor."""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
