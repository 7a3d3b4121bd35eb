"""The small rewards: what they read, what they lose, and how they are stored."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.rewards import folder, hpsv3, videoalign
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.qwen2_vl.prompts import RewardPrompt
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.training import preference_loss, preferences, reward_text
from streamt1_jax.training.preferences import NAMES, Pairs
from tests import small_rewards

_ROWS = 448

# One program each: by themselves their operations are many small ones.
_preference_terms = jax.jit(preference_loss.preference_terms)
_seeing_terms = jax.jit(preference_loss.seeing_terms)
_telling_terms = jax.jit(preference_loss.telling_terms)
_comparing_terms = jax.jit(preference_loss.comparing_terms)


@functools.cache
def _tokenizer():
  return reward_text.make_tokenizer(_ROWS)


def _config(name: str):
  """The shapes world's config, narrower; frames keep their size."""
  config = (hpsv3 if name == "hpsv3" else videoalign).shapes_config()
  backbone = dataclasses.replace(
    small_rewards.BACKBONE,
    vision=dataclasses.replace(small_rewards.BACKBONE.vision, patch_size=8),
    decoder=dataclasses.replace(small_rewards.BACKBONE.decoder, vocab_size=_ROWS),
  )
  return dataclasses.replace(config, backbone=backbone)


def _pairs(kinds: list[str], late: list[bool], frames: int = 1) -> Pairs:
  count = len(kinds)
  clips = np.random.default_rng(0).integers(0, 256, (2, count, frames, 64, 64, 3))
  rows = jnp.arange(count)
  flags = jnp.arange(count) % 2 == 0
  kind = jnp.array([NAMES.index(name) for name in kinds])
  return Pairs(*jnp.asarray(clips, jnp.uint8), kind, jnp.array(late), rows, rows + 400, flags, ~flags)


class TestText:
  def test_words_of_the_world_are_single_tokens(self):
    words = {word for names in shapes.attribute_names().values() for name in names for word in name.split()}
    for word in (*words, "moves", "over", "background"):
      assert len(_tokenizer().encode(f" {word}").ids) == 1, word

  @pytest.mark.parametrize("name", ["hpsv3", "videoalign"])
  def test_any_prompt_can_be_read(self, name):
    template = reward_text.TEMPLATES[name]
    tokens = RewardPrompt(_tokenizer(), template, _ROWS)("Ein Käfer {läuft}. 日本")
    text = _tokenizer().decode(tokens.after[: tokens.reward_index[-1] + 1].tolist(), skip_special_tokens=True)
    assert "Ein Käfer {läuft}. 日本" in text
    found = tokens.after[tokens.reward_index].tolist()
    assert found == [_tokenizer().token_to_id(token) for token in template.reward_tokens]

  def test_tokens_of_captions(self):
    prompt = RewardPrompt(_tokenizer(), reward_text.TEMPLATES["videoalign"], _ROWS)
    captions = reward_text.caption_tokens(prompt)
    for row, omit_size, omit_speed in [(0, False, False), (700, True, False), (1151, False, True), (5, True, True)]:
      found = captions.of(jnp.int32(row), jnp.bool(omit_size), jnp.bool(omit_speed))
      expected = prompt(shapes.caption(*shapes.all_scenes()[row], omit_size, omit_speed))
      used = expected.reward_index[-1] + 1
      np.testing.assert_array_equal(found.before, expected.before)
      np.testing.assert_array_equal(found.after[:used], expected.after[:used])
      np.testing.assert_array_equal(found.reward_index, expected.reward_index)

  def test_the_texts_are_not_passed_off_as_the_published_ones(self):
    for template in reward_text.TEMPLATES.values():
      assert template.model not in REWARDS
      assert template.sha256 not in [spec.text.sha256 for spec in REWARDS.values() if spec.text is not None]


