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
from streamt1_jax.data import shapes, world
from streamt1_jax.rewards import folder, hpsv3, videoalign
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.qwen2_vl.prompts import RewardPrompt
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.training import pair_labels, preference_loss, preferences, reward_text
from streamt1_jax.training.appearance import Look
from streamt1_jax.training.corruptions import CORRUPTIONS, NAMES
from streamt1_jax.training.pair_labels import FIELDS, UNKNOWN
from streamt1_jax.training.preference_loss import Pairs
from streamt1_jax.training.preferences import Clip
from tests import small_rewards

_ROWS = 448

# One program each: by themselves their operations are many small ones.
_preference_terms = jax.jit(preference_loss.preference_terms)
_seeing_terms = jax.jit(preference_loss.seeing_terms)
_telling_terms = jax.jit(preference_loss.telling_terms)
_comparing_terms = jax.jit(preference_loss.comparing_terms, static_argnames="reward")

_TWO = world.parse(
  "a small red circle moves quickly left and a large blue square moves slowly up over a gray background"
)
_ONE = world.parse("a large blue square moves slowly up over a black background")


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


def _drawn(kinds: list[str], late: list[bool]) -> list[preferences.Pair]:
  """Pairs of `_TWO` and `_ONE`, in turn the right caption."""
  clip = Clip((_TWO,), (0,), np.zeros((2, 2), int), Look())
  captions = [(_TWO, _ONE), (_ONE, _TWO)]
  omit = [((False, False), (False, False)), ((True, False), (True, False))]
  return [
    preferences.Pair(clip, clip, 0, NAMES.index(kind), is_late, True, *captions[index % 2], omit[index % 2])
    for index, (kind, is_late) in enumerate(zip(kinds, late, strict=True))
  ]


def _labels(kinds: list[str], late: list[bool]) -> pair_labels.Labels:
  return pair_labels.labels(_drawn(kinds, late))


def _pairs(name: str, kinds: list[str], frames: int) -> Pairs:
  """Noise for frames: what is read does not depend on what it shows."""
  drawn = _drawn(kinds, [False] * len(kinds))
  clips = np.random.default_rng(0).integers(0, 256, (2, len(kinds), frames, 64, 64, 3)).astype(np.uint8)
  prompt = RewardPrompt(_tokenizer(), reward_text.TEMPLATES[name], _ROWS)
  tokens = reward_text.caption_tokens(prompt, [pair.texts[side] for side in range(2) for pair in drawn])
  by_caption = lambda x: x.reshape(2, len(kinds), -1)
  places = by_caption(reward_text.said_at(_tokenizer(), tokens))
  tokens = tokens._replace(after=by_caption(tokens.after), reward_index=by_caption(tokens.reward_index))
  return Pairs(*clips, tokens, places, pair_labels.labels(drawn))


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
    captions = [_TWO, _ONE, *(world.without(each, [(True, True), (False, True)]) for each in (_TWO, _ONE))]
    found = reward_text.caption_tokens(prompt, captions)
    for row, caption in enumerate(captions):
      expected = prompt(world.caption(caption))
      used = expected.reward_index[-1] + 1
      np.testing.assert_array_equal(found.before, expected.before)
      np.testing.assert_array_equal(found.after[row, :used], expected.after[:used])
      np.testing.assert_array_equal(found.reward_index[row], expected.reward_index)
    places = reward_text.said_at(_tokenizer(), found)
    words = [[_tokenizer().decode([token]) for token in after[at]] for after, at in zip(found.after, places)]
    assert words == [[" left", " up", " background"], [" up", " up", " background"]] * 2

  def test_captions_of_one_length_and_two_share_a_program(self):
    """A search compiles for lengths rounded up to 64, so a second object must not be another length."""
    for template in reward_text.TEMPLATES.values():
      prompt = RewardPrompt(_tokenizer(), template, _ROWS)
      assert len({len(prompt(world.caption(caption)).after) for caption in (_ONE, _TWO)}) == 1

  def test_the_texts_are_not_passed_off_as_the_published_ones(self):
    for template in reward_text.TEMPLATES.values():
      assert template.model not in REWARDS
      assert template.sha256 not in [spec.text.sha256 for spec in REWARDS.values() if spec.text is not None]


