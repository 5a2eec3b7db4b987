"""Measure an adapter on held-out rows, beside its base model, and with its speculator on and off."""

from __future__ import annotations

from slipstream.evaluation.compare import EvaluationOptions, evaluate
from slipstream.evaluation.opened import OpenedAdapter, open_adapter
from slipstream.evaluation.result import Evaluation, Spread, VariantResult
from slipstream.evaluation.variants import Variant, variants_of

__all__ = [
    "Evaluation",
    "EvaluationOptions",
    "OpenedAdapter",
    "Spread",
    "Variant",
    "VariantResult",
    "evaluate",
    "open_adapter",
    "variants_of",
]
