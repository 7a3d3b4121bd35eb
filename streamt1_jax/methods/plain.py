"""Methods without the paper's units: plain streaming, best of N, and the search over chunks alone."""

import dataclasses

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.methods.spec import Method
from streamt1_jax.policies import KeepBeams

NEVER = 1e30
"""A rise or a fall that no score makes: as a threshold it keeps every chunk from being remembered."""
JUDGING = ("sliding_window", "reward_decode", "reward_codec")
"""Fields that say how candidates are judged."""


def _beam(model: ModelConfig) -> SearchConfig:
  # Plain streaming forgets every chunk, because nothing scores it. A beam's chunks have scores.
  return dataclasses.replace(
    SearchConfig.streaming(model), beam_size=2, top_k=2, judges=True, short_threshold=NEVER, long_threshold=NEVER
  )


def _greedy(model: ModelConfig) -> SearchConfig:
  return dataclasses.replace(_beam(model), beam_size=4, top_k=1)


def _best_of_n(model: ModelConfig) -> SearchConfig:
  return dataclasses.replace(SearchConfig.streaming(model), top_k=4, policy=KeepBeams())


NONE = Method(
  "none",
  "Plain streaming: one candidate per chunk, and nothing is judged.",
  SearchConfig.streaming,
  ("sink_distance",),
)
BEAM = Method(
  "beam",
  "A beam over chunks: the best of all candidates go on, with independent noise and without added sinks.",
  _beam,
  ("beam_size", "top_k", "fusion_cap", *JUDGING, "sink_distance", "settle_within"),
)
GREEDY = Method(
  "greedy",
  "The best candidate of every chunk goes on: a beam of one.",
  _greedy,
  ("beam_size", "fusion_cap", *JUDGING, "sink_distance"),
)
BEST_OF_N = Method(
  "best_of_n",
  "Independent videos in one batch, as many as --top_k says; the reward of the whole video picks one.",
  _best_of_n,
  ("top_k", "reward_codec", "sink_distance"),
  least={"top_k": 2},
)
