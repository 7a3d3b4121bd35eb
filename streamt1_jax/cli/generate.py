"""Makes videos from prompts: one searched video per prompt, and a full account of how it came to be.

  python -m experiments.generate --prompt="a red circle moves left over a dark blue background"
  python -m experiments.generate --prompts_file=prompts.txt --seconds=30 --seed=7 --output_dir=outputs/long
  python -m experiments.generate --flagfile=experiments/flagfiles/generate_tiny.flags --search=none

Every prompt gets a folder in `output_dir`, which appears whole or not at all:

  video.mp4           H.264, small videos enlarged by whole pixels
  contact_sheet.png   eight frames, with their times
  trace.json          every candidate: seed, parent, scores, route, survival; the winner's lineage
  manifest.json       flags, versions, device, seeds, length, seconds per phase, peak memory, compilations

On a mesh with `data` several prompts are searched at the same time (--mesh=data:4,candidate:2). Several processes, on
one host or many, search together: all get the same flags, process 0 writes, and if one dies the others stop.

Prompts whose folder is finished are skipped, so an interrupted list goes on where it stopped. Once a minute, or every
`save_every` chunks, the search is saved, in a hidden folder beside the result's that goes when the result is there: the
same command goes on in the middle of a video, wherever it was killed, and makes the same video. `manifest.json` then
has the chunks at which it went on; its seconds, memory and compilations are those of the last run.

Exit codes: 0; 2 for bad input; 3 when every candidate of a chunk is NaN or Inf (the folder then holds `failed.json` and
the trace so far), the disk is full, or another process died; 130 when interrupted; 143 by SIGTERM, after the chunk is
finished and saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import common, host_flags, monitoring, results, search_flags, stopped_searches
from streamt1_jax.cli.stopped_searches import Batch
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import config_json, manifest
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.parallel import hosts
from streamt1_jax.pipeline import Pipeline, Video
from streamt1_jax.saved_search import SavedSearch
from streamt1_jax.state import ChunkTrace
from streamt1_jax.text.prompts import load_prompts
from streamt1_jax.text.tokenizer import clean
from streamt1_jax.trace import describe_trace

_SEED_LIMIT = 2**31

_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model.")
_PROMPT = flags.DEFINE_string("prompt", None, "What to show.")
_PROMPTS_FILE = common.define_path("prompts_file", None, "Text file with one prompt per line.")
_SECONDS = common.define_float("seconds", None, "Length, rounded to whole chunks; 5 unless a length is given.")
_LATENT_FRAMES = common.define_integer("num_latent_frames", None, "Length in latent frames, whole chunks.")
_SEED = common.define_integer("seed", 0, "Base seed of all candidates.", -_SEED_LIMIT, _SEED_LIMIT - 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
_OUTPUT_DIR = common.define_path("output_dir", "outputs/", "Where the folders of the prompts are made.")
_OVERWRITE = flags.DEFINE_bool(
  "overwrite",
  False,
  "Replace earlier results of the same prompts, those of the start before too: not for a command that is started again "
  "until its list is finished.",
)
flags.adopt_module_key_flags(search_flags)
flags.adopt_module_key_flags(host_flags)
flags.adopt_module_key_flags(stopped_searches)
flags.adopt_module_key_flags(monitoring)
flags.mark_flags_as_mutual_exclusive(["prompt", "prompts_file"], required=True)
flags.mark_flags_as_mutual_exclusive(["seconds", "num_latent_frames"])

DEFAULT_SECONDS = 5.0
_PROGRESS = "{desc}: chunk {n_fmt}/{total_fmt} |{bar:20}| {elapsed} passed, {remaining} left{postfix}"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all videos of one run have in common.

  Attributes:
    pipeline: the loaded model.
    rewards: what judges, as JSON values.
    search: how to search.
    num_chunks: length of every video.
    checkpoint_sha256: identifies the model, wherever its folder is.
    load_seconds: wall time of loading the model.
  """

  pipeline: Pipeline
  rewards: dict[str, Any]
  search: SearchConfig
  num_chunks: int
  checkpoint_sha256: str
  load_seconds: float

  def settings(self, prompt: str) -> dict[str, Any]:
    """Everything that decides the video of `prompt`."""
    return {
      "prompt": prompt,
      "seed": _SEED.value,
      "num_latent_frames": self.num_chunks * self.pipeline.config.chunk_frames,
      "checkpoint_sha256": self.checkpoint_sha256,
      "dtype": _DTYPE.value,
      **self.rewards,
      **config_json.to_json_value(self.search),
    }

  def search_settings(self, prompts: Sequence[str]) -> dict[str, Any]:
    """Everything that decides the state of a search of `prompts` to the last bit."""
    models = self.pipeline.models
    common_settings = {name: value for name, value in self.settings("").items() if name != "prompt"}
    # By rounding alone: no difference between two searches, but one within a search that goes on.
    execution = {
      "platform": jax.default_backend(),
      "mesh": self.pipeline.mesh_sizes,
      "decoding": models.execution.decoding,
      "attention": models.execution.attention,
    }
    return {"prompts": list(prompts), **execution, **common_settings}


