"""The shapes world as a tfds data set in array_record files; neither writing nor reading needs TensorFlow.

source = tfds.data_source("shapes_videos/standard", split="train", data_dir=..., download=True)
source[0]["video"]  # [81, 64, 64, 3] uint8
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from streamt1_jax.data import shapes


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
  """One size of the data set.

  Attributes:
    num_frames: frames per clip, at `shapes.FPS`.
    num_clips: clips of each split.
    seed: seed of the drawn scenes. Clips depend on it, on the split and on the split's number of clips.
  """

  num_frames: int
  num_clips: Mapping[str, int]
  seed: int = 0


class ShapesVideos(tfds.core.GeneratorBasedBuilder):
  """Captioned clips of a coloured shape that moves over a plain background: `streamt1_jax.data.shapes`."""

  # tfds 4.9.10 would use `importlib_resources` to find it, and does not depend on that package.
  code_path = epath.Path(__file__)

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}
  BUILDER_CONFIGS = [
    ShapesConfig(
      name="standard",
      description="Clips of 5 seconds: 7 chunks of 3 latent frames.",
      num_frames=81,
      num_clips={"train": 8192, "tune": 512, "test": 512},
    ),
    ShapesConfig(
      name="sample",
      description="A few short clips, to look at the format.",
      num_frames=9,
      num_clips={"train": 6, "tune": 2, "test": 2},
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
          "caption": tfds.features.Text(),
          "attributes": {
            field: tfds.features.ClassLabel(names=names) for field, names in shapes.attribute_names().items()
          },
          "start": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        }
      ),
      supervised_keys=("caption", "video"),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in self._config.num_clips}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    config = self._config
    key = jax.random.fold_in(jax.random.key(config.seed), shapes.SPLITS.index(split))
    scenes = jax.device_get(shapes.sample_scenes(key, config.num_clips[split], split))
    render = jax.jit(shapes.render)
    for index in range(config.num_clips[split]):
      scene = jax.tree.map(lambda field, index=index: field[index], scenes)
      attributes = shapes.Attributes(*(int(value) for value in scene[:-1]))
      frames = render(scene, jnp.arange(config.num_frames))
      yield (
        index,
        {
          "video": np.asarray(jnp.round(frames * 255.0)).astype(np.uint8),
          "caption": shapes.caption(*attributes),
          "attributes": attributes._asdict(),
          "start": scene.start,
        },
      )
