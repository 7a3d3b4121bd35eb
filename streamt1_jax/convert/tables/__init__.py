"""Published parameter names to ours, one table a model."""
