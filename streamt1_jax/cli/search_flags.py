"""The flags of a search and of what judges it. Every command that runs a search has them.

`SearchConfig.released()` gives the defaults of the search, and a checkpoint may have a few of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from etils import epath

from streamt1_jax.cli import device_flags, flag_types, memory_plans
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, SearchDefaults, choices
from streamt1_jax.config import video_chunks as chunks_of_length
from streamt1_jax.execution import Decoding
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.methods import METHODS, SEMANTICS, Method
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.planning.request import Request
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards import selection, window_codecs
from streamt1_jax.rewards.selection import RewardChoice
from streamt1_jax.rewards.table import DEFAULT_REWARDS, LEARNED_REWARDS, REWARDS

# Name and meaning of the flags that are fields of `SearchConfig`.
_INTEGERS = {
  "beam_size": "Candidates per beam and chunk.",
  "top_k": "Beams kept after every chunk.",
  "sliding_window": "Chunks the video reward sees.",
  "judge_every": "Chunks from one that is judged to the next; the first is judged.",
  "look_ahead": "Chunks by which every candidate is carried on, to be judged by what follows.",
  "settle_within": "Chunks after which all beams must share a chunk, so that a live stream can show it; 0: no limit.",
  "round_size": "Candidates of a beam drawn at a time; 0 draws all at once.",
  "round_budget": "Rounds given to every chunk; a chunk that draws fewer leaves them to later ones.",
  "max_sink_frames": "Latent frames the sinks may grow to.",
}
_FLOATS = {
  "noise_sigma": "Weight of the parent's noise, in (-1, 1).",
  "short_threshold": "Rise of the image score to remember.",
  "long_threshold": "Fall of the video score: a new scene.",
  "fusion_cap": "Largest weight of the image score, in [0, 1].",
}
_CHOICES = {
  "reward_decode": "What the rewards see. streamed: the frames of the video, each decoded once. scratch: every "
  "candidate's chunk and window decoded anew, as the released code does; its frames differ, and it takes more work.",
}
_DEFAULTS: dict[str, Callable[[ModelConfig], SearchDefaults]] = {
  "checkpoint": lambda model: model.search,
  "released": lambda model: SearchDefaults(),
}
_FIELDS = (*_INTEGERS, *_FLOATS, *_CHOICES, "reward_codec", "accept", "least_gain")


def define(values: flags.FlagValues) -> None:
  """Defines the flags of a search, of its rewards and, from `device_flags`, of its devices."""
  released = SearchConfig.released()
  flag_types.define_choice(
    values,
    "search",
    "stream_t1",
    list(METHODS),
    "How to search: none is plain streaming. Each search sets some of the flags below itself and refuses them, and its "
    "sizes may differ from the defaults here: docs/methods has a page for each.",
  )
  flag_types.define_choice(
    values, "semantics", "released", list(SEMANTICS), "Follow the released code or the paper where they differ."
  )
  flag_types.define_choice(
    values,
    "search_defaults",
    "checkpoint",
    list(_DEFAULTS),
    f"What {', '.join('--' + name for name in vars(SearchDefaults()))} are unless given: the checkpoint's own, if it "
    "has some, or those of the released code.",
  )
  flag_types.define_list(
    values, "policy", None, "Numbers of the search's policy, for a search that has some: alpha:0.02,ess_threshold:0.5."
  )
  for name, meaning in _INTEGERS.items():
    flag_types.define_integer(values, name, getattr(released, name), meaning)
  for name, meaning in _FLOATS.items():
    flag_types.define_float(values, name, getattr(released, name), meaning)
  flag_types.define_float(values, "accept", None, "Hybrid score that is good enough to draw no further round.")
  gain = "No further round is drawn once one more candidate is expected to gain less than this, in the hybrid score."
  flag_types.define_float(values, "least_gain", None, gain)
  flag_types.define_integer(
    values,
    "sink_distance",
    None,
    "Most latent frames between a chunk and the first sink as the chunk sees it. A video then has no longest length.",
    1,
  )
  for name, meaning in _CHOICES.items():
    flag_types.define_choice(values, name, getattr(released, name), choices(SearchConfig, name), meaning)
  define_reward_codec(values)
  flag_types.define_string(
    values,
    "reward",
    None,
    f"Rewards joined by '+'; known are {', '.join(REWARDS)}. By default {'+'.join(LEARNED_REWARDS)} if the checkpoint "
    f"has both and there is a search, else {'+'.join(DEFAULT_REWARDS)}; a warning says so where it has one of them.",
  )
  flag_types.define_list(
    values, "reward_weights", None, "Factors of their scores, 1 by default: hpsv3:0.5,videoalign:1."
  )
  flag_types.define_integer(
    values, "short_frames", None, "Frames of a chunk that the image reward sees; all by default."
  )
  flag_types.define_choice(
    values,
    "reward_dtype",
    None,
    ["float32", "bfloat16", "int8"],
    "Dtype of the rewards' weights and activations; the model's by default. int8: kernels in int8, all else bfloat16.",
  )
  device_flags.define(values)
  memory_plans.define(values)


def define_reward_codec(values: flags.FlagValues) -> None:
  """Defines --reward_codec."""
  flag_types.define_choice(
    values,
    "reward_codec",
    SearchConfig.released().reward_codec,
    list(window_codecs.REWARD_CODECS),
    "What videos go through before a video reward sees them. h264: an mp4 in memory, as the released code writes for "
    "VideoAlign (16 frames per second, 1024 kbit/s on average). Not with several processes; and no program with it is "
    "kept in the compilation cache.",
  )


def search_config(values: flags.FlagValues, model: ModelConfig) -> SearchConfig:
  """The search that the flags ask for. Raises ConfigError, naming the flag, if it cannot run on `model`."""
  method = METHODS[values.search]
  _require_taken(values, method)
  model = dataclasses.replace(model, search=_DEFAULTS[values.search_defaults](model))
  given = {name: values[name].value for name in ("semantics", *_FIELDS) if values[name].present}
  if values.sink_distance is not None:
    given["sink_distance"] = values.sink_distance
  numbers = named_numbers(values, "policy", "alpha:0.02")
  if numbers:
    try:
      method.settings(model, numbers=numbers)
    except ConfigError as error:
      raise ConfigError(f"--policy: {error}") from error
  search = method.settings(model, numbers=numbers, **given)
  require_usable(search, model)
  return search


def require_usable(search: SearchConfig, model: ModelConfig) -> None:
  """Raises ConfigError for a search that fits `model`, but not its videos or this process."""
  window_codecs.require_usable(search.reward_codec)
  if not search.judges:
    return
  # They set the size of what every beam carries; more than the longest video has would only fill the memory.
  frames = model.backbone.max_frames
  chunks = frames // model.chunk_frames
  for name, limit in (("sliding_window", chunks), ("settle_within", chunks), ("max_sink_frames", frames)):
    if getattr(search, name) > limit:
      raise ConfigError(f"{name} must be at most {limit} (rotary tables), got {getattr(search, name)}")


def driver(values: flags.FlagValues) -> Callable[..., Any] | None:
  """What drives the chunk step for the method of the flags; None for `drivers.stream_states`."""
  method = METHODS[values.search]
  numbers = {**method.numbers, **named_numbers(values, "policy", "alpha:0.02")}
  return None if method.run is None else functools.partial(method.run, **numbers)


def driver_settings(values: flags.FlagValues) -> dict[str, Any]:
  """What decides how the chunk step is driven, as JSON values; nothing for `drivers.stream_states`."""
  run = driver(values)
  return {} if run is None else {"method": values.search, "numbers": dict(run.keywords)}


def _require_taken(values: flags.FlagValues, method: Method) -> None:
  """Raises ConfigError if a flag is given that the method sets itself."""
  refused = method.refused([name for name in ("semantics", *_FIELDS) if values[name].present])
  if not refused:
    return
  taken = [f"--{name}" for name in ("semantics", *_FIELDS) if name in method.fields]
  allowed = f"no --{', --'.join(refused)}; of the search flags it takes {', '.join(taken)}"
  nothing = f"no search flags, got --{', --'.join(refused)}"
  raise ConfigError(f"--search={method.name} takes {allowed if taken else nothing}")


def reward_choice(values: flags.FlagValues, checkpoint: epath.Path, model: ModelConfig) -> RewardChoice:
  """The rewards that the flags ask for; no weight is read. Raises ConfigError, naming the flag."""
  return selection.choose(
    checkpoint,
    _reward_names(values, model),
    named_numbers(values, "reward_weights", "hpsv3:0.5"),
    short_frames=values.short_frames,
    chunk_frames=model.required_codec.temporal_stride * model.chunk_frames,
  )


def prompt_readers(checkpoint: epath.Path, choice: RewardChoice) -> list[Callable[[str], Any]]:
  """What the chosen rewards read prompts with; each raises ConfigError for a prompt it cannot read."""
  parts = checkpoint / reward_folder.REWARDS_FOLDER
  return [reward_folder.load_prompt(parts / name) for name in choice.stored]


def memory_request(
  values: flags.FlagValues,
  checkpoint: epath.Path,
  model: ModelConfig,
  dtype: str,
  num_prompts: int = 1,
  num_chunks: int | None = None,
) -> Request:
  """What the search of the flags asks of a device. Raises ConfigError, naming the flag or the file."""
  search = search_config(values, model)
  mesh = device_flags.make_mesh(values, model, search, num_prompts)
  choice = reward_choice(values, checkpoint, model)
  kept = METHODS[values.search].states_kept(named_numbers(values, "policy", "alpha:0.02"))
  return memory_plans.request(
    values, checkpoint, model, search, choice, mesh, dtype, num_chunks, kept, values.reward_dtype
  )


def load_pipeline(
  values: flags.FlagValues,
  checkpoint: epath.Path,
  dtype: str = "float32",
  num_prompts: int = 1,
  decoding: Decoding | None = None,
) -> Pipeline:
  """The model of a checkpoint with the rewards and on the devices of the flags.

  Args:
    values: the flags.
    checkpoint: its folder.
    dtype: of the model; by default that of the small world's programs, whose figures are float32 everywhere.
    num_prompts: made together.
    decoding: how to decode; by default as the search of the flags fits.

  Raises:
    ConfigError: names the flag or the file; also for a search that does not fit its devices.
  """
  device_flags.use_compilation_cache(values)
  model = load_config(checkpoint)
  asked = memory_request(values, checkpoint, model, dtype, num_prompts)
  decoding = decoding or memory_plans.decide(values, {"": asked})
  device_flags.warn_if_slow(model, values.attention)
  return Pipeline.load(
    checkpoint,
    dtype=jnp.dtype(device_flags.use_dtype(dtype)),
    reward=_reward_names(values, model),
    reward_weights=named_numbers(values, "reward_weights", "hpsv3:0.5"),
    short_frames=values.short_frames,
    reward_dtype=None if values.reward_dtype is None else jnp.dtype(values.reward_dtype),
    mesh=asked.execution.mesh,
    decoding=decoding,
    attention=values.attention,
  )


def _reward_names(values: flags.FlagValues, model: ModelConfig) -> str | None:
  search = search_config(values, model)
  chooses = search.num_candidates > 1 or search.judges or METHODS[values.search].asks
  # What chooses nothing, plain streaming, loads nothing large to judge it.
  default = None if chooses else "+".join(DEFAULT_REWARDS)
  return default if values.reward is None else values.reward


def named_numbers(values: flags.FlagValues, flag: str, example: str) -> dict[str, float]:
  """The numbers of a flag that is a list of name:number, by name. Raises ConfigError, naming the flag."""
  numbers = {}
  for item in values[flag].value or ():
    name, _, number = item.partition(":")
    try:
      value = float(number)
    except ValueError as error:
      raise ConfigError(f"--{flag}: {item!r} is not name:number, as in {example}") from error
    if not math.isfinite(value):
      raise ConfigError(f"--{flag}: {item!r} is not a finite number")
    if name.strip() in numbers:
      raise ConfigError(f"--{flag}: {name.strip()} is given twice")
    numbers[name.strip()] = value
  return numbers


def reward_settings(choice: RewardChoice, dtype: str) -> dict[str, Any]:
  """What judges, as JSON values; `dtype` is that of the rewards. With the checkpoint it decides all scores."""
  return {
    "image_rewards": choice.image,
    "video_rewards": choice.video,
    "short_frames": choice.short_frames,
    "reward_dtype": dtype if choice.stored else None,
  }


def video_chunks(
  model: ModelConfig,
  *,
  seconds: float | None = None,
  num_latent_frames: int | None = None,
  search: SearchConfig | None = None,
) -> int:
  """The length that the flag of the same name gives, in chunks. Raises ConfigError, naming the flag."""
  try:
    chunks = chunks_of_length(model, seconds=seconds, num_latent_frames=num_latent_frames)
    endless = search is not None and search.sink_distance is not None
    longest = model.max_chunks if search is None else search.max_chunks(model)
    if chunks > longest:
      remedy = "seeds" if endless else "rotary tables; --sink_distance lifts it"
      raise ConfigError(f"the number of chunks must be in 1..{longest} ({remedy}), got {chunks}")
  except (ConfigError, OverflowError) as error:
    given = f"--seconds={seconds}" if num_latent_frames is None else f"--num_latent_frames={num_latent_frames}"
    raise ConfigError(f"{given}: {error}") from error
  return chunks


def check_prompts(readers: Sequence[Callable[[str], Any]], prompts: Sequence[str], source: str) -> None:
  """Raises ConfigError, naming the flag in `source` and the prompt, if a reward cannot read one of them."""
  for prompt in prompts:
    for read in readers:
      try:
        read(prompt)
      except ConfigError as error:
        raise ConfigError(f"{source}: {prompt!r}: {error}") from error
