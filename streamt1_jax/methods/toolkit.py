"""Beams over chunks whose policy is another: who survives by lot, by weight or by rank, and when.

All begin as the search "beam", with the units of the paper left out: --noise_sigma, --max_sink_frames and the
thresholds bring them back.
"""

import dataclasses
from typing import Any

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.methods.plain import BEAM, JUDGING
from streamt1_jax.methods.spec import Method
from streamt1_jax.policies import Particles, PerBeam, ProbabilisticTopK, RankEnsemble, TopK

_UNITS = ("noise_sigma", "max_sink_frames", "short_threshold", "long_threshold")
_EVERY_CHUNK = ("beam_size", "top_k", "fusion_cap", *_UNITS, *JUDGING, "sink_distance")
_FIELDS = (*_EVERY_CHUNK, "judge_every", "settle_within")
_PARTICLES = {"alpha": None, "beta": 1.0, "ess_threshold": 0.5}


def _beam(model: ModelConfig, **changes: Any) -> SearchConfig:
  # Averages of sinks come back with the thresholds.
  own = {"sink_ema_decay": SearchConfig().sink_ema_decay}
  return dataclasses.replace(BEAM.search(model), **own, **changes)


def _cumulative(model: ModelConfig) -> SearchConfig:
  return _beam(model, policy=TopK(cumulative=True))


def _per_beam(model: ModelConfig, epsilon: float) -> SearchConfig:
  return _beam(model, policy=PerBeam(epsilon))


def _probabilistic(model: ModelConfig, temperature: float) -> SearchConfig:
  return _beam(model, policy=ProbabilisticTopK(temperature))


def _rank_ensemble(model: ModelConfig) -> SearchConfig:
  return _beam(model, policy=RankEnsemble())


def _every_j(model: ModelConfig) -> SearchConfig:
  return _beam(model, judge_every=3)


def _look_ahead(model: ModelConfig) -> SearchConfig:
  return _beam(model, look_ahead=1)


def _rounds(model: ModelConfig) -> SearchConfig:
  return _beam(model, beam_size=16, top_k=1, round_size=4)


def _particles(model: ModelConfig, alpha: float, beta: float, ess_threshold: float) -> SearchConfig:
  return _beam(model, beam_size=1, top_k=4, policy=Particles(alpha, beta, ess_threshold, "long"))


def _particles_sum(model: ModelConfig, alpha: float, beta: float, ess_threshold: float) -> SearchConfig:
  return _beam(model, beam_size=1, top_k=4, policy=Particles(alpha, beta, ess_threshold, "sum"))


CUMULATIVE = Method(
  "cumulative",
  "A beam that ranks lineages by the sum of all their scores, and not chunks by their own.",
  _cumulative,
  _FIELDS,
)
PER_BEAM = Method(
  "per_beam",
  "A beam in which now and then, with probability epsilon, every beam keeps the best of its own candidates.",
  _per_beam,
  _FIELDS,
  {"epsilon": 0.2},
)
PROBABILISTIC = Method(
  "probabilistic",
  "A beam whose survivors are drawn with probability exp(score / temperature), and not ranked.",
  _probabilistic,
  _FIELDS,
  {"temperature": 0.01},
)
RANK_ENSEMBLE = Method(
  "rank_ensemble",
  "A beam that ranks candidates by their mean place in the orders of both rewards, whatever their scales.",
  _rank_ensemble,
  tuple(name for name in _FIELDS if name != "fusion_cap"),
)
EVERY_J = Method(
  "every_j",
  "A beam that judges one chunk of --judge_every; in those between, each beam goes on with one candidate.",
  _every_j,
  _FIELDS,
)
LOOK_AHEAD = Method(
  "look_ahead",
  "A beam that carries every candidate on by --look_ahead chunks, judges them as well, and throws them away.",
  _look_ahead,
  (*_FIELDS, "look_ahead"),
)
ROUNDS = Method(
  "rounds",
  "The best of many candidates, drawn --round_size at a time, until one scores --accept, one more would gain less than "
  "--least_gain, or the budget is spent.",
  _rounds,
  (*_EVERY_CHUNK, "round_size", "accept", "least_gain", "round_budget"),
)


def _forgets(search: SearchConfig, num_chunks: int) -> str | None:
  if num_chunks <= search.sliding_window:
    return None
  return (
    f"a video of {num_chunks} chunks is longer than the sliding window of {search.sliding_window}: particles forget "
    "what has left the window, and --search=particles_sum weighs the whole video"
  )


PARTICLES = Method(
  "particles",
  "Sequential Monte Carlo over chunks, for videos that fit into the sliding window: beams are copied in proportion to "
  "exp(score / alpha) when few of them have all the weight.",
  _particles,
  _FIELDS,
  _PARTICLES,
  least={"top_k": 2},
  note=_forgets,
)
PARTICLES_SUM = Method(
  "particles_sum",
  "The same for videos of any length: the score is the sum of the chunks' scores, divided by the chunks of the video.",
  _particles_sum,
  _FIELDS,
  _PARTICLES,
  least={"top_k": 2},
)
