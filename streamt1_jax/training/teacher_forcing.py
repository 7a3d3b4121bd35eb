"""The training view of the causal DiT: all chunks of a clip at once, each with the context it will have when streaming.

  clean chunks ── same blocks, context timestep ── keys and values of every chunk
                                                        │ gathered by `visible`
  noisy chunks ── same blocks, own timesteps ────── attention to visible clean chunks and to itself

The result of a noisy chunk equals that of streaming with the clean chunks committed to memory (tested), so a model
trained here is sampled by `chunk_step` as it is.

Batched by hand, unlike the rest of the package: everything but attention sees one long row of tokens, the chunks of a
batch folded into the frame axis. Under `vmap` the gradient of every weight would sum over two axes at once. XLA's CPU
backend then transposes both operands, and training takes 1.8 times as long.

G: clips of a batch, or prompts; R: chunks of one of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from streamt1_jax.backbone import attention
from streamt1_jax.backbone.dit import CausalWanDiT, TextMemory
from streamt1_jax.nn import rotary
from streamt1_jax.typing import HostArray


class Seen(NamedTuple):
  """What the chunks of clips see besides themselves, clean ones first, then noisy ones; a batch has a leading G.

  Attributes:
    chunks: clean chunks.
    valid: which of them count.
    distance: latent frames from the first of the chunk back to the first of what it sees.
    prompt: under which of the clip's prompts the chunk is.
  """

  chunks: Int32[Array, "*G rows V"]
  valid: Bool[Array, "*G rows V"]
  distance: Int32[Array, "*G rows V"]
  prompt: Int32[Array, "*G rows"]


def clip_velocity(
  model: CausalWanDiT,
  noisy: Float[Array, "G R F C H W"],
  clean: Float[Array, "G N F C H W"],
  features: Float32[Array, "G R freq_dim"],
  context_features: Float32[HostArray, " freq_dim"],
  text: TextMemory,
  seen: Seen,
) -> Float[Array, "G R F C H W"]:
  """Velocities of noisy chunks of G clips of N chunks, given the clean chunks that they see.

  Args:
    model: the DiT.
    noisy: noisy chunks.
    clean: clean chunks.
    features: sinusoids of each noisy chunk's timestep.
    context_features: sinusoids of the clean pass.
    text: keys and values of the P prompts of every clip, [G, P, L, A, X, D] each.
    seen: what the N + R chunks see.
  """
  groups, num_clean = clean.shape[:2]
  context_features = jnp.broadcast_to(context_features, (groups, num_clean, context_features.shape[0]))
  both = lambda clean, noisy: jnp.concatenate([clean, noisy], axis=1)
  turns = rotary.turns_of(rotary.frame_turns(model.config.head_dim, model.config.max_frames), -seen.distance)
  attend_clip = jax.vmap(functools.partial(_attend_clip, num_clean=num_clean))
  flow = _velocity(
    model,
    both(clean, noisy),
    both(context_features, features),
    text,
    lambda q, k, v: attend_clip(q, k, v, seen, turns),
    lambda q, text: jax.vmap(_attend_prompts)(q, text, seen.prompt),
  )
  return flow[:, num_clean:]


def chunk_velocity(
  model: CausalWanDiT, noisy: Float[Array, "G R F C H W"], features: Float32[Array, "G R freq_dim"], text: TextMemory
) -> Float[Array, "G R F C H W"]:
  """Velocity of the first chunks of videos, which see nothing but themselves.

  Args:
    model: the DiT.
    noisy: noisy chunks.
    features: sinusoids of each chunk's timestep.
    text: keys and values of the G prompts, [G, L, A, X, D] each.
  """
  alone = lambda q, k, v: attention.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
  of_prompt = lambda q, text: attention.attend(q.reshape(-1, *q.shape[2:]), text.k, text.v).reshape(q.shape)
  return _velocity(model, noisy, features, text, jax.vmap(jax.vmap(alone)), jax.vmap(of_prompt))


def _attend_prompts(q: jax.Array, text: TextMemory, prompt: jax.Array) -> jax.Array:
  """Cross-attention of a clip's chunks [R, T, A, D], each to its own one of P prompts, [P, A, X, D] each."""
  return jax.vmap(attention.attend)(q, text.k[prompt], text.v[prompt])


