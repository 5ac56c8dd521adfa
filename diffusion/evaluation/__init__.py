"""Metrics, one per file: `make(train, held_out, **options)` returns a metric of `core.types`."""
