"""Makes videos from prompts: one searched video per prompt, and a full account of how it came to be.

  streamt1 generate --prompt="a red circle moves left over a dark blue background"
  streamt1 generate --prompts_file=prompts.txt --seconds=30 --seed=7 --output_dir=outputs/long
  streamt1 generate --flagfile=generate_tiny.flags --search=none
  streamt1 generate --plan --flagfile=paper_5s.flags --checkpoint=checkpoints/wan_1_3b

Every prompt gets a folder in `output_dir`, which appears whole or not at all:

  video.mp4           H.264, small videos enlarged by whole pixels
  report.html         the search as a page to click through, unless --report=false
  pictures.zip        three small frames of every survivor, for the report
  latents.safetensors the video before it was decoded: --continue_from=FOLDER goes on from it
  contact_sheet.png   eight frames, with their times
  trace.json          every candidate: seed, parent, scores, route, fate; what each chunk cost; the winner's lineage
  manifest.json       flags, versions, device, seeds, length, cost, seconds per phase, peak memory, compilations

A video may change its prompt (--timeline=FILE) and begin with a picture, another video, or an earlier result (--image,
--video, --continue_from); its length then counts what is made.

With --samples=N every prompt gets N videos of different seeds, whose folders end with -1, -2 and so on: the samples
that `streamt1 export_vbench` looks for.

On a mesh with `data` several prompts are searched at the same time (--mesh=data:4,candidate:2). Several processes, on
one host or many, search together: all get the same flags, process 0 writes, and if one dies the others stop.

A prompt whose folder is finished is skipped, so an interrupted list goes on where it stopped. Once a minute, or every
`save_every` chunks, the search is saved in a hidden folder, which goes away when the result is there. After a kill the
same command goes on in the middle of the video and makes the same video. `manifest.json` then has the chunks at which
it went on; its seconds, memory and compilations are those of the last run.

Exit codes: 0; 2 for bad input; 3 when every candidate of a chunk is NaN or Inf (the folder then holds `failed.json` and
the trace so far), the disk is full, or another process died; 130 when interrupted; 143 by SIGTERM, after the chunk is
finished and saved. If another process of the run dies, JAX ends this one with 134.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tqdm
from absl import flags
from etils import epath

from streamt1_jax import drivers
from streamt1_jax.cli import (
  command,
  device_flags,
  flag_types,
  host_flags,
  memory_plans,
  monitoring,
  report,
  results,
  search_flags,
  steering_flags,
  stopped_searches,
)
from streamt1_jax.cli.files import checkpoint_sha256, find_checkpoint
from streamt1_jax.cli.growing_result import GrowingResult
from streamt1_jax.cli.steering_flags import Steered
from streamt1_jax.cli.stopped_searches import Batch
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, require_video_model
from streamt1_jax.cost import Cost
from streamt1_jax.drivers import SearchError
from streamt1_jax.finishing import Finishing, Scored
from streamt1_jax.io import config_json, manifest, part_files
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.measuring import ledger, search_flop
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.methods.tries import Try
from streamt1_jax.parallel import hosts
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.saved_search import SavedSearch
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.steering import NOTHING, Start, Steering
from streamt1_jax.text.prompts import load_prompts
from streamt1_jax.text.tokenizer import clean
from streamt1_jax.trace import describe_video

_SEED_LIMIT = 2**31
SAMPLE_SEEDS = 1_000_000
"""Between the seeds of two samples: seeds of candidates go up by 1000 a chunk, and samples share none of them."""
_MOST_SAMPLES = 1000
DEFAULT_SECONDS = 5.0
_PROGRESS = "{desc}: chunk {n_fmt}/{total_fmt} |{bar:20}| {elapsed} passed, {remaining} left{postfix}"


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_checkpoint(values)
  flag_types.define_string(values, "prompt", None, "What to show.")
  flag_types.define_path(values, "prompts_file", None, "Text file with one prompt per line.")
  flag_types.define_float(values, "seconds", None, "Length, rounded to whole chunks; 5 unless a length is given.")
  flag_types.define_integer(values, "num_latent_frames", None, "Length in latent frames, whole chunks.")
  flag_types.define_integer(values, "seed", 0, "Base seed of all candidates.", -_SEED_LIMIT, _SEED_LIMIT - 1)
  flag_types.define_integer(
    values,
    "samples",
    1,
    f"Videos of every prompt. Each has a folder of its own, and the seed of the one before it plus {SAMPLE_SEEDS}.",
    1,
    _MOST_SAMPLES,
  )
  device_flags.define_dtype(values, ["float32", "bfloat16"], "Dtype of weights and activations.")
  flag_types.define_path(values, "output_dir", "outputs/", "Where the folders of the prompts are made.")
  flag_types.define_switch(
    values,
    "overwrite",
    False,
    "Replace earlier results of the same prompts, those of the start before too: not for a command that is started "
    "again until its list is finished.",
  )
  for group in (steering_flags, search_flags, host_flags, stopped_searches, monitoring, report):
    group.define(values)
  flag_types.define_switch(
    values, "plan", False, "Say what the search takes of a device and what is compiled, and stop; needs no prompt."
  )
  flags.mark_flags_as_mutual_exclusive(["prompt", "prompts_file", "timeline"], flag_values=values)
  flags.mark_flags_as_mutual_exclusive(["seconds", "num_latent_frames"], flag_values=values)


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
    """Of the result."""
    return results.result_folder(self.values.output_dir, prompt, self.steered.name, self.sample)

  def samples(self) -> list[Plan]:
    """The plans of all videos of a prompt; this is the first. Raises ConfigError if there are too few seeds."""
    count = self.values.samples
    last = self.seed + (count - 1) * SAMPLE_SEEDS
    if last >= _SEED_LIMIT:
      raise ConfigError(f"--samples={count}: the last seed would be {last}, and {_SEED_LIMIT - 1} is the largest")
    seeds = [self.seed + sample * SAMPLE_SEEDS for sample in range(count)]
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


def search_videos(
  searcher: Searcher,
  prompts: list[str],
  timer: manifest.PhaseTimer,
  writers: Mapping[str, GrowingResult],
  saved: SavedSearch,
) -> list[Made]:
  """Searches the videos of prompts that are made together; `writers` receive their chunks as they come."""
  plan, pipeline = searcher.plan, searcher.pipeline
  seeds, length = [plan.seed] * len(prompts), plan.num_chunks
  with timer.phase("text"):
    steering = begin_steering(searcher, prompts[0]) if plan.steered.is_steered else None
    conditions = (
      [pipeline.condition(prompt, length) for prompt in prompts] if steering is None else [steering.condition]
    )
    conditions = jax.block_until_ready(conditions)
  with timer.phase("load"):
    end = plan.length(searcher.start)
    abstract = pipeline.abstract_state(plan.search, num_chunks=max(end, plan.steered.horizon or 0), seeds=seeds)
    state, start = saved.restore(abstract, warn) or (None, 0)
  border = None
  if steering is not None:
    state, border = resume_steering(searcher, steering, state), functools.partial(scripted_border, steering)
  videos = [
    Making(pipeline, plan.search, steering or Unchanged(condition), writer)
    for condition, writer in zip(conditions, map(writers.get, prompts), strict=True)
  ]
  with timer.phase("load"):
    if steering is not None and steering.given is not None:
      videos[0].give(steering.given)
    for made in saved.traces():
      take_all(videos, made)
  drive = search_flags.driver(plan.values)
  options: dict[str, Any] = {"num_chunks": end, "seeds": seeds, "state": state, "border": border}
  if drive is not None:
    options["drive"] = functools.partial(drive, tell=functools.partial(count_try, writers))
  states = pipeline.stream_states(conditions, plan.search, **options)
  title = clean(prompts[0])[:40] + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
  options = {"bar_format": _PROGRESS, "mininterval": 0, "file": sys.stderr, "disable": not hosts.is_first()}
  unsaved: list[list[ChunkTrace]] = [[] for _ in prompts]
  with (
    tqdm.tqdm(total=length, initial=start, desc=title, **options) as bar,
    contextlib.closing(monitoring.Monitor(plan.values, prompts, length, start, plan.sample)) as monitor,
  ):
    for index in range(start, length):
      command.raise_if_interrupted()
      # The first chunk brings the seed to the device; after that, nothing may travel there unasked.
      guard = jax.transfer_guard_host_to_device("disallow" if index > start else "allow")
      with guard, timer.phase("search" if index > start else "first_chunk"), monitor.chunk(index):
        state, made = next(states)
      for chunks, trace in zip(unsaved, made, strict=True):
        chunks.append(trace)
      monitor.log(index, made, judged=plan.search.judges)
      if plan.search.judges:
        bar.set_postfix_str(f"best score {made[0].score[0]:.3f}", refresh=False)
      bar.update()
      stopped_searches.save_if_due(saved, state, unsaved, length, timer, plan.values.save_every)
      with timer.phase("write"):
        take_all(videos, made)
  command.raise_if_interrupted()
  with timer.phase("assemble"):
    scored = [video.finishing.end() for video in videos]
  told = [[(0, prompt)] for prompt in prompts]
  if steering is not None:
    told = [list(zip(steering.begins, steering.prompts, strict=True))]
  return [
    Made(each, segments, video.finishing.cost, condition)
    for each, segments, video, condition in zip(scored, told, videos, conditions, strict=True)
  ]


class Made(NamedTuple):
  """A finished video.

  Attributes:
    scored: its scores.
    segments: first chunk and prompt of every segment.
    cost: what judging it as a whole took.
    condition: its first prompt.
  """

  scored: Scored
  segments: list[tuple[int, str]]
  cost: Cost
  condition: Condition


class Unchanged(NamedTuple):
  """The one segment of a video that nothing steers."""

  condition: Condition
  begins: Sequence[int] = (0,)

  def segment(self, index: int) -> drivers.Segment:
    return drivers.Segment(self.begins[index], self.condition)


class Making:
  """One video while it is made: chunks that come are judged, and written if there is a `writer`."""

  def __init__(
    self, pipeline: Pipeline, search: SearchConfig, segments: Steering | Unchanged, writer: GrowingResult | None
  ):
    """`segments` may become more while the video is made."""
    self._segments, self._writer, self._chunks = segments, writer, 0
    self._segment: drivers.Segment | None = None
    self.finishing = Finishing(pipeline.params, pipeline.models, search, None if writer is None else writer.add)

  def give(self, given: drivers.Given) -> None:
    """The chunks that the video begins with."""
    self._chunks = len(given.frames)
    self.finishing.give(given, self._segments.segment(0))

  def take(self, trace: ChunkTrace) -> None:
    """The next chunk that was made."""
    if self._writer is not None:
      self._writer.add_trace(trace)
    self.finishing.add(trace, self._current_segment())
    self._chunks += 1

  def _current_segment(self) -> drivers.Segment:
    index = bisect.bisect_right(self._segments.begins, self._chunks) - 1
    # A prompt is read once for all of its chunks.
    if self._segment is None or self._segment.begin != self._segments.begins[index]:
      self._segment = self._segments.segment(index)
    return self._segment


def count_try(writers: Mapping[str, GrowingResult], tried: Try) -> None:
  """Counts what a driver tried for the one video that is made."""
  for writer in writers.values():
    writer.ledger.add_try(tried)


def take_all(videos: Sequence[Making], traces: Sequence[ChunkTrace]) -> None:
  """The next chunk of every video."""
  for video, trace in zip(videos, traces, strict=True):
    video.take(trace)


def begin_steering(searcher: Searcher, prompt: str) -> Steering:
  """Steers a video that begins under `prompt`. Raises ConfigError for a prompt that cannot be read."""
  plan, pipeline = searcher.plan, searcher.pipeline
  end, script = plan.length(searcher.start), searcher.script(prompt)
  horizon = plan.steered.horizon or end
  options = {"horizon": horizon, "capacity": max(end, horizon), "start": searcher.start}
  return Steering(pipeline, script, plan.search, plan.steered.switch, **options)


def resume_steering(searcher: Searcher, steering: Steering, state: SearchState | None) -> SearchState:
  """The state that a steered video goes on from: the saved one, or that after the chunks that it begins with."""
  begun = steering.begin(searcher.plan.seed)
  if state is None:
    return begun
  steering.resume(int(hosts.to_host(state.chunk_index)))
  return state


def scripted_border(
  steering: Steering, state: SearchState, condition: Condition
) -> tuple[SearchState, Condition] | None:
  """As `Steering.border`. Nobody watches: a prompt that cannot be switched to ends the search with SearchError."""
  begun = steering.border(state, condition)
  for receipt in steering.applied:
    if receipt.status == "failed":
      raise SearchError(f"chunk {receipt.chunk}: prompt {receipt.prompt!r} cannot take effect: {receipt.reason}")
  return begun


def say(sentence: str) -> None:
  if hosts.is_first():
    print(sentence, file=sys.stderr, flush=True)


def warn(message: str) -> None:
  if hosts.is_first():
    print(f"warning: {message}", file=sys.stderr, flush=True)


def describe_run(searcher: Searcher, prompt: str) -> dict[str, Any]:
  """What is known before the search."""
  plan, pipeline = searcher.plan, searcher.pipeline
  return {
    "settings": plan.settings(prompt),
    "method": plan.values.search,
    "sample": plan.sample,
    "prompt_truncated": pipeline.text.tokenizer(prompt).truncated,
    "flags": command.flag_settings(plan.values),
    "environment": manifest.environment(),
    "mesh": pipeline.mesh_sizes,
  }


def make_results(searcher: Searcher, batch: Batch) -> None:
  """Searches the videos of prompts that are made together and fills the folders that are missing: process 0 does.

  Raises SearchError, after saving the trace of the prompt that failed.
  """
  plan, prompts = searcher.plan, list(batch.folders)
  timer = manifest.PhaseTimer()
  timer.seconds["load"] = searcher.load_seconds
  with contextlib.ExitStack() as stack:
    stack.enter_context(command.termination_deferred())
    saved = stack.enter_context(batch.saved())
    # Once the folders below have taken their places.
    stack.push(lambda kind, *_: saved.discard() if kind is SearchError else None)
    failed = lambda prompt: lambda error: isinstance(error, SearchError) and prompts[error.prompt] == prompt
    staging = {
      prompt: stack.enter_context(results.staged_folder(folder, keep_on=failed(prompt)))
      for prompt, folder in batch.missing.items()
      if hosts.is_first()
    }
    writers = {prompt: stack.enter_context(begin_result(searcher, folder)) for prompt, folder in staging.items()}
    compilations = stack.enter_context(manifest.CompileCounter())
    runs = {prompt: describe_run(searcher, prompt) for prompt in staging}
    begins = searcher.start.num_chunks
    describe = lambda segments: plan.rewards | describe_video(plan.search, begins, segments, plan.values.search)
    try:
      videos = search_videos(searcher, prompts, timer, writers, saved)
    except SearchError as error:
      prompt = prompts[error.prompt]
      failure = SearchError(f"prompt {prompt!r}, {error}", error.prompt)
      if prompt in staging:
        folder = staging[prompt]
        chunks = writers[prompt].fail(describe(searcher.script(prompt)), error)
        failed_at = {"error": str(error), "chunk": chunks, "files": part_files.describe_files(folder)}
        manifest.write_json(folder / results.FAILURE, failed_at | runs[prompt])
        report.write_if_wanted(plan.values, folder)
      # All processes fail here. The first one to end would take process 0 with it, so they wait until it has written.
      hosts.everyone(None)
      raise failure from error
    for prompt, made in zip(prompts, videos, strict=True):
      if prompt not in staging:
        continue
      folder, run = staging[prompt], runs[prompt]
      with timer.phase("write"):
        run |= writers[prompt].finish(describe(made.segments), made.scored, plan.seed)
      run |= {
        "segments": results.describe_segments(made.segments, run["length"]["frames"], searcher.pipeline.clock),
        "cost": writers[prompt].ledger.describe(search_flop.prices(searcher.pipeline, made.condition), made.cost),
        "tries": [each._asdict() for each in writers[prompt].ledger.tries],
        "resumed_at_chunks": saved.resumed_at,
        "wall_seconds": timer.seconds,
        "compilations": {"count": compilations.count, "seconds": compilations.seconds},
        "peak_memory_bytes": {"host": manifest.peak_rss_bytes(), "device": manifest.peak_device_bytes()},
      }
      manifest.write_json(folder / results.MANIFEST, run)
      report.write_if_wanted(plan.values, folder)
      say(ledger.sentence(run["cost"]))
  saved.discard()


def begin_result(searcher: Searcher, folder: epath.Path) -> GrowingResult:
  """The files of a result, to be made in `folder`."""
  pipeline, plan, end = searcher.pipeline, searcher.plan, searcher.plan.length(searcher.start)
  return GrowingResult(
    folder,
    plan.search,
    Ledger(
      pipeline.models,
      pipeline.config,
      plan.search,
      capacity=max(end, plan.steered.horizon or 0),
      given_chunks=searcher.start.num_chunks,
      short_frames=pipeline.rewards.choice.short_frames,
    ),
    fps=pipeline.config.fps,
    height=pipeline.models.codec.frame_shape()[0],
    num_frames=round(pipeline.clock.seconds(end) * pipeline.clock.fps),
    num_latent_frames=end * pipeline.config.chunk_frames,
    given_chunks=searcher.start.num_chunks,
    model_sha256=pipeline.model_sha256,
    pictures=searcher.plan.values.report,
  )


def make_plan(values: flags.FlagValues, prompts: list[str], steered: Steered) -> Plan:
  """Checks everything that needs no weights. Raises ConfigError, naming the flag."""
  checkpoint = find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, str(checkpoint))
  search = search_flags.search_config(values, model)
  chunks = _num_chunks(values, model, search)
  monitoring.check_flags(values, chunks)
  choice = search_flags.reward_choice(values, checkpoint, model)
  readers = search_flags.prompt_readers(checkpoint, choice)
  search_flags.check_prompts(readers, prompts, prompt_source(values))
  steering_flags.check(values, steered, model, readers)
  host_flags.require_same_inputs(checkpoint, prompts, repr(steered.settings))
  hosts.first_decides(lambda: monitoring.make_folders(values))
  dtype = device_flags.use_dtype(values.dtype)
  rewards = search_flags.reward_settings(values, choice, dtype)
  sha256 = checkpoint_sha256(checkpoint, choice.stored)
  seed = steering_flags.seed(values, steered)
  return Plan(values, dtype, checkpoint, model, rewards, search, chunks, sha256, steered, seed)


def _num_chunks(values: flags.FlagValues, model: ModelConfig, search: SearchConfig) -> int:
  seconds = DEFAULT_SECONDS if values.seconds is None and values.num_latent_frames is None else values.seconds
  return search_flags.video_chunks(model, seconds=seconds, num_latent_frames=values.num_latent_frames, search=search)


def describe_memory(values: flags.FlagValues, num_prompts: int) -> list[str]:
  """What --plan prints. No weight is read. Raises ConfigError, naming the flag, also where the search does not fit."""
  checkpoint = find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, str(checkpoint))
  chunks = _num_chunks(values, model, search_flags.search_config(values, model))
  asked = search_flags.memory_request(
    values, checkpoint, model, device_flags.use_dtype(values.dtype), max(num_prompts, 1), chunks
  )
  plan = memory_plans.make(values, asked)
  lines = list(memory_plans.lines(plan, asked, chunks))
  if not plan.fits:
    tell(*lines)
  memory_plans.require_fit(plan, asked)
  return lines


def load(plan: Plan, num_prompts: int) -> Searcher:
  """Loads the model that all prompts share."""
  timer = manifest.PhaseTimer()
  with timer.phase("load"):
    pipeline = search_flags.load_pipeline(plan.values, plan.checkpoint, plan.dtype, num_prompts)
  if plan.steered.is_steered and pipeline.prompts_together > 1:
    raise ConfigError(
      "--mesh: a video that changes its prompt or begins with something is searched alone: data must be 1"
    )
  if search_flags.driver(plan.values) is not None and pipeline.prompts_together > 1:
    raise ConfigError(f"--mesh: --search={plan.values.search} makes one video at a time: data must be 1")
  notes: list[str] = []
  with timer.phase("load"):
    start = steering_flags.make_start(plan.steered, pipeline, notes.append)
  end = plan.length(start)
  notes += steering_flags.check_times(plan.values, plan.steered, pipeline.clock, end, start.num_chunks)
  drivers.check_length(pipeline.models, plan.search, end)
  return Searcher(plan, pipeline, timer.seconds["load"], start, tuple(notes))


def find_finished(plan: Plan, folders: dict[str, epath.Path]) -> list[str]:
  """Prompts whose results exist. All are looked at before the first search: a conflict in the last costs nothing.

  Raises ConfigError if a folder holds something else, or cannot be made.
  """
  settings, overwrite = plan.settings, plan.values.overwrite
  finished = [
    prompt for prompt, at in folders.items() if results.is_finished(at, settings(prompt), overwrite=overwrite)
  ]
  for prompt in folders.keys() - finished:
    results.check_place(folders[prompt])
  return finished


def tell(*lines: Any) -> None:
  """Prints, once for all processes."""
  if hosts.is_first():
    print(*lines, sep="\n", flush=True)


class Sample(NamedTuple):
  """The videos of all prompts that have one seed: their plan, their folders, and prompts whose results are there."""

  plan: Plan
  folders: dict[str, epath.Path]
  finished: list[str]

  @property
  def is_finished(self) -> bool:
    return len(self.finished) == len(self.folders)

  def batches(self, searcher: Searcher) -> list[Batch]:
    """The searches that are left to do. Process 0 decides."""
    together, options = searcher.pipeline.prompts_together, {"overwrite": self.plan.values.overwrite}
    groups = hosts.first_decides(
      lambda: stopped_searches.group_prompts(self.folders, self.finished, together, searcher.settings, **options)
    )
    return [
      Batch({prompt: self.folders[prompt] for prompt in group}, searcher.settings(group), self.finished)
      for group in groups
    ]


def find_samples(plan: Plan, prompts: list[str]) -> list[Sample]:
  """What is to be made; says what is there already. Raises ConfigError as `find_finished` does."""
  samples = []
  for each in plan.samples():
    folders = {prompt: each.folder(prompt) for prompt in prompts}
    finished = hosts.first_decides(functools.partial(find_finished, each, folders))
    samples.append(Sample(each, folders, finished))
  for sample in samples:
    for prompt in sample.finished:
      tell(f"{sample.folders[prompt]} is finished, skipped", sample.folders[prompt] / "video.mp4")
    if sample.is_finished:
      discard = functools.partial(stopped_searches.discard_finished, sample.folders.values(), sample.finished)
      hosts.first_decides(discard)
  return samples


def run(values: flags.FlagValues) -> None:
  """Makes the videos of all prompts."""
  host_flags.start(values)
  steered = steering_flags.read(values)
  prompts = read_prompts(values, steered)
  if values.plan:
    tell(*describe_memory(values, len(prompts)))
    return
  plan = make_plan(values, prompts, steered)
  missing = [sample for sample in find_samples(plan, prompts) if not sample.is_finished]
  if not missing:
    return
  searcher = load(plan, len(prompts))
  searchers = [dataclasses.replace(searcher, plan=sample.plan) for sample in missing]
  work = [(each, sample.batches(each)) for each, sample in zip(searchers, missing, strict=True)]
  # Bad input is told in one line and nothing else, so this waits until all of it is known.
  device_flags.tell_devices(plan.dtype, searcher.pipeline.models.execution.mesh)
  for note in searcher.notes:
    say(note)
  # The text encoder is read from disk once for all of them.
  told = [] if steered.timeline is None else [entry.prompt for entry in steered.timeline.entries]
  asked = [prompt for _, batches in work for batch in batches for prompt in batch.folders]
  searcher.pipeline.text.prepare([*dict.fromkeys(asked), *told])
  for each, batches in work:
    for batch in batches:
      command.raise_if_interrupted()
      make_results(each, batch)
      tell(*(folder / "video.mp4" for folder in batch.missing.values()))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
