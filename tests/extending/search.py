"""A search of one's own, from outside the package: beams live apart at first, and compete afterwards."""

import dataclasses

import jax.numpy as jnp

import streamt1_jax as st1
from streamt1_jax.methods import METHODS, Method
from streamt1_jax.policies import Choice


@dataclasses.dataclass(frozen=True)
class Islands:
  """Every beam keeps its own best candidate for the first `apart` chunks; then the best of all survive."""

  apart: int = 3

  def init(self, search):
    return None

  def select(self, carry, scores, key, chunk_index, num_chunks):
    options = scores, key, chunk_index, num_chunks
    alone, together = st1.KeepBeams().select(carry, *options), st1.TopK().select(carry, *options)
    survivor, score = (jnp.where(chunk_index < self.apart, x, y) for x, y in zip(alone[:2], together[:2]))
    return Choice(survivor, score, carry)


def islands(model, apart):
  return dataclasses.replace(METHODS["beam"].settings(model), policy=Islands(int(apart)))


ISLANDS = Method("islands", "Apart, then together.", islands, fields=("top_k",), numbers={"apart": 3})
SEARCHES = {**METHODS, ISLANDS.name: ISLANDS}

if __name__ == "__main__":
  pipeline = st1.Pipeline.load()
  search = SEARCHES["islands"].settings(pipeline.config, top_k=3, numbers={"apart": 2})
  video = pipeline.generate("a red circle moves left over a dark blue background", seconds=2, search=search)
  video.save("outputs/islands.mp4")
