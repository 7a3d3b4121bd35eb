"""`python -m experiments.convert` in a checkout; see `streamt1_jax.cli.convert`."""

from streamt1_jax.cli import common
from streamt1_jax.cli.convert import main

if __name__ == "__main__":
  common.run(main)
