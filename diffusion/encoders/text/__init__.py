"""Text encoders, one per file: `make(**options)` returns a `diffusion.core.types.TextEncoder`."""
