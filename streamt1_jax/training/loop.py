"""What the training programs share: a loop that resumes, the loss curve, and its plot."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import flags, logging
from etils import epath

from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, paths

FLAGS = flags.FLAGS
common.define_path("run_dir", None, "Where everything is written; an interrupted run resumes from it.", required=True)
flags.DEFINE_string("preset", "tiny", "Model preset.")
flags.DEFINE_integer("checkpoint_every", 200, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("log_every", 20, "Steps between rows of the loss curve.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of initialisation and data.")

CURVE_FILE = "loss.csv"
_FLAGS_FILE = "flags.txt"
_MAY_CHANGE = {"run_dir", "checkpoint_every", "log_every"}

Carry = TypeVar("Carry")
Terms = Mapping[str, jax.Array | float]


def start_run() -> epath.Path:
  """Makes the run's folder, writes every flag to `flags.txt` in it and returns it.

  Raises ConfigError if the folder holds a run with other flags: what is there would be continued as something else.
  """
  # Orbax reports every step it does not save.
  logging.set_verbosity(logging.WARNING)
  run_dir = epath.Path(FLAGS.run_dir)
  run_dir.mkdir(parents=True, exist_ok=True)
  written = run_dir / _FLAGS_FILE
  if written.exists():
    _require_same_flags(written)
  written.write_text(FLAGS.flags_into_string())
  return run_dir


def _require_same_flags(written: epath.Path) -> None:
  free = {flag.name for module, owned in FLAGS.flags_by_module_dict().items() if "absl" in module for flag in owned}

  def settings(text: str) -> set[str]:
    lines = (line for line in text.splitlines() if line.startswith("--"))
    return {line for line in lines if line[2:].split("=")[0].removeprefix("no") not in free | _MAY_CHANGE}

  before, now = settings(written.read_text()), settings(FLAGS.flags_into_string())
  if before != now:
    raise ConfigError(
      f"--run_dir={written.parent} holds a run with other flags: {' '.join(sorted(before - now)) or 'fewer'} there, "
      f"{' '.join(sorted(now - before)) or 'fewer'} here; give the same flags or another folder"
    )


def run_steps(
  carry: Carry, update: Callable[[Carry, jax.Array], tuple[Carry, Terms]], steps: int, run_dir: epath.Path
) -> Carry:
  """Calls `update` for every step after the newest checkpoint in `run_dir`, and saves and logs as the flags say.

  Args:
    carry: PyTree of arrays at step 0; donated to `update`.
    update: from the carry and the step (int32 scalar) to the next carry and the loss terms to log, scalars by name.
      Its randomness comes from the step, so that a resumed run is the run that was interrupted.
    steps: number of steps of the whole run.
    run_dir: holds `checkpoints/` and the loss curve.

  Returns:
    The carry after the last step.
  """
  options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=FLAGS.checkpoint_every)
  with ocp.CheckpointManager(paths.absolute(run_dir / "checkpoints"), options=options) as checkpoints:
    start = checkpoints.latest_step() or 0
    if start:
      carry = checkpoints.restore(start, args=ocp.args.StandardRestore(carry))
      print(f"resumed at step {start}", flush=True)
    began = time.perf_counter()
    for step in range(start, steps):
      common.raise_if_interrupted()
      carry, terms = update(carry, jnp.asarray(step))
      if (step + 1) % FLAGS.log_every == 0:
        _log(run_dir / CURVE_FILE, {"step": step + 1} | {name: float(value) for name, value in terms.items()})
        print(f"  {(time.perf_counter() - began) / (step + 1 - start):.3f} s/step", flush=True)
      checkpoints.save(step + 1, args=ocp.args.StandardSave(carry), force=step + 1 == steps)
  return carry


def _log(path: epath.Path, row: Mapping[str, float]) -> None:
  print("  ".join(f"{name} {value:.5g}" for name, value in row.items()), end="", flush=True)
  lines = io.StringIO()
  writer = csv.DictWriter(lines, row)
  if not path.exists():
    writer.writeheader()
  writer.writerow(row)
  atomic.append_text(path, lines.getvalue())


def plot_curve(run_dir: epath.Path, names: Sequence[str], title: str, **axes_settings: str) -> None:
  """Draws the columns `names` of the loss curve to `loss.png`; `axes_settings` as of `matplotlib.axes.Axes.set`."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  if not (run_dir / CURVE_FILE).exists():
    return  # The run was shorter than one row.
  with (run_dir / CURVE_FILE).open() as file:
    # A resumed run repeats the steps after its checkpoint; the later row of a step counts.
    rows = {int(row["step"]): row for row in csv.DictReader(file)}
  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  for name in names:
    axes.plot(list(rows), [float(row[name]) for row in rows.values()], label=name)
  axes.set(xlabel="step", title=title, **axes_settings)
  axes.legend()
  picture = io.BytesIO()
  figure.savefig(picture, dpi=120)
  atomic.replace_bytes(run_dir / "loss.png", picture.getvalue())