def read_prompts() -> list[str]:
  """The prompts of the flags, each once."""
  if _PROMPTS_FILE.value is not None:
    prompts, source = load_prompts(_PROMPTS_FILE.value), f"--prompts_file {_PROMPTS_FILE.value}"
  else:
    prompts, source = [_PROMPT.value], "--prompt"
  for prompt in prompts:
    if prompt.encode(errors="ignore").decode() != prompt:
      raise ConfigError(f"{source}: the prompt {prompt!r} is not UTF-8 text")
    if not clean(prompt):
      raise ConfigError(f"{source}: the prompt {prompt!r} is empty; give a sentence")
  return list(dict.fromkeys(prompts))


def check_prompts(pipeline: Pipeline, prompts: list[str]) -> None:
  """Raises ConfigError, naming flag and prompt, if a reward cannot read one of them."""
  source = "--prompt" if _PROMPTS_FILE.value is None else f"--prompts_file {_PROMPTS_FILE.value}"
  for prompt in prompts:
    try:
      pipeline.reward_features(prompt)
    except ConfigError as error:
      raise ConfigError(f"{source}: {prompt!r}: {error}") from error


def search_videos(
  plan: Plan, prompts: list[str], timer: manifest.PhaseTimer, traces: list[list[ChunkTrace]], saved: SavedSearch
) -> list[Video]:
  """The searched videos of prompts that are made together.

  `traces` has a list per prompt, which receives every chunk when it is made: a failed search leaves them.
  """
  seeds, length = [_SEED.value] * len(prompts), plan.num_chunks
  with timer.phase("text"):
    conditions = [jax.block_until_ready(plan.pipeline.condition(prompt, length)) for prompt in prompts]
  with timer.phase("load"):
    abstract = plan.pipeline.abstract_state(plan.search, num_chunks=length, seeds=seeds)
    state, earlier = saved.restore(abstract, warn) or (None, [])
  for chunks, done in zip(traces, earlier):
    chunks.extend(done)
  start = len(traces[0])
  states = plan.pipeline.stream_states(conditions, plan.search, num_chunks=length, seeds=seeds, state=state)
  title = clean(prompts[0])[:40] + (f" and {len(prompts) - 1} more" if len(prompts) > 1 else "")
  options = {"bar_format": _PROGRESS, "mininterval": 0, "file": sys.stderr, "disable": not hosts.is_first()}
  with (
    tqdm.tqdm(total=length, initial=start, desc=title, **options) as bar,
    contextlib.closing(monitoring.Monitor(prompts, length, start)) as monitor,
  ):
    for index in range(start, length):
      common.raise_if_interrupted()
      # The first chunk brings the seed to the device; after that, nothing may travel there unasked.
      guard = jax.transfer_guard_host_to_device("disallow" if index > start else "allow")
      with guard, timer.phase("search" if index > start else "first_chunk"), monitor.chunk(index):
        state, made = next(states)
      for chunks, trace in zip(traces, made, strict=True):
        chunks.append(trace)
      monitor.log(index, made)
      bar.set_postfix_str(f"best score {traces[0][-1].score[0]:.3f}", refresh=False)
      bar.update()
      stopped_searches.save_if_due(saved, state, traces, length, timer)
  common.raise_if_interrupted()
  with timer.phase("assemble"):
    assemble = lambda condition, chunks: plan.pipeline.assemble(condition, plan.search, chunks)
    return [assemble(condition, chunks) for condition, chunks in zip(conditions, traces, strict=True)]


def warn(message: str) -> None:
  if hosts.is_first():
    print(f"warning: {message}", file=sys.stderr, flush=True)


def describe_run(plan: Plan, prompt: str) -> dict[str, Any]:
  """What is known before the search."""
  own_flags = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
  return {
    "settings": plan.settings(prompt),
    "prompt_truncated": plan.pipeline.text.tokenizer(prompt).truncated,
    "flags": {flag.name: flag.value for flag in own_flags},
    "environment": manifest.environment(),
    "mesh": plan.pipeline.mesh_sizes,
  }