class TestLabels:
  def test_what_is_true_of_what_is_shown(self):
    """By hand. Columns: size, colour, shape, speed, direction, background."""
    values = lambda description: [[*thing, UNKNOWN] for thing in description.things]
    red, blue = values(_TWO)
    gray, black = (list(shapes.BACKGROUNDS).index(name) for name in ("gray", "black"))
    nothing = [UNKNOWN] * 6
    ground = lambda value: [UNKNOWN] * 5 + [value]

    is_true, shown = pair_labels.compared(_TWO, _TWO)
    np.testing.assert_array_equal(is_true, [[1] * 5 + [UNKNOWN]] * 2 + [ground(1)])
    np.testing.assert_array_equal(shown, [red, blue, ground(gray)])
    # The blue square is the second object of the caption, and nothing is red.
    is_true, shown = pair_labels.compared(_TWO, _ONE)
    np.testing.assert_array_equal(is_true, [[UNKNOWN, 0] + [UNKNOWN] * 4, [1] * 5 + [UNKNOWN], ground(0)])
    np.testing.assert_array_equal(shown, [nothing, blue, ground(black)])
    # A caption that does not name the size; the clip has one object more.
    is_true, shown = pair_labels.compared(world.without(_ONE, [(True, False)]), _TWO)
    np.testing.assert_array_equal(is_true, [[UNKNOWN, 1, 1, 1, 1, UNKNOWN], nothing, ground(0)])
    np.testing.assert_array_equal(shown, [[UNKNOWN, *blue[1:]], nothing, ground(gray)])

  def test_only_what_was_drawn_is_known(self):
    found = _labels(["extra", "color", "blur"], [True, False, False])
    np.testing.assert_array_equal(found.is_text, [True, True, False])
    np.testing.assert_array_equal(found.shows_other, [False, True, False])
    # Nothing is known of worse clips unless they show the other caption all the time.
    known = (found.is_true != UNKNOWN).any(axis=(3, 4))
    np.testing.assert_array_equal(known, [[[True] * 3, [False, True, False]]] * 2)
    red, blue = (list(shapes.COLORS).index(name) for name in ("red", "blue"))
    np.testing.assert_array_equal(found.there[0], np.isin(np.arange(6), [red, blue]))
    np.testing.assert_array_equal(found.there[1], np.isin(np.arange(6), [blue]))
    np.testing.assert_array_equal(found.named[0, blue, :-1], _TWO.things[1])
    assert (found.named[1, red] == UNKNOWN).all()

  def test_nothing_is_named_where_a_clip_has_two_captions(self):
    (pair,) = _drawn(["blur"], [False])
    found = pair_labels.labels([pair._replace(steady=False)])
    assert (found.there == UNKNOWN).all()
    assert (found.named == UNKNOWN).all()
    assert (found.background == UNKNOWN).all()


