"""Networks, one per file: `make(shape=..., num_classes=..., **options)` returns a `diffusion.core.types.Network`."""
