"""A module without its weights."""

from collections.abc import Callable

from flax import nnx

from streamt1_jax.typing import Params


def abstract_module(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
  """Graph definition of the module that `build` makes, and the shapes of its parameters; nothing is allocated."""
  graphdef, params = nnx.split(nnx.eval_shape(build), nnx.Param)
  return graphdef, nnx.to_pure_dict(params)