@pytest.mark.parametrize("name", ["hpsv3", "videoalign"])
def test_batches_score_as_the_search_does(name):
  config, template = _config(name), reward_text.TEMPLATES[name]
  params = jax.tree.map(jnp.asarray, small_rewards.random_params(config))
  prompt = RewardPrompt(_tokenizer(), template, _ROWS)
  pairs = _pairs(name, ["color", "blur"], frames=1 if name == "hpsv3" else 4)
  module = hpsv3 if name == "hpsv3" else videoalign
  model = nnx.merge(module.graphdef(config), params)
  reading = jax.jit(lambda pairs: preference_loss.read_pairs(model, REWARDS[name], pairs))(pairs)
  tokens = 16 if name == "hpsv3" else 2 * 16
  assert reading.media.shape == (2, tokens, config.backbone.decoder.dim)

  # The other caption with the better clip of the second pair, by itself.
  media = preference_loss.media_tokens(model, REWARDS[name], pairs.better)[1]
  drawn = _drawn(["color", "blur"], [False, False])
  text = prompt(world.caption(drawn[1].texts[1]))
  embedding = model.backbone.embed_prompt(text)
  outputs = model.backbone.decoder.block_outputs(jnp.concatenate([embedding.before, media, embedding.after]))
  begin, ids = len(text.before) + len(media), text.after.tolist()
  places = [begin + ids.index(_tokenizer().encode(f" {word}").ids[0]) for word in ("left", "up", "background")]
  np.testing.assert_allclose(reading.said[1, 0, 1], outputs[:, places], rtol=2e-4, atol=2e-4)

  reward = hpsv3.HPSv3(config) if name == "hpsv3" else videoalign.VideoAlign(16.0, config)

  @jax.jit
  def alone(tokens, clip):
    condition = reward.init(params, tokens)
    if name == "hpsv3":
      return reward.frame_scores(params, condition, clip)[0, :1]
    return reward.raw_scores(params, condition, clip)

  for index, pair in enumerate(drawn):
    for caption, text in enumerate(pair.texts):
      for clip, frames in enumerate((pairs.better[index], pairs.worse[index])):
        np.testing.assert_allclose(
          reading.scores[caption, clip, index], alone(prompt(world.caption(text)), frames), rtol=2e-4, atol=2e-4
        )


