"""Building blocks that the ODE solvers share."""
