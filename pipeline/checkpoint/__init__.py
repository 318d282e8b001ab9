"""Save and restore a training run."""
