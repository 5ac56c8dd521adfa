"""Starts the jobs of `experiments/`, one at a time or as a sweep, on this machine or on a cluster.

The package is used from the root of a checkout and is not installed. It contains no training or sampling logic.
"""
