"""As for integration tests: Ray is imported first, quietly."""

from __future__ import annotations

import sys
import warnings

from deployments.local_ray import prepare_ray_environment

if "ray" not in sys.modules:
    prepare_ray_environment()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
