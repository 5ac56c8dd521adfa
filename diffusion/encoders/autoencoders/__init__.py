"""Autoencoders, one per file: `make(shape=..., **options)` returns a `diffusion.core.types.Autoencoder`."""
