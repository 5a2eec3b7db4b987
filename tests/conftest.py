"""What must be settled before the first test module is imported."""

from __future__ import annotations

import os

# Triton reads it when it is imported, which other libraries may do first. TRITON_INTERPRET=0 pytest -m gpu: compiled kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")
