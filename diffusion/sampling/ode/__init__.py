"""Building blocks of ODE solvers that several samplers share."""
