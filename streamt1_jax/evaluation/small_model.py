"""Videos of captions of the shapes world, generated or true, and what the verifiers say of them."""

from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from streamt1_jax.codec.vae import quantize_frames
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.data import shapes, verify, world
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.training.codec import load_codec

_SHEET_FRAMES = 9


def generated_videos(
  pipeline: Pipeline, search: SearchConfig, chunks: int, captions: Sequence[str], seeds: Sequence[int]
) -> Iterator[UInt8[np.ndarray, "T 64 64 3"]]:
  """Frames [T, 64, 64, 3] uint8 of one video per caption, each from its own seed."""
  frames = chunks * pipeline.config.chunk_frames
  pipeline.text.prepare(captions)
  together = pipeline.prompts_together
  for start in range(0, len(captions), together):
    batch = slice(start, start + together)
    for video in pipeline.generate_together(captions[batch], seeds[batch], num_latent_frames=frames, search=search):
      yield video.frames


def reconstructed_videos(
  checkpoint: epath.Path, model: ModelConfig, chunks: int, captions: Sequence[str], seed: int
) -> Iterator[UInt8[np.ndarray, "T 64 64 3"]]:
  """True clips of the captions, encoded and decoded; `seed` draws where their objects start."""
  codec = load_codec(checkpoint / "codec", model)
  times = np.arange(1 + model.required_codec.temporal_stride * (chunks * model.chunk_frames - 1))
  through = jax.jit(
    lambda states: quantize_frames(codec.decoder.decode(codec.encoder.encode(2 * world.draw(states) - 1)))
  )
  rng = np.random.default_rng(seed)
  for caption in captions:
    start = shapes.START_POSITIONS[rng.integers(len(shapes.START_POSITIONS))]
    yield np.asarray(through(world.play([world.parse(caption)], [0], world.starts_of(start), times)))


def judge(videos: Iterable[UInt8[np.ndarray, "T 64 64 3"]], captions: Sequence[str]) -> dict[str, dict[str, float]]:
  """Shares per verdict over whole videos and, where there is more than one, in each of the windows of the drift."""
  whole, windows = [], []
  for frames, caption in zip(videos, captions, strict=True):
    description = world.parse(caption)
    whole.append(verify.verify(frames, description))
    windows.append(verify.verify_windows(frames, description))
  report = {"whole_video": verify.verify_rates(whole)}
  if len(windows[0]) > 1:
    for column, (begin, end) in zip(zip(*windows, strict=True), verify.DRIFT_WINDOWS, strict=False):
      report[f"{begin}-{end}s"] = verify.verify_rates(column)
  return report


def contact_sheet(videos: Sequence[UInt8[np.ndarray, "T 64 64 3"]]) -> UInt8[np.ndarray, "rows columns 3"]:
  """Picture [64 V, 576, 3] uint8, one row per video: a few frames from first to last."""
  pick = lambda frames: frames[np.linspace(0, len(frames) - 1, _SHEET_FRAMES).astype(int)]
  return np.concatenate([np.concatenate(list(pick(frames)), axis=1) for frames in videos])
