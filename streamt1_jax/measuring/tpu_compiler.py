"""Compiling for TPUs that are not there: their description, and the shapes of a reward's text at full size."""

from __future__ import annotations

import os
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.typing import DTypeLike

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.qwen2_vl.model import PromptEmbedding
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.typing import Device

_SETTINGS = {
  # The compiler asks the cloud what it runs on, and waits, unless it is told. Any slice will do: it is not used.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  # No TPU is opened, so there is nothing to keep for one process.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def get_devices(topology: str) -> list[Device]:
  """The devices of a slice. Raises ConfigError if there is no such slice, or no compiler."""
  for variable, value in _SETTINGS.items():
    os.environ.setdefault(variable, value)
  # Else JAX looks for TPUs to run on.
  jax.config.update("jax_platforms", "cpu")
  try:
    options = _host_bounds(topology)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
  except Exception as error:
    if "not installed" in str(error):
      raise ConfigError(
        f"--topology={topology}: this needs libtpu, the compiler for TPUs: pip install -e '.[tpu]'"
      ) from error
    raise ConfigError(
      f"--topology={topology}: there is no such slice; known are v5e:1x1 to v5e:16x16, v6e:1x1 to v6e:16x16, v4:2x2x1, "
      f"v5p:2x2x1 to v5p:4x4x4 and tpu7x:2x2x1 ({str(error).splitlines()[0]})"
    ) from error


def _host_bounds(topology: str) -> dict[str, tuple[int, int, int]]:
  """What a slice smaller than a host must say of it: the compiler takes 2x2x1 chips for granted."""
  _, _, text = topology.partition(":")
  sizes = [int(size) for size in text.split("x") if size.isdecimal()]
  if not text or len(sizes) != text.count("x") + 1 or len(sizes) > 3:
    return {}
  x, y, z = sizes + [1] * (3 - len(sizes))
  return {} if x % 2 == 0 and y % 2 == 0 else {"chips_per_host_bounds": (x, y, z)}


def prompt_shapes(spec: RewardSpec, dtype: DTypeLike) -> PromptEmbedding:
  """What `init` of a published reward makes of its instruction text with a prompt of 127 tokens, as shapes.

  `dtype` is the reward's, as in `load_reward`.
  """
  dtype = jnp.bfloat16 if dtype == jnp.int8 else dtype
  text = lambda length: jax.ShapeDtypeStruct((length, spec.make_config().backbone.decoder.dim), dtype)
  read = jax.ShapeDtypeStruct((len(spec.required_text.reward_tokens),), jnp.int32)
  before, after = spec.required_text.length
  return cast(Any, PromptEmbedding)(text(before), text(after), read)
