"""Trains a small HPSv3 or VideoAlign on pairs of clips of the shapes world; the first clip is the better one.

  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 FLAGFILES=experiments/flagfiles
  REWARD="python -m experiments.train.reward"
  $REWARD --flagfile=$FLAGFILES/train_hpsv3.flags --run_dir=runs/hpsv3_stage1
  $REWARD --flagfile=$FLAGFILES/train_hpsv3_refine.flags --init_from=runs/hpsv3_stage1/reward --run_dir=runs/hpsv3
  $REWARD --flagfile=$FLAGFILES/train_videoalign.flags --init_from=runs/hpsv3/reward --run_dir=runs/videoalign_stage1
  $REWARD --flagfile=$FLAGFILES/train_videoalign_speed.flags --init_from=runs/videoalign_stage1/reward \
    --run_dir=runs/videoalign_stage2
  $REWARD --flagfile=$FLAGFILES/train_videoalign_refine.flags --init_from=runs/videoalign_stage2/reward \
    --run_dir=runs/videoalign

The architecture is that of the published model, the sizes are `shapes_config()`. The loss is Bradley and Terry's,
-log sigmoid(r_better - r_worse), over three kinds of pairs (`streamt1_jax.training.preferences`):

  the caption's clip against a corrupted one
  the right caption against one that differs in an attribute, with the same clip
  the two clips exchanged, where the "corrupted" one shows what the other caption says

VideoAlign's three scores are trained one by one: each must fall with the corruptions that concern it and stay with the
others. Linear readers, which are thrown away in the end, must name from the media tokens which colours have an object
and the attributes of the object of every colour, and foretell the caption word by word: this is how Qwen2-VL learned to
see and to read before it became a reward. The first steps do nothing but name, on more clips than pairs could be
afforded. With `--comparing_weight` more readers say, where everything about an object or the background has been said,
which of it is true and what the clip shows instead: without such readers a small VideoAlign never compared directions,
nor speeds. The optimiser is Adam; what is kept is the exponential moving average.

Written to `run_dir`: `checkpoints/` (to resume), `reward/` (the folder that `rewards.folder.load_reward` reads: the
final averages in float16, the head in float32), `loss.jsonl` (the flags, then a row every few steps), `loss.png`.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from flax import nnx

from streamt1_jax import shipped
from streamt1_jax.cli import command, flag_types, training_flags
from streamt1_jax.config import ConfigError
from streamt1_jax.data import shapes
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.qwen2_vl import loading
from streamt1_jax.rewards.qwen2_vl.prompts import RewardPrompt
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.training import corruptions, loop, reward, reward_text
from streamt1_jax.training.codec import load_codec
from streamt1_jax.training.preferences import PairConfig
from streamt1_jax.training.reward import WINDOWS, Objective, RewardTraining
from streamt1_jax.training.trainer import count_parameters


def define_flags(values: flags.FlagValues) -> None:
  """Those of all trainings, and the fields of `RewardTraining`."""
  training_flags.define(values)
  trainable = [name for name, spec in REWARDS.items() if spec.training]
  flags.DEFINE_enum("reward", None, trainable, "Which reward.", flag_values=values, required=True)
  codec = "Trained codec parameters: some pairs go through it. The small model's by default."
  flag_types.define_path(values, "codec_dir", None, codec)
  backbone = "Folder of a reward whose backbone to go on from, of either kind."
  flag_types.define_path(values, "init_from", None, backbone)
  windows = "Frames of VideoAlign's windows, in turn: 57,9; most that a search shows, and 30 s, by default."
  flag_types.define_list(values, "windows", [], windows)
  emphasis = "Corruptions to be drawn more often: background:3,direction:2."
  flag_types.define_list(values, "emphasis", [], emphasis)
  integer, number = flag_types.define_integer, flag_types.define_float
  integer(values, "steps", 2000, "Optimiser steps.", 1)
  seeing = "First steps in which only the vision tower learns, by naming attributes."
  integer(values, "seeing_steps", 0, seeing, 0)
  integer(values, "seeing_pairs", 64, "Clips in their batches.", 1)
  integer(values, "pairs", 16, "Pairs in a batch; a quarter of them in the longest window.", 1)
  integer(values, "through_codec", 4, "How many of them go through the codec.", 0)
  number(values, "learning_rate", 1.5e-3, "Peak of the learning rate (Adam).", 0.0)
  number(values, "ema_decay", 0.995, "Decay of the weights' moving average.", 0.0, 1.0)
  number(values, "naming_weight", 0.5, "Weight of the loss of the readers that name attributes.", 0.0)
  words = "Weight of the loss of the reader that foretells the caption's words."
  number(values, "words_weight", 3.0, words, 0.0)
  comparing = "Weight of the losses where everything about an object or the background is said."
  number(values, "comparing_weight", 0.0, comparing, 0.0)
  number(values, "stay_weight", 0.02, "Weight of the squared change of scores that must not change.", 0.0)
  batches = "Batches over which the final scores get mean 0 and standard deviation 1."
  integer(values, "score_batches", 45, batches, 1)


def read_windows(values: flags.FlagValues) -> tuple[tuple[int, int], ...]:
  """The lengths of `--windows`, and how many frames of each are looked at; an image reward looks at single frames.

  Raises ConfigError for lengths outside 9..477, and for any length where the reward judges images.
  """
  spec, lengths = REWARDS[values.reward], values.windows
  if spec.on_frames:
    if lengths:
      raise ConfigError(
        f"--windows={','.join(lengths)}: {spec.name} looks at single frames; windows are for videoalign"
      )
    return ((1, 1),)
  for item in lengths:
    if not (item.isdecimal() and min(WINDOWS) <= int(item) <= max(WINDOWS)):
      raise ConfigError(f"--windows: {item!r} must be a number of frames in {min(WINDOWS)}..{max(WINDOWS)}")
  judge: Any = spec.make(spec.required_training.config(), float(shapes.FPS))
  return tuple((length, len(judge.sample(length))) for length in map(int, lengths or WINDOWS))


def read_emphasis(values: flags.FlagValues) -> tuple[tuple[str, float], ...]:
  """The factors of `--emphasis`. Raises ConfigError unless they are positive, of corruptions that the reward sees."""
  on_frames = REWARDS[values.reward].on_frames
  seen = [kind for kind, corruption in corruptions.CORRUPTIONS.items() if corruption.on_frames or not on_frames]
  factors = []
  for item in values.emphasis:
    kind, _, factor = item.partition(":")
    try:
      factors.append((kind, float(factor)))
    except ValueError as error:
      raise ConfigError(f"--emphasis: {item!r} is not corruption:factor, as in background:3") from error
    if kind not in seen or not 0.0 < factors[-1][1] < float("inf"):
      raise ConfigError(f"--emphasis: {item!r} must be a positive factor of one of {', '.join(seen)}")
  return tuple(factors)


def run(values: flags.FlagValues) -> None:
  """Trains, gives the scores unit statistics and stores the reward."""
  model, spec = training_flags.trainable_preset(values.preset), REWARDS[values.reward]
  training = RewardTraining(**training_flags.fields_of(values, RewardTraining))
  small = spec.required_training
  config, template = small.config(), reward_text.TEMPLATES[spec.name]
  emphasis, windows = read_emphasis(values), read_windows(values)
  codec_dir = values.codec_dir or shipped.checkpoint() / "codec"
  training_flags.require_folder("codec_dir", codec_dir)
  params = reward.init_params(spec, config, training.seed, values.init_from)
  codec, codec_params = nnx.split(load_codec(codec_dir, model), nnx.Param)
  this = training_flags.start_run(values)
  print(f"{count_parameters(params)} parameters", flush=True)
  vocab_size = config.backbone.decoder.vocab_size
  tokenizer = reward_text.make_tokenizer(vocab_size)
  objective = Objective(
    reward=spec,
    config=config,
    graphdef=small.graphdef(config),
    prompt=RewardPrompt(tokenizer, template, vocab_size),
    tokenizer=tokenizer,
    codec=(nnx.to_pure_dict(codec_params), codec),
    pairs=PairConfig(on_frames=spec.on_frames, emphasis=emphasis),
    windows=windows,
  )
  optimizer = reward.make_optimizer(training)
  update = reward.make_update(objective, optimizer, training)
  trained = loop.run_steps(reward.begin(params, objective, optimizer), update, training.steps, this)
  average = trained.state.average["reward"]
  mean, std = reward.score_statistics(average, objective, training, values.score_batches)
  print(f"scores: mean {mean}, standard deviation {std}", flush=True)
  config, final = small.with_unit_scores(average, config, mean, std)
  stored, texts = loading.with_backbone_in(final, jnp.float16), loading.files(spec, config, template, tokenizer)
  folder.save_reward(this.folder / "reward", spec, config, stored, texts)
  loop.plot_curve(this, ["clip", "caption", "naming", "words"], f"small {spec.name}", ylabel="loss", yscale="log")


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
