"""Judges generated videos of the shapes world with the verifiers that no search and no reward has seen.

  python -m experiments.evaluate.small_model --split=test --num_captions=64 --search=none
  python -m experiments.evaluate.small_model --split=test --num_captions=64 --search=none --seconds=30

prints one JSON line: the share of videos for which each verdict holds, over the whole video and, where it is longer
than 5 s, window by window.

Captions of the split "tune" are for choosing anything at all; those of "test" are for reporting. `--reconstruct`
judges true clips after a trip through the VAE instead: what the decoder can reach at best.
"""

import json
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import common, search_flags
from streamt1_jax.codec.vae import quantize_frames
from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes, verify
from streamt1_jax.io.video import write_png
from streamt1_jax.pipeline import Pipeline

_CHECKPOINT = common.define_path("checkpoint", "checkpoints/tiny", "Folder of the model.")
_SPLIT = flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
_NUM_CAPTIONS = common.define_integer("num_captions", 64, "Videos judged.", 1, 10_000)
_SECONDS = common.define_float("seconds", 5.0, "Length of each video, rounded to whole chunks.")
_SEED = common.define_integer("seed", 0, "Choice of captions, and seed of the first video.", 0, 10**9)
_RECONSTRUCT = flags.DEFINE_bool("reconstruct", False, "Judge true clips that went through the VAE.")
_CONTACT_SHEET = common.define_path("contact_sheet", None, "PNG of the first videos, for looking at.")
flags.adopt_module_key_flags(search_flags)

# Seeds grow by 1000 a chunk: videos of up to 100 chunks share none.
_SEED_STEP = 100_000
_SHEET_VIDEOS, _SHEET_FRAMES = 16, 9


def generated_videos(pipeline: Pipeline, captions: list[str]) -> Iterator[np.ndarray]:
  """Frames [T, 64, 64, 3] uint8 of one video per caption, every one from its own seed."""
  search = search_flags.search_config(pipeline.config)
  frames = search_flags.video_chunks(pipeline, search, seconds=_SECONDS.value) * pipeline.config.chunk_frames
  pipeline.text.prepare(captions)
  seeds = [_SEED.value + _SEED_STEP * index for index in range(len(captions))]
  together = pipeline.prompts_together
  for start in range(0, len(captions), together):
    batch = slice(start, start + together)
    for video in pipeline.generate_together(captions[batch], seeds[batch], num_latent_frames=frames, search=search):
      yield video.frames


def reconstructed_videos(checkpoint: epath.Path, pipeline: Pipeline, captions: list[str]) -> Iterator[np.ndarray]:
  """True clips of the captions, encoded and decoded."""
  config = pipeline.config
  search = search_flags.search_config(config)
  length = search_flags.video_chunks(pipeline, search, seconds=_SECONDS.value) * config.chunk_frames
  codec = common.load_codec(config, checkpoint / "codec")
  indices = jnp.arange(1 + config.codec.temporal_stride * (length - 1))
  through = jax.jit(
    lambda scene: quantize_frames(codec.decoder.decode(codec.encoder.encode(2 * shapes.render(scene, indices) - 1)))
  )
  rng = np.random.default_rng(_SEED.value)
  for caption in captions:
    start = jnp.asarray(shapes.START_POSITIONS[rng.integers(len(shapes.START_POSITIONS))])
    yield np.asarray(through(shapes.Scene(*map(jnp.int32, shapes.parse_caption(caption)), start=start)))


def judge(videos: Iterable[np.ndarray], captions: list[str]) -> dict[str, dict[str, float]]:
  """Shares per verdict over whole videos and, where there is more than one, in each of the windows of the drift."""
  whole, windows = [], []
  for frames, caption in zip(videos, captions, strict=True):
    attributes = shapes.parse_caption(caption)
    whole.append(verify.verify(frames, attributes))
    windows.append(verify.verify_windows(frames, attributes))
  report = {"whole_video": verify.verify_rates(whole)}
  if len(windows[0]) > 1:
    for column, (begin, end) in zip(zip(*windows, strict=True), verify.DRIFT_WINDOWS, strict=False):
      report[f"{begin}-{end}s"] = verify.verify_rates(column)
  return report


def contact_sheet(videos: list[np.ndarray]) -> np.ndarray:
  """One row per video: a few frames from first to last."""
  pick = lambda frames: frames[np.linspace(0, len(frames) - 1, _SHEET_FRAMES).astype(int)]
  return np.concatenate([np.concatenate(list(pick(frames)), axis=1) for frames in videos])


def main() -> None:
  if _CONTACT_SHEET.value:
    common.require_writable("contact_sheet", _CONTACT_SHEET.value)
  checkpoint = common.find_folder(_CHECKPOINT.value)
  pipeline = search_flags.load_pipeline(checkpoint, num_prompts=_NUM_CAPTIONS.value)
  frame = pipeline.models.codec.frame_shape()
  if frame != (shapes.FRAME_SIZE, shapes.FRAME_SIZE, 3):
    raise ConfigError(f"--checkpoint={checkpoint}: its frames are {frame}, the shapes world's are 64x64 and RGB")
  captions = shapes.held_out_captions(_SPLIT.value, _NUM_CAPTIONS.value, _SEED.value)
  if _RECONSTRUCT.value:
    made = reconstructed_videos(checkpoint, pipeline, captions)
  else:
    made = generated_videos(pipeline, captions)
  videos = list(tqdm.tqdm(made, total=len(captions), desc="videos", file=sys.stderr))
  report = {"split": _SPLIT.value, "captions": len(captions), "seconds": _SECONDS.value} | judge(videos, captions)
  print(json.dumps(report), flush=True)
  if _CONTACT_SHEET.value:
    write_png(_CONTACT_SHEET.value, contact_sheet(videos[:_SHEET_VIDEOS]))


if __name__ == "__main__":
  common.run(main)
