"""Compares searches at equal cost, by judges that no search has seen.

  streamt1 compare --methods=none,best_of_n,beam,stream_t1 --split=test --num_prompts=64 --output=runs/compare
  streamt1 compare --methods=best_of_n:8,stream_t1:2x2,stream_t1:4x1 --timelines --seconds=30 --num_seeds=2 \\
    --output=runs/timelines
  streamt1 compare --checkpoint=checkpoints/wan_1_3b --prompts_file=prompts.txt --reward=videoalign --judge=hpsv3 \\
    --pool=4 --num_prompts=32 --output=runs/wan

A method may have a size, candidates x beams or N, and values of its own: particles:1x8:alpha=0.02. Every prompt and
seed gets a pool of plain videos. It serves plain streaming, best-of-N for every N up to the pool, a random pick and a
perfect judge. The other methods make a video each. Captions of the shapes world are judged by its verifiers; those of
--prompts_file by a reward that does not select.

Prompts, seeds, the primary metric and their numbers are in `plan.json` before the first video is made. Every video is a
row of `videos.jsonl`, safe as soon as it is made: the same command goes on where it stopped, and a later one may name
further methods. At the end there are `comparison.json`, `comparison.md`, which is printed, `comparison.html` and plots.

Exit codes: 0; 2 for bad input; 3 when a search fails; 130 when interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import flags
from etils import epath

from streamt1_jax import drivers
from streamt1_jax.cli import (
  caption_flags,
  command,
  device_flags,
  files,
  flag_types,
  memory_plans,
  search_flags,
  telling,
)
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, require_video_model
from streamt1_jax.evaluation.compare import contenders, held_out, making, plots, report, scenes, summary
from streamt1_jax.evaluation.compare.contenders import Contender
from streamt1_jax.evaluation.compare.outcomes import Results
from streamt1_jax.evaluation.compare.pool import Folder, Plan, wanted
from streamt1_jax.evaluation.compare.scenes import Scene
from streamt1_jax.execution import Decoding
from streamt1_jax.io import atomic, manifest
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.measuring import search_flop
from streamt1_jax.methods import METHODS
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.report import comparison
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards import scoring
from streamt1_jax.rewards.selection import RewardChoice
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.text.prompts import load_prompts

_MOST_CASES = 10_000
_NOT_HERE = ("search", *contenders.SIZES)


def define_flags(values: flags.FlagValues) -> None:
  """The methods, the prompts, who judges, and the flags of a search."""
  flag_types.define_list(
    values, "methods", ["none", "best_of_n", "beam", "stream_t1"], "Searches, each as method:SIZE:name=value."
  )
  caption_flags.define(values, "num_prompts", 64)
  flag_types.define_switch(values, "timelines", False, "Captions that change while the video goes on.")
  flag_types.define_path(values, "prompts_file", None, "Prompts of a model of another world, one a line.")
  flag_types.define_string(values, "judge", None, "Reward that judges the videos of --prompts_file.")
  flag_types.define_switch(values, "judge_selects", False, "Allows a judge that is one of the rewards that select.")
  flag_types.define_integer(values, "num_seeds", 1, "Seeds of every prompt.", 1, 100)
  flag_types.define_integer(values, "pool", 16, "Plain videos of every prompt and seed.", 2, 100)
  flag_types.define_path(values, "output", None, "Folder of the comparison.", required=True)
  device_flags.define_dtype(values, ["float32", "bfloat16"], "Dtype of weights and activations.")
  search_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Makes the videos that are missing, and writes the comparison."""
  _require_possible(values)
  checkpoint, model = _model(values)
  dtype = device_flags.use_dtype(values.dtype)
  entries = _contenders(values, model)
  chunks = search_flags.video_chunks(model, seconds=values.seconds, search=_pool_search(values, model))
  for contender in entries:
    _require_made(values, model, contender, chunks)
  choice = search_flags.reward_choice(values, checkpoint, model)
  _require_judge(values, checkpoint, choice)
  found, kind = _scenes(values, checkpoint, chunks, choice)
  judge, judge_settings = _judge(values, checkpoint, model, chunks, dtype)
  plan = _plan(values, checkpoint, found, kind | judge_settings, chunks, choice, judge.metrics[0], dtype)
  decoding = _decoding(values, checkpoint, model, entries, dtype)
  output = epath.Path(values.output)
  files.make_folder("output", values.output, writable=True)
  folder = Folder(output, plan, entries, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
  for contender in entries:
    note = contender.method.note(contender.search, chunks)
    if note is not None:
      telling.say(f"{contender.label}: {note}")
  pipeline = search_flags.load_pipeline(values, checkpoint, dtype, decoding=decoding)
  for contender in entries:
    drivers.check_length(pipeline.models, contender.search, chunks)
  folder.begin()
  device_flags.tell_devices(dtype, pipeline.models.execution.mesh)
  _make_missing(pipeline, folder, plan, entries, judge, chunks, _pool_search(values, model))
  _write(output, folder, plan, entries, judge.metrics)


def _require_possible(values: flags.FlagValues) -> None:
  """Raises ConfigError for flags that do not go together."""
  for name in _NOT_HERE:
    if values[name].present:
      raise ConfigError(f"--{name}: this command takes --methods, as in stream_t1:2x2")
  if values.num_prompts * values.num_seeds > _MOST_CASES:
    raise ConfigError(f"--num_prompts times --num_seeds must be at most {_MOST_CASES}")
  if (values.prompts_file is None) != (values.judge is None):
    raise ConfigError("--prompts_file and --judge come together: nothing else judges prompts of another world")
  if values.prompts_file is not None:
    given = [name for name in ("split", "objects", "timelines") if values[name].present]
    if given:
      raise ConfigError(f"--prompts_file takes no --{', --'.join(given)}: those are of the shapes world")
  if values.timelines and values["objects"].present:
    raise ConfigError("--timelines takes no --objects: a timeline begins with one or two, and they change")


def _model(values: flags.FlagValues) -> tuple[epath.Path, ModelConfig]:
  if values.prompts_file is None:
    return caption_flags.require_shapes_world(values)
  checkpoint = files.find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, f"--checkpoint={checkpoint}")
  return checkpoint, model


