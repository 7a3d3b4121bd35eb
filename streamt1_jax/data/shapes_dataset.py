"""The shapes world as a tfds data set in array_record files; neither writing nor reading needs TensorFlow.

source = tfds.data_source("shapes_videos/standard", split="train", data_dir=..., download=True)
source[0]["video"]  # [81, 64, 64, 3] uint8
source[0]["timeline"]  # {"begin": [n] int32, the frames with which captions begin, "caption": [n] texts}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from streamt1_jax.data import shapes, world

FIRST_FRAMES, LATER_FRAMES = 9, 12
"""Frames of the first chunk of a video, and of every later one."""


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
  """One size of the data set.

  Attributes:
    num_frames: frames per clip, at `shapes.FPS`.
    num_clips: clips of each split.
    max_captions: most captions of a clip, which begin with chunks.
    seed: seed of the drawn scenes. Clips depend on it, on the split and on their number in it.
  """

  num_frames: int
  num_clips: Mapping[str, int]
  max_captions: int
  seed: int = 0


class ShapesVideos(tfds.core.GeneratorBasedBuilder):
  """Captioned clips of one or two coloured shapes that move over a plain background: `streamt1_jax.data.world`."""

  # tfds 4.9.10 would use `importlib_resources` to find it, and does not depend on that package.
  code_path = epath.Path(__file__)

  VERSION = tfds.core.Version("2.0.0")
  RELEASE_NOTES = {
    "1.0.0": "One object, one caption.",
    "2.0.0": "One or two objects, and timelines of captions.",
  }
  BUILDER_CONFIGS = [
    ShapesConfig(
      name="standard",
      description="Clips of 5 seconds: 7 chunks of 3 latent frames.",
      num_frames=81,
      num_clips={"train": 8192, "tune": 512, "test": 512},
      max_captions=3,
    ),
    ShapesConfig(
      name="sample",
      description="A few short clips, to look at the format.",
      num_frames=21,
      num_clips={"train": 6, "tune": 2, "test": 2},
      max_captions=2,
    ),
  ]

  def __init__(self, *, file_format: str = "array_record", **kwargs):
    # The default of tfds is TFRecord, which only TensorFlow can read.
    super().__init__(file_format=file_format, **kwargs)

  @property
  def _config(self) -> ShapesConfig:
    assert isinstance(self.builder_config, ShapesConfig)
    return self.builder_config

  def _info(self) -> tfds.core.DatasetInfo:
    frames = (self._config.num_frames, shapes.FRAME_SIZE, shapes.FRAME_SIZE, 3)
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          "video": tfds.features.Tensor(shape=frames, dtype=np.uint8, encoding="zlib"),
          "timeline": tfds.features.Sequence({"begin": np.int32, "caption": tfds.features.Text()}),
          "starts": tfds.features.Tensor(shape=(2, 2), dtype=np.int32),
        }
      ),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self._config.num_clips}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    config = self._config
    draw, times = jax.jit(world.draw), np.arange(config.num_frames)
    chunks = 1 + (config.num_frames - FIRST_FRAMES) // LATER_FRAMES
    for index in range(config.num_clips[split]):
      rng = np.random.default_rng((config.seed, shapes.SPLITS.index(split), index))
      timeline = world.draw_timeline(rng, split, int(rng.integers(1, 1 + config.max_captions)))
      changes = np.sort(1 + rng.permutation(chunks - 1)[: len(timeline) - 1])
      begins = [0, *(int(FIRST_FRAMES + LATER_FRAMES * (chunk - 1)) for chunk in changes)]
      starts = world.starts_of(shapes.START_POSITIONS[rng.integers(len(shapes.START_POSITIONS))])
      frames = draw(world.play(timeline, begins, starts, times))
      yield (
        index,
        {
          "video": np.asarray(jnp.round(frames * 255.0)).astype(np.uint8),
          "timeline": {"begin": np.array(begins, np.int32), "caption": list(map(world.caption, timeline))},
          "starts": starts,
        },
      )
