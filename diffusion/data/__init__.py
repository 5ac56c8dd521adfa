"""Data sources, one per file, and the input pipeline that shuffles, shards and batches them."""
