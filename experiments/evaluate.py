"""Judges generated videos of the shapes world with the verifiers that no search and no reward has seen.

  python -m experiments.evaluate --split=test --num_captions=64 --search=none
  python -m experiments.evaluate --split=test --num_captions=64 --search=none --seconds=30

prints one JSON line: the share of videos for which every verdict holds, over the whole video (5 s) or window by
window (30 s).
Captions of the split "tune" are for choosing anything at all; those of "test" are for reporting. `--reconstruct`
judges true clips after a trip through the VAE instead: what the decoder can reach at best.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from experiments import common, search_flags
from streamt1_jax.codec.vae import VideoCodec, quantize_frames
from streamt1_jax.data import shapes, verify
from streamt1_jax.io.checkpoint import load_params
from streamt1_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", "checkpoints/tiny", "Model checkpoint.")
flags.DEFINE_enum("split", "tune", shapes.SPLITS, "Whose captions.")
flags.DEFINE_integer("num_captions", 64, "Videos judged.")
flags.DEFINE_float("seconds", 5.0, "Length of each video.")
flags.DEFINE_integer("seed", 0, "Choice of captions, and seed of the first video; the others follow.")
flags.DEFINE_bool("reconstruct", False, "Judge true clips that went through the VAE.")
flags.DEFINE_string("contact_sheet", None, "PNG of the first videos, for looking at.")


def generated_videos(pipeline: Pipeline, captions: list[str]):
  """Frames [T, 64, 64, 3] uint8 of one video per caption, every one from its own seed."""
  search = search_flags.search_config(pipeline.config)
  pipeline.text.prepare(captions)
  for index, caption in enumerate(captions):
    yield pipeline.generate(caption, seconds=FLAGS.seconds, search=search, seed=FLAGS.seed + 100_000 * index).frames


def reconstructed_videos(checkpoint: str, pipeline: Pipeline, captions: list[str]):
  """True clips of the captions, encoded and decoded."""
  config, length = pipeline.config, pipeline.num_chunks(seconds=FLAGS.seconds) * pipeline.config.chunk_frames
  graphdef, abstract = nnx.split(nnx.eval_shape(lambda: VideoCodec(config.codec, rngs=nnx.Rngs(0))), nnx.Param)
  codec = nnx.merge(graphdef, load_params(f"{checkpoint}/codec", nnx.to_pure_dict(abstract), jnp.float32))
  indices = jnp.arange(1 + config.codec.temporal_stride * (length - 1))
  through = jax.jit(
    lambda scene: quantize_frames(codec.decoder.decode(codec.encoder.encode(2 * shapes.render(scene, indices) - 1)))
  )
  rng = np.random.default_rng(FLAGS.seed)
  for caption in captions:
    start = jnp.asarray(shapes.START_POSITIONS[rng.integers(len(shapes.START_POSITIONS))])
    yield np.asarray(through(shapes.Scene(*map(jnp.int32, shapes.parse_caption(caption)), start=start)))


def judge(videos, captions: list[str]) -> dict:
  """Shares per verdict over whole videos and, for videos of 30 s, in each of the windows of the drift."""
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


def write_sheet(path: str, videos: list[np.ndarray]) -> None:
  """One row per video: nine frames from first to last."""
  from streamt1_jax.io.video import write_png

  rows = [np.concatenate(list(frames[np.linspace(0, len(frames) - 1, 9).astype(int)]), axis=1) for frames in videos]
  write_png(path, np.concatenate(rows))


def main(_) -> None:
  checkpoint = common.find_checkpoint(FLAGS.checkpoint) if hasattr(common, "find_checkpoint") else FLAGS.checkpoint
  pipeline = Pipeline.load(checkpoint)
  captions = shapes.held_out_captions(FLAGS.split, FLAGS.num_captions, FLAGS.seed)
  make = (
    reconstructed_videos(checkpoint, pipeline, captions) if FLAGS.reconstruct else generated_videos(pipeline, captions)
  )
  videos = list(make)
  if FLAGS.contact_sheet:
    write_sheet(FLAGS.contact_sheet, videos[:16])
  print(
    json.dumps({"split": FLAGS.split, "captions": len(captions), "seconds": FLAGS.seconds} | judge(videos, captions))
  )


if __name__ == "__main__":
  app.run(main)
