"""What must be settled before the first test module is imported."""

from __future__ import annotations

import os

from hypothesis import settings

# Triton reads it when it is imported, which other libraries may do first.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A test's time says how busy the machine is: pytest-timeout ends what hangs.
settings.register_profile("slipstream", deadline=None)
settings.load_profile("slipstream")
