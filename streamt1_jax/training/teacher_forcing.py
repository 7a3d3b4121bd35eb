"""The training view of the causal DiT: all chunks of a clip at once, each with the context it will have when streaming.

  clean chunks ── same blocks, context timestep ── keys and values of every chunk
                                                        │ gathered by `visible`
  noisy chunks ── same blocks, own timesteps ────── attention to visible clean chunks and to itself

The result of a noisy chunk equals that of streaming with the clean chunks committed to memory (tested), so a model
trained here is sampled by `chunk_step` as it is.

Batched by hand, unlike the rest of the package: everything but attention sees one long row of tokens, the chunks of a
batch folded into the frame axis. Under `vmap` the gradient of every weight would sum over two axes at once. XLA's CPU
backend then transposes both operands, and training takes 1.8 times as long.

G: prompts of a batch; R: chunks of one prompt.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from streamt1_jax.backbone import attention
from streamt1_jax.backbone.dit import CausalWanDiT, TextMemory
from streamt1_jax.nn import rotary
from streamt1_jax.typing import HostArray


def clip_velocity(
  model: CausalWanDiT,
  noisy: Float[Array, "G N F C H W"],
  clean: Float[Array, "G N F C H W"],
  features: Float32[Array, "G N freq_dim"],
  context_features: Float32[HostArray, " freq_dim"],
  first_frame: Int32[Array, "G N"],
  text: TextMemory,
  visible: Int32[Array, "G N V"],
  valid: Bool[Array, "G N V"],
  moved: Int32[Array, "G N V"] | None = None,
) -> Float[Array, "G N F C H W"]:
  """Velocity of every chunk of G clips of N chunks, given the clean chunks before it.

  Args:
    model: the DiT.
    noisy: noisy chunks.
    clean: clean chunks.
    features: sinusoids of each noisy chunk's timestep.
    context_features: sinusoids of the clean pass.
    first_frame: absolute index of each chunk's first latent frame.
    text: keys and values of the G prompts, [G, L, A, X, D] each.
    visible: chunks that each chunk can see besides itself.
    valid: which entries of `visible` count.
    moved: latent frames by which the keys of a visible chunk move, as if it had been committed earlier
      or later; nothing moves if None.
  """
  num_chunks = noisy.shape[1]
  context_features = jnp.broadcast_to(context_features.reshape(1, 1, -1), features.shape)
  both = lambda clean, noisy: jnp.concatenate([clean, noisy], axis=1)
  turns = rotary.frame_turns(model.config.head_dim, model.config.max_frames)
  # Distances from every chunk to those it sees, as the search's memory has them.
  distance = first_frame[:, :, None] - jax.vmap(jnp.take)(first_frame, visible) - (0 if moved is None else moved)
  seen = rotary.turns_of(turns, -distance)
  attend = jax.vmap(_attend_clip)
  flow = _velocity(
    model,
    both(clean, noisy),
    both(context_features, features),
    text,
    lambda q, k, v: attend(q, k, v, visible, valid, seen),
  )
  return flow[:, num_chunks:]


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
  return _velocity(model, noisy, features, text, jax.vmap(jax.vmap(alone)))


def _attend_clip(q, k, v, visible, valid, turns: rotary.FrameTurns) -> jax.Array:
  """Attention of a clip's 2 N chunks [2 N, T, A, D], clean ones first: each to itself and to clean ones it sees."""
  num_chunks = visible.shape[0]
  attend = jax.vmap(_attend_chunk, in_axes=(0, 0, 0, None, None, 0, 0, 0))
  visible, valid, turns = jax.tree.map(lambda x: jnp.concatenate([x, x]), (visible, valid, turns))
  return attend(q, k, v, k[:num_chunks], v[:num_chunks], visible, valid, turns)


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
) -> jax.Array:
  """Velocities of chunks, [G, R, F, C, H, W] both; `attend` takes and gives [G, R, T, A, D]."""
  groups, count, frames = chunks.shape[:3]
  x = model.patchify(chunks.reshape(-1, *chunks.shape[3:]))
  embedding, projected = model.embed_time(features.reshape(groups * count, -1))
  embedding, projected = jnp.repeat(embedding, frames, axis=0), jnp.repeat(projected, frames, axis=0)
  cos, sin = (jnp.tile(angles, (groups * count, 1, 1)) for angles in model.rotation(frames))
  by_chunk = lambda x: x.reshape(groups, count, -1, *x.shape[2:])
  by_prompt = lambda x: x.reshape(groups, -1, *x.shape[2:])
  graphdef, blocks = nnx.split(model.blocks)

  # What is cheap to compute again is not kept: stacking it for the backward pass costs more.
  @jax.checkpoint
  def step(x, inputs):
    params, text = inputs
    block = nnx.merge(graphdef, params)
    rows = block.modulation_rows(projected)
    q, k, v = block.qkv(x, rows, cos, sin)
    attended = attend(by_chunk(q), by_chunk(k), by_chunk(v)).reshape(q.shape)
    cross = lambda q: jax.vmap(attention.attend)(by_prompt(q), text.k, text.v).reshape(q.shape)
    return block.with_cross_attention(x, attended, rows, cross), None

  x, _ = jax.lax.scan(step, x, (blocks, jax.tree.map(lambda t: t.swapaxes(0, 1), text)))
  return model.unpatchify(x, embedding).reshape(chunks.shape).astype(jnp.float32)
