"""Backups of the registry: its records out of Redis, and the blobs that they name. See docs/operations/backup.md."""