def _fields(values: flags.FlagValues) -> dict[str, Any]:
  """The fields of a search that flags give, but for sizes."""
  names = ["semantics", *(field.name for field in dataclasses.fields(SearchConfig) if field.name != "policy")]
  return {name: values[name].value for name in names if name in values and values[name].present}


def _contenders(values: flags.FlagValues, model: ModelConfig) -> list[Contender]:
  numbers = search_flags.named_numbers(values, "policy", "alpha:0.02")
  # They are of these methods. What reads the flags later knows the default search alone: it would refuse them.
  values["policy"].value = None
  try:
    found = contenders.read(values.methods, model, numbers=numbers, fields=_fields(values))
  except ConfigError as error:
    raise ConfigError(f"--methods: {error}") from error
  for name in METHODS[values.search].refused(list(_fields(values))):
    values[name].unparse()
  return found


def _require_made(values: flags.FlagValues, model: ModelConfig, contender: Contender, chunks: int) -> None:
  """Raises ConfigError unless the videos that a contender needs can be made."""
  if (contender.picks or 1) > values.pool:
    raise ConfigError(f"--methods: {contender.label} picks among more videos than --pool={values.pool} has")
  try:
    search_flags.require_usable(contender.search, model)
    drivers.check_judged(contender.search, chunks)
  except ConfigError as error:
    raise ConfigError(f"--methods: {contender.label}: {error}") from error


def _pool_search(values: flags.FlagValues, model: ModelConfig) -> SearchConfig:
  """How the plain videos are made."""
  shared = {name: value for name, value in _fields(values).items() if name in ("sink_distance", "reward_codec")}
  search = dataclasses.replace(SearchConfig.streaming(model), **shared)
  search.validate_for(model)
  return search


