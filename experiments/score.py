"""`python -m experiments.score` in a checkout is `streamt1 score`; see `streamt1_jax.cli.score`."""

import sys

from streamt1_jax.cli.score import main

if __name__ == "__main__":
  sys.exit(main())