@pytest.mark.parametrize("name", ["hpsv3", "videoalign"])
def test_batches_score_as_the_search_does(name):
  config, template = _config(name), reward_text.TEMPLATES[name]
  params = jax.tree.map(jnp.asarray, small_rewards.random_params(config))
  prompt = RewardPrompt(_tokenizer(), template, _ROWS)
  captions = reward_text.caption_tokens(prompt)
  pairs = _pairs(["color", "blur"], [False, False], frames=1 if name == "hpsv3" else 4)
  module = hpsv3 if name == "hpsv3" else videoalign
  model = nnx.merge(module.graphdef(config), params)
  reading = jax.jit(lambda pairs: preference_loss.read_pairs(model, REWARDS[name], captions, pairs))(pairs)
  tokens = 16 if name == "hpsv3" else 2 * 16
  assert reading.media.shape == (2, tokens, config.backbone.decoder.dim)

  differing = [[_tokenizer().decode([int(token)]) for token in tokens] for tokens in reading.differing]
  assert differing == [[" red"] * 2, [" magenta"] * 2]
  # The other caption with the better clip of the second pair, by itself.
  media = preference_loss.media_tokens(model, REWARDS[name], pairs.better)[1]
  text = captions.of(pairs.other[1], pairs.omit_size[1], pairs.omit_speed[1])
  embedding = model.backbone.embed_prompt(text)
  outputs = model.backbone.decoder.block_outputs(jnp.concatenate([embedding.before, media, embedding.after]))
  place = len(text.before) + len(media) + text.after.tolist().index(_tokenizer().encode(" magenta").ids[0])
  np.testing.assert_allclose(reading.compared[1, 0, 1], outputs[:, place], rtol=2e-4, atol=2e-4)

  reward = hpsv3.HPSv3(config) if name == "hpsv3" else videoalign.VideoAlign(16.0, config)

  @jax.jit
  def alone(tokens, clip):
    condition = reward.init(params, tokens)
    if name == "hpsv3":
      return reward.frame_scores(params, condition, clip)[0, :1]
    return reward.raw_scores(params, condition, clip)

  for index in range(2):
    for caption, row in enumerate((pairs.scene[index], pairs.other[index])):
      words = shapes.caption(*shapes.all_scenes()[row], bool(pairs.omit_size[index]), bool(pairs.omit_speed[index]))
      for clip, frames in enumerate((pairs.better[index], pairs.worse[index])):
        np.testing.assert_allclose(
          reading.scores[caption, clip, index], alone(prompt(words), frames), rtol=2e-4, atol=2e-4
        )