def _attend_clip(q, k, v, seen: Seen, turns: rotary.FrameTurns, *, num_clean: int) -> jax.Array:
  """Attention of a clip's chunks [R, T, A, D], clean ones first: each to itself and to clean ones it sees."""
  attend = jax.vmap(_attend_chunk, in_axes=(0, 0, 0, None, None, 0, 0, 0))
  return attend(q, k, v, k[:num_clean], v[:num_clean], seen.chunks, seen.valid, turns)


def _attend_chunk(q, k, v, clean_k, clean_v, visible, valid, turns: rotary.FrameTurns):
  """Attention of one chunk [T, A, D] to itself and to the clean chunks [N, T, A, D] that `visible` [V] names.

  `turns` [V, D] bring their keys to where the chunk sees them: there are fewer keys to turn than queries.
  """
  tokens, heads, width = q.shape
  seen_k, seen_v = clean_k[visible], clean_v[visible]
  seen_k = jax.vmap(rotary.turn)(seen_k, jax.tree.map(lambda x: x[:, None, None], turns)).astype(k.dtype)
  row = lambda x: x.reshape(-1, heads, width)
  k, v = jnp.concatenate([k, row(seen_k)]), jnp.concatenate([v, row(seen_v)])
  mask = jnp.repeat(jnp.concatenate([jnp.ones(1, bool), valid]), tokens)
  logits = jnp.einsum("qad,kad->aqk", q * width**-0.5, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -jnp.inf), axis=-1).astype(v.dtype)
  return jnp.einsum("aqk,kad->qad", weights, v)


def _velocity(
  model: CausalWanDiT,
  chunks: jax.Array,
  features: jax.Array,
  text: TextMemory,
  attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  cross_attend: Callable[[jax.Array, TextMemory], jax.Array],
) -> jax.Array:
  """Velocities of chunks, [G, R, F, C, H, W] both.

  `attend` and `cross_attend` take and give [G, R, T, A, D]; the latter takes a block's text memory, too.
  """
  groups, count, frames = chunks.shape[:3]
  x = model.patchify(chunks.reshape(-1, *chunks.shape[3:]))
  embedding, projected = model.embed_time(features.reshape(groups * count, -1))
  embedding, projected = jnp.repeat(embedding, frames, axis=0), jnp.repeat(projected, frames, axis=0)
  cos, sin = (jnp.tile(angles, (groups * count, 1, 1)) for angles in model.rotation(frames))
  by_chunk = lambda x: x.reshape(groups, count, -1, *x.shape[2:])
  graphdef, blocks = nnx.split(model.blocks)

  # What is cheap to compute again is not kept: stacking it for the backward pass costs more.
  @jax.checkpoint
  def step(x, inputs):
    params, text = inputs
    block = nnx.merge(graphdef, params)
    rows = block.modulation_rows(projected)
    q, k, v = block.qkv(x, rows, cos, sin)
    attended = attend(by_chunk(q), by_chunk(k), by_chunk(v)).reshape(q.shape)
    cross = lambda q: cross_attend(by_chunk(q), text).reshape(q.shape)
    return block.with_cross_attention(x, attended, rows, cross), None

  # Blocks, [L, ...], are behind the axes of clips and prompts.
  by_block = lambda t: jnp.moveaxis(t, -4, 0)
  x, _ = jax.lax.scan(step, x, (blocks, jax.tree.map(by_block, text)))
  return model.unpatchify(x, embedding).reshape(chunks.shape).astype(jnp.float32)