def _decoding(
  values: flags.FlagValues, checkpoint: epath.Path, model: ModelConfig, entries: Sequence[Contender], dtype: str
) -> Decoding:
  """How to decode, so that the largest of all methods fits. Raises ConfigError, naming the method that does not."""
  asked = search_flags.memory_request(values, checkpoint, model, dtype)
  # The pool's videos are made one at a time.
  searches = {"--pool: ": dataclasses.replace(asked, search=_pool_search(values, model))}
  for each in (each for each in entries if each.picks is None):
    kept = each.method.states_kept(each.numbers)
    searches[f"--methods: {each.label}: "] = dataclasses.replace(asked, search=each.search, kept_states=kept)
  return memory_plans.decide(values, searches)


def _require_judge(values: flags.FlagValues, checkpoint: epath.Path, choice: RewardChoice) -> None:
  """Raises ConfigError unless the judge of --judge is there and selects nothing; no weight is read."""
  if values.judge is None:
    return
  if values.judge in {**choice.image, **choice.video} and not values.judge_selects:
    raise ConfigError(
      f"--judge={values.judge} is one of the rewards that select: every search would seem to win; name another, or say "
      "--judge_selects"
    )
  parts = checkpoint / reward_folder.REWARDS_FOLDER
  # A path is no name: it could lead to a reward that selects.
  stored = [path.name for path in parts.iterdir() if path.is_dir()] if parts.is_dir() else []
  if values.judge not in [*stored, *(name for name, spec in REWARDS.items() if not spec.is_stored)]:
    raise ConfigError(f"--judge={values.judge}: {parts} has no such reward")


def _judge(
  values: flags.FlagValues, checkpoint: epath.Path, model: ModelConfig, chunks: int, model_dtype: str
) -> tuple[held_out.Judge, dict[str, Any]]:
  """Who judges, and what identifies it."""
  if values.judge is None:
    return held_out.Verifiers(), {"judge": "verifiers"}
  parts, spec = checkpoint / reward_folder.REWARDS_FOLDER, REWARDS.get(values.judge)
  dtype = jnp.dtype(values.reward_dtype or model_dtype)
  scorer = scoring.make_scorer(values.judge, parts / values.judge, dtype=dtype)
  frames = model.required_codec.temporal_stride * (chunks * model.chunk_frames - 1) + 1
  stored = [values.judge] if spec is None or spec.is_stored else []
  told = {
    "judge": values.judge,
    "judge_sha256": files.checkpoint_sha256(checkpoint, stored),
    "judge_dtype": dtype.name if stored else None,
  }
  return held_out.RewardJudge(scorer, frames, model.fps), told


def _scenes(
  values: flags.FlagValues, checkpoint: epath.Path, chunks: int, choice: RewardChoice
) -> tuple[list[Scene], dict[str, Any]]:
  """What the videos are of, and what else says where that is from. Raises ConfigError, naming the flag."""
  count = values.num_prompts
  if values.prompts_file is None:
    try:
      found = scenes.of_world(
        values.split, count, chunks, values.seconds, values.objects, values.timelines, values.seed
      )
    except ConfigError as error:
      raise ConfigError(f"--timelines --seconds={values.seconds}: {error}") from error
    return found, {"split": values.split, "objects": None if values.timelines else values.objects}
  found = scenes.of_prompts(load_prompts(values.prompts_file), count)
  readers = search_flags.prompt_readers(checkpoint, choice)
  search_flags.check_prompts(readers, [scene.text for scene in found], "--prompts_file")
  return found, {}


