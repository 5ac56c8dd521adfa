"""Starts the jobs of `experiments/`, one at a time or as a sweep, on this machine or on a cluster.

It contains no training or sampling logic.
"""
