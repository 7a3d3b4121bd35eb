"""What trainings alone need: batches, losses, preferences."""
