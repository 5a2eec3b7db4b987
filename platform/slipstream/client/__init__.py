"""The registry's routes for Python; for chat and completions use OpenAI's own client."""

from slipstream.client.references import to_reference
from slipstream.client.slipstream_client import SlipstreamClient

__all__ = ["SlipstreamClient", "to_reference"]
