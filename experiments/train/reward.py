"""Trains a small HPSv3 or VideoAlign on pairs of clips of the shapes world, of which the first is better.

  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 FLAGFILES=experiments/flagfiles
  REWARD="python -m experiments.train.reward"
  $REWARD --flagfile=$FLAGFILES/train_hpsv3.flags --run_dir=runs/hpsv3
  $REWARD --flagfile=$FLAGFILES/train_videoalign.flags --init_from=runs/hpsv3/reward --run_dir=runs/stage1
  $REWARD --flagfile=$FLAGFILES/train_videoalign_refine.flags --init_from=runs/stage1/reward --run_dir=runs/stage2
  $REWARD --flagfile=$FLAGFILES/train_videoalign_motion.flags --init_from=runs/stage2/reward --run_dir=runs/stage3
  $REWARD --flagfile=$FLAGFILES/train_videoalign_words.flags --init_from=runs/stage3/reward --run_dir=runs/stage4
  $REWARD --flagfile=$FLAGFILES/train_videoalign_speed.flags --init_from=runs/stage4/reward --run_dir=runs/stage5
  $REWARD --flagfile=$FLAGFILES/train_videoalign_all.flags --init_from=runs/stage5/reward --run_dir=runs/videoalign

The architecture is that of the published model, the sizes are `shapes_config()`. The loss is Bradley and Terry's,
-log sigmoid(r_better - r_worse), over three kinds of pairs (`streamt1_jax.training.preferences`):

  the caption's clip against a corrupted one
  the right caption against one that differs in an attribute, for the same clip
  the two clips exchanged where the "corrupted" one is what the other caption says

VideoAlign's three scores are trained one by one: each must fall for the corruptions that concern it and stay for those
that do not. Beside that, linear readers, which are thrown away in the end, must name the attributes of the scene from
the media tokens and foretell the caption word by word: this is how Qwen2-VL learned to see and to read before it became
a reward. The first steps do nothing but name, on more clips than pairs could be afforded. With `--comparing_weight`
two more readers say, at the word in which two captions differ, what the clip shows and whether that word is true of it:
without them a small VideoAlign never compared directions, nor speeds without a reader that names those. Adam;
exponential moving average.

Written to `run_dir`: `checkpoints/` (to resume), `reward/` (the folder that `rewards.folder.load_reward` reads: the
final averages in float16, the head in float32), `loss.csv`, `loss.png`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError, ModelConfig
from streamt1_jax.data import shapes
from streamt1_jax.io.checkpoint import load_params
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.qwen2_vl.prompts import RewardPrompt
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.training import loop, preference_loss, preferences, reward_text
from streamt1_jax.training.preferences import PairConfig, Pairs
from streamt1_jax.training.reward_text import CaptionTokens

FLAGS = flags.FLAGS
flags.DEFINE_enum(
  "reward", None, [name for name, spec in REWARDS.items() if spec.training], "Which reward.", required=True
)
common.define_path("codec_dir", "checkpoints/tiny/codec", "Trained codec parameters: some pairs go through it.")
common.define_path("init_from", None, "Folder of a reward whose backbone to go on from, of either kind.")
common.define_integer("steps", 2000, "Optimiser steps.", 1)
common.define_integer("seeing_steps", 0, "First steps in which only the vision tower learns, by naming attributes.", 0)
common.define_integer("seeing_pairs", 64, "Clips in their batches.", 1)
common.define_integer("pairs", 16, "Pairs in a batch; a quarter of them in the longest window.", 1)
common.define_integer("through_codec", 4, "How many of them go through the codec.", 0)
_WINDOWS = flags.DEFINE_list(
  "windows", [], "Frames of VideoAlign's windows, in turn: 57,9; most that a search shows, and 30 s, by default."
)
_EMPHASIS = flags.DEFINE_list("emphasis", [], "Corruptions to be drawn more often: background:3,direction:2.")
common.define_float("learning_rate", 1.5e-3, "Peak of the learning rate (Adam).", 0.0)
common.define_float("ema_decay", 0.995, "Decay of the weights' moving average.", 0.0, 1.0)
common.define_float("naming_weight", 0.5, "Weight of the loss of the readers that name attributes.", 0.0)
common.define_float("words_weight", 3.0, "Weight of the loss of the reader that foretells the caption's words.", 0.0)
common.define_float("comparing_weight", 0.0, "Weight of the losses at the word in which two captions differ.", 0.0)
common.define_float("stay_weight", 0.02, "Weight of the squared change of scores that must not change.", 0.0)

WINDOWS = (9, 33, 117, 57, 81, 21, 105, 69, 9, 33, 117, 81, 57, 477, 21)
"""Lengths of the windows, in frames, in the order in which training steps take them: some of what a search shows, and
30 seconds, since whole videos are judged in the end; `--windows` names others."""

_RECENT = 0.97  # decay of the averages in the loss curve


class Objective(NamedTuple):
  """What the training of one reward needs to know; all static but the arrays.

  Attributes:
    reward: which one.
    config: sizes.
    graphdef: of the model.
    captions: tokens of every caption.
    scenes: pairs of scenes of the split "train".
    codec: parameters and graph definition of the codec.
    emphasis: of `PairConfig`.
    windows: length of the window and number of frames looked at, of every step in turn.
  """

  reward: RewardSpec
  config: Any
  graphdef: nnx.GraphDef
  captions: CaptionTokens
  scenes: preferences.Neighbours
  codec: tuple[dict, nnx.GraphDef]
  emphasis: tuple[tuple[str, float], ...]
  windows: tuple[tuple[int, int], ...]


class Trainer(NamedTuple):
  """What a training step changes.

  Attributes:
    params: {"reward", "readers"}, nested dicts.
    average: their moving average.
    optimizer: state.
    recent: loss terms, averaged over the last steps: one batch is too small to see anything.
  """

  params: dict
  average: dict
  optimizer: optax.OptState
  recent: dict


def draw_batch(
  objective: Objective, key: jax.Array, window: jax.Array, looked_at: int, codec: dict, *, pairs: int, coded: int
) -> Pairs:
  """Pairs whose windows have `window` frames (int32), of which `looked_at` are looked at; for HPSv3 single frames.

  Args:
    pairs: how many, in windows of which up to 29 frames are looked at; fewer in longer ones.
    coded: how many of them go through the codec.
  """
  shrink = max(1, looked_at // 15)
  on_frames = objective.reward.kind == "image"
  config = PairConfig(
    max(1, pairs // shrink), on_frames=on_frames, through_codec=coded // shrink, emphasis=objective.emphasis
  )
  last_frame = preferences.through_codec(nnx.merge(objective.codec[1], codec))
  if on_frames:
    return preferences.draw_pairs(key, objective.scenes, config, jnp.zeros(1, jnp.int32), jnp.int32(1), last_frame)
  times = jnp.round(jnp.linspace(0.0, 1.0, looked_at) * (window - 1)).astype(jnp.int32)
  return preferences.draw_pairs(key, objective.scenes, config, times, window, last_frame)


def make_update(objective: Objective, optimizer: optax.GradientTransformation) -> Callable:
  """The training step, (trainer, step) to (trainer, loss terms); jitted for every number of frames looked at."""
  windows = objective.windows
  # Those of which the fewest frames are looked at show all that can be named, but for some speeds.
  shortest = [window for window in windows if window[1] == min(looked_at for _, looked_at in windows)]

  def seeing_loss(params, pairs):
    model = nnx.merge(objective.graphdef, params["reward"])
    media = preference_loss.media_tokens(model, objective.reward, pairs.better)
    terms = preference_loss.seeing_terms(params["readers"], media, pairs)
    return terms["naming"], terms

  def whole_loss(params, pairs):
    model = nnx.merge(objective.graphdef, params["reward"])
    reading = preference_loss.read_pairs(model, objective.reward, objective.captions, pairs)
    terms = preference_loss.preference_terms(reading.scores, pairs)
    terms |= preference_loss.seeing_terms(params["readers"], reading.media, pairs)
    terms |= preference_loss.telling_terms(params["readers"], reading)
    terms |= preference_loss.comparing_terms(params["readers"], reading, pairs)
    total = terms["clip"] + terms["caption"] + 0.5 * terms["exchanged"]
    total = total + FLAGS.naming_weight * terms["naming"] + FLAGS.words_weight * terms["words"]
    total = total + FLAGS.comparing_weight * (terms["truth"] + 0.5 * terms["correction"])
    # Only differences are learned from pairs; this keeps the level of all captions the same.
    total = total + FLAGS.stay_weight * terms.get("change", 0.0) + 1e-3 * jnp.square(reading.scores).mean()
    return total, terms

  @functools.partial(jax.jit, static_argnames=("looked_at", "seeing"), donate_argnums=(0,))
  def train_step(trainer: Trainer, step: jax.Array, window: jax.Array, codec: dict, looked_at: int, seeing: bool):
    key = jax.random.fold_in(jax.random.key(FLAGS.seed), step)
    # The codec's looks come later: they cost more than all the rest of a step that only names.
    count, coded = (FLAGS.seeing_pairs, 0) if seeing else (FLAGS.pairs, min(FLAGS.pairs, FLAGS.through_codec))
    pairs = draw_batch(objective, key, window, looked_at, codec, pairs=count, coded=coded)
    gradients, terms = jax.grad(seeing_loss if seeing else whole_loss, has_aux=True)(trainer.params, pairs)
    updates, state = optimizer.update(gradients, trainer.optimizer, trainer.params)
    params = optax.apply_updates(trainer.params, updates)
    decay = jnp.minimum(FLAGS.ema_decay, (1.0 + step) / (10.0 + step))
    average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, trainer.average, params)
    share = jnp.maximum(1.0 - _RECENT, 1.0 / (1.0 + step))
    recent = {name: (1.0 - share) * trainer.recent[name] + share * value for name, value in terms.items()}
    return Trainer(params, average, state, trainer.recent | recent)

  def update(trainer: Trainer, step: jax.Array):
    seeing = int(step) < FLAGS.seeing_steps
    turns = shortest if seeing else windows
    window, looked_at = turns[int(step) % len(turns)]
    trainer = train_step(trainer, step, jnp.int32(window), objective.codec[0], looked_at, seeing)
    return trainer, trainer.recent

  return update


def make_optimizer() -> optax.GradientTransformation:
  """Adam; warm-up, cosine to zero. Muon makes attention without normalised queries and keys saturate."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, FLAGS.learning_rate, min(100, FLAGS.steps // 10), FLAGS.steps)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def make_objective(reward: RewardSpec, model: ModelConfig, prompt: RewardPrompt, config: Any) -> Objective:
  """Reads flags and the codec, and lays out captions and pairs of scenes."""
  emphasis, windows = read_emphasis(reward), read_windows(reward, config)
  graphdef, params = nnx.split(common.load_codec(model, common.find_folder(FLAGS.codec_dir)), nnx.Param)
  return Objective(
    reward=reward,
    config=config,
    graphdef=reward.training.graphdef(config),
    captions=reward_text.caption_tokens(prompt),
    scenes=preferences.neighbours("train", ("train",)),
    codec=(nnx.to_pure_dict(params), graphdef),
    emphasis=emphasis,
    windows=windows,
  )


