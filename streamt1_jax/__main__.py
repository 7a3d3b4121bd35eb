"""`streamt1 COMMAND --flag=value ...`, the same as `python -m streamt1_jax COMMAND --flag=value ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
  """A sub-command.

  Attributes:
    module: its program, imported only when it runs.
    meaning: what --help says of it.
  """

  module: str
  meaning: str


COMMANDS = {
  "generate": Command("streamt1_jax.cli.generate", "makes videos from prompts"),
  "score": Command("streamt1_jax.cli.score", "scores videos by reward models"),
  "convert": Command("streamt1_jax.cli.convert", "turns published weights into a checkpoint folder"),
  "report": Command("streamt1_jax.cli.report", "draws a page of a search that a person clicks through"),
  "serve": Command("streamt1_jax.cli.serve", "shows a search live, on a page where people steer it"),
  "measure": Command("streamt1_jax.cli.measure", "measures motion, coherence and drift of videos, without rewards"),
  "compare": Command("streamt1_jax.cli.compare", "compares searches at equal cost, by judges they have not seen"),
  "export_vbench": Command(
    "streamt1_jax.cli.export_vbench", "names videos as VBench wants them, and reads its results"
  ),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the sub-command that the first argument names, on the others; returns its exit code."""
  name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
  if name in ("--help", "-h", "help"):
    print("\n".join(["streamt1 COMMAND --flag=value ...", "", *_table(), "", "Flags: streamt1 COMMAND --help"]))
    return 0
  if name not in COMMANDS:
    print(f"error: {name!r} is no command of streamt1; there are: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2
  command = importlib.import_module(COMMANDS[name].module)
  if argv is not None:
    return command.main(arguments)
  # The command is the whole process, and does what it does only then.
  sys.argv[:] = [f"{sys.argv[0]} {name}", *arguments]
  return command.main()


def _table() -> list[str]:
  return [f"  {name:15}{command.meaning}" for name, command in COMMANDS.items()]


if __name__ == "__main__":
  sys.exit(main())
