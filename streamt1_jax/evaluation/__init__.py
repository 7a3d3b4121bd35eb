"""What evaluates videos and rewards. The programs are in `experiments.evaluate`."""
