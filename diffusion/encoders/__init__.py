"""Frozen models next to the network."""
