"""`python -m experiments.generate` in a checkout; see `streamt1_jax.cli.generate`."""

from streamt1_jax.cli import common
from streamt1_jax.cli.generate import main

if __name__ == "__main__":
  common.run(main)
