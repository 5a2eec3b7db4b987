"""Import this in tests that run Triton's kernels on the processor: `tests/conftest.py` turns its interpreter on."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
