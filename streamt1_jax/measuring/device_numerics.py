"""Whether a device computes what the host computes in float32: attention, rewards, and a recorded search."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from streamt1_jax import drivers, shipped
from streamt1_jax.backbone.attention import COMPILED_ON
from streamt1_jax.config import SearchConfig
from streamt1_jax.data import shapes
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import random_search, reward_calls
from streamt1_jax.measuring.device_sizes import NotHere, Sizes
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.rewards.table import LEARNED_REWARDS
from streamt1_jax.typing import Device, Implementation

_CHUNKS = 3
# Largest relative error that is called equal. Products of float32 are exact to 1e-7 and there are some thousands in a
# row; bfloat16 has 8 bits, and every chunk reads what the ones before it left.
_EQUAL = {"float32": 1e-4, "bfloat16": 2e-2}
# Precision of products. The host's are exact. The device computes as it does for users, who choose nothing: so a model
# that no longer asks for exact products by itself is found.
_REFERENCE, _CHECKED = "highest", None
_GOLDEN = "case_A"
_GOLDEN_TOLERANCE = 5e-5  # of latents, as tests/golden/README.md has it


def host() -> Device:
  """The CPU beside the device. Raises NotHere where JAX was told to use the device alone."""
  try:
    return jax.devices("cpu")[0]
  except RuntimeError as error:
    raise NotHere("JAX has no CPU to compare with: JAX_PLATFORMS must name cpu too, as in cuda,cpu") from error


def attention(sizes: Sizes, implementation: Implementation) -> dict[str, Any]:
  """Relative errors of the latents of a video, in both dtypes, against the fold in float32 on the host."""
  platform = jax.default_backend()
  # Interpreted, it says nothing of the device.
  if platform not in COMPILED_ON[implementation]:
    raise NotHere(f"{implementation} is not compiled for a {platform}")
  expected = _latents(sizes, "fold", jnp.float32, host(), _REFERENCE)
  found: dict[str, Any] = {}
  for name in _EQUAL:
    made = _latents(sizes, implementation, jnp.dtype(name), jax.devices()[0], _CHECKED)
    found[f"{name}_error"] = relative_error(made, expected)
  return found | {"equal": all(found[f"{name}_error"] <= limit for name, limit in _EQUAL.items())}


def _latents(
  sizes: Sizes, implementation: Implementation, dtype: DTypeLike, device: Device, precision: str | None
) -> np.ndarray:
  """Latents of a streamed video with random weights, made on `device`."""
  # Every device and dtype gets what the host draws in float32: numbers drawn in another dtype are others.
  with jax.default_device(host()):
    built = random_search.build(sizes.numerics, Execution(attention=implementation), jnp.float32, _CHUNKS, False)
    narrow = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    drawn = jax.tree.map(narrow, (built.params, built.condition))
  params, condition = jax.device_put(drawn, device)
  search = SearchConfig.streaming(built.model)
  with jax.default_device(device), jax.default_matmul_precision(precision):
    chunks = drivers.stream(params, condition, built.models, search, num_chunks=_CHUNKS, seed=0)
    return np.stack([np.asarray(trace.latents, np.float64) for trace in chunks])


def relative_error(found: Any, expected: Any) -> float:
  """Norm of the difference over that of what is expected; infinite where something is not finite."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
  return float(error) if np.isfinite(error) else float("inf")


def rewards(sizes: Sizes) -> dict[str, Any]:
  """Relative errors of the small learned rewards, heads included, against float32 on the host.

  What a reward loses in bfloat16 depends on its weights. So a device may be twice as far from float32 as the host is in
  the same dtype.
  """
  del sizes
  found: dict[str, Any] = {}
  equal = True
  for name in LEARNED_REWARDS:
    expected = _judged(name, jnp.float32, host(), _REFERENCE)
    for dtype, limit in _EQUAL.items():
      error = relative_error(_judged(name, jnp.dtype(dtype), None, _CHECKED), expected)
      of_host = relative_error(_judged(name, jnp.dtype(dtype), host(), _REFERENCE), expected)
      found |= {f"{name}_{dtype}_error": error, f"{name}_{dtype}_error_of_host": of_host}
      equal &= error <= max(limit, 2 * of_host)
  return found | {"equal": equal}


def _judged(name: str, dtype: DTypeLike, device: Device | None, precision: str | None) -> np.ndarray:
  """`_scores` on a device, None for the default one."""
  with jax.default_device(device), jax.default_matmul_precision(precision):
    return _scores(name, dtype)


def _scores(name: str, dtype: DTypeLike) -> np.ndarray:
  """Scores of four clips of noise by a reward of the small model."""
  part = shipped.checkpoint() / REWARDS_FOLDER / name
  spec, _ = folder.load_config(part)
  loaded = folder.load_reward(part, fps=shapes.FPS, dtype=dtype)
  condition = loaded.reward.init(loaded.params, loaded.prompt(shapes.caption(*shapes.all_scenes()[0])))
  structs = reward_calls.clip_shapes(spec, 12, 2, 2, (shapes.FRAME_SIZE, shapes.FRAME_SIZE, 3))
  draw = np.random.default_rng(0).integers
  clips = [jnp.asarray(draw(256, size=struct.shape, dtype=np.uint8)) for struct in structs]
  return np.asarray(jax.jit(reward_calls.judge(spec, loaded.reward))(loaded.params, condition, *clips))


def golden(sizes: Sizes) -> dict[str, Any]:
  """A recorded search of the released program, replayed: survivors and latents.

  The recording and its reader are tests. Raises NotHere in a folder without them.
  """
  del sizes
  try:
    support = importlib.import_module("tests.golden_support")
  except ImportError as error:
    raise NotHere("the recorded searches are in a checkout alone: run this in its folder") from error
  path = pathlib.Path(support.__file__ or "").parent / "golden" / f"{_GOLDEN}.npz"
  if not path.exists():
    raise NotHere(f"there is no {path}")
  with jax.default_matmul_precision("highest"):
    run = support.replay(support.load_case(path), "one_device")
  survivors = np.stack([block.trace.survivor for block in run.blocks])
  made = np.stack([_per_candidate(block.trace.steps["x0"]) for block in run.blocks])
  error = float(np.abs(made - run.case.arrays["x0"]).max())
  same = bool((survivors == run.case.arrays["surv_cand"]).all())
  return {"same_survivors": same, "largest_error": error, "equal": same and error <= _GOLDEN_TOLERANCE}


def _per_candidate(x0: Any) -> np.ndarray:
  """[K, B, ...] to [N, ...]."""
  return np.asarray(x0, np.float64).reshape(-1, *np.shape(x0)[2:])
