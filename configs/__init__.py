"""Experiments: one config per file; `common` holds the pieces that several share."""
