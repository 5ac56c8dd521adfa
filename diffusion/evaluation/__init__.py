"""Metrics of samples, one a file: `make(**options)` returns a `diffusion.types.Metric`."""
