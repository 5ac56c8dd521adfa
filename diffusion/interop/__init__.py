"""Reads and writes weights in the formats of other libraries, without importing any of them."""
