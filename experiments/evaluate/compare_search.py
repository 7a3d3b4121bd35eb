"""Does the search choose well? Plain streaming, best of N, and the search, from equal seeds, judged by the verifiers.

  python -m experiments.evaluate.compare_search --split=test --num_prompts=64 --output=runs/compare_5s.jsonl
  python -m experiments.evaluate.compare_search --split=test --seconds=30 --output=runs/compare_30s.jsonl

Three ways to spend one prompt and one seed:

  plain      one candidate per chunk
  best_of_n  as many plain videos as the search draws candidates, from the noises of its first chunk; the video reward
             picks one by looking at whole videos
  search     the search of the flags, 2 beams of 2 candidates by default

The verifiers (`streamt1_jax.data.verify`) have seen no reward and no reward has seen them. Prints a Markdown table, and
last one JSON line: the mean of every verdict with a 95 % bootstrap interval over captions, and the same of the paired
differences. `oracle_of_n` is what a perfect judge would reach with the plain videos, verdict by verdict.

Every prompt is one line of `--output`; a run that was interrupted, or is asked for more prompts, goes on behind the
last one.
"""

import json
import sys
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import common, search_flags
from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.data import shapes, verify
from streamt1_jax.evaluation import comparison
from streamt1_jax.io import config_json
from streamt1_jax.pipeline import Pipeline, Video

_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model.")
_SPLIT = flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
_NUM_PROMPTS = common.define_integer("num_prompts", 64, "Captions.", 2, 10_000)
_SECONDS = common.define_float("seconds", 5.0, "Length of each video, rounded to whole chunks.")
_SEED = common.define_integer("seed", 0, "Choice of captions, and seed of the first prompt.", 0, 10**9)
_OUTPUT = common.define_path("output", None, "JSON lines: settings, then a line per prompt.", required=True)
flags.adopt_module_key_flags(search_flags)

# Seeds grow by 1000 a chunk: prompts with videos of up to 100 chunks share none.
_SEED_STEP = 100_000


def compare(pipeline: Pipeline, search: SearchConfig, chunks: int, caption: str, seed: int) -> dict[str, Any]:
  """Verdicts of every method, and the scores of the video reward, for one caption."""
  attributes = shapes.parse_caption(caption)
  frames = chunks * pipeline.config.chunk_frames
  generate = lambda how, seed: pipeline.generate(caption, num_latent_frames=frames, search=how, seed=seed)
  streaming = SearchConfig.streaming(pipeline.config)
  plain: list[Video] = [generate(streaming, plain_seed) for plain_seed in comparison.plain_seeds(seed, search)]
  searched = generate(search, seed)
  scores = [video.score for video in plain]
  best = int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))
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
    "seconds": _SECONDS.value,
    "chunks": chunks,
    "seed": _SEED.value,
    "candidates": search.num_candidates,
    "checkpoint_sha256": common.checkpoint_sha256(checkpoint, pipeline.rewards.choice.stored),
    **search_flags.reward_settings(pipeline, "float32"),
    **config_json.to_json_value(search),
  }
  settings = json.loads(json.dumps(settings))  # As they will be read again.
  rows = comparison.read_rows(output, settings)[: _NUM_PROMPTS.value]
  captions = shapes.held_out_captions(_SPLIT.value, _NUM_PROMPTS.value, _SEED.value)
  pipeline.text.prepare(captions[len(rows) :])
  indices = range(len(rows), len(captions))
  for index in tqdm.tqdm(indices, initial=len(rows), total=len(captions), desc="prompts", file=sys.stderr):
    rows.append(compare(pipeline, search, chunks, captions[index], _SEED.value + _SEED_STEP * index))
    comparison.write_rows(output, settings, rows)
  result = comparison.summary(rows)
  print(comparison.table(result))
  print(json.dumps({"settings": settings, "results": result}), flush=True)


if __name__ == "__main__":
  common.run(main)