class TestLoss:
  def test_image_reward(self):
    """By hand: [caption, clip, pair, 1]; the second pair's other clip is not what its other caption says."""
    pairs = _pairs(["color", "blur"], [False, False])
    scores = jnp.array([[[[2.0], [1.0]], [[0.0], [3.0]]], [[[-1.0], [0.5]], [[1.5], [9.0]]]])
    terms = _preference_terms(scores, pairs)
    loss = lambda difference: math.log(1.0 + math.exp(-difference))
    np.testing.assert_allclose(terms["clip"], (loss(2.0) + loss(-2.0)) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["caption"], (loss(3.0) + loss(0.5)) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["exchanged"], loss(2.5) + loss(1.5), rtol=1e-6)
    assert terms["clips_right"] == 0.5
    assert terms["text_right"] == 1.0
    assert "change" not in terms

  def test_each_score_of_the_video_reward_has_its_corruptions(self):
    """A gradient reaches a score's difference where it must fall (loss) or stay (change), and nowhere else."""
    pairs = _pairs(["blur", "freeze", "direction", "direction"], [False, False, False, True], frames=4)

    def term(name, drop):
      zero = jnp.zeros((2, 2, 4, 3))
      scores = zero.at[:, 1].set(-drop[None])
      terms = _preference_terms(scores, pairs)
      total = preference_loss.bradley_terry(drop.sum(axis=1), jnp.zeros(4)).mean()
      return terms["clip"] - 0.5 * total if name == "clip" else terms[name]

    drop = jnp.full((4, 3), 0.5)
    slope = lambda name: jax.jit(jax.grad(functools.partial(term, name)))(drop)
    reached = {name: np.asarray(slope(name)) != 0 for name in ("clip", "change")}
    np.testing.assert_array_equal(reached["clip"], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    # Blur leaves motion as it is and freezing the picture; a direction that changes late is a matter of motion, too.
    np.testing.assert_array_equal(reached["change"], [[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]])

  def test_motion_quality_never_asks_for_the_caption(self):
    for corruption in preferences.CORRUPTIONS.values():
      if corruption.family == "text":
        assert corruption.falls == ("TA",)

  def test_readers_start_knowing_nothing_and_read_the_right_things(self):
    readers = preference_loss.init_readers(REWARDS["hpsv3"], 8, 5)
    pairs = _pairs(["color"] * 3, [False] * 3)
    media, hidden = jnp.ones((3, 16, 8)), jnp.zeros((3, 4, 8)).at[:, 0, 0].set(1.0)
    after = jnp.array([[4, 1, 2, 0]] * 3)
    tokens = PromptTokens(jnp.zeros((3, 2), int), after, jnp.full((3, 1), 2))
    reading = preference_loss.Reading(None, media, hidden, tokens, None, None)
    terms = _seeing_terms(readers, media, pairs) | _telling_terms(readers, reading)
    np.testing.assert_allclose(terms["naming"], np.mean(np.log([2, 6, 3, 4])), rtol=1e-6)
    np.testing.assert_allclose(terms["words"], np.log(5), rtol=1e-6)
    # Position 0 foretells token 1, position 1 the last reward token; what follows that does not count.
    readers["words"] = readers["words"].at[0, 1].set(3.0)
    terms = _telling_terms(readers, reading)
    np.testing.assert_allclose(terms["words"], (np.log(np.exp(3.0) + 4) - 3.0 + np.log(5)) / 2, rtol=1e-6)

  def test_what_is_true_and_whether_it_stands_there(self):
    """By hand, two tokens and two features: the first says which token is shown, the second whether it stands there."""
    pairs = _pairs(["direction", "direction", "blur"], [False, True, False])
    # Worse clips show the other caption's token, but the second one only late and the third one not at all.
    shown = np.array([[1.0, 1.0, 1.0], [-1.0, 9.0, 9.0]])
    stands = np.array([[[1.0, 1.0, 1.0], [-1.0, 9.0, 9.0]], [[-1.0, -1.0, 1.0], [1.0, -9.0, -9.0]]])
    compared = np.full((2, 2, 3, 3, 2), 7.0)  # [caption, clip, pair, block, feature]
    # Their size does not count.
    compared[..., 0, :] = 5.0 * np.stack([np.broadcast_to(shown, stands.shape), np.ones_like(stands)], axis=-1)
    compared[..., 1, :] = np.stack([np.ones_like(stands), stands], axis=-1)
    differing = jnp.array([[0, 0, 0], [1, 1, 1]])
    reading = preference_loss.Reading(None, None, None, None, differing, jnp.asarray(compared))
    readers = {"correction": jnp.array([[2.0, -2.0], [0.0, 0.0]]), "truth": jnp.array([0.0, 3.0])}
    terms = _comparing_terms(readers, reading, pairs)
    loss = lambda logit: math.log(1.0 + math.exp(-logit))
    np.testing.assert_allclose(terms["correction"], loss(4.0), rtol=1e-5)
    # Eight clips and captions are known; of the third pair the other caption is taken for true.
    np.testing.assert_allclose(terms["truth"], (7 * loss(3.0) + loss(-3.0)) / 8, rtol=1e-5)
    np.testing.assert_allclose(terms["truth_right"], 7 / 8)

  @pytest.mark.parametrize("name", ["hpsv3", "videoalign"])
  def test_names_of_all_terms(self, name):
    pairs, scores = _pairs(["color"], [False]), jnp.zeros((2, 2, 1, 1 if name == "hpsv3" else 3))
    readers = preference_loss.init_readers(REWARDS[name], 8, 5)
    tokens = PromptTokens(jnp.zeros((1, 2), int), jnp.zeros((1, 4), int), jnp.full((1, 1), 2))
    differing, compared = jnp.zeros((2, 1), int), jnp.ones((2, 2, 1, 3, 8))
    reading = preference_loss.Reading(scores, jnp.ones((1, 16, 8)), jnp.ones((1, 4, 8)), tokens, differing, compared)
    terms = _preference_terms(scores, pairs)
    terms |= _seeing_terms(readers, reading.media, pairs)
    terms |= _telling_terms(readers, reading)
    terms |= _comparing_terms(readers, reading, pairs)
    assert set(terms) == set(preference_loss.term_names(REWARDS[name]))
    assert ("speed" in readers) == (name == "videoalign")


class TestUnitScores:
  """Made-up statistics: where a score was the mean it is 0, and a standard deviation above that it is 1."""

  def test_of_mu(self):
    config = _config("hpsv3")
    params = jax.tree.map(jnp.asarray, small_rewards.random_params(config))
    same, scaled = hpsv3.with_unit_scores(config, params, np.array([4.0]), np.array([2.5]))
    assert same == config
    condition = hpsv3.HPSv3(config).init(params, PromptTokens(jnp.zeros(2, int), jnp.arange(4), jnp.array([3])))
    frames = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)), jnp.uint8)
    scores = jax.jit(lambda params: hpsv3.HPSv3(config).frame_scores(params, condition, frames))
    before, after = scores(params), scores(scaled)
    assert np.ptp(before[:, 0]) > 1e-3
    np.testing.assert_allclose(after[:, 0], (before[:, 0] - 4.0) / 2.5, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after[:, 1], before[:, 1])  # the logarithm of sigma

  def test_of_vq_mq_and_ta(self):
    config = _config("videoalign")
    mean, std = np.array([4.0, -1.0, 0.12345]), np.array([2.0, 0.5, 4.0])
    given = {"head": jnp.zeros(1)}
    scaled, params = videoalign.with_unit_scores(config, given, mean, std)
    assert params is given
    assert dataclasses.replace(scaled, mean=config.mean, std=config.std) == config
    raw = jnp.array([[4.0, -1.0, 0.1235], [6.0, -0.5, 4.1235], [2.0, -2.0, -7.8765]])
    found = videoalign.VideoAlign(16.0, scaled).normalise(raw)
    np.testing.assert_allclose(found, [[0, 0, 0], [1, 1, 1], [-1, -2, -2]], atol=1e-6)


