"""Adapters, one per file: `make(network=..., **options)` returns a network that changes a trained one."""
