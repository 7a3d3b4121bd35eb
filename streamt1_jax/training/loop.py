"""What all trainings share: a loop that goes on where it was stopped, the loss curve, and its plot."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from streamt1_jax.io import atomic, paths, rows, signals
from streamt1_jax.typing import FloatScalar, IntScalar

Carry = TypeVar("Carry")
Terms = Mapping[str, FloatScalar | float]


@dataclasses.dataclass(frozen=True)
class Run:
  """A training and its folder.

  Attributes:
    folder: holds `checkpoints/` and the loss curve.
    settings: what decides the result, as JSON values.
    checkpoint_every: steps between checkpoints.
    log_every: steps between rows of the loss curve.
  """

  folder: epath.Path
  settings: Mapping[str, Any]
  checkpoint_every: int
  log_every: int

  def curve(self) -> list[rows.Row]:
    """The rows of the loss curve, oldest first. Raises ConfigError if the folder holds a run with other settings."""
    remedy = "give the same flags or another folder"
    name = f"--run_dir={self.folder}"
    return rows.read(self._curve_file, self.settings, name=name, remedy=remedy, is_row=_is_row)

  def curve_writer(self, kept: Sequence[rows.Row]) -> rows.Writer:
    """Begins the loss curve anew with the rows `kept`."""
    return rows.Writer(self._curve_file, self.settings, kept)

  @property
  def _curve_file(self) -> epath.Path:
    return self.folder / "loss.jsonl"


def _is_row(row: rows.Row) -> bool:
  """Whether `row` has a step and, as other fields, losses; one that was not finite is None."""
  return type(row.get("step")) is int and all(loss is None or type(loss) in (int, float) for loss in row.values())


def run_steps(carry: Carry, update: Callable[[Carry, IntScalar], tuple[Carry, Terms]], steps: int, run: Run) -> Carry:
  """Calls `update` for every step after the newest checkpoint of `run`, and saves and logs as `run` says.

  Args:
    carry: PyTree of arrays at step 0; donated to `update`.
    update: from the carry and the step (int32 scalar) to the next carry and the loss terms to log, scalars by name.
      Its randomness comes from the step, so that a resumed run is the run that was interrupted.
    steps: number of steps of the whole run.
    run: the folder and its settings.

  Returns:
    The carry after the last step.
  """
  # Orbax reports every step it does not save.
  logging.set_verbosity(logging.WARNING)
  options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=run.checkpoint_every)
  with ocp.CheckpointManager(paths.absolute(run.folder / "checkpoints"), options=options) as checkpoints:
    start = checkpoints.latest_step() or 0
    if start:
      carry = checkpoints.restore(start, args=ocp.args.StandardRestore(carry))
      print(f"resumed at step {start}", flush=True)
    # The steps after the checkpoint come again.
    curve = run.curve_writer([row for row in run.curve() if row["step"] <= start])
    began = time.perf_counter()
    for step in range(start, steps):
      signals.raise_if_interrupted()
      carry, terms = update(carry, jnp.asarray(step))
      if (step + 1) % run.log_every == 0:
        row = {"step": step + 1} | {name: float(value) for name, value in terms.items()}
        print("  ".join(f"{name} {value:.5g}" for name, value in row.items()), end="")
        print(f"  {(time.perf_counter() - began) / (step + 1 - start):.3f} s/step", flush=True)
        curve.append({name: value if math.isfinite(value) else None for name, value in row.items()})
      checkpoints.save(step + 1, args=ocp.args.StandardSave(carry), force=step + 1 == steps)
  return carry


def plot_curve(run: Run, names: Sequence[str], title: str, **axes_settings: str) -> None:
  """Draws the terms `names` of the loss curve to `loss.png`; `axes_settings` as of `matplotlib.axes.Axes.set`."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  curve = run.curve()
  if not curve:
    return  # The run was shorter than one row.
  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  for name in names:
    # A loss that was not finite is a gap.
    losses = [math.nan if row[name] is None else row[name] for row in curve]
    axes.plot([row["step"] for row in curve], losses, label=name)
  axes.set(xlabel="step", title=title, **axes_settings)
  axes.legend()
  picture = io.BytesIO()
  figure.savefig(picture, dpi=120)
  pyplot.close(figure)
  atomic.replace_bytes(run.folder / "loss.png", picture.getvalue())
