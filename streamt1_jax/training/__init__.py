"""What trainings alone need: batches, losses, steps. The programs are in `experiments.train`."""
