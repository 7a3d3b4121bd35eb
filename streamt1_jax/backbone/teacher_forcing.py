"""The training view of the causal DiT: all chunks of a clip at once, each with the context it will have when streaming.

  clean chunks ── same blocks, context timestep ── keys and values of every chunk
                                                        │ gathered by `visible`
  noisy chunks ── same blocks, own timesteps ────── attention to visible clean chunks and to itself

The result of a noisy chunk equals that of streaming with the clean chunks committed to memory (tested), so a model
trained here is sampled by `chunk_step` as it is.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from streamt1_jax.backbone import attention, rope
from streamt1_jax.backbone.dit import CausalWanDiT, TextMemory


def _attend(q, k, v, clean_k, clean_v, visible, valid):
  """Attention of one chunk [T, A, D] to itself and to the clean chunks [N, T, A, D] that `visible` [V] names."""
  tokens, heads, width = q.shape
  context = lambda x: x[visible].reshape(-1, heads, width)
  k, v = jnp.concatenate([k, context(clean_k)]), jnp.concatenate([v, context(clean_v)])
  mask = jnp.repeat(jnp.concatenate([jnp.ones(1, bool), valid]), tokens)
  logits = jnp.einsum("qad,kad->aqk", q * width**-0.5, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -jnp.inf), axis=-1).astype(v.dtype)
  return jnp.einsum("aqk,kad->qad", weights, v)


def clip_velocity(
  model: CausalWanDiT,
  noisy: jax.Array,
  clean: jax.Array,
  features: jax.Array,
  context_features: jax.Array,
  first_frame: jax.Array,
  text: TextMemory,
  visible: jax.Array,
  valid: jax.Array,
) -> jax.Array:
  """Velocity of every chunk of one clip (N chunks), given the clean chunks before it.

  Args:
    model: the DiT.
    noisy: [N, F, C, H, W] noisy chunks.
    clean: [N, F, C, H, W] clean chunks.
    features: [N, freq_dim] sinusoids of each noisy chunk's timestep.
    context_features: [freq_dim] sinusoids of the clean pass.
    first_frame: [N] int32 absolute index of each chunk's first latent frame.
    text: the prompt's keys and values.
    visible: [N, V] int32 chunks that each chunk can see besides itself.
    valid: [N, V] bool, which entries of `visible` count.

  Returns:
    [N, F, C, H, W] float32.
  """
  num_chunks, frames = noisy.shape[:2]
  x = jnp.stack([clean, noisy])
  x = jax.vmap(jax.vmap(model.patchify))(x)
  features = jnp.stack([jnp.broadcast_to(context_features[None], features.shape), features])
  per_frame = jnp.broadcast_to(features[:, :, None], (2, num_chunks, frames, features.shape[-1]))
  embedding, projected = jax.vmap(jax.vmap(model.embed_time))(per_frame)
  tables = model.rotary_tables()
  cos, sin = jax.vmap(lambda first: rope.chunk_rotation(tables, first, frames))(first_frame)
  graphdef, blocks = nnx.split(model.blocks)

  def step(x, inputs):
    params, text = inputs
    block = nnx.merge(graphdef, params)
    rows = [row.reshape(2, num_chunks, frames, 1, -1) for row in _modulation(block, projected)]
    qkv = jax.vmap(jax.vmap(lambda x, rows, cos, sin: block.qkv(x, rows, cos, sin)), in_axes=(0, 0, None, None))
    q, k, v = qkv(x, rows, cos, sin)
    attend = jax.vmap(_attend, in_axes=(0, 0, 0, None, None, 0, 0))
    attended = jax.vmap(attend, in_axes=(0, 0, 0, None, None, None, None))(q, k, v, k[0], v[0], visible, valid)
    after = lambda x, attended, rows: block.after_attention(x, attended, rows, text)
    return jax.vmap(jax.vmap(after))(x, attended, rows), None

  x, _ = jax.lax.scan(step, x, (blocks, text))
  return jax.vmap(model.unpatchify)(x[1], embedding[1]).astype(jnp.float32)


def _modulation(block, projected: jax.Array) -> list[jax.Array]:
  """The block's six rows for every chunk of both streams, [2, N, F, 1, M] each, from [2, N, F, 6, M]."""
  return jax.vmap(jax.vmap(block.modulation_rows))(projected)


def chunk_velocity(model: CausalWanDiT, noisy: jax.Array, features: jax.Array, text: TextMemory) -> jax.Array:
  """Velocity of a video's first chunk `[F, C, H, W]`, which sees nothing but itself; `features` is [freq_dim]."""
  features = jnp.broadcast_to(features[None], (noisy.shape[0], features.shape[0]))
  attend = lambda q, k, v, layer: attention.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
  return model(noisy, features, jnp.int32(0), text, attend)[0]