class TestFolder:
  @pytest.mark.parametrize("name", ["hpsv3", "videoalign"])
  def test_round_trip(self, name, tmp_path):
    config, template = _config(name), reward_text.TEMPLATES[name]
    params = jax.tree.map(jnp.asarray, small_rewards.random_params(config))
    for _ in range(2):  # The second time it is replaced.
      files = loading.files(REWARDS[name], config, template, _tokenizer())
      folder.save_reward(tmp_path / name, REWARDS[name], config, loading.with_backbone_in(params, jnp.float16), files)
    loaded = folder.load_reward(tmp_path / name, fps=16.0, dtype=jnp.float32)
    assert loaded.reward.config == config
    assert loaded.prompt.template == template
    for stored, given in zip(jax.tree.leaves(loaded.params["head"]), jax.tree.leaves(params["head"])):
      np.testing.assert_array_equal(stored, given)
    for stored, given in zip(jax.tree.leaves(loaded.params["backbone"]), jax.tree.leaves(params["backbone"])):
      np.testing.assert_array_equal(stored, given.astype(jnp.float16).astype(jnp.float32))

  def test_a_tokenizer_with_more_tokens_than_the_model_embeds(self):
    config = _config("hpsv3")
    decoder = dataclasses.replace(config.backbone.decoder, vocab_size=100)
    small = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, decoder=decoder))
    with pytest.raises(ConfigError, match="embeds only 100"):
      loading.files(REWARDS["hpsv3"], small, reward_text.TEMPLATES["hpsv3"], _tokenizer())
