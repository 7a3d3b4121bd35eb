"""`python -m experiments.generate` in a checkout is `streamt1 generate`; see `streamt1_jax.cli.generate`."""

import sys

from streamt1_jax.cli.generate import main

if __name__ == "__main__":
  sys.exit(main())
