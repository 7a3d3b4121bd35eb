"""A search policy of one's own, from outside the package: it ranks lineages, not chunks."""

import dataclasses

import jax.numpy as jnp

import streamt1_jax as st1
from streamt1_jax.policies import Choice
from streamt1_jax.reward_pruning import prune


@dataclasses.dataclass(frozen=True)
class Cumulative:
  """The best K candidates by the discounted sum of all hybrid scores of their lineage.

  Attributes:
    discount: weight of a chunk's score one chunk later, in [0, 1].
  """

  discount: float = 0.9

  def init(self, search):
    return jnp.zeros(search.top_k)  # the sum so far, one per beam

  def select(self, carry, scores, key, chunk_index, num_chunks):
    total = self.discount * carry[:, None] + scores.hybrid  # [K, B]
    survivor, best = prune(total.reshape(-1), scores.usable.reshape(-1), top_k=len(carry))
    return Choice(survivor, best, carry=best)


SEARCH = st1.SearchConfig(policy=Cumulative(discount=0.8))

if __name__ == "__main__":
  pipeline = st1.Pipeline.load()
  video = pipeline.generate("a red circle moves left over a dark blue background", seconds=2, search=SEARCH)
  video.save("outputs/cumulative.mp4")
