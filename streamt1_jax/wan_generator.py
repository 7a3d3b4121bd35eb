"""The published model as the search sees it: the causal Wan DiT, its schedule, and Memory Sinking as its memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64, Int32

from streamt1_jax import memory_sinking, recache
from streamt1_jax.backbone import attention
from streamt1_jax.backbone.dit import ANYWHERE, Attend, ChunkMemory, Placement, TextMemory
from streamt1_jax.backbone.schedule import DenoisingSchedule, denoising_schedule, time_features
from streamt1_jax.config import ModelConfig, SearchConfig, SwitchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Eviction
from streamt1_jax.memory_sinking import FinishedChunk, Memory
from streamt1_jax.nn import precision
from streamt1_jax.nn.rotary import frame_turns
from streamt1_jax.parallel.sharding import LAYOUTS, Layout
from streamt1_jax.recache import Forward
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.typing import IntScalar, Latents, Params


@dataclasses.dataclass(frozen=True)
class WanGenerator:
  """Implements `generator.Generator`.

  Attributes:
    config: sizes.
    graphdef: graph definition of the causal DiT.
  """

  config: ModelConfig
  graphdef: nnx.GraphDef

  @functools.cached_property
  def schedule(self) -> DenoisingSchedule:
    return denoising_schedule(self.config.schedule, self.config.backbone.freq_dim)

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    return self.config.latent_shape

  def max_chunks(self, search: SearchConfig) -> int:
    return search.max_chunks(self.config)

  @property
  def sigmas(self) -> Float64[np.ndarray, " S"]:
    return self.schedule.sigmas

  @property
  def memory_layout(self) -> Layout:
    return LAYOUTS["memory"]

  @property
  def chunk_layout(self) -> Layout:
    return LAYOUTS["chunk_memory"]

  def check(self, search: SearchConfig) -> None:
    search.validate_for(self.config)

  def init_memory(self, params: Params, search: SearchConfig) -> Memory:
    """Takes the dtype of the weights."""
    return memory_sinking.empty_memory(self.config, search, _dtype(params))

  def open(self, memory: Memory, search: SearchConfig) -> tuple[Memory, Eviction]:
    return memory_sinking.evict(memory, self.config, search)

  def view(self, memory: Memory, chunk_index: IntScalar, search: SearchConfig) -> attention.MemoryView:
    turns = _frame_turns(self.config.backbone.head_dim, memory_sinking.longest_distance(self.config, search))
    return memory_sinking.view(memory, self._first_frame(chunk_index), turns, self.config, search)

  def denoise(
    self,
    params: Params,
    x: Latents,
    step: IntScalar,
    text: TextMemory,
    view: attention.MemoryView,
    execution: Execution,
    image: Float32[Array, "C H W"] | None = None,
  ) -> Latents:
    """x0 = x - sigma v, with the velocity v of the flow from data to noise.

    With an `image` the first frame has timestep 0 and stays what it is (LongLive 2.0).
    """
    features = jnp.asarray(self.schedule.features)[step]
    sigma = jnp.asarray(self.schedule.sigmas, jnp.float32)[step]
    if image is None:
      return x - sigma * self.velocity(params, x, features, text, view, execution)[0]
    still = jnp.asarray(time_features(np.asarray(0.0), self.config.backbone.freq_dim))
    features = jnp.broadcast_to(features[None], (len(x), len(features))).at[0].set(still)
    x = x.at[0].set(image)
    x0 = x - sigma * self.velocity(params, x, features, text, view, execution)[0]
    return x0.at[0].set(image)

  def clean_pass(
    self,
    params: Params,
    latents: Latents,
    text: TextMemory,
    view: attention.MemoryView,
    execution: Execution,
  ) -> FinishedChunk:
    """Keys and values of the chunk at the context timestep."""
    features = jnp.asarray(self.schedule.context_features)
    chunk = self.velocity(params, latents, features, text, view, execution)[1]
    return FinishedChunk(chunk.k, chunk.v, latents)

  def commit(self, memory: Memory, chunk: FinishedChunk, flags: Flags, chunk_index: IntScalar) -> Memory:
    return memory_sinking.commit(memory, chunk, flags, self._first_frame(chunk_index), self.config)

  def gather(self, memories: Memory, parents: Int32[Array, " K"]) -> Memory:
    return memory_sinking.gather(memories, parents)

  def velocity(
    self,
    params: Params,
    latents: Latents,
    features: Float32[Array, "*frames freq_dim"],
    text: TextMemory,
    view: attention.MemoryView,
    execution: Execution,
  ) -> tuple[Latents, ChunkMemory]:
    """Velocity of one chunk at one timestep, and the keys and values it would commit.

    `features` are the sinusoids of one timestep, or of one per latent frame; the rest is as in `denoise`.
    """
    options = execution.attention, execution.divide_attention
    attend = lambda q, k, v, layer: attention.attend_with_memory(q, k, v, view, layer, *options)
    return self._forward(params, latents, features, text, attend, execution)

  def _forward(
    self, params: Params, latents: Latents, features: jax.Array, text: TextMemory, attend: Attend, execution: Execution
  ) -> tuple[Latents, ChunkMemory]:
    if features.ndim == 1:
      features = jnp.broadcast_to(features[None], (latents.shape[0], *features.shape))
    with precision.of_weights(params):
      return nnx.merge(self.graphdef, params)(latents, features, text, attend, _placement(execution))

  def recache(
    self,
    params: Params,
    memory: Memory,
    chunk_index: IntScalar,
    text: TextMemory,
    search: SearchConfig,
    switch: SwitchConfig,
    execution: Execution,
  ) -> Memory:
    """See `recache.recache`; `chunk_index` is the next chunk's."""
    forward = self.clean_forward(params, text, execution)
    return recache.recache(
      memory, forward, self._first_frame(chunk_index), self.config, search, switch, execution
    ).memory

  def clean_forward(self, params: Params, text: TextMemory, execution: Execution) -> Forward:
    """The clean pass under a prompt, of any number of frames and with any self-attention."""
    features = jnp.asarray(self.schedule.context_features)
    return lambda latents, attend: self._forward(params, latents, features, text, attend, execution)

  def text_memory(self, params: Params, embeddings: Float[Array, "X E"]) -> TextMemory:
    """Cross-attention keys and values of a prompt's text embeddings [X, E]: what the search passes as `text`."""
    with precision.of_weights(params):
      return nnx.merge(self.graphdef, params).text_memory(embeddings.astype(_dtype(params)))

  def _first_frame(self, chunk_index: IntScalar) -> IntScalar:
    return chunk_index * self.config.chunk_frames


_frame_turns = functools.cache(frame_turns)


def _dtype(params: Params) -> jnp.dtype:
  return jax.tree.leaves(params)[0].dtype


def _placement(execution: Execution) -> Placement:
  """Where tokens lie: divided on the mesh axis `seq`, or as the compiler likes where that axis has size 1."""
  if not execution.divides("patch"):
    return ANYWHERE
  to_tokens, to_heads = execution.place("frame", "patch", "projected"), execution.place("frame", "token", "head")
  # Both constraints are needed: with `to_heads` alone the compiler might gather what queries, keys and values are
  # computed from.
  return Placement(
    tokens=execution.place("frame", "patch"), to_heads=lambda x: to_heads(to_tokens(x)), to_tokens=to_tokens
  )
