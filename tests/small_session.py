"""Sessions of the small search: random weights, latents for frames; a prompt is any text."""

import dataclasses
import zlib

import jax.numpy as jnp

from streamt1_jax.config import ConfigError, SearchConfig, SessionConfig
from streamt1_jax.generator import Models
from streamt1_jax.io.timeline import ChunkClock
from streamt1_jax.session import Session
from streamt1_jax.state import Condition
from tests import small_search as small

ONE_BEAM = SearchConfig(beam_size=2, top_k=1, sliding_window=3, max_sink_frames=6, sink_distance=90)
TWO_BEAMS = dataclasses.replace(ONE_BEAM, top_k=2)
CLOCK = ChunkClock(fps=3, first=3, later=3)  # a chunk of three frames is a second


@dataclasses.dataclass(frozen=True)
class SmallRuntime:
  """A `steering.Runtime` whose prompts are random embeddings, equal for equal texts."""

  models: Models
  params: dict

  def condition(self, prompt: str, num_chunks: int) -> Condition:
    if not prompt.strip():
      raise ConfigError("the prompt is empty")
    # Texts that differ in case mean the same, as they would to a tokenizer that ignores it.
    condition = small.condition(num_chunks, zlib.crc32(prompt.lower().encode()) % 1000)
    if prompt == "poison":
      return condition._replace(text=_poisoned(condition.text))
    return condition


def _poisoned(text):
  return type(text)(*(jnp.full_like(leaf, jnp.nan) for leaf in text))


def runtime() -> SmallRuntime:
  return SmallRuntime(small.models(), small.params())


def session(prompt="a", *, search=ONE_BEAM, start=None, config=None, **changes) -> Session:
  config = dataclasses.replace(config or SessionConfig(search=search, num_chunks=6), **changes)
  options = {} if start is None else {"start": start}
  return Session(runtime(), CLOCK, prompt, config, **options)
