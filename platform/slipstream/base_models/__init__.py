"""Base models: make sure that the one asked for is on this machine."""

from __future__ import annotations

from slipstream.base_models.prepare import PreparedModel, prepare_base_model, served_id
from slipstream.base_models.progress import Progress, Silent

__all__ = ["PreparedModel", "Progress", "Silent", "prepare_base_model", "served_id"]
