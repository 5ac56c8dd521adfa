"""From a config to a training, and from a workdir to a trained model."""
