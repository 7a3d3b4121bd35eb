"""The commands of `streamt1`, one module each."""
