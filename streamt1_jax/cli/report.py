"""Draws a page of one search or of several, that a person clicks through.

  streamt1 report outputs/a-red-circle-moves-left-1e5d7e4c
  streamt1 report outputs/one outputs/two --output=both.html

The page shows the video, the tree of all candidates with their scores, what the memory kept, and where the time went.
It is one HTML file that needs no network. It has an index for several results, and results of one prompt stand side by
side. `streamt1 generate` writes the page of every video by itself, as report.html beside it.

Exit codes: 0; 2 for bad input, such as a folder without a trace; 3 when the disk is full.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from streamt1_jax.cli import command, flag_types, results
from streamt1_jax.cli.files import require_writable
from streamt1_jax.config import ConfigError
from streamt1_jax.io import part_files
from streamt1_jax.report import write

_FOLDERS = "folders"
_LOGGER = logging.getLogger(__name__)


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_list(values, _FOLDERS, [], "Result folders joined by commas; or give them without a flag.")
  flag_types.define_path(values, "output", results.REPORT, "The HTML file; an earlier one is replaced.", url=False)
  flag_types.define_path(
    values, "assets", None, "Folder that videos are copied to; by default they are in the page, up to 20 MB.", url=False
  )


def run(values: flags.FlagValues) -> None:
  """Writes the page."""
  if not values.folders:
    raise ConfigError("name at least one result folder: streamt1 report RESULT_FOLDER")
  require_writable("output", values.output)
  write.write_report(values.folders, values.output, values.assets)
  print(values.output, flush=True)


def define(values: flags.FlagValues) -> None:
  """Defines --report, of commands that make results."""
  flag_types.define_switch(values, "report", True, "Draw report.html beside every video, and keep pictures for it.")


def write_if_wanted(values: flags.FlagValues, folder: epath.Path) -> None:
  """Writes the page of a new result into its folder. What goes wrong is a warning.

  A search of hours is not lost over its page, whatever is wrong with that.
  """
  if not values.report:
    return
  try:
    write.write_beside(folder)
  except Exception as error:
    _LOGGER.warning(f"there is no {results.REPORT}: {part_files.first_line(error)}")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv, positional=_FOLDERS)


if __name__ == "__main__":
  sys.exit(main())