def read_windows(reward: RewardSpec, config: Any) -> tuple[tuple[int, int], ...]:
  """The lengths of `--windows`, and how many frames of each are looked at; by an image reward always one.

  Raises ConfigError for lengths outside 9..477, and for any where the reward is one for images.
  """
  lengths = _WINDOWS.value
  if reward.kind == "image":
    if lengths:
      raise ConfigError(
        f"--windows={','.join(lengths)}: {reward.name} looks at single frames; windows are for videoalign"
      )
    return ((1, 1),)
  for item in lengths:
    if not (item.isdecimal() and min(WINDOWS) <= int(item) <= max(WINDOWS)):
      raise ConfigError(f"--windows: {item!r} must be a number of frames in {min(WINDOWS)}..{max(WINDOWS)}")
  sample = reward.make(config, float(shapes.FPS)).sample
  return tuple((length, len(sample(length))) for length in map(int, lengths or WINDOWS))


def read_emphasis(reward: RewardSpec) -> tuple[tuple[str, float], ...]:
  """The factors of `--emphasis`. Raises ConfigError unless they are positive and of corruptions that it sees."""
  sees_time = reward.kind == "video"
  seen = [kind for kind, corruption in preferences.CORRUPTIONS.items() if corruption.on_frames or sees_time]
  factors = []
  for item in _EMPHASIS.value:
    kind, _, factor = item.partition(":")
    try:
      factors.append((kind, float(factor)))
    except ValueError as error:
      raise ConfigError(f"--emphasis: {item!r} is not corruption:factor, as in background:3") from error
    if kind not in seen or not 0.0 < factors[-1][1] < float("inf"):
      raise ConfigError(f"--emphasis: {item!r} must be a positive factor of one of {', '.join(seen)}")
  return tuple(factors)


