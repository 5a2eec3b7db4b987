"""Warnings are errors in our tests, but not those of Ray's own import: it is done here first, quietly, and with the
environment that it reads then."""

from __future__ import annotations

import sys
import warnings

from deployments.local_ray import prepare_ray_environment

if "ray" not in sys.modules:
    prepare_ray_environment()  # else Ray makes itself a token and keeps it in the user's home folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
