"""Names and weights of rewards to what judges a search."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards import selection
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.folder import load_reward
from streamt1_jax.rewards.quality import ImageQuality
from streamt1_jax.rewards.selection import Term, WeightedImageReward, WeightedVideoReward
from tests import small_rewards

_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A folder with two learned rewards, and nothing else that a checkpoint has."""
  path = tmp_path_factory.mktemp("checkpoint")
  for model in ("hpsv3", "videoalign"):
    small_rewards.save_reward(path / "rewards" / model, model)
  return path


def _choose(directory, reward=None, weights=None, **options):
  return selection.choose(directory, reward, weights, **({"chunk_frames": 12} | options))


class TestChoose:
  def test_default_is_what_the_checkpoint_has(self, checkpoint, tmp_path):
    choice = _choose(checkpoint)
    assert (choice.image, choice.video) == ({"hpsv3": 1.0}, {"videoalign": 1.0})
    assert choice.stored == ["hpsv3", "videoalign"]
    choice = _choose(tmp_path)
    assert (choice.image, choice.video, choice.stored) == ({"quality": 1.0}, {"coherence": 1.0}, [])
    # One alone would be mixed with a score of another scale: only both, or by name.
    (tmp_path / "rewards/hpsv3").mkdir(parents=True)
    assert _choose(tmp_path).stored == []
    assert [_choose(path).passed_over for path in (tmp_path, checkpoint)] == [("hpsv3",), ()]
    assert _choose(tmp_path, "quality+coherence").passed_over == ()

  def test_names_and_weights(self, checkpoint):
    choice = _choose(checkpoint, "coherence+hpsv3+videoalign", {"coherence": 0.5, "videoalign": 2.0}, short_frames=12)
    assert (choice.image, choice.video) == ({"hpsv3": 1.0}, {"coherence": 0.5, "videoalign": 2.0})
    assert choice.short_frames == 12

  @pytest.mark.parametrize(
    ("reward", "weights", "message"),
    [
      ("clip+coherence", {}, "reward: 'clip' is not one of quality, hpsv3, coherence, videoalign"),
      ("", {}, "reward: '' is not one of"),
      ("hpsv3", {}, "reward: hpsv3 has no video reward; add one of coherence, videoalign"),
      ("coherence+videoalign", {}, "has no image reward; add one of quality, hpsv3"),
      ("hpsv3+hpsv3+coherence", {}, "reward: hpsv3 is named twice"),
      ("hpsv3+quality+coherence", {}, "hpsv3 and quality are all image rewards; reward_weights .* hpsv3:1,quality:1"),
      ("hpsv3+quality+coherence", {"hpsv3": 1.0}, "reward_weights must say"),
      ("hpsv3+coherence", {"quality": 1.0}, "reward_weights: 'quality' is not one of the rewards hpsv3, coherence"),
      ("hpsv3+coherence", {"hpsv3": 0.0}, "weight of hpsv3 must be positive and finite, got 0.0"),
      ("hpsv3+coherence", {"hpsv3": float("nan")}, "weight of hpsv3 must be positive"),
    ],
  )
  def test_faults(self, checkpoint, reward, weights, message):
    with pytest.raises(ConfigError, match=message):
      _choose(checkpoint, reward, weights)

  def test_missing_reward(self, tmp_path):
    command = (
      f"which streamt1 convert --output={tmp_path} --reward_tokenizer=FILE --hpsv3=FILE --hpsv3_prompt=FILE makes"
    )
    with pytest.raises(ConfigError, match=f"there is no .*rewards/hpsv3, {re.escape(command)}; there are quality"):
      _choose(tmp_path, "hpsv3+coherence")

  @pytest.mark.parametrize("count", [0, 13])
  def test_short_frames(self, tmp_path, count):
    with pytest.raises(ConfigError, match=rf"short_frames must be in 1..12, the frames of a chunk, got {count}"):
      _choose(tmp_path, short_frames=count)


@pytest.mark.parametrize(
  ("length", "count", "expected"),
  [(12, 3, [2, 6, 10]), (9, 12, range(9)), (12, 12, range(12)), (12, 1, [6]), (9, 2, [2, 6])],
)
def test_spread(length, count, expected):
  assert selection.spread(length, count).tolist() == list(expected)


@dataclasses.dataclass(frozen=True)
class _Mean:
  """Mean of the frames, plus what `init` made of the prompt."""

  def init(self, params, prompt_features):
    return params["scale"] * prompt_features

  def __call__(self, params, condition, frames, info):
    frames = frames.chunk if isinstance(frames, FrameWindow) else frames
    return frames.astype(jnp.float32).mean() + condition


class TestWeightedSum:
  _PARAMS = {"a": {"scale": jnp.float32(2.0)}, "b": {"scale": jnp.float32(10.0)}}
  _FEATURES = {"a": jnp.float32(1.0), "b": jnp.float32(3.0)}
  _TERMS = (Term("a", _Mean(), 0.5), Term("b", _Mean(), 4.0))

  def test_image(self):
    frames = jnp.arange(12, dtype=jnp.uint8)[:, None]
    for count, mean in ((None, 5.5), (12, 5.5), (3, 6.0), (1, 6.0), (2, 6.0)):
      reward = WeightedImageReward(self._TERMS, count)
      condition = reward.init(self._PARAMS, self._FEATURES)
      score = reward(self._PARAMS, condition, frames, _INFO)
      np.testing.assert_allclose(score, 0.5 * (mean + 2) + 4 * (mean + 30))

  def test_video(self):
    reward = WeightedVideoReward(self._TERMS)
    window = FrameWindow(jnp.zeros((0, 1)), 0, jnp.full((4, 1), 7.0))
    score = reward(self._PARAMS, reward.init(self._PARAMS, self._FEATURES), window, _INFO)
    np.testing.assert_allclose(score, 0.5 * (7 + 2) + 4 * (7 + 30))


