"""Samplers, one per file; each `make` returns a `diffusion.core.types.Sampler` with `init`, `step` and `finish`.

The formulas in the docstrings use x_t = alpha_t x0 + sigma_t eps and step from time t to time s < t. There x0 is the
denoiser's estimate at x_t, eps = (x_t - alpha_t x0) / sigma_t the corresponding noise, z standard normal noise, and
lambda = log(alpha / sigma), in which h = lambda_s - lambda_t is the step size. Papers that write x_t = x0 + sigma eps
(EDM, k-diffusion) have x and sigma where the formulas have x / alpha and sigma / alpha.
"""
