"""HTTP: OpenAI's routes, the registry's routes, and the one place where errors become responses. No Ray, no Redis."""

from slipstream.api.app import create_app
from slipstream.api.services import ApiServices

__all__ = ["ApiServices", "create_app"]
