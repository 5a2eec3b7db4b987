"""What chat and text answers have in common: their head and their usage."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.api.catalog import Target
from slipstream.api.generation import Generation, cached_tokens
from slipstream.api.sse import Json

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's stand-in


@dataclass(frozen=True, slots=True)
class Reply:
    """The fields that every chunk of an answer repeats."""

    id: str
    created: int
    target: Target

    def head(self, kind: str) -> Json:
        """The fields before `choices`; `model` is what answered, with its version, not what was asked for."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.target.served_as,
            "system_fingerprint": self.target.fingerprint,
        }


def usage_body(generation: Generation) -> Json:
    """OpenAI's usage: each prompt counted once, however many choices it has; ours adds `decode_steps`."""
    prompts = list(generation.by_prompt())
    choices = [usage for usages in prompts for usage in usages]
    prompt_tokens = sum(usages[0].prompt_tokens for usages in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in choices)
    drafted, accepted = sum(u.drafted_tokens for u in choices), sum(u.accepted_tokens for u in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(map(cached_tokens, prompts))},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
        "decode_steps": sum(usage.decode_steps for usage in choices),
    }
