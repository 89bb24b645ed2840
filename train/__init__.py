"""Training: from a release of the lake to a checkpoint."""
