"""A reward that the package does not know, with weights and a prompt reader, searches a video and scores whole ones."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.rewards import selection
from streamt1_jax.rewards.folder import load_config, load_reward, save_reward
from streamt1_jax.rewards.scoring import make_scorer
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.table import REWARDS
from tests.command_line import save_model
from tests.extending import reward as extending

PROMPT = "a red circle moves over a blue background"
_COLOR = np.mean([extending.COLORS["red"], extending.COLORS["blue"]], axis=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  path = save_model(tmp_path_factory.mktemp("model") / "tiny")
  extending.save(path)
  return path


def _by_hand(frames: np.ndarray) -> float:
  color = frames[-4:].astype(np.float64).mean(axis=(1, 2)) / 255
  return -np.linalg.norm(color - _COLOR, axis=-1).mean()


def test_it_judges_a_search(checkpoint):
  pipeline = Pipeline.load(
    checkpoint, reward="quality+color_match", reward_table=extending.WITH_COLOR_MATCH, short_frames=3
  )
  assert pipeline.rewards.choice.stored == ["color_match"]
  search = SearchConfig.released(sliding_window=2)
  video = pipeline.generate(PROMPT, num_latent_frames=6, search=search)
  np.testing.assert_allclose(video.score, _by_hand(video.frames), atol=1e-5)
  # The best of the surviving videos is the one whose colours are closest.
  assert video.beams.best == np.argmax([_by_hand(frames) for frames in video.beams.frames])
  for trace in video.traces:
    assert len(np.unique(trace.candidates.long)) > 1


def test_it_scores_whole_videos(checkpoint):
  scorer = make_scorer(
    "color_match", checkpoint / "rewards/color_match", dtype=jnp.float32, table=extending.WITH_COLOR_MATCH
  )
  assert scorer.columns == ("color_match",)
  assert scorer.reads_prompt
  frames = np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), np.uint8)
  assert scorer.look_at(11, 8.0).tolist() == list(range(11))
  np.testing.assert_allclose(scorer(PROMPT, frames)["color_match"], _by_hand(frames), atol=1e-5)


def test_without_the_table_it_is_unknown(checkpoint):
  choose = lambda **options: selection.choose(checkpoint, "quality+color_match", chunk_frames=12, **options)
  with pytest.raises(ConfigError, match="reward: 'color_match' is not one of quality, hpsv3, coherence, videoalign"):
    choose()
  with pytest.raises(ConfigError, match="reward must be one of hpsv3, videoalign, got 'color_match'"):
    load_config(checkpoint / "rewards/color_match")
  assert choose(table=extending.WITH_COLOR_MATCH).video == {"color_match": 1.0}


def test_a_checkpoint_without_it(tmp_path):
  with pytest.raises(ConfigError, match="there is no .*rewards/color_match; there are quality, coherence$"):
    selection.choose(tmp_path, "quality+color_match", chunk_frames=12, table=extending.WITH_COLOR_MATCH)


def test_an_image_reward_without_a_prompt_reader(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Scale:
    rows: int

  @dataclasses.dataclass(frozen=True)
  class Brightness:
    def init(self, params, prompt_features):
      return ()

    def __call__(self, params, condition, chunk, info):
      return params["scale"].sum() * chunk.astype(jnp.float32).mean()

  spec = RewardSpec(
    "brightness",
    "image",
    make=lambda config, fps: Brightness(),
    config_type=Scale,
    abstract_params=lambda config, dtype: {"scale": jax.ShapeDtypeStruct((config.rows,), dtype)},
  )
  table = {spec.name: spec}
  save_reward(tmp_path / "brightness", spec, Scale(2), {"scale": np.array([0.5, 1.5], np.float32)})
  scorer = make_scorer("any_name", tmp_path / "brightness", dtype=jnp.float32, table=table)
  assert not scorer.reads_prompt
  frames = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), np.uint8)
  scores = scorer(None, frames)
  assert list(scores) == ["any_name", "any_name_frames"]
  np.testing.assert_allclose(scores["any_name_frames"], 2.0 * frames.mean(axis=(1, 2, 3)), rtol=1e-5)
  with pytest.raises(ConfigError, match="brightness"):
    save_reward(tmp_path / "brightness", spec, Scale(2), {"scale": np.array([np.nan, 0.0], np.float32)})
  # The earlier one is still whole.
  loaded = load_reward(tmp_path / "brightness", fps=8.0, dtype=jnp.float32, table=table)
  assert loaded.params["scale"].tolist() == [0.5, 1.5]


def test_a_reward_without_weights_that_reads_the_prompt(checkpoint):
  @dataclasses.dataclass(frozen=True)
  class Closeness:
    def init(self, params, prompt_features):
      return prompt_features

    def __call__(self, params, condition, chunk, info):
      return -jnp.linalg.norm(chunk.astype(jnp.float32).mean(axis=(0, 1, 2)) / 255.0 - condition)

  def read_prompt(folder, config):
    assert config is None
    return lambda prompt: np.float32(extending.COLORS[prompt.split()[1]])

  spec = RewardSpec("closeness", "image", make=lambda config, fps: Closeness(), read_prompt=read_prompt)
  table = {**REWARDS, spec.name: spec}
  scorer = make_scorer("closeness", checkpoint / "rewards/closeness", table=table)
  assert scorer.reads_prompt
  blue = np.full((2, 16, 16, 3), np.multiply(255, extending.COLORS["blue"]).round(), np.uint8)
  # Rounding to bytes moves a colour by less than 1 / 255.
  assert scorer("a blue circle", blue)["closeness"] > -0.01
  np.testing.assert_allclose(scorer("a red circle", blue)["closeness"], -np.linalg.norm([0.8, 0.1, 0.8]), atol=0.01)
  choice = selection.choose(checkpoint, "closeness+coherence", chunk_frames=12, table=table)
  rewards = selection.load(checkpoint, choice, fps=8.0, dtype=jnp.float32, table=table)
  assert choice.stored == []
  np.testing.assert_array_equal(rewards.image.prompt("a red circle")["closeness"], np.float32(extending.COLORS["red"]))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "a/b"}, "the name of a reward must be letters, digits and '_', got 'a/b'"),
    ({"kind": "audio"}, "color_match: kind must be one of image, video, got 'audio'"),
    ({"abstract_params": None}, "color_match: config_type and abstract_params must be given together"),
  ],
)
def test_specs_that_cannot_be(changes, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(extending.SPEC, **changes)
