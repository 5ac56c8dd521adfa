"""Data sources, one a file, and the pipeline that shuffles, shards and batches any of them."""
