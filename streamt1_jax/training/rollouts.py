"""Clips that the model itself goes on with, as it does when it streams.

A model that only ever saw true pasts never learned what to do about its own small errors: outlines erode, objects that
cross melt into one. Here the future is determined, so after a past that the model made, the true chunk is still what it
should draw ("self forcing" with exact targets; compare arXiv 2506.08009, which has none and matches distributions).

  true chunks ── up to where the clip begins to be learned ─┐
       noise ── four timesteps, past as when streaming ─────┴─ next chunk ── ... ── made clip, of true beginnings
"""

import io
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from streamt1_jax.backbone.dit import CausalWanDiT, TextMemory
from streamt1_jax.backbone.schedule import denoising_schedule
from streamt1_jax.config import ModelConfig
from streamt1_jax.io import atomic
from streamt1_jax.training import batches
from streamt1_jax.training.batches import ClipKind
from streamt1_jax.training.dataset import CHUNKS, Dataset
from streamt1_jax.training.teacher_forcing import clip_velocity
from streamt1_jax.typing import Params

_TOGETHER = 8  # clips streamed at once


def roll_out(
  backbone: CausalWanDiT,
  model: ModelConfig,
  clips: Float32[Array, "G 7 F C H W"],
  text: TextMemory,
  kind: ClipKind,
  key: PRNGKeyArray,
) -> Float32[Array, "G 7 F C H W"]:
  """The clips, with the chunks that are learned as the model makes them one after the other.

  Args:
    backbone: the DiT.
    model: sizes.
    clips: true chunks.
    text: keys and values of the prompts of every clip, [G, 2, L, A, X, D] each.
    kind: of every clip.
    key: draws distances and noise.
  """
  seen_key, noise_key = jax.random.split(key)
  places = jnp.arange(1, CHUNKS)
  seen_alone = lambda key, kind: batches.draw_seen(key, kind, places, model, 0.0, 0.0)
  seen = jax.vmap(seen_alone)(jax.random.split(seen_key, len(clips)), kind)
  begin = batches.first_learned(kind)
  schedule = denoising_schedule(model.schedule, model.backbone.freq_dim)
  chunks = [clips[:, 0]]
  for chunk in range(1, CHUNKS):
    rows = np.array([*range(chunk), CHUNKS + chunk - 1])
    now = jax.tree.map(lambda x, rows=rows: x[:, rows], seen)
    # For a clip that is not learned yet, some of what it sees is still to come: what is made of that is thrown away.
    past, x0 = jnp.stack(chunks, axis=1), jnp.zeros_like(clips[:, 0])
    for step, sigma in enumerate(schedule.sigmas):
      noise = jax.random.normal(jax.random.fold_in(noise_key, chunk * len(schedule.sigmas) + step), x0.shape)
      x = (1.0 - sigma) * x0 + sigma * noise
      features = jnp.broadcast_to(jnp.asarray(schedule.features[step]), (len(clips), 1, schedule.features.shape[1]))
      context = jnp.asarray(schedule.context_features)
      x0 = x - sigma * clip_velocity(backbone, x[:, None], past, features, context, text, now)[:, 0]
    is_made = (chunk >= begin).reshape(-1, 1, 1, 1, 1)
    chunks.append(jnp.where(is_made, x0, clips[:, chunk]))
  return jnp.stack(chunks, axis=1)


def make_rollouts(
  params: Params, graphdefs: dict[str, nnx.GraphDef], data: Dataset, model: ModelConfig, count: int, seed: int
) -> Float[np.ndarray, "count 7 F C H W"]:
  """The first `count` clips of `data` as the model goes on with them, float16."""

  @jax.jit
  def roll(params, clips, tokens, kind, key):
    backbone, text = (nnx.merge(graphdefs[name], params[name]) for name in ("backbone", "text"))
    encode: Callable = jax.vmap(lambda ids: text(ids, ids > 0) * (ids > 0)[:, None])
    prompts = jax.vmap(backbone.text_memory)(encode(tokens.reshape(-1, tokens.shape[-1])))
    by_clip = jax.tree.map(lambda x: x.reshape(*tokens.shape[:2], *x.shape[1:]), prompts)
    return roll_out(backbone, model, clips, by_clip, kind, key)

  weights = {name: params[name] for name in ("backbone", "text")}
  # No step of the training that follows has this key.
  made, key = [], jax.random.fold_in(jax.random.key(seed), np.iinfo(np.uint32).max)
  for begin in range(0, count, _TOGETHER):
    # The last ones are filled up, so that one program makes all.
    which = np.minimum(np.arange(begin, begin + _TOGETHER), count - 1)
    tokens = jnp.stack([data.tokens[which, 0], data.sink_tokens[which]], axis=1)
    clips = data.clips[which].astype(jnp.float32)
    kind = ClipKind(data.switch[which], data.late[which], data.gap[which])
    rolled = roll(weights, clips, tokens, kind, jax.random.fold_in(key, begin))
    made.append(np.asarray(rolled, np.float16)[: count - begin])
  return np.concatenate(made)


def read_or_make(
  make: Callable[[], Float[np.ndarray, "count 7 F C H W"]], cache: epath.Path
) -> Float[np.ndarray, "count 7 F C H W"]:
  """The clips of the file `cache`, which is made if it is missing; a run that goes on need not make them again."""
  if not cache.exists():
    content = io.BytesIO()
    np.save(content, make(), allow_pickle=False)
    atomic.replace_bytes(cache, content.getvalue())
  with cache.open("rb") as file:
    return np.load(file, allow_pickle=False)
