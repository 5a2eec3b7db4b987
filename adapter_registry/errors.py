"""The registry's exception tree. `slipstream/api/errors.py` turns these into HTTP answers."""

from __future__ import annotations


class RegistryError(Exception):
    """Root. `str(error)` is a sentence for people; it names only what the asking tenant may see."""


class InvalidName(RegistryError):
    """A name, alias or reference breaks the naming rules."""


class NotPublished(RegistryError):
    """No such adapter, version, alias or digest for this tenant."""


class InUse(RegistryError):
    """It cannot go: an alias still points at it."""


class StorageFull(RegistryError):
    """The tenant's quota of stored bytes does not hold this as well."""


class BlobMissing(RegistryError):
    """A blob that a version names is not in the blob store."""


class BlobCorrupt(RegistryError):
    """A blob's content does not match its digest."""


class StoreUnavailable(RegistryError):
    """The store (Redis, the bucket) cannot be reached, or did not answer in time."""


class BackupInvalid(RegistryError):
    """There is no whole backup there, or not one that can be read or restored here."""


class BackupIncomplete(RegistryError):
    """The registry cannot be backed up as it is: something that it names is not there, or is not known here."""


class RegistryNotEmpty(RegistryError):
    """A restore would mix with what is there already."""
