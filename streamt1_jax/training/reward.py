"""The training of a small HPSv3 or VideoAlign on pairs of clips: batches, losses, one step, and unit scores in the end.

draw_batch ── clips, tokens, labels ── frames ── read_pairs ──┬─ preferences (clip, caption, exchanged, change)
   (host)                              (device)               └─ readers (naming, words, correction, truth)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from jaxtyping import Float32, Int32

from streamt1_jax.config import ConfigError
from streamt1_jax.io.checkpoint import load_params
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.training import pair_frames, pair_labels, preference_loss, preferences, reward_text, trainer
from streamt1_jax.training.pair_frames import PairClips
from streamt1_jax.training.pair_labels import Labels
from streamt1_jax.training.preference_loss import Pairs
from streamt1_jax.training.preferences import PairConfig
from streamt1_jax.training.reward_text import CaptionTokens
from streamt1_jax.training.trainer import Trainer
from streamt1_jax.typing import FloatScalar, HostArray, Params

WINDOWS = (9, 33, 117, 57, 81, 21, 105, 69, 9, 33, 117, 81, 57, 477, 21)
"""Lengths of the windows, in frames, in the order in which training steps take them: some of what a search shows, and
30 seconds, since whole videos are judged in the end."""

_RECENT = 0.97  # decay of the averages in the loss curve


@dataclasses.dataclass(frozen=True)
class RewardTraining:
  """How a reward is trained.

  Attributes:
    steps: optimiser steps.
    seeing_steps: first steps in which only the vision tower learns, by naming attributes.
    seeing_pairs: clips in their batches.
    pairs: pairs in a batch; fewer in long windows.
    through_codec: how many of them go through the codec.
    learning_rate: peak of the learning rate.
    ema_decay: decay of the weights' moving average.
    naming_weight: weight of the loss of the readers that name attributes.
    words_weight: weight of the loss of the reader that foretells the caption's words.
    comparing_weight: weight of the losses where everything about an object or the background is said.
    stay_weight: weight of the squared change of scores that must not change.
    seed: decides initialisation and data.
  """

  steps: int
  seeing_steps: int
  seeing_pairs: int
  pairs: int
  through_codec: int
  learning_rate: float
  ema_decay: float
  naming_weight: float
  words_weight: float
  comparing_weight: float
  stay_weight: float
  seed: int


class Objective(NamedTuple):
  """What is trained, and on what.

  Attributes:
    reward: which one.
    config: sizes.
    graphdef: graph definition of the model.
    prompt: gives the tokens of captions.
    tokenizer: that of `prompt`.
    codec: parameters and graph definition of the codec.
    pairs: how pairs are drawn.
    windows: length of the window and number of frames looked at, of every step in turn.
  """

  reward: RewardSpec
  config: Any
  graphdef: nnx.GraphDef
  prompt: Callable[[str], PromptTokens]
  tokenizer: tokenizers.Tokenizer
  codec: tuple[Params, nnx.GraphDef]
  pairs: PairConfig
  windows: tuple[tuple[int, int], ...]


class Batch(NamedTuple):
  """Pairs as arrays, before their frames are drawn.

  Attributes:
    clips: of both sides.
    times: of the frames that the reward looks at.
    tokens: of the captions (right, other).
    said_at: see `preference_loss.Pairs`.
    labels: what is known of the pairs.
  """

  clips: PairClips
  times: Int32[HostArray, " n"]
  tokens: CaptionTokens
  said_at: Int32[HostArray, "2 B 3"]
  labels: Labels


class RewardTrainer(NamedTuple):
  """What a training step changes.

  Attributes:
    state: {"reward", "readers"}, nested dicts, their average and the optimiser.
    recent: loss terms, averaged over the last steps: one batch is too small to see anything.
  """

  state: Trainer
  recent: dict[str, FloatScalar]


def draw_batch(
  objective: Objective, seed: Sequence[int], window: int, looked_at: int, *, pairs: int, coded: int
) -> Batch:
  """Pairs of windows, or of single frames for an image reward; on the host.

  Args:
    objective: what is trained.
    seed: decides everything.
    window: frames of a window.
    looked_at: how many of them the reward sees.
    pairs: how many, where the reward looks at up to 29 frames; there are fewer where it looks at more.
    coded: how many of them go through the codec.
  """
  shrink = max(1, looked_at // 15)
  count, coded = max(1, pairs // shrink), coded // shrink
  drawn = preferences.draw_pairs(np.random.default_rng(seed), objective.pairs, count, window)
  times = np.round(np.linspace(0.0, 1.0, looked_at) * (window - 1)).astype(np.int32)
  texts = [caption for side in range(2) for caption in (pair.texts[side] for pair in drawn)]
  tokens = reward_text.caption_tokens(objective.prompt, texts)
  by_caption = lambda x: x.reshape(2, count, -1)
  return Batch(
    clips=pair_frames.pair_clips(drawn, times, coded),
    times=times,
    tokens=tokens._replace(after=by_caption(tokens.after), reward_index=by_caption(tokens.reward_index)),
    said_at=by_caption(reward_text.said_at(objective.tokenizer, tokens)),
    labels=pair_labels.labels(drawn),
  )


def _drawn(codec: Params, objective: Objective, batch: Batch) -> Pairs:
  """The pairs with their frames."""
  through = pair_frames.through_codec(nnx.merge(objective.codec[1], codec))
  better, worse = pair_frames.draw(batch.clips, batch.times, through)
  return Pairs(better, worse, batch.tokens, batch.said_at, batch.labels)


def _seeing_loss(params: Params, objective: Objective, pairs: Pairs):
  model = nnx.merge(objective.graphdef, params["reward"])
  media = preference_loss.media_tokens(model, objective.reward, pairs.better)
  terms = preference_loss.seeing_terms(params["readers"], media, pairs.labels)
  return terms["naming"], terms


def _whole_loss(params: Params, objective: Objective, pairs: Pairs, training: RewardTraining):
  model = nnx.merge(objective.graphdef, params["reward"])
  readers, labels = params["readers"], pairs.labels
  reading = preference_loss.read_pairs(model, objective.reward, pairs)
  terms = preference_loss.preference_terms(reading.scores, labels)
  terms |= preference_loss.seeing_terms(readers, reading.media, labels)
  terms |= preference_loss.telling_terms(readers, reading, pairs.tokens)
  terms |= preference_loss.comparing_terms(readers, reading, labels, objective.reward)
  total = terms["clip"] + terms["caption"] + 0.5 * terms["exchanged"]
  total = total + training.naming_weight * terms["naming"] + training.words_weight * terms["words"]
  total = total + training.comparing_weight * (terms["truth"] + 0.5 * terms["correction"])
  # Only differences are learned from pairs; this keeps the level of all captions the same.
  total = total + training.stay_weight * terms.get("change", 0.0) + 1e-3 * jnp.square(reading.scores).mean()
  return total, terms


def make_update(objective: Objective, optimizer: optax.GradientTransformation, training: RewardTraining) -> Callable:
  """The training step, (trainer, step) to (trainer, loss terms); compiled for every number of frames looked at."""
  windows = objective.windows
  # The windows with the fewest frames looked at show all that can be named, except some speeds.
  shortest = [window for window in windows if window[1] == min(looked_at for _, looked_at in windows)]

  @functools.partial(jax.jit, static_argnames=("seeing",), donate_argnums=(0,))
  def train_step(before: RewardTrainer, step: jax.Array, batch: Batch, codec: Params, seeing: bool):
    pairs = _drawn(codec, objective, batch)
    loss = _seeing_loss if seeing else functools.partial(_whole_loss, training=training)
    gradients, terms = jax.grad(loss, has_aux=True)(before.state.params, objective, pairs)
    state = trainer.improved(before.state, gradients, optimizer, step, training.ema_decay)
    share = jnp.maximum(1.0 - _RECENT, 1.0 / (1.0 + step))
    recent = {name: (1.0 - share) * before.recent[name] + share * value for name, value in terms.items()}
    return RewardTrainer(state, before.recent | recent)

  def update(before: RewardTrainer, step: jax.Array):
    seeing = int(step) < training.seeing_steps
    turns = shortest if seeing else windows
    window, looked_at = turns[int(step) % len(turns)]
    # The codec's looks come later: they cost more than all the rest of a step that only names.
    count, coded = (training.seeing_pairs, 0) if seeing else (training.pairs, _coded(training))
    batch = draw_batch(objective, (training.seed, int(step)), window, looked_at, pairs=count, coded=coded)
    after = train_step(before, step, batch, objective.codec[0], seeing)
    return after, after.recent

  return update


def _coded(training: RewardTraining) -> int:
  return min(training.pairs, training.through_codec)


def make_optimizer(training: RewardTraining) -> optax.GradientTransformation:
  """Adam; warm-up, cosine to zero. Muon makes attention without normalised queries and keys saturate."""
  warmup = min(100, training.steps // 10)
  schedule = optax.warmup_cosine_decay_schedule(0.0, training.learning_rate, warmup, training.steps)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def begin(params: Params, objective: Objective, optimizer: optax.GradientTransformation) -> RewardTrainer:
  """A training of the reward's weights before its first step; its readers know nothing."""
  decoder = objective.config.backbone.decoder
  readers = preference_loss.init_readers(objective.reward, decoder.dim, decoder.vocab_size)
  recent = {term: jnp.zeros(()) for term in preference_loss.term_names(objective.reward)}
  return RewardTrainer(trainer.begin({"reward": params, "readers": readers}, optimizer), recent)


