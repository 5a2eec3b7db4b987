"""Warnings are errors in our tests, but not those of Ray's own import: it is done here first, quietly."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
