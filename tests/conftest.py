"""What must be settled before the first test module is imported."""

from __future__ import annotations

import os

# Triton reads it when it is imported, which other libraries may do first.
os.environ.setdefault("TRITON_INTERPRET", "1")
