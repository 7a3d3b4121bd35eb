"""The folder of a comparison: what was fixed before the first video, and a row for every video.

  DIR/plan.json     settings, prompts, seeds, primary metric, methods
  DIR/videos.jsonl  a line of settings, then a line for each video, safe as soon as it is made

Plain videos are made once and serve plain streaming, best-of-N, a random pick and the perfect judge alike. A later run
may bring further methods, which are marked as later; everything else is refused if it differs.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.compare import held_out
from streamt1_jax.evaluation.compare.contenders import Contender
from streamt1_jax.evaluation.compare.held_out import Found
from streamt1_jax.evaluation.compare.making import Counted, Finished
from streamt1_jax.evaluation.compare.scenes import Case, Scene
from streamt1_jax.io import config_json, manifest, rows

PLAN, VIDEOS = "plan.json", "videos.jsonl"
PLAIN = "plain"
"""Method of the rows of plain videos."""
_TOLD = {"settings", "added", "videos_before"}
"""What a plan says of a method."""
_LARGEST = 1e100  # Sums of squares stay finite.
REMEDY = "give the same flags or another folder"

Row = dict[str, Any]


class Key(NamedTuple):
  """Which video of a comparison a row is: method, prompt and take by their numbers, and the place in the pool."""

  method: str
  prompt: int
  take: int
  place: int = 0


class Plan(NamedTuple):
  """What is fixed before the first video.

  Attributes:
    settings: everything that decides the plain videos and what is said of all videos, as JSON values.
    scenes: what the videos are of.
    cases: every prompt with its seeds.
    pool: plain videos of every case.
    primary: the metric that decides.
  """

  settings: Mapping[str, Any]
  scenes: Sequence[Scene]
  cases: Sequence[Case]
  pool: int
  primary: str

  def fixed(self) -> dict[str, Any]:
    """All of it as JSON values."""
    scenes = [scene.to_json() for scene in self.scenes]
    return {
      **self.settings,
      "primary_metric": self.primary,
      "num_prompts": len(self.scenes),
      "num_seeds": len(self.cases) // len(self.scenes),
      "pool": self.pool,
      "prompts_sha256": hashlib.sha256(json.dumps(scenes).encode()).hexdigest(),
    }


class Folder:
  """A comparison on disk."""

  def __init__(self, path: epath.Path, plan: Plan, contenders: Sequence[Contender], now: str):
    """Reads what an earlier run has made of the same plan; nothing is written.

    Args:
      path: the folder; it is made.
      plan: what is fixed.
      contenders: those whose videos are wanted.
      now: date and time of this run.

    Raises:
      ConfigError: the folder holds a comparison of another plan, or one of the methods with other settings.
    """
    self._path, self._writer = path, None
    fixed, name = plan.fixed(), f"--output={path}"
    self.rows = {
      _key(row): row for row in rows.read(path / VIDEOS, fixed, name=f"{name}: {VIDEOS}", remedy=REMEDY, is_row=is_row)
    }
    self.plan = self._read_plan(path, fixed, name) or {
      "begun": now,
      "fixed": fixed,
      "scenes": [scene.to_json() for scene in plan.scenes],
      "seeds": [case.seed for case in plan.cases],
      "methods": {},
    }
    for contender in contenders:
      known = self.plan["methods"].get(contender.label)
      if known is not None:
        rows.require_same(f"{name}: {contender.label}", known["settings"], contender.settings, REMEDY)
      else:
        told = {"settings": contender.settings, "added": now, "videos_before": len(self.rows)}
        self.plan["methods"][contender.label] = told

  def begin(self) -> None:
    """Writes the plan, before the first video is made. Raises OSError if the file system refuses."""
    manifest.write_json(self._path / PLAN, self.plan)
    self._writer = rows.Writer(self._path / VIDEOS, self.plan["fixed"], self.rows.values())

  @staticmethod
  def _read_plan(path: epath.Path, fixed: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    if not (path / PLAN).exists():
      return None
    document = config_json.read_json(path / PLAN, f"{name}: {PLAN}")
    methods = document.get("methods") if isinstance(document, dict) else None
    whole = isinstance(methods, dict) and all(
      isinstance(each, dict) and set(each) >= _TOLD for each in methods.values()
    )
    if not whole:
      raise ConfigError(f"{name}: {PLAN} is not the plan of a comparison; {REMEDY}")
    rows.require_same(f"{name}: {PLAN}", document.get("fixed"), fixed, REMEDY)
    return document

  def add(self, key: Key, seed: int, finished: Finished, found: Found, more: Mapping[str, Any]) -> None:
    """Keeps a video's row."""
    assert self._writer is not None
    row = {
      **key._asdict(),
      "base_seed": seed,
      "score": finished.score if abs(finished.score) < float("inf") else None,
      "held_out": found.held_out,
      "windows": found.windows,
      **more,
      "made": _counted(finished.made),
      "verdict": _counted(finished.verdict),
      "depth": finished.depth,
      "seconds": finished.seconds,
      "verdict_seconds": finished.verdict_seconds,
      "compilations": finished.compilations,
    }
    self._writer.append(row)
    self.rows[key] = row


def wanted(plan: Plan, contenders: Sequence[Contender]) -> list[tuple[Key, Case, Contender | None]]:
  """Every video, case by case: the pool of plain ones, then one of each contender that makes its own."""
  keys = []
  for case in plan.cases:
    keys += [(Key(PLAIN, case.prompt, case.take, place), case, None) for place in range(plan.pool)]
    own = (contender for contender in contenders if contender.picks is None)
    keys += [(Key(contender.label, case.prompt, case.take), case, contender) for contender in own]
  return keys


def is_row(row: Mapping[str, Any]) -> bool:
  """Whether a JSON object has what a summary reads of a video."""
  numbers = [row.get(name) for name in ("prompt", "take", "place", "base_seed", "depth", "compilations")]
  judged, windows, motion = row.get("held_out"), row.get("windows"), row.get("motion", {})
  return (
    isinstance(row.get("method"), str)
    and all(type(number) is int and _is_number(number) for number in numbers)
    and all(_is_number(row.get(name)) for name in ("seconds", "verdict_seconds"))
    and (row.get("score") is None or _is_number(row["score"]))
    and _is_signature(row.get("signature"))
    and all(_are_numbers(values, optional=True) for values in (judged, motion))
    and isinstance(windows, list)
    and all(map(_is_number, windows))
    and all(_is_counted(row.get(name)) for name in ("made", "verdict"))
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, (bool, int, float)) and abs(value) < _LARGEST


def _are_numbers(values: Any, optional: bool = False) -> bool:
  return isinstance(values, dict) and all(_is_number(x) or (optional and x is None) for x in values.values())


def _is_counted(value: Any) -> bool:
  return isinstance(value, dict) and all(_are_numbers(value.get(name)) for name in ("cost", "tflop"))


def _is_signature(value: Any) -> bool:
  try:
    return isinstance(value, str) and len(base64.b64decode(value, validate=True)) == held_out.SIGNATURE_BYTES
  except ValueError:
    return False


def _key(row: Mapping[str, Any]) -> Key:
  return Key(*(row[name] for name in Key._fields))


def _counted(counted: Counted) -> dict[str, Any]:
  return {
    "cost": counted.cost._asdict(),
    "tflop": {name: value / 1e12 for name, value in counted.flop._asdict().items()},
  }
