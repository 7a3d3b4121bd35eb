"""Makes videos from prompts: one searched video per prompt, and a full account of how it came to be.

  streamt1 generate --prompt="a red circle moves left over a dark blue background"
  streamt1 generate --prompts_file=prompts.txt --seconds=30 --seed=7 --output_dir=outputs/long
  streamt1 generate --flagfile=generate_tiny.flags --search=none
  streamt1 generate --plan --flagfile=paper_5s.flags --checkpoint=checkpoints/wan_1_3b

Every prompt gets a folder in `output_dir`, which appears whole or not at all:

  video.mp4           H.264, small videos enlarged by whole pixels
  report.html         the search as a page to click through, unless --report=false
  pictures.zip        three small frames of every candidate, for the report
  latents.safetensors the video before it was decoded: --continue_from=FOLDER goes on from it
  contact_sheet.png   eight frames, with their times
  trace.json          every candidate: seed, parent, scores, route, fate; what each chunk cost; the winner's lineage
  manifest.json       flags, versions, device, seeds, length, cost, seconds per phase, peak memory, compilations

A video may change its prompt (--timeline=FILE) and begin with a picture, another video, or an earlier result (--image,
--video, --continue_from); its length then counts what is made.

With --samples=N every prompt gets N videos of different seeds. The folders of all but the first end with -1, -2 and so
on: the samples that `streamt1 export_vbench` looks for.

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

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

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
from streamt1_jax.cli.files import find_checkpoint
from streamt1_jax.cli.generate_plan import (
  SAMPLE_SEEDS,
  SEED_LIMIT,
  Plan,
  Searcher,
  check_begin,
  load,
  make_plan,
  num_chunks,
  read_prompts,
)
from streamt1_jax.cli.growing_result import GrowingResult
from streamt1_jax.cli.searched_videos import search_videos
from streamt1_jax.cli.steering_flags import Steered
from streamt1_jax.cli.stopped_searches import Batch
from streamt1_jax.cli.telling import say, tell
from streamt1_jax.config import require_video_model
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import manifest, part_files
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.measuring import ledger, search_flop
from streamt1_jax.measuring.ledger import Ledger
from streamt1_jax.parallel import hosts
from streamt1_jax.trace import describe_video

_MOST_SAMPLES = 1000


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_checkpoint(values)
  flag_types.define_string(values, "prompt", None, "What to show.")
  flag_types.define_path(values, "prompts_file", None, "Text file with one prompt per line.")
  flag_types.define_float(values, "seconds", None, "Length, rounded to whole chunks; 5 unless a length is given.")
  flag_types.define_integer(values, "num_latent_frames", None, "Length in latent frames, whole chunks.")
  flag_types.define_integer(values, "seed", 0, "Base seed of all candidates.", -SEED_LIMIT, SEED_LIMIT - 1)
  flag_types.define_integer(
    values,
    "samples",
    1,
    f"Videos of every prompt. Each has a folder of its own, and the seed of the one before it plus {SAMPLE_SEEDS}; for "
    "more than 1000 chunks a multiple of that.",
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
    took = sum(timer.seconds.get(phase, 0.0) for phase in ("first_chunk", "search"))
    for prompt, made in zip(prompts, videos, strict=True):
      if prompt not in staging:
        continue
      folder, run, account = staging[prompt], runs[prompt], writers[prompt].ledger
      with timer.phase("write"):
        run |= writers[prompt].finish(describe(made.segments), made.scored, plan.seed)
      run |= {
        "segments": results.describe_segments(made.segments, run["length"]["frames"], searcher.pipeline.clock),
        "cost": account.describe(search_flop.prices(searcher.pipeline, made.condition), made.cost, took),
        "tries": [each._asdict() for each in account.tries],
        "resumed_at_chunks": saved.resumed_at,
        "wall_seconds": timer.seconds,
        "compilations": {"count": compilations.count, "seconds": compilations.seconds},
        "peak_memory_bytes": {"host": manifest.peak_rss_bytes(), "device": manifest.peak_device_bytes()},
      }
      manifest.write_json(folder / results.MANIFEST, run)
      report.write_if_wanted(plan.values, folder)
      say(ledger.sentence(run["cost"], max(saved.resumed_at, default=0)))
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
      length=plan.steered.horizon,
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


def describe_memory(values: flags.FlagValues, steered: Steered, num_prompts: int) -> list[str]:
  """What --plan prints. No weight is read. Raises ConfigError, naming the flag, also where the search does not fit."""
  checkpoint = find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, str(checkpoint))
  search = search_flags.search_config(values, model)
  chunks = num_chunks(values, model, search)
  check_begin(values, steered, model, search, chunks)
  asked = search_flags.memory_request(
    values, checkpoint, model, device_flags.use_dtype(values.dtype), max(num_prompts, 1), chunks
  )
  plan = memory_plans.make(values, asked)
  lines = list(memory_plans.lines(plan, asked, chunks))
  if not plan.fits:
    tell(*lines)
  memory_plans.require_fit(values, plan, asked)
  return lines


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
    tell(*describe_memory(values, steered, len(prompts)))
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
