"""Metrics, one per file: `make(train, held_out, **options)` returns a `SampleMetric` or a `ModelMetric`."""
