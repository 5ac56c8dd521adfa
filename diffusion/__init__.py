"""Diffusion models in JAX and Flax: any objective, network, parameterization and sampler, put together by a config."""
