"""Meshes of devices and the rules that lay arrays out over them."""
