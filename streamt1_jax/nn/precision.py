"""float32 means float32: how exact a model's products are follows from the dtype of its weights.

By default accelerators round the factors of a product of float32: TPUs to bfloat16, NVIDIA GPUs to TensorFloat-32.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

from streamt1_jax.typing import Params


def of_weights(params: Params) -> contextlib.AbstractContextManager:
  """A context for the trace of a model: its products are exact if all its floating weights are float32.

  A precision that the user has chosen (`jax_default_matmul_precision`) stays. On CPUs this changes no bit.
  """
  chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
  if dtypes != {jnp.dtype(jnp.float32)} or chosen is not None:
    return contextlib.nullcontext()
  return jax.default_matmul_precision("highest")