def make_results(plan: Plan, batch: Batch) -> None:
  """Searches the videos of prompts that are made together and fills the folders that are missing: process 0 does.

  Raises SearchError, after saving the trace of the prompt that failed.
  """
  prompts = list(batch.folders)
  timer, traces = manifest.PhaseTimer(), [[] for _ in prompts]
  timer.seconds["load"] = plan.load_seconds
  with contextlib.ExitStack() as stack:
    stack.enter_context(common.termination_deferred())
    saved = stack.enter_context(batch.saved())
    # Once the folders below have taken their places.
    stack.push(lambda kind, *_: saved.discard() if kind is SearchError else None)
    failed = lambda prompt: lambda error: isinstance(error, SearchError) and prompts[error.prompt] == prompt
    staging = {
      prompt: stack.enter_context(results.staged_folder(folder, keep_on=failed(prompt)))
      for prompt, folder in batch.missing.items()
      if hosts.is_first()
    }
    compilations = stack.enter_context(manifest.CompileCounter())
    runs = {prompt: describe_run(plan, prompt) for prompt in staging}
    try:
      videos = search_videos(plan, prompts, timer, traces, saved)
    except SearchError as error:
      prompt, chunks = prompts[error.prompt], traces[error.prompt]
      failure = SearchError(f"prompt {prompt!r}, {error}", error.prompt)
      if hosts.is_first():
        # The others fail as well and are done at once; else they would take this process with them.
        hosts.announce(common.RUN_FAILED, str(failure))
      if prompt in staging:
        folder = staging[prompt]
        manifest.write_json(folder / "trace.json", plan.rewards | describe_trace(chunks, None, plan.search))
        manifest.write_json(folder / results.FAILURE, {"error": str(error), "chunk": len(chunks), **runs[prompt]})
      raise failure from error
    for prompt, made, chunks in zip(prompts, videos, traces, strict=True):
      if prompt not in staging:
        continue
      folder, run = staging[prompt], runs[prompt]
      with timer.phase("write"):
        trace = plan.rewards | describe_trace(chunks, made.beams, plan.search)
        results.write_video_files(folder, made, trace)
      run |= results.describe_video(made, trace, _SEED.value) | {
        "resumed_at_chunks": saved.resumed_at,
        "wall_seconds": timer.seconds,
        "compilations": {"count": compilations.count, "seconds": compilations.seconds},
        "peak_memory_bytes": {"host": manifest.peak_rss_bytes(), "device": manifest.peak_device_bytes()},
      }
      manifest.write_json(folder / results.MANIFEST, run)
  saved.discard()


def make_plan(checkpoint: epath.Path, prompts: list[str]) -> Plan:
  """Loads the model once, for all prompts."""
  timer = manifest.PhaseTimer()
  search = search_flags.search_config(load_config(checkpoint))
  host_flags.require_same_inputs(checkpoint, prompts)
  with timer.phase("load"):
    pipeline = search_flags.load_pipeline(checkpoint, _DTYPE.value, len(prompts))
  seconds = DEFAULT_SECONDS if _SECONDS.value is None and _LATENT_FRAMES.value is None else _SECONDS.value
  chunks = search_flags.video_chunks(pipeline, search, seconds=seconds, num_latent_frames=_LATENT_FRAMES.value)
  monitoring.check_flags(chunks)
  rewards = search_flags.reward_settings(pipeline, _DTYPE.value)
  sha256 = common.checkpoint_sha256(checkpoint, pipeline.rewards.choice.stored)
  return Plan(pipeline, rewards, search, chunks, sha256, timer.seconds["load"])


def find_finished(plan: Plan, folders: dict[str, epath.Path]) -> list[str]:
  """Prompts whose results exist. All are looked at before the first search: a conflict in the last costs nothing."""
  settings, overwrite = plan.settings, _OVERWRITE.value
  return [prompt for prompt, at in folders.items() if results.is_finished(at, settings(prompt), overwrite=overwrite)]


def tell(*lines: Any) -> None:
  """Prints, once for all processes."""
  if hosts.is_first():
    print(*lines, sep="\n", flush=True)


def main() -> None:
  host_flags.start(__name__)
  prompts = read_prompts()
  plan = make_plan(common.find_folder(_CHECKPOINT.value), prompts)
  check_prompts(plan.pipeline, prompts)
  folders = {prompt: results.result_folder(_OUTPUT_DIR.value, prompt) for prompt in prompts}
  finished = hosts.first_decides(lambda: find_finished(plan, folders))
  together, options = plan.pipeline.prompts_together, {"overwrite": _OVERWRITE.value}
  groups = hosts.first_decides(
    lambda: stopped_searches.group_prompts(folders, finished, together, plan.search_settings, **options)
  )
  batches = [
    Batch({prompt: folders[prompt] for prompt in group}, plan.search_settings(group), finished) for group in groups
  ]
  for prompt in finished:
    tell(f"{folders[prompt]} is finished, skipped", folders[prompt] / "video.mp4")
  # The text encoder is read from disk once for all of them.
  plan.pipeline.text.prepare([prompt for batch in batches for prompt in batch.folders])
  for batch in batches:
    common.raise_if_interrupted()
    make_results(plan, batch)
    tell(*(folder / "video.mp4" for folder in batch.missing.values()))


if __name__ == "__main__":
  common.run(main)