class TestLoss:
  def test_image_reward(self):
    """By hand: [caption, clip, pair, 1]; the second pair's other clip is not what its other caption says."""
    pairs = _labels(["color", "blur"], [False, False])
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
    pairs = _labels(["blur", "freeze", "direction", "direction"], [False, False, False, True])

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
    for corruption in CORRUPTIONS.values():
      if corruption.family == "text":
        assert corruption.falls == ("TA",)

  def test_readers_start_knowing_nothing_and_read_the_right_things(self):
    readers = preference_loss.init_readers(REWARDS["hpsv3"], 8, 5)
    labels = _labels(["color"] * 3, [False] * 3)
    media, hidden = jnp.ones((3, 16, 8)), jnp.zeros((3, 4, 8)).at[:, 0, 0].set(1.0)
    after = jnp.array([[[4, 1, 2, 0]] * 3] * 2)
    tokens = reward_text.CaptionTokens(jnp.zeros(2, int), after, jnp.full((2, 3, 1), 2))
    reading = preference_loss.Reading(None, media, hidden, None)
    terms = _seeing_terms(readers, media, labels) | _telling_terms(readers, reading, tokens)
    # Which colours are there, and the object of every colour: its size and shape; and the background.
    np.testing.assert_allclose(terms["naming"], np.mean(np.log([2, 2, 3, 4])), rtol=1e-6)
    np.testing.assert_allclose(terms["words"], np.log(5), rtol=1e-6)
    # Position 0 foretells token 1, position 1 the last reward token; what follows that does not count.
    readers["words"] = readers["words"].at[0, 1].set(3.0)
    terms = _telling_terms(readers, reading, tokens)
    np.testing.assert_allclose(terms["words"], (np.log(np.exp(3.0) + 4) - 3.0 + np.log(5)) / 2, rtol=1e-6)

  def test_an_object_is_read_where_its_colour_is(self):
    """Two tokens: the first is red and says small, the second blue and says large. One reader is right about both."""
    readers = preference_loss.init_readers(REWARDS["hpsv3"], 3, 5)
    labels = _labels(["color"], [False])
    size = lambda name: list(shapes.SIZES).index(name)
    color = lambda name: list(shapes.COLORS).index(name)
    media = jnp.array([[[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]])
    found = labels.named[0, :, FIELDS.index("size")]
    assert (found[color("red")], found[color("blue")]) == (size("small"), size("large"))
    readers["name_there"] = readers["name_there"].at[0, color("red")].set(40.0).at[1, color("blue")].set(40.0)
    readers["name_size"] = readers["name_size"].at[2, size("small")].set(20.0).at[2, size("large")].set(-20.0)
    right = _seeing_terms(readers, media, labels)["naming"]
    wrong = _seeing_terms(readers, media.at[..., 2].multiply(-1.0), labels)["naming"]
    # One of four losses, that of the size, is 20 - -20 where the odds are the wrong way round.
    np.testing.assert_allclose(wrong - right, 40.0 / 4, rtol=1e-5)

  def test_what_is_true_and_what_is_so(self):
    """By hand: the first feature says yes or no, the second one which colour."""
    labels = _labels(["color", "blur"], [False, False])
    said = np.zeros((2, 2, 2, 3, 3, 2), np.float32)  # [caption, clip, pair, block, place, feature]
    said[..., 1, :, 0] = 1.0
    said[1, 0, 0, 1, 2, 0] = -5.0  # the other caption of the first pair: its background is not the better clip's
    reading = preference_loss.Reading(None, None, None, jnp.asarray(said))
    readers = preference_loss.init_readers(REWARDS["videoalign"], 2, 5)
    size = math.sqrt(2.0)  # what a normalised feature is, where the other one is zero
    readers["truth"] = readers["truth"].at[0].set(3.0 / size)
    terms = _comparing_terms(readers, reading, labels, REWARDS["videoalign"])
    loss = lambda logit: math.log(1.0 + math.exp(-logit))
    known = labels.is_true != UNKNOWN
    yes, no = (labels.is_true == 1).sum(), (labels.is_true == 0).sum()
    assert known.sum() == yes + no
    assert no > 1
    expected = (yes * loss(3.0) + (no - 1) * loss(-3.0) + loss(3.0)) / (yes + no)
    np.testing.assert_allclose(terms["truth"], expected, rtol=1e-5)
    np.testing.assert_allclose(terms["truth_right"], (yes + 1) / (yes + no), rtol=1e-6)
    sizes = [len(shapes.attribute_names()[field]) for field in FIELDS]
    np.testing.assert_allclose(terms["correction"], np.mean(np.log(sizes)), rtol=1e-6)

  @pytest.mark.parametrize("name", ["hpsv3", "videoalign"])
  def test_names_of_all_terms(self, name):
    labels, scores = _labels(["color"], [False]), jnp.zeros((2, 2, 1, 1 if name == "hpsv3" else 3))
    readers = preference_loss.init_readers(REWARDS[name], 8, 5)
    tokens = reward_text.CaptionTokens(jnp.zeros(2, int), jnp.zeros((2, 1, 4), int), jnp.full((2, 1, 1), 2))
    said = jnp.ones((2, 2, 1, 3, 3, 8))
    reading = preference_loss.Reading(scores, jnp.ones((1, 16, 8)), jnp.ones((1, 4, 8)), said)
    terms = _preference_terms(scores, labels)
    terms |= _seeing_terms(readers, reading.media, labels)
    terms |= _telling_terms(readers, reading, tokens)
    terms |= _comparing_terms(readers, reading, labels, REWARDS[name])
    assert set(terms) == set(preference_loss.term_names(REWARDS[name]))
    assert ("name_speed" in readers) == (name == "videoalign")


class TestUnitScores:
  """Made-up statistics: where a score was the mean it is 0, and a standard deviation above that it is 1."""

  def test_of_mu(self):
    config = _config("hpsv3")
    params = jax.tree.map(jnp.asarray, small_rewards.random_params(config))
    same, scaled = hpsv3.with_unit_scores(params, config, np.array([4.0]), np.array([2.5]))
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
    scaled, params = videoalign.with_unit_scores(given, config, mean, std)
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
