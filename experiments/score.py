"""`python -m experiments.score` in a checkout; see `streamt1_jax.cli.score`."""

from streamt1_jax.cli import common
from streamt1_jax.cli.score import main

if __name__ == "__main__":
  common.run(main)
