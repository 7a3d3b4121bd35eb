"""What measures speed, memory, disk, FLOP and what devices send. The programs are in `experiments.measure`."""
