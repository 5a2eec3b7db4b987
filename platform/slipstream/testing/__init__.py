"""Public fakes of the platform's seams; each passes the contract tests of its real twin."""

from slipstream.testing.fake_engine import FAKE_BASE, FakeAnswer, FakeEngine
from slipstream.testing.manual_clock import ManualClock
from slipstream.testing.memory_blobs import MemoryBlobs
from slipstream.testing.memory_store import MemoryStore

__all__ = ["FAKE_BASE", "FakeAnswer", "FakeEngine", "ManualClock", "MemoryBlobs", "MemoryStore"]
