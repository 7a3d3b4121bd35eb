"""What the search asks of a generator, and the models that one search calls.

A generator is a causal model that makes latents chunk by chunk and remembers the chunks before. The search knows
nothing else of it:

  memory  ── open ──────────── memory'              makes room for the next chunk      every beam
  memory' ── view ── denoise ── x0                  reads, and writes nothing          every candidate, S times
  memory' ── view ── clean_pass ── chunk memory     what a finished chunk leaves       winners only
  memory' ── commit ────────── memory of the next   writes it                          winners only

`wan_generator.WanGenerator` is the one of the published model. Another one needs no more than these methods.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from streamt1_jax.codec.base import Codec
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.noise_propagation import DrawNoise
from streamt1_jax.parallel.sharding import Layout
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.rewards.base import JudgesChunk, JudgesWindow
from streamt1_jax.sampling import Sampler
from streamt1_jax.typing import IntScalar, Latents, Params


class Eviction(NamedTuple):
  """What happened to one beam's memory before a chunk was generated.

  Attributes:
    route: one of the routes that `memory_sinking` numbers; 0 says that nothing left the memory.
    frame: first latent frame of the chunk that left the window; -1 if none did.
    sink_frame: first latent frame of the sink that took it in; -1 if none did.
  """

  route: IntScalar
  frame: IntScalar
  sink_frame: IntScalar


@runtime_checkable
class Generator(Protocol):
  """A causal generator of latents. Pure and hashable: it is static under `jit`.

  All methods but `gather` are written for one beam or one candidate; the chunk step vmaps them. Memory, view, text and
  chunk memory are trees of arrays that only the generator looks into. The shapes of a memory never change. `params` are
  the generator's own weights.
  """

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """Shape [F, C, H, W] of a chunk of latents."""
    ...

  @property
  def sigmas(self) -> Float[np.ndarray, " S"]:
    """Noise level before every denoising step, in (0, 1], largest first; after the last step it is 0."""
    ...

  @property
  def memory_layout(self) -> Layout:
    """Axes of the arrays of all beams' memories [K, ...]; `parallel.sharding.BY_BEAM` will always do.

    Where it divides more than beams, `open` and `commit` see a part of the arrays on every device.
    """
    ...

  @property
  def chunk_layout(self) -> Layout:
    """The same of what `clean_pass` leaves of all beams' chunks."""
    ...

  def check(self, search: SearchConfig) -> None:
    """Raises ConfigError unless `search` can run."""

  def max_chunks(self, search: SearchConfig) -> int:
    """Chunks of the longest video."""
    ...

  def init_memory(self, params: Params, search: SearchConfig) -> Any:
    """Memory of a beam that has no chunk yet."""
    ...

  def open(self, memory: Any, search: SearchConfig) -> tuple[Any, Eviction]:
    """Makes room for the next chunk, and tells what left the memory."""
    ...

  def view(self, memory: Any, chunk_index: IntScalar, search: SearchConfig) -> Any:
    """What the candidates of a chunk, counted from 0, read of an opened memory.

    They share it: it is never copied for one of them.
    """
    ...

  def denoise(
    self,
    params: Params,
    x: Latents,
    step: IntScalar,
    text: Any,
    view: Any,
    execution: Execution,
    image: Float32[Array, "C H W"] | None = None,
  ) -> Latents:
    """One denoising step of one candidate.

    Args:
      params: weights.
      x: noisy at level `sigmas[step]`.
      step: in 0..S - 1.
      text: the prompt, as `Condition.text` has it.
      view: of the beam's opened memory.
      execution: on which devices, and how.
      image: what the chunk's first latent frame is to be, without noise; only the first chunk of a video has one.

    Returns:
      The noiseless chunk x0 as this step predicts it.
    """
    ...

  def clean_pass(self, params: Params, latents: Latents, text: Any, view: Any, execution: Execution) -> Any:
    """What a finished chunk leaves in the memory; arguments as in `denoise`."""
    ...

  def commit(self, memory: Any, chunk: Any, flags: Flags, chunk_index: IntScalar) -> Any:
    """The opened memory with what `clean_pass` gave; `flags` say what becomes of the chunk when it has to leave."""
    ...

  def recache(
    self,
    params: Params,
    memory: Any,
    chunk_index: IntScalar,
    text: Any,
    search: SearchConfig,
    switch: SwitchConfig,
    execution: Execution,
  ) -> Any:
    """The memory between two chunks as a new prompt finds it; `chunk_index` is the next chunk's."""
    ...

  def gather(self, memories: Any, parents: Int32[Array, " K"]) -> Any:
    """The memories [K, ...] of the beams at `parents`: the only time that memories move."""
    ...


@dataclasses.dataclass(frozen=True)
class Models:
  """The static half of everything a search calls. `models.make_models` puts it together for a Wan model.

  The arrays are in a dict `params`: "backbone" (of the generator), "codec", "image_reward" and "video_reward".

  Attributes:
    generator: makes latents.
    codec: decodes them.
    image_reward: judges a chunk, which gives the short-term score.
    video_reward: judges the sliding window, which gives the long-term score.
    draw_noise: seed to noise.
    sampler: what happens between two denoising steps.
    execution: on which devices, and how.
  """

  generator: Generator
  codec: Codec
  image_reward: JudgesChunk
  video_reward: JudgesWindow
  draw_noise: DrawNoise
  sampler: Sampler
  execution: Execution = Execution()
