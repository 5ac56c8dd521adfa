"""Samplers, one a file, each the `init`, `step` and `finish` of `diffusion.types.Sampler`."""
