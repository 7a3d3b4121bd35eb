"""What the scores of pairs say, by hand; and that no pair asks about a caption of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.data import shapes, world
from streamt1_jax.evaluation import reward_pairs, reward_report
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.training import preferences, reward_text
from tests.small_rewards import save_reward

_NAN = np.nan  # what the worse clip scores for the other caption is never asked


def _scores(*pairs) -> np.ndarray:
  """[B, 2 captions, 2 clips, 1] of (better, worse, better for the other caption)."""
  return np.array([[[[better], [worse]], [[other], [_NAN]]] for better, worse, other in pairs])


def test_captions_are_complete_and_held_out():
  config = reward_pairs.held_out_pairs("test", on_frames=False)
  assert (config.split, config.on_frames, config.milder_probability) == ("test", False, 0.0)
  pairs = preferences.draw_pairs(np.random.default_rng(0), config, 16, 33)
  assert {world.split_of(pair.caption) for pair in pairs} == {"test"}
  assert all(pair.texts == (pair.caption, pair.other) for pair in pairs)


def test_shares_of_frames():
  # Better and worse: in order, in order, tied, exchanged, in order. The captions: right, wrong, right, wrong, tied.
  scores = _scores((2.0, 1.0, 0.0), (-1.0, -3.0, 4.0), (1.0, 1.0, 0.0), (0.0, 5.0, 1.0), (7.0, 6.0, 7.0))
  found = reward_report.describe(scores, np.zeros(5, bool), "blur")
  assert found == {"pairs": 5, "agreement": 0.6, "caption_swapped": 0.4}


def test_shares_of_windows():
  # VQ, MQ and TA of the better clip, of the worse one, and of the better one for the other caption.
  pairs = [
    ((1, 0, 1), (0, 5, 0), (0, 0, 2)),  # VQ and TA are right, their sum with MQ is not
    ((1, 5, 1), (0, 0, 2), (9, 9, 0)),  # VQ and the sum
    ((0, 9, 0), (1, 0, 1), (0, 0, 1)),  # the sum alone
    ((3, 0, 0), (0, 0, 1), (0, 0, -1)),  # VQ and the sum
  ]
  scores = np.array([[[b, w], [o, (_NAN,) * 3]] for b, w, o in pairs], float)
  late = np.array([True, False, False, True])
  assert reward_report.describe(scores, late, "mixed_shape") == {
    "pairs": 4,
    "agreement": 0.75,
    "whole_window": 1.0,
    "last_chunk_only": 0.5,
    "VQ": 0.75,
    "TA": 0.25,
    "caption_swapped": 0.5,
  }
  # Only the scores that a corruption concerns are told, and where none is late, no share of those.
  found = reward_report.describe(scores, np.zeros(4, bool), "freeze")
  assert found == {"pairs": 4, "agreement": 0.75, "MQ": 0.5, "caption_swapped": 0.5}


_REPORT = {
  "color": {"pairs": 4, "agreement": 1.0, "caption_swapped": 0.5},
  "blur": {"pairs": 4, "agreement": 0.5, "VQ": 0.25, "caption_swapped": 0.0},
  "noise": {"pairs": 4, "agreement": 0.25, "whole_window": 0.5, "last_chunk_only": 0.0, "caption_swapped": 1.0},
}


def test_summary():
  found = reward_report.summary(_REPORT)
  assert found == pytest.approx({"agreement": 0.583, "caption_swapped": 0.5, "text": 1.0, "picture": 0.375}, abs=6e-4)


def test_table():
  assert reward_report.table(_REPORT).splitlines() == [
    "| corruption | pairs | agreement | whole_window | last_chunk_only | VQ | caption_swapped |",
    "|---|---|---|---|---|---|---|",
    "| color | 4 | 1.00 |  |  |  | 0.50 |",
    "| blur | 4 | 0.50 |  |  | 0.25 | 0.00 |",
    "| noise | 4 | 0.25 | 0.50 | 0.00 |  | 1.00 |",
  ]


_CAPTIONS = tuple(map(world.of_attributes, (shapes.Attributes(0, 0, 0, 0, 0, 0), shapes.Attributes(0, 2, 1, 0, 1, 0))))


def _clips() -> np.ndarray:
  """Better and worse of two pairs, one frame each."""
  return np.random.default_rng(0).integers(0, 256, (2, 2, 1, 64, 64, 3), np.uint8)


def test_scores_of_pairs_are_the_rewards_own(tmp_path):
  save_reward(tmp_path / "reward", "hpsv3")
  loaded = folder.load_reward(tmp_path / "reward", fps=16.0, dtype=jnp.float32)
  frame_score = jax.jit(lambda *given: loaded.reward.frame_scores(*given)[0, 0])
  conditions = [loaded.reward.init(loaded.params, loaded.prompt(world.caption(caption))) for caption in _CAPTIONS]
  score = lambda caption, clip: frame_score(loaded.params, conditions[caption], jnp.asarray(clip))
  better, worse = _clips()
  expected = [
    [[score(caption, clips[pair]) for clips in (better, worse)] for caption in (pair, 1 - pair)] for pair in range(2)
  ]
  assert len({float(x) for x in np.ravel(expected)}) == 8
  tokens = reward_text.caption_tokens(loaded.prompt, [*_CAPTIONS, *_CAPTIONS[::-1]])
  tokens = tokens._replace(after=tokens.after.reshape(2, 2, -1), reward_index=tokens.reward_index.reshape(2, 2, -1))
  clips = jnp.asarray(np.stack([better, worse], axis=1))
  scores = lambda params: reward_pairs.pair_scores(params, REWARDS["hpsv3"], loaded, clips, tokens)
  found = jax.jit(scores)(loaded.params)
  # Two programs: one takes all clips at once.
  np.testing.assert_allclose(found[..., 0], expected, rtol=2e-4, atol=2e-4)
