"""Samplers, time grids, guidance and the sampling loop."""
