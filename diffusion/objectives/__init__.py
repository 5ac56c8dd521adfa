"""Training objectives, one per file: what the network predicts, at which times, and how the loss is weighted."""
