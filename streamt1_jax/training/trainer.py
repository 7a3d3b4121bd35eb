"""What a training step changes: weights, their moving average, and the optimiser's state."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from streamt1_jax.typing import IntScalar, Params


class Trainer(NamedTuple):
  """The state of a training.

  Attributes:
    params: weights, nested dicts.
    average: their exponential moving average.
    optimizer: state.
  """

  params: Params
  average: Params
  optimizer: optax.OptState


def begin(params: Params, optimizer: optax.GradientTransformation) -> Trainer:
  """A training before its first step."""
  return Trainer(params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def improved(
  trainer: Trainer, gradients: Params, optimizer: optax.GradientTransformation, step: IntScalar, ema_decay: float
) -> Trainer:
  """The training after one more step.

  Args:
    trainer: before the step.
    gradients: gradients of the loss, a tree like `trainer.params`.
    optimizer: makes updates of gradients.
    step: int32, counted from 0. The average forgets faster at first, since early weights say little.
    ema_decay: decay of the average later on, in [0, 1].
  """
  updates, state = optimizer.update(gradients, trainer.optimizer, trainer.params)
  params = cast(Params, optax.apply_updates(trainer.params, updates))
  decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
  average = cast(Params, optax.incremental_update(params, trainer.average, 1.0 - decay))
  return Trainer(params, average, state)


def count_parameters(params: Params) -> int:
  """Number of weights."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
