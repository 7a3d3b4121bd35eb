"""What `streamt1 generate` will do, before any weight is read, and then with its model loaded.

flags ── read_prompts, make_plan ── Plan ── load ── Searcher
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from streamt1_jax import drivers, noise_propagation
from streamt1_jax.cli import (
  device_flags,
  host_flags,
  monitoring,
  results,
  search_flags,
  steering_flags,
)
from streamt1_jax.cli.files import checkpoint_sha256, find_checkpoint
from streamt1_jax.cli.steering_flags import Steered
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, require_video_model
from streamt1_jax.io import config_json, manifest
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.methods import METHODS
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel.sharding import RULES
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.report.pictures import FRAMES_PER_STRIP
from streamt1_jax.steering import NOTHING, Start
from streamt1_jax.text.prompts import load_prompts
from streamt1_jax.text.tokenizer import clean

SEED_LIMIT = 2**31
"""Seeds are smaller, and at least the negative of it."""
SAMPLE_SEEDS = 1_000_000
"""Between the seeds of two samples of up to 1000 chunks, and a multiple of it for longer ones: they share no noise."""
DEFAULT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all videos of one run have in common, before any weight is read.

  Attributes:
    values: the flags.
    dtype: of weights and activations.
    checkpoint: folder of the model.
    model: its configuration.
    rewards: what judges, as JSON values.
    search: how to search.
    num_chunks: chunks to make of every video.
    checkpoint_sha256: identifies the model, wherever its folder is.
    steered: how prompts change, and what the videos begin with.
    seed: base seed.
    sample: which of the videos of a prompt, counted from 0.
  """

  values: flags.FlagValues
  dtype: str
  checkpoint: epath.Path
  model: ModelConfig
  rewards: dict[str, Any]
  search: SearchConfig
  num_chunks: int
  checkpoint_sha256: str
  steered: Steered
  seed: int
  sample: int = 0

  def settings(self, prompt: str) -> dict[str, Any]:
    """Everything that decides the video of `prompt`."""
    return {
      "prompt": prompt,
      "seed": self.seed,
      "num_latent_frames": self.num_chunks * self.model.chunk_frames,
      "checkpoint_sha256": self.checkpoint_sha256,
      "dtype": self.dtype,
      **self.rewards,
      **config_json.to_json_value(self.search),
      # Fields that older results lack are compared as well.
      "sink_distance": self.search.sink_distance,
      **search_flags.driver_settings(self.values),
      **self.steered.settings,
    }

  def folder(self, prompt: str) -> epath.Path:
    """The folder of the result for `prompt`."""
    return results.result_folder(self.values.output_dir, prompt, self.steered.name, self.sample)

  @property
  def sample_seeds(self) -> int:
    """What the seed of a sample is above that of the one before."""
    return SAMPLE_SEEDS * -(-self.num_chunks * noise_propagation.SEEDS_PER_CHUNK // SAMPLE_SEEDS)

  def require_apart(self, length: int) -> None:
    """Raises ConfigError if samples of `length` chunks, given ones included, would share seeds of candidates."""
    most = self.sample_seeds // noise_propagation.SEEDS_PER_CHUNK
    if self.values.samples > 1 and length > most:
      raise ConfigError(
        f"--samples={self.values.samples}: videos of {length} chunks, given ones included, would share seeds; at most "
        f"{most} chunks do not"
      )

  def samples(self) -> list[Plan]:
    """The plans of all videos of a prompt; this is the first. Raises ConfigError if there are too few seeds."""
    count = self.values.samples
    last = self.seed + (count - 1) * self.sample_seeds
    if last >= SEED_LIMIT:
      raise ConfigError(f"--samples={count}: the last seed would be {last}, and {SEED_LIMIT - 1} is the largest")
    seeds = [self.seed + sample * self.sample_seeds for sample in range(count)]
    return [dataclasses.replace(self, seed=seed, sample=sample) for sample, seed in enumerate(seeds)]

  def length(self, start: Start) -> int:
    """Chunks of every video, those that it begins with included."""
    return start.num_chunks + self.num_chunks


@dataclasses.dataclass(frozen=True)
class Searcher:
  """A plan with its model loaded.

  Attributes:
    plan: the plan.
    pipeline: the loaded model.
    load_seconds: wall time of loading it.
    start: what every video begins with.
    notes: sentences about what was done to the input.
  """

  plan: Plan
  pipeline: Pipeline
  load_seconds: float
  start: Start = NOTHING
  notes: tuple[str, ...] = ()

  def script(self, prompt: str) -> list[tuple[int, str]]:
    """Prompts of the video of `prompt`, and the chunks that they begin with."""
    return self.plan.steered.script(prompt, self.pipeline.clock, self.plan.length(self.start))

  def settings(self, prompts: Sequence[str]) -> dict[str, Any]:
    """Everything that decides the state of a search of `prompts` to the last bit."""
    models = self.pipeline.models
    common_settings = {name: value for name, value in self.plan.settings("").items() if name != "prompt"}
    # Two searches may differ in these, which only round otherwise; one search that goes on may not.
    execution = {
      "platform": jax.default_backend(),
      "mesh": self.pipeline.mesh_sizes,
      "decoding": models.execution.decoding,
      "attention": models.execution.attention,
    }
    return {"prompts": list(prompts), **execution, **common_settings}


def prompt_source(values: flags.FlagValues) -> str:
  """The flag that gives the prompts."""
  if values.timeline is not None:
    return f"--timeline {values.timeline}"
  return "--prompt" if values.prompts_file is None else f"--prompts_file {values.prompts_file}"


def read_prompts(values: flags.FlagValues, steered: Steered) -> list[str]:
  """The prompts of the flags, each once; of a timeline, the first. With --plan there may be none."""
  if steered.timeline is not None:
    return [steered.timeline.entries[0].prompt]
  if values.prompts_file is not None:
    prompts = load_prompts(values.prompts_file)
  elif values.prompt is not None:
    prompts = [values.prompt]
  elif values.plan:
    return []
  else:
    raise ConfigError("exactly one of --prompt, --prompts_file and --timeline must be given")
  for prompt in prompts:
    if prompt.encode(errors="ignore").decode() != prompt:
      raise ConfigError(f"{prompt_source(values)}: the prompt {prompt!r} is not UTF-8 text")
    if not clean(prompt):
      raise ConfigError(f"{prompt_source(values)}: the prompt {prompt!r} is empty; give a sentence")
  return list(dict.fromkeys(prompts))


def make_plan(values: flags.FlagValues, prompts: list[str], steered: Steered) -> Plan:
  """Checks everything that needs no weights. Raises ConfigError, naming the flag."""
  checkpoint = find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, str(checkpoint))
  search = search_flags.search_config(values, model)
  chunks = num_chunks(values, model, search)
  check_begin(values, steered, model, search, chunks)
  monitoring.check_flags(values, chunks)
  choice = search_flags.reward_choice(values, checkpoint, model)
  readers = search_flags.prompt_readers(checkpoint, choice)
  search_flags.check_prompts(readers, prompts, prompt_source(values))
  steering_flags.check(values, steered, model, readers)
  host_flags.require_same_inputs(checkpoint, prompts, repr(steered.settings))
  hosts.first_decides(lambda: monitoring.make_folders(values))
  dtype = device_flags.use_dtype(values.dtype)
  rewards = search_flags.reward_settings(choice, values.reward_dtype or dtype)
  sha256 = checkpoint_sha256(checkpoint, choice.stored)
  seed = steering_flags.seed(values, steered)
  return Plan(values, dtype, checkpoint, model, rewards, search, chunks, sha256, steered, seed)


