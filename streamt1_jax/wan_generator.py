"""The published model as the search sees it: the causal Wan DiT, its schedule, and Memory Sinking as its memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64, Int32

from streamt1_jax import memory_sinking
from streamt1_jax.backbone import attention
from streamt1_jax.backbone.dit import ANYWHERE, ChunkMemory, Placement, TextMemory
from streamt1_jax.backbone.schedule import DenoisingSchedule, denoising_schedule
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Eviction
from streamt1_jax.memory_sinking import Memory
from streamt1_jax.nn.rotary import RotaryTables, rotary_tables
from streamt1_jax.parallel.sharding import LAYOUTS, Layout
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

  @functools.cached_property
  def rotary(self) -> RotaryTables:
    c, patch = self.config, self.config.backbone.patch_size
    return rotary_tables(c.backbone.head_dim, c.backbone.max_frames, c.latent_height // patch, c.latent_width // patch)

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    return self.config.latent_shape

  @property
  def max_chunks(self) -> int:
    return self.config.max_chunks

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
    return memory_sinking.evict(memory, self.rotary, self.config, search)

  def view(self, memory: Memory) -> attention.MemoryView:
    return memory_sinking.view(memory)

  def denoise(
    self,
    params: Params,
    x: Latents,
    step: IntScalar,
    chunk_index: IntScalar,
    text: TextMemory,
    view: attention.MemoryView,
    execution: Execution,
  ) -> Latents:
    """x0 = x - sigma v, with the velocity v of the flow from data to noise."""
    features = jnp.asarray(self.schedule.features)[step]
    sigma = jnp.asarray(self.schedule.sigmas, jnp.float32)[step]
    return x - sigma * self.velocity(params, x, features, chunk_index, text, view, execution)[0]

  def clean_pass(
    self,
    params: Params,
    latents: Latents,
    chunk_index: IntScalar,
    text: TextMemory,
    view: attention.MemoryView,
    execution: Execution,
  ) -> ChunkMemory:
    """Keys and values of the chunk at the context timestep."""
    features = jnp.asarray(self.schedule.context_features)
    return self.velocity(params, latents, features, chunk_index, text, view, execution)[1]

  def commit(self, memory: Memory, chunk: ChunkMemory, flags: Flags, chunk_index: IntScalar) -> Memory:
    return memory_sinking.commit(memory, chunk, flags, self._first_frame(chunk_index), self.config)

  def gather(self, memories: Memory, parents: Int32[Array, " K"]) -> Memory:
    return memory_sinking.gather(memories, parents)

  def velocity(
    self,
    params: Params,
    latents: Latents,
    features: Float32[Array, " freq_dim"],
    chunk_index: IntScalar,
    text: TextMemory,
    view: attention.MemoryView,
    execution: Execution,
  ) -> tuple[Latents, ChunkMemory]:
    """Velocity of one chunk at one timestep, and the keys and values it would commit.

    `features` are the timestep's sinusoids; the other arguments are those of `denoise`.
    """
    features = jnp.broadcast_to(features[None], (latents.shape[0], *features.shape))
    options = execution.attention, execution.divide_attention
    attend = lambda q, k, v, layer: attention.attend_with_memory(q, k, v, view, layer, *options)
    backbone = nnx.merge(self.graphdef, params)
    return backbone(latents, features, self._first_frame(chunk_index), text, attend, _placement(execution))

  def text_memory(self, params: Params, embeddings: Float[Array, "X E"]) -> TextMemory:
    """Cross-attention keys and values of a prompt's text embeddings [X, E]: what the search passes as `text`."""
    return nnx.merge(self.graphdef, params).text_memory(embeddings.astype(_dtype(params)))

  def _first_frame(self, chunk_index: IntScalar) -> IntScalar:
    return chunk_index * self.config.chunk_frames


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
