"""Networks, one a file: `make(shape=..., num_classes=..., **options)` returns a `diffusion.types.Network`."""