class TestLoaded:
  def test_learned_rewards(self, checkpoint):
    """Each reward reads its own tokens and scores as it does alone; their embeddings never get to the device."""
    loaded = selection.load(checkpoint, _choose(checkpoint, short_frames=3), fps=8.0, dtype=jnp.float32)
    for one, name in ((loaded.image, "hpsv3"), (loaded.video, "videoalign")):
      assert one.params[name]["backbone"]["decoder"]["token_embedding"].size == 0
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, (12, 32, 40, 3)), jnp.uint8)
    caption = "a red circle moves left"

    alone = {
      name: load_reward(checkpoint / "rewards" / name, fps=8.0, dtype=jnp.float32) for name in loaded.choice.stored
    }
    hpsv3, videoalign = alone["hpsv3"].reward, alone["videoalign"].reward

    @jax.jit
    def judge(params, features):
      image, video = loaded.image.reward, loaded.video.reward
      short = image(params[0], image.init(params[0], features[0]), frames, _INFO)
      window = FrameWindow(frames[:3], 3, frames[3:])
      return short, video(params[1], video.init(params[1], features[1]), window, _INFO)

    @jax.jit
    def judge_alone(params, features):
      condition = hpsv3.init(params["hpsv3"], features["hpsv3"])
      seen = hpsv3.frame_scores(params["hpsv3"], condition, frames[np.array([2, 6, 10])])
      condition = videoalign.init(params["videoalign"], features["videoalign"])
      raw = videoalign.raw_scores(params["videoalign"], condition, frames[videoalign.sample(12)])
      return seen[:, 0].mean(), videoalign.overall(raw)

    found = judge(
      (loaded.image.params, loaded.video.params), (loaded.image.prompt(caption), loaded.video.prompt(caption))
    )
    params = {name: one.params for name, one in alone.items()}
    expected = judge_alone(params, {name: one.prompt(caption) for name, one in alone.items()})
    np.testing.assert_allclose(found, expected, atol=1e-5)

  def test_built_in_rewards_read_no_prompt(self, tmp_path):
    loaded = selection.load(tmp_path, _choose(tmp_path), fps=8.0, dtype=jnp.float32)
    assert loaded.image.reward.terms == (Term("quality", ImageQuality(), 1.0),)
    assert jax.tree.leaves((loaded.image.prompt("<|im_end|>"), loaded.image.params)) == []

  def test_a_learned_reward_that_is_passed_over_is_told(self, tmp_path, caplog):
    logging.use_absl_handler()
    (tmp_path / "rewards/videoalign").mkdir(parents=True)
    for reward, said in (("quality+coherence", 0), (None, 1)):
      selection.load(tmp_path, _choose(tmp_path, reward), fps=8.0, dtype=jnp.float32)
      assert caplog.text.count("quality+coherence judge") == said
    assert "rewards has videoalign alone" in caplog.text

  def test_another_reward_in_its_place(self, tmp_path):
    small_rewards.save_reward(tmp_path / "rewards/hpsv3", "videoalign")
    with pytest.raises(ConfigError, match="rewards/hpsv3 holds videoalign, not hpsv3"):
      selection.load(tmp_path, _choose(tmp_path, "hpsv3+coherence"), fps=8.0, dtype=jnp.float32)


class TestOneCall:
  """Candidates and beams are batched: the program does not grow with their number."""

  @pytest.mark.parametrize("model", ["hpsv3", "videoalign"])
  def test_products_do_not_grow(self, checkpoint, model):
    loaded = load_reward(checkpoint / "rewards" / model, fps=8.0, dtype=jnp.float32)
    features = jax.tree.map(jnp.asarray, loaded.prompt("a red circle"))

    def judge(params, past, chunk, num_past):
      condition = loaded.reward.init(params, features)
      frames = lambda past, chunk: chunk if model == "hpsv3" else FrameWindow(past, num_past, chunk)
      score = lambda past, chunk: loaded.reward(params, condition, frames(past, chunk), _INFO)
      return jax.vmap(jax.vmap(score, in_axes=(None, 0)))(past, chunk)

    def products(beams: int, candidates: int) -> int:
      past = jax.ShapeDtypeStruct((beams, 8, 32, 32, 3), jnp.uint8)
      chunk = jax.ShapeDtypeStruct((beams, candidates, 6, 32, 32, 3), jnp.uint8)
      lowered = jax.jit(judge).lower(loaded.params, past, chunk, jax.ShapeDtypeStruct((), jnp.int32))
      return lowered.as_text().count("stablehlo.dot_general")

    assert products(1, 1) == products(2, 4) > 0

  def test_products_do_not_grow_with_the_window(self, checkpoint):
    """One program serves windows of every length; it has the products of the program for a single length."""
    loaded = load_reward(checkpoint / "rewards/videoalign", fps=8.0, dtype=jnp.float32)
    features = jax.tree.map(jnp.asarray, loaded.prompt("a red circle"))

    def judge(params, past, chunk, num_past):
      return loaded.reward(params, loaded.reward.init(params, features), FrameWindow(past, num_past, chunk), _INFO)

    frames = lambda count: jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.uint8)
    known = jax.jit(judge, static_argnums=3).lower(loaded.params, frames(40), frames(6), 40).as_text()
    unknown = jax.jit(judge).lower(loaded.params, frames(40), frames(6), jax.ShapeDtypeStruct((), jnp.int32)).as_text()
    assert len({len(loaded.reward.sample(total)) for total in range(6, 47)}) > 2
    count = lambda text: text.count("stablehlo.dot_general")
    assert count(unknown) == count(known) > 0
