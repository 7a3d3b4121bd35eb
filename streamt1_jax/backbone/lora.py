"""Low-rank adapters as PyTrees: a nested dict like the backbone's, with `{"down", "up"}` where it has a `"kernel"`.

  adapter = {"blocks": {"ffn_in": {"down": [L, in, r], "up": [L, r, out]}, ...}}
  merged["blocks"]["ffn_in"]["kernel"] == kernel + scale * down @ up

Source: Wan spec, section 1.7. scale = alpha / rank.
"""

import jax
import jax.numpy as jnp

from streamt1_jax.config import ConfigError
from streamt1_jax.typing import Params


def merge_lora(params: Params, adapter: Params, scale: float) -> Params:
  """Adds an adapter to the kernels it names; computed in float32, cast back to each kernel's dtype.

  Args:
    params: nested dict of weights; not changed.
    adapter: nested dict whose innermost dicts hold `down [..., in, r]` and `up [..., r, out]`.
    scale: alpha / rank.

  Returns:
    Nested dict like `params`; leaves without an adapter are the same arrays.

  Raises:
    ConfigError: the adapter names a layer that `params` has not, or does not fit its kernel.
  """
  return _merge(params, adapter, scale, "")


def _merge(params: Params, adapter: Params, scale: float, path: str) -> Params:
  if set(adapter) == {"down", "up"}:
    return params | {"kernel": _merged_kernel(params, adapter, scale, path)}
  unknown = sorted(set(adapter) - set(params))
  if unknown:
    raise ConfigError(f"the adapter names {path}{unknown[0]}, which the model has not")
  return params | {name: _merge(params[name], part, scale, f"{path}{name}.") for name, part in adapter.items()}


def _merged_kernel(layer: Params, adapter: Params, scale: float, path: str) -> jax.Array:
  kernel = layer["kernel"]
  down, up = (jnp.asarray(adapter[name], jnp.float32) for name in ("down", "up"))
  expected = (*down.shape[:-1], up.shape[-1])
  if down.shape[-1] != up.shape[-2] or kernel.shape != expected:
    raise ConfigError(f"the adapter of {path[:-1]} is {down.shape} by {up.shape}, the kernel is {kernel.shape}")
  delta = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
  return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
