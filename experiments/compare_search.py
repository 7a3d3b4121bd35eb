"""Does the search choose well? Plain streaming, best of N, and the search, from equal seeds, judged by the verifiers.

  python -m experiments.compare_search --split=test --num_prompts=64 --output=runs/compare_5s.jsonl
  python -m experiments.compare_search --split=test --num_prompts=64 --seconds=30 --output=runs/compare_30s.jsonl

Three ways to spend one prompt and one seed:

  plain      one candidate per chunk
  best_of_n  as many plain videos as the search draws candidates, from the noises of its first chunk; the video reward
             picks one by looking at whole videos
  search     the search of the flags, 2 beams of 2 candidates by default

The verifiers (`streamt1_jax.data.verify`) have seen no reward and no reward has seen them. Prints a Markdown table, and
last one JSON line: the mean of every verdict with a 95 % bootstrap interval over prompts, and the same of the paired
differences. `oracle_of_n` is what a perfect judge would reach with the plain videos, verdict by verdict.

Every prompt is one line of `--output`; a run that was interrupted goes on behind the last one.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from experiments import common, search_flags
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.data import shapes, verify
from streamt1_jax.pipeline import Pipeline, Video

_CHECKPOINT = flags.DEFINE_string("checkpoint", "checkpoints/tiny", "Folder of the model.")
_SPLIT = flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
_NUM_PROMPTS = common.define_integer("num_prompts", 64, "Captions.", 2, 10_000)
_SECONDS = common.define_float("seconds", 5.0, "Length of each video, rounded to whole chunks.")
_SEED = common.define_integer("seed", 0, "Choice of captions, and seed of the first prompt.", 0, 10**9)
_OUTPUT = flags.DEFINE_string(
  "output", None, "JSON lines, one per prompt; the first holds the settings.", required=True
)
flags.adopt_module_key_flags(search_flags)

METHODS = ("plain", "best_of_n", "search", "oracle_of_n")
DIFFERENCES = (("search", "plain"), ("search", "best_of_n"), ("best_of_n", "plain"))

# Seeds grow by 1000 a chunk: prompts with videos of up to 100 chunks share none.
_SEED_STEP = 100_000
_RESAMPLES = 10_000


def plain_seeds(seed: int, search: SearchConfig) -> list[int]:
  """Seeds of the N plain videos: those of the candidates of the search's first chunk."""
  return [seed + 100 * beam + candidate for beam in range(search.top_k) for candidate in range(search.beam_size)]


def compare(pipeline: Pipeline, search: SearchConfig, chunks: int, caption: str, seed: int) -> dict[str, Any]:
  """Verdicts of every method, and the scores of the video reward, for one caption."""
  attributes = shapes.parse_caption(caption)
  frames = chunks * pipeline.config.chunk_frames
  generate = lambda how, seed: pipeline.generate(caption, num_latent_frames=frames, search=how, seed=seed)
  streaming = SearchConfig.streaming(pipeline.config)
  plain: list[Video] = [generate(streaming, plain_seed) for plain_seed in plain_seeds(seed, search)]
  searched = generate(search, seed)
  scores = [video.score for video in plain]
  best = int(np.argmax(scores))
  verdicts = [verify.verify(video.frames, attributes) for video in plain]
  return {
    "caption": caption,
    "seed": seed,
    "plain_scores": scores,
    "search_score": searched.score,
    "verdicts": {
      "plain": verdicts[0],
      "best_of_n": verdicts[best],
      "search": verify.verify(searched.frames, attributes),
      "oracle_of_n": {name: any(verdict[name] for verdict in verdicts) for name in verify.VERDICTS},
    },
  }


def read_rows(path: epath.Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Rows of an earlier run with the same settings; a last line that was cut off does not count.

  Raises ConfigError if the file holds something else.
  """
  if not path.exists():
    return []
  rows = []
  for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
    if not line.endswith("\n"):
      break
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise ConfigError(f"--output={path}, line {number}: not JSON; give another file") from error
  if rows and rows[0] != settings:
    raise ConfigError(f"--output={path} holds a comparison with other settings; give the same flags or another file")
  return rows[1:]


def write_rows(path: epath.Path, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
  """Writes all lines beside the file, then renames: a row is there whole or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text("".join(json.dumps(row) + "\n" for row in (settings, *rows)))
  partial.replace(path)


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
  """Mean of [prompts] values and the 95 % percentile bootstrap interval over prompts."""
  resampled = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
  low, high = np.percentile(values[resampled].mean(axis=1), [2.5, 97.5])
  return {name: round(float(x), 3) for name, x in (("mean", values.mean()), ("low", low), ("high", high))}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
  """By method or difference, then by verdict: mean and interval."""
  values = {
    method: {name: np.array([row["verdicts"][method][name] for row in rows], float) for name in verify.VERDICTS}
    for method in METHODS
  }
  result = {method: {name: interval(found) for name, found in of.items()} for method, of in values.items()}
  for first, second in DIFFERENCES:
    paired = {name: values[first][name] - values[second][name] for name in verify.VERDICTS}
    result[f"{first} - {second}"] = {name: interval(found) for name, found in paired.items()}
  return result


def table(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
  """The summary in Markdown."""
  cell = lambda x: f"{x['mean']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"
  lines = [f"| | {' | '.join(verify.VERDICTS)} |", "|---" * (len(verify.VERDICTS) + 1) + "|"]
  for name, of in result.items():
    lines.append(f"| {name} | {' | '.join(cell(of[verdict]) for verdict in verify.VERDICTS)} |")
  return "\n".join(lines)


def main() -> None:
  common.require_writable("output", _OUTPUT.value)
  checkpoint, output = common.find_folder(_CHECKPOINT.value), epath.Path(_OUTPUT.value)
  pipeline = search_flags.load_pipeline(checkpoint)
  search = search_flags.search_config(pipeline.config)
  if search.num_candidates == 1:
    raise ConfigError("a search with a single candidate has nothing to choose; compare another")
  chunks = search_flags.video_chunks(pipeline, search, seconds=_SECONDS.value)
  settings = {
    "split": _SPLIT.value,
    "prompts": _NUM_PROMPTS.value,
    "seconds": _SECONDS.value,
    "chunks": chunks,
    "seed": _SEED.value,
    "candidates": search.num_candidates,
    "checkpoint_sha256": common.checkpoint_sha256(checkpoint),
    **search_flags.reward_settings(pipeline, "float32"),
    **dataclasses.asdict(search),
  }
  settings = json.loads(json.dumps(settings))  # As they will be read again.
  rows = read_rows(output, settings)
  captions = shapes.held_out_captions(_SPLIT.value, _NUM_PROMPTS.value, _SEED.value)
  pipeline.text.prepare(captions[len(rows) :])
  indices = range(len(rows), len(captions))
  for index in tqdm.tqdm(indices, initial=len(rows), total=len(captions), desc="prompts", file=sys.stderr):
    rows.append(compare(pipeline, search, chunks, captions[index], _SEED.value + _SEED_STEP * index))
    write_rows(output, settings, rows)
  result = summary(rows)
  print(table(result))
  print(json.dumps({"settings": settings, "results": result}), flush=True)


if __name__ == "__main__":
  common.run(main)