def init_params(reward: RewardSpec, config: Any, seed: int, init_from: str | None) -> Params:
  """Fresh weights; the backbone, and the head of the same kind, from the reward in `init_from` if it is given.

  Raises ConfigError if that is no reward, or has a backbone of other sizes.
  """
  params = reward.required_training.initial_params(config, seed)
  if init_from is None:
    return params
  other, given = folder.load_config(init_from)
  if given.backbone != config.backbone:
    raise ConfigError(f"--init_from={init_from}: its backbone has other sizes than {reward.name}'s")
  loaded = load_params(init_from, other.weight_shapes(given, jnp.float32))
  return params | (loaded if other.name == reward.name else {"backbone": loaded["backbone"]})


def score_statistics(
  params: Params, objective: Objective, training: RewardTraining, batches: int
) -> tuple[Float32[np.ndarray, " R"], Float32[np.ndarray, " R"]]:
  """Mean and standard deviation, [R] each, of the scores of clips of training pairs, good and bad alike."""

  @jax.jit
  def score(params: Params, batch: Batch, codec: Params) -> jax.Array:
    model = nnx.merge(objective.graphdef, params)
    return preference_loss.read_pairs(model, objective.reward, _drawn(codec, objective, batch)).scores[0]

  scores = []
  for step in range(batches):
    window, looked_at = objective.windows[step % len(objective.windows)]
    seed = (training.seed + 1, step)
    batch = draw_batch(objective, seed, window, looked_at, pairs=training.pairs, coded=_coded(training))
    found = score(params, batch, objective.codec[0])
    scores.append(np.asarray(found).reshape(-1, found.shape[-1]))
  joined = np.concatenate(scores)
  return joined.mean(axis=0), joined.std(axis=0)
