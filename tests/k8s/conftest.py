"""Ray is imported here: quietly, and with the environment that it reads then (as in `tests/integration`)."""

from __future__ import annotations

import sys
import warnings

from deployments.local_ray import prepare_ray_environment

if "ray" not in sys.modules:
    prepare_ray_environment()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401
