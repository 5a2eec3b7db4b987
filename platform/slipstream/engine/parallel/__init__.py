"""Tensor parallelism: one engine over several processes, each with a shard of the base model (methods.md 5)."""