def check_begin(
  values: flags.FlagValues, steered: Steered, model: ModelConfig, search: SearchConfig, chunks: int
) -> None:
  """Raises ConfigError, naming the flag, unless the search can make a video that begins like this."""
  if steered.start is None:
    drivers.check_judged(search, chunks)
    return
  flag, path = steered.start
  is_given = flag != "image" or (steered.image_start or model.image_start) == "still"
  if METHODS[values.search].begins and is_given:
    raise ConfigError(f"--{flag}={path}: --search={values.search} tries the first chunk, and this video's is given")


def num_chunks(values: flags.FlagValues, model: ModelConfig, search: SearchConfig) -> int:
  """Chunks to make of every video."""
  seconds = DEFAULT_SECONDS if values.seconds is None and values.num_latent_frames is None else values.seconds
  return search_flags.video_chunks(model, seconds=seconds, num_latent_frames=values.num_latent_frames, search=search)


def _alone(plan: Plan) -> str | None:
  """Why no two videos are made at the same time; None if they may be."""
  if plan.steered.is_steered:
    return "a video that changes its prompt or begins with something is searched alone"
  return None if METHODS[plan.values.search].run is None else f"--search={plan.values.search} makes one video at a time"


def load(plan: Plan, num_prompts: int) -> Searcher:
  """Loads the model that all prompts share."""
  timer = manifest.PhaseTimer()
  alone = _alone(plan)
  num_prompts = num_prompts if alone is None else 1
  mesh = device_flags.make_mesh(plan.values, plan.model, plan.search, num_prompts)
  if alone is not None and mesh is not None and mesh.shape[RULES["prompt"]] > 1:
    raise ConfigError(f"--mesh: {alone}: data must be 1")
  with timer.phase("load"):
    pipeline = search_flags.load_pipeline(plan.values, plan.checkpoint, plan.dtype, num_prompts)
  if plan.values.report and plan.search.num_candidates > 1:
    pipeline = pipeline.with_previews(FRAMES_PER_STRIP)
  notes: list[str] = []
  with timer.phase("load"):
    start = steering_flags.make_start(plan.steered, pipeline, notes.append)
  end = plan.length(start)
  notes += steering_flags.check_times(plan.values, plan.steered, pipeline.clock, end, start.num_chunks)
  drivers.check_length(pipeline.models, plan.search, end)
  plan.require_apart(end)
  note = METHODS[plan.values.search].note(plan.search, end)
  notes += [] if note is None else [note]
  return Searcher(plan, pipeline, timer.seconds["load"], start, tuple(notes))
