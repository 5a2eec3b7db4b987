"""The command line: `slipstream adapters …`, `slipstream keys …`, `slipstream version`."""

from slipstream.cli.app import app

__all__ = ["app"]
