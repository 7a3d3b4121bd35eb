"""Stream-T1, and the same without one of its units: the ablations of the paper."""

import dataclasses

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.methods.plain import JUDGING, NEVER
from streamt1_jax.methods.spec import Method
from streamt1_jax.policies import ByScore

_SIZES = ("beam_size", "top_k")
_NOISE = ("noise_sigma",)
_SINKS = ("short_threshold", "long_threshold", "max_sink_frames")
_FUSION = ("fusion_cap",)
_PARTS = (*_SIZES, *_NOISE, *_SINKS, *_FUSION, *JUDGING, "sink_distance", "settle_within")


def _without(*fields: str) -> tuple[str, ...]:
  return ("semantics", *(name for name in _PARTS if name not in fields))


def _paper(model: ModelConfig) -> SearchConfig:
  return SearchConfig.paper(**vars(model.search))


def _no_propagation(model: ModelConfig) -> SearchConfig:
  # Candidate 0 would get its parent's fresh noise once more if it were reused.
  return dataclasses.replace(SearchConfig.of(model), noise_sigma=0.0, first_candidate="fresh")


def _no_sinking(model: ModelConfig) -> SearchConfig:
  never = {"short_threshold": NEVER, "long_threshold": NEVER}
  return dataclasses.replace(SearchConfig.of(model), max_sink_frames=model.sink_frames, **never)


def _ema_only(model: ModelConfig) -> SearchConfig:
  # No fall of the score is a change of scene, so nothing is appended.
  return dataclasses.replace(SearchConfig.of(model), max_sink_frames=model.sink_frames, long_threshold=NEVER)


def _short_only(model: ModelConfig) -> SearchConfig:
  return dataclasses.replace(SearchConfig.of(model), policy=ByScore("short"))


def _long_only(model: ModelConfig) -> SearchConfig:
  return dataclasses.replace(SearchConfig.of(model), policy=ByScore("long"))


STREAM_T1 = Method(
  "stream_t1",
  "Stream-T1: noise propagation, reward pruning and memory sinking.",
  SearchConfig.of,
  _without(),
)
STREAM_T1_PAPER = Method(
  "stream_t1_paper",
  "Stream-T1 as the paper's text says, where the released code differs.",
  _paper,
  _PARTS,
)
NO_PROPAGATION = Method(
  "no_propagation",
  "Stream-T1 without noise propagation: every candidate draws independent noise.",
  _no_propagation,
  _without(*_NOISE),
)
NO_SINKING = Method(
  "no_sinking",
  "Stream-T1 without memory sinking: what leaves the window is discarded.",
  _no_sinking,
  _without(*_SINKS),
)
EMA_ONLY = Method(
  "ema_only",
  "Stream-T1 whose chunks are averaged into the first sink or discarded, and never become new sinks.",
  _ema_only,
  _without("long_threshold", "max_sink_frames"),
)
SHORT_ONLY = Method(
  "short_only",
  "Stream-T1 that ranks candidates by the image reward of the chunk alone.",
  _short_only,
  _without(*_FUSION),
)
LONG_ONLY = Method(
  "long_only",
  "Stream-T1 that ranks candidates by the video reward of the window alone.",
  _long_only,
  _without(*_FUSION),
)
