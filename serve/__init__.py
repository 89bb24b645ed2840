"""Serving: from a checkpoint to a policy, and its evaluation."""