def _plan(
  values: flags.FlagValues,
  checkpoint: epath.Path,
  found: Sequence[Scene],
  told: dict[str, Any],
  chunks: int,
  choice: RewardChoice,
  primary: str,
  dtype: str,
) -> Plan:
  settings = {
    **told,
    "timelines": values.timelines,
    "seconds": values.seconds,
    "chunks": chunks,
    "seed": values.seed,
    "checkpoint_sha256": files.checkpoint_sha256(checkpoint, choice.stored),
    **search_flags.reward_settings(choice, values.reward_dtype or dtype),
    "dtype": dtype,
    "motion": held_out.measures_motion(),
    "sink_distance": values.sink_distance,
    "reward_codec": values.reward_codec,
    "device": jax.devices()[0].device_kind,
  }
  return Plan(settings, found, scenes.cases(len(found), values.num_seeds, values.seed), values.pool, primary)


def _make_missing(
  pipeline: Pipeline,
  folder: Folder,
  plan: Plan,
  entries: Sequence[Contender],
  judge: held_out.Judge,
  chunks: int,
  plain: SearchConfig,
) -> None:
  videos = wanted(plan, entries)
  missing = [video for video in videos if video[0] not in folder.rows]
  captions = dict.fromkeys(text for _, case, _ in missing for text in plan.scenes[case.prompt].captions)
  pipeline.text.prepare(list(captions))
  prices = _prices(pipeline)
  torus, done, everything = "split" in plan.settings, len(videos) - len(missing), len(videos)
  bar = tqdm.tqdm(missing, desc="videos", unit="video", file=sys.stderr, initial=done, total=everything)
  for key, case, contender in bar:
    command.raise_if_interrupted()
    scene, seed = plan.scenes[case.prompt], case.seed + key.place
    search, drive = (plain, None) if contender is None else (contender.search, contender.run)
    options = {"run": drive, "num_chunks": chunks, "seed": seed}
    finished = making.make(pipeline, scene, search, prices, **options)
    found = judge(finished.frames, scene, pipeline.clock)
    more: dict[str, Any] = {"signature": held_out.signature(finished.frames)}
    if plan.settings["motion"]:
      more["motion"] = held_out.motion_of(finished.frames, pipeline.config.fps, torus)
    folder.add(key, seed, finished, found, more)


def _prices(pipeline: Pipeline) -> Callable[[Any], search_flop.Prices]:
  """FLOP of pieces of work, counted once for prompts of one length."""
  shapes = lambda tree: tuple(jax.tree.leaves(jax.tree.map(lambda leaf: jnp.shape(leaf), tree)))
  known: dict[Any, search_flop.Prices] = {}

  def of(condition: Any) -> search_flop.Prices:
    key = shapes((condition.image_reward, condition.video_reward))
    if key not in known:
      known[key] = search_flop.prices(pipeline, condition)
    return known[key]

  return of


def _write(
  output: epath.Path, folder: Folder, plan: Plan, entries: Sequence[Contender], metrics: Sequence[str]
) -> None:
  """What all rows say."""
  numbers = summary.summarise(Results(plan, folder.rows), entries, metrics)
  notes = []
  if not plan.settings["motion"]:
    notes.append("Motion is not measured: it needs the extra eval, pip install 'streamt1_jax[eval]'.")
  if len(plan.cases) == len(plan.scenes):
    notes.append("Diversity is not measured: it compares seeds of one prompt, --num_seeds=2 or more.")
  if not plots.available():
    notes.append("There are no plots: they need the extra train, pip install 'streamt1_jax[train]'.")
  manifest.write_json(output / "comparison.json", {"plan": folder.plan, "results": numbers, "notes": notes})
  page = report.markdown_of(folder.plan, numbers, notes)
  atomic.replace_bytes(output / "comparison.md", page.encode())
  print(page)
  drawn = plots.write(output, numbers) if plots.available() else {}
  comparison.write_comparison(output / "comparison.html", report.sections(folder.plan, numbers, notes), drawn)
  names = ("comparison.json", "comparison.md", "comparison.html")
  print("\n".join(map(str, [*(output / name for name in names), *drawn.values()])), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
