"""The training of a small HPSv3 or VideoAlign on pairs of clips: batches, losses, one step, and unit scores in the end.

draw_batch ── pairs ── read_pairs ──┬─ preferences (clip, caption, exchanged, change)
                                    └─ readers (naming, words, correction, truth)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from streamt1_jax.config import ConfigError
from streamt1_jax.io.checkpoint import load_params
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.training import preference_loss, preferences, trainer
from streamt1_jax.training.preferences import PairConfig, Pairs
from streamt1_jax.training.reward_text import CaptionTokens
from streamt1_jax.training.scene_pairs import Neighbours
from streamt1_jax.training.trainer import Trainer
from streamt1_jax.typing import Params

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
    comparing_weight: weight of the losses at the word in which two captions differ.
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
  """What is trained, and on what; all static but the arrays.

  Attributes:
    reward: which one.
    config: sizes.
    graphdef: graph definition of the model.
    captions: tokens of every caption.
    scenes: pairs of scenes of the split "train".
    codec: parameters and graph definition of the codec.
    emphasis: as in `PairConfig`.
    windows: length of the window and number of frames looked at, of every step in turn.
  """

  reward: RewardSpec
  config: Any
  graphdef: nnx.GraphDef
  captions: CaptionTokens
  scenes: Neighbours
  codec: tuple[Params, nnx.GraphDef]
  emphasis: tuple[tuple[str, float], ...]
  windows: tuple[tuple[int, int], ...]


class RewardTrainer(NamedTuple):
  """What a training step changes.

  Attributes:
    state: {"reward", "readers"}, nested dicts, their average and the optimiser.
    recent: loss terms, averaged over the last steps: one batch is too small to see anything.
  """

  state: Trainer
  recent: dict[str, jax.Array]


def draw_batch(
  codec: Params, objective: Objective, key: jax.Array, window: jax.Array, looked_at: int, *, pairs: int, coded: int
) -> Pairs:
  """Pairs of windows, or of single frames for an image reward.

  Args:
    codec: parameters of the codec.
    objective: what is trained.
    key: random key.
    window: int32, frames of a window.
    looked_at: how many of them the reward sees.
    pairs: how many, where the reward looks at up to 29 frames; there are fewer where it looks at more.
    coded: how many of them go through the codec.
  """
  shrink = max(1, looked_at // 15)
  on_frames = objective.reward.on_frames
  config = PairConfig(
    max(1, pairs // shrink), on_frames=on_frames, through_codec=coded // shrink, emphasis=objective.emphasis
  )
  last_frame = preferences.through_codec(nnx.merge(objective.codec[1], codec))
  if on_frames:
    return preferences.draw_pairs(key, objective.scenes, config, jnp.zeros(1, jnp.int32), jnp.int32(1), last_frame)
  times = jnp.round(jnp.linspace(0.0, 1.0, looked_at) * (window - 1)).astype(jnp.int32)
  return preferences.draw_pairs(key, objective.scenes, config, times, window, last_frame)


def _seeing_loss(params: Params, objective: Objective, pairs: Pairs):
  model = nnx.merge(objective.graphdef, params["reward"])
  media = preference_loss.media_tokens(model, objective.reward, pairs.better)
  terms = preference_loss.seeing_terms(params["readers"], media, pairs)
  return terms["naming"], terms


def _whole_loss(params: Params, objective: Objective, pairs: Pairs, training: RewardTraining):
  model = nnx.merge(objective.graphdef, params["reward"])
  reading = preference_loss.read_pairs(model, objective.reward, objective.captions, pairs)
  terms = preference_loss.preference_terms(reading.scores, pairs)
  terms |= preference_loss.seeing_terms(params["readers"], reading.media, pairs)
  terms |= preference_loss.telling_terms(params["readers"], reading)
  terms |= preference_loss.comparing_terms(params["readers"], reading, pairs)
  total = terms["clip"] + terms["caption"] + 0.5 * terms["exchanged"]
  total = total + training.naming_weight * terms["naming"] + training.words_weight * terms["words"]
  total = total + training.comparing_weight * (terms["truth"] + 0.5 * terms["correction"])
  # Only differences are learned from pairs; this keeps the level of all captions the same.
  total = total + training.stay_weight * terms.get("change", 0.0) + 1e-3 * jnp.square(reading.scores).mean()
  return total, terms


def make_update(objective: Objective, optimizer: optax.GradientTransformation, training: RewardTraining) -> Callable:
  """The training step, (trainer, step) to (trainer, loss terms); jitted for every number of frames looked at."""
  windows = objective.windows
  # The windows with the fewest frames looked at show all that can be named, except some speeds.
  shortest = [window for window in windows if window[1] == min(looked_at for _, looked_at in windows)]

  @functools.partial(jax.jit, static_argnames=("looked_at", "seeing"), donate_argnums=(0,))
  def train_step(
    before: RewardTrainer, step: jax.Array, window: jax.Array, codec: Params, looked_at: int, seeing: bool
  ):
    key = jax.random.fold_in(jax.random.key(training.seed), step)
    # The codec's looks come later: they cost more than all the rest of a step that only names.
    count, coded = (training.seeing_pairs, 0) if seeing else (training.pairs, _coded(training))
    pairs = draw_batch(codec, objective, key, window, looked_at, pairs=count, coded=coded)
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
    after = train_step(before, step, jnp.int32(window), objective.codec[0], looked_at, seeing)
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
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation, [R] each, of the scores of clips of training pairs, good and bad alike."""

  @functools.partial(jax.jit, static_argnames="looked_at")
  def score(params, step, window, codec, looked_at):
    key = jax.random.fold_in(jax.random.key(training.seed + 1), step)
    pairs = draw_batch(codec, objective, key, window, looked_at, pairs=training.pairs, coded=_coded(training))
    model = nnx.merge(objective.graphdef, params)
    return preference_loss.read_pairs(model, objective.reward, objective.captions, pairs).scores[0]

  scores = []
  for step in range(batches):
    window, looked_at = objective.windows[step % len(objective.windows)]
    batch = score(params, jnp.int32(step), jnp.int32(window), objective.codec[0], looked_at)
    scores.append(np.asarray(batch).reshape(-1, batch.shape[-1]))
  joined = np.concatenate(scores)
  return joined.mean(axis=0), joined.std(axis=0)
