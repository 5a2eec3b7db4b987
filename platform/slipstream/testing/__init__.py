"""Public fakes of the platform's seams; each passes the contract tests of its real twin."""

from slipstream.testing.fake_cluster import FakeCluster
from slipstream.testing.fake_engine import FAKE_BASE, FakeAnswer, FakeEngine
from slipstream.testing.fake_peers import FakePeers
from slipstream.testing.manual_clock import ManualClock
from slipstream.testing.memory_blobs import MemoryBlobs
from slipstream.testing.memory_changes import MemoryChanges
from slipstream.testing.memory_imports import MemoryImports
from slipstream.testing.memory_jobs import MemoryJobs
from slipstream.testing.memory_store import MemoryStore
from slipstream.testing.memory_tenants import MemoryTenants
from slipstream.testing.memory_webhooks import MemoryWebhooks
from slipstream.testing.scripted_jobs import ScriptedJobRunner

__all__ = [
    "FAKE_BASE",
    "FakeAnswer",
    "FakeCluster",
    "FakeEngine",
    "FakePeers",
    "ManualClock",
    "MemoryBlobs",
    "MemoryChanges",
    "MemoryImports",
    "MemoryJobs",
    "MemoryStore",
    "MemoryTenants",
    "MemoryWebhooks",
    "ScriptedJobRunner",
]
