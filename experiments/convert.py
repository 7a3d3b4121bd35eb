"""`python -m experiments.convert` in a checkout is `streamt1 convert`; see `streamt1_jax.cli.convert`."""

import sys

from streamt1_jax.cli.convert import main

if __name__ == "__main__":
  sys.exit(main())
