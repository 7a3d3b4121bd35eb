"""Flags of a video whose prompt changes, or that begins with something: a timeline, a picture, a video, a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from streamt1_jax.cli import flag_types, results
from streamt1_jax.config import ConfigError, ModelConfig, SwitchConfig, choices
from streamt1_jax.config.session import MAX_HORIZON
from streamt1_jax.io import config_json, part_files, paths, timeline
from streamt1_jax.io.timeline import ChunkClock, Timeline
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.steering import Start
from streamt1_jax.text.tokenizer import clean

_IMAGE_STARTS = ["still", "clamp"]
_SWITCH_FLAGS = {
  "recache": ("recache", "How a new prompt computes the memory anew."),
  "switch_sinks": ("sinks", "What becomes of the sinks at a new prompt."),
  "switch_video": (
    "video",
    "What the video reward sees after a new prompt: the whole window, or what was made since.",
  ),
}
"""Fields of `SwitchConfig` and what they mean, by the flags that set them."""


def define(values: flags.FlagValues) -> None:
  """Defines the flags."""
  flag_types.define_path(values, "timeline", None, "JSON file of prompts and when they begin, in place of --prompt.")
  flag_types.define_path(values, "image", None, "Begin with this picture.")
  flag_types.define_choice(
    values,
    "image_start",
    None,
    _IMAGE_STARTS,
    "How: 'still', it stands for one chunk; 'clamp', it is the first latent frame, for models that were trained for "
    "it, whose default this is.",
  )
  flag_types.define_path(values, "video", None, "Begin with the end of this video.")
  flag_types.define_path(values, "continue_from", None, "Begin with the video of this result folder, exactly.")
  switch = SwitchConfig()
  for name, (field, meaning) in _SWITCH_FLAGS.items():
    flag_types.define_choice(values, name, getattr(switch, field), choices(SwitchConfig, field), meaning)
  flag_types.define_integer(
    values,
    "horizon",
    None,
    "Chunks over which the weight of the image reward grows, as in a session without an end; the video's by default.",
    1,
    MAX_HORIZON,
  )
  flags.mark_flags_as_mutual_exclusive(list(_STARTS), flag_values=values)


@dataclasses.dataclass(frozen=True)
class Steered:
  """What the flags ask for.

  Attributes:
    timeline: prompts and when they begin, or None.
    switch: what a new prompt does to the memory.
    start: kind of start and the path that was given, or None.
    image_start: as the flag says.
    start_settings: the start as JSON values: its kind and what identifies its content. None without one.
    horizon: as the flag says.
  """

  timeline: Timeline | None
  switch: SwitchConfig
  start: tuple[str, str] | None
  image_start: str | None
  start_settings: dict[str, Any] | None
  horizon: int | None

  @property
  def is_steered(self) -> bool:
    return self.timeline is not None or self.start is not None or self.horizon is not None

  @property
  def settings(self) -> dict[str, Any]:
    """What decides the video, as JSON values; None is what a video has that nothing steers."""
    return {
      "timeline": None if self.timeline is None else self.timeline.to_json()["entries"],
      "switch": None if self.timeline is None else config_json.to_json_value(self.switch),
      "start": self.start_settings,
      "horizon": self.horizon,
    }

  @property
  def name(self) -> str:
    """What the folder of the result is named after, beside the prompt; empty for a video that nothing steers."""
    named = {name: self.settings[name] for name in ("timeline", "start") if self.settings[name] is not None}
    return repr(named) if named else ""

  def script(self, prompt: str, clock: ChunkClock, end: int) -> list[tuple[int, str]]:
    """Prompts and the chunks they begin with, in a video of `end` chunks. Raises ConfigError, naming the file."""
    if self.timeline is None:
      return [(0, prompt)]
    return self.timeline.chunks(clock, end)


def read(values: flags.FlagValues) -> Steered:
  """What the flags ask for; files are read as far as no model is needed.

  Raises:
    ConfigError: a flag is given that has no effect, or a file cannot be read; the message names the flag.
  """
  told = None if values.timeline is None else _named("timeline", timeline.load, values.timeline)
  if told is None:
    useless = [name for name in _SWITCH_FLAGS if values[name].present]
    if useless:
      raise ConfigError(f"--{useless[0]} says what a new prompt does: it needs --timeline")
  if told is not None and told.seed is not None and values["seed"].present and values.seed != told.seed:
    raise ConfigError(f"--seed={values.seed}, but --timeline={values.timeline} has seed {told.seed}; leave --seed out")
  if values.image_start is not None and values.image is None:
    raise ConfigError("--image_start says how a picture begins the video: it needs --image")
  chosen: dict[str, Any] = {field: values[name].value for name, (field, _) in _SWITCH_FLAGS.items()}
  switch = SwitchConfig(**chosen)
  paths: list[tuple[str, Any]] = [(name, values[name].value) for name in _STARTS]
  given = [(name, path) for name, path in paths if path is not None]
  start = given[0] if given else None
  settings = None if start is None else _start_settings(*start, values.image_start)
  return Steered(told, switch, start, values.image_start, settings, values.horizon)


def seed(values: flags.FlagValues, steered: Steered) -> int:
  """The base seed: that of the timeline, or of the flag."""
  told = None if steered.timeline is None else steered.timeline.seed
  return values.seed if told is None else told


def check(values: flags.FlagValues, steered: Steered, model: ModelConfig, readers: Sequence[Callable]) -> None:
  """Raises ConfigError if the model cannot do it, or a reward cannot read a prompt; the message names the entry."""
  if steered.image_start == "clamp" and model.image_start != "clamp":
    raise ConfigError(f"--image_start=clamp: the model {model.name!r} was not trained for it; it can begin with still")
  for number, entry in enumerate(steered.timeline.entries if steered.timeline else (), start=1):
    if not clean(entry.prompt):
      raise ConfigError(f"--timeline={values.timeline}: entry {number}: the prompt {entry.prompt!r} is empty")
    for reader in readers:
      try:
        reader(entry.prompt)
      except ConfigError as error:
        raise ConfigError(f"--timeline={values.timeline}: entry {number}: {error}") from error


def check_times(values: flags.FlagValues, steered: Steered, clock: ChunkClock, end: int, given: int) -> list[str]:
  """Says how times are rounded.

  Raises ConfigError for a prompt that begins when a video of `end` chunks is over, or in its first `given` chunks.
  """
  told = steered.timeline
  if told is None:
    return []
  _named("timeline", lambda _: told.chunks(clock, end, given), values.timeline)
  return told.rounded(clock)


def make_start(steered: Steered, pipeline: Pipeline, say: Callable[[str], None]) -> Start:
  """What the video begins with. Raises ConfigError, naming the flag."""
  if steered.start is None:
    return pipeline.start()
  name, path = steered.start
  options = _STARTS[name].options(path, steered, pipeline)
  return _named(name, lambda _: pipeline.start(**options, say=say), path)


class _StartFlag(NamedTuple):
  """A flag that names what a video begins with.

  Attributes:
    file: what identifies it, in the path that is given.
    problem: of a path without that file.
    options: arguments of `Pipeline.start`, of the path, the flags and the pipeline.
  """

  file: Callable[[epath.Path], epath.Path]
  problem: str
  options: Callable[[str, Steered, Pipeline], dict[str, Any]]


_NO_FILE = "does not exist or is not a file"
_STARTS = {
  "image": _StartFlag(
    lambda path: path, _NO_FILE, lambda path, steered, _: {"image": path, "image_start": steered.image_start}
  ),
  "video": _StartFlag(lambda path: path, _NO_FILE, lambda path, *_: {"video": path}),
  "continue_from": _StartFlag(
    lambda path: path / results.LATENTS,
    f"is no result with latents: it has no {results.LATENTS}",
    lambda path, _, pipeline: {"latents": results.read_latents(epath.Path(path), pipeline.model_sha256)},
  ),
}
"""By the names of their flags."""


def _start_settings(name: str, path: str, image_start: str | None) -> dict[str, Any]:
  file = _STARTS[name].file(epath.Path(path))
  if not paths.is_regular_file(file):
    raise ConfigError(f"--{name}={path} {_STARTS[name].problem}")
  settings = {"kind": name, "sha256": part_files.file_sha256(file)}
  return settings | ({} if image_start is None else {"image_start": image_start})


def _named(flag: str, read: Callable[[Any], Any], value: Any) -> Any:
  try:
    return read(value)
  except ConfigError as error:
    raise ConfigError(f"--{flag}={value}: {error}") from error
