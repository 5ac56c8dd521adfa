"""Starts the jobs of `experiments/`, here or on a cluster, one or a sweep of them. It holds none of their logic."""
