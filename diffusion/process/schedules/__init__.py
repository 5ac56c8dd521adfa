"""Noise schedules: `alpha(t)` and `sigma(t)` of `x_t = alpha x0 + sigma eps`, one per file."""