def init_params(reward: RewardSpec, config: Any) -> dict:
  """Fresh weights; the backbone, and the head of the same kind, from `--init_from` if it is given."""
  params = reward.training.initial_params(config, FLAGS.seed)
  if FLAGS.init_from:
    other, given = folder.load_config(FLAGS.init_from)
    loaded = load_params(FLAGS.init_from, other.abstract_params(given, jnp.float32))
    if given.backbone != config.backbone:
      raise ConfigError(f"--init_from={FLAGS.init_from}: its backbone has other sizes than {reward.name}'s")
    params |= loaded if other.name == reward.name else {"backbone": loaded["backbone"]}
  return params


def score_statistics(objective: Objective, params: dict, batches: int = 45) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation, [R] each, of the scores of clips of training pairs, good and bad alike."""

  @functools.partial(jax.jit, static_argnames="looked_at")
  def score(params, step, window, codec, looked_at):
    key = jax.random.fold_in(jax.random.key(FLAGS.seed + 1), step)
    pairs = draw_batch(
      objective, key, window, looked_at, codec, pairs=FLAGS.pairs, coded=min(FLAGS.pairs, FLAGS.through_codec)
    )
    model = nnx.merge(objective.graphdef, params)
    return preference_loss.read_pairs(model, objective.reward, objective.captions, pairs).scores[0]

  scores = []
  for step in range(batches):
    window, looked_at = objective.windows[step % len(objective.windows)]
    batch = score(params, jnp.int32(step), jnp.int32(window), objective.codec[0], looked_at)
    scores.append(np.asarray(batch).reshape(-1, batch.shape[-1]))
  joined = np.concatenate(scores)
  return joined.mean(axis=0), joined.std(axis=0)


def normalised(objective: Objective, params: dict) -> tuple[Any, dict]:
  """Config and weights whose scores have mean 0 and standard deviation 1 over training clips."""
  mean, std = score_statistics(objective, params)
  print(f"scores: mean {mean}, standard deviation {std}", flush=True)
  return objective.reward.training.with_unit_scores(objective.config, params, mean, std)


def main() -> None:
  model, spec = common.trainable_preset(FLAGS.preset), REWARDS[FLAGS.reward]
  config = spec.training.config()
  template, decoder = reward_text.TEMPLATES[spec.name], config.backbone.decoder
  tokenizer = reward_text.make_tokenizer(decoder.vocab_size)
  objective = make_objective(spec, model, RewardPrompt(tokenizer, template, decoder.vocab_size), config)
  reward = init_params(spec, config)
  run_dir = loop.start_run()
  print(f"{sum(leaf.size for leaf in jax.tree.leaves(reward))} parameters", flush=True)
  params = {"reward": reward, "readers": preference_loss.init_readers(spec, decoder.dim, decoder.vocab_size)}
  optimizer = make_optimizer()
  recent = {term: jnp.zeros(()) for term in preference_loss.term_names(spec)}
  trainer = Trainer(params, jax.tree.map(jnp.copy, params), optimizer.init(params), recent)
  trainer = loop.run_steps(trainer, make_update(objective, optimizer), FLAGS.steps, run_dir)
  config, final = normalised(objective, trainer.average["reward"])
  files = loading.files(spec, config, template, tokenizer)
  folder.save_reward(run_dir / "reward", spec, config, loading.with_backbone_in(final, jnp.float16), files)
  loop.plot_curve(run_dir, ["clip", "caption", "naming", "words"], f"small {spec.name}", ylabel="loss", yscale="log")


if __name__ == "__main__":
  common.run(main)
