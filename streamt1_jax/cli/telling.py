"""What a command says, once for all processes: results to stdout, all else to stderr."""

import sys
from typing import Any

from streamt1_jax.parallel import hosts


def tell(*lines: Any) -> None:
  """Prints results."""
  if hosts.is_first():
    print(*lines, sep="\n", flush=True)


def say(sentence: str) -> None:
  """Prints what a person may want to know."""
  if hosts.is_first():
    print(sentence, file=sys.stderr, flush=True)


def warn(message: str) -> None:
  """Prints what a person should know."""
  if hosts.is_first():
    print(f"warning: {message}", file=sys.stderr, flush=True)
