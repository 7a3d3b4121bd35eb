"""One test-time search over a model: candidates, beams, noise, pruning and sinks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any, Literal

from streamt1_jax.config.base import LATER, require, require_choices
from streamt1_jax.config.model import ModelConfig

_MOST_CHUNKS = 2_000_000
"""The most chunks of a video without a longest length: seeds and frames are 32 bits wide."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """One test-time search (Stream-T1, arXiv 2605.04461).

  Attributes:
    beam_size: candidates drawn per beam and chunk.
    top_k: beams kept after every chunk. The first chunk draws `beam_size * top_k` candidates as well.
    noise_sigma: weight of the parent's noise in a candidate's noise, in (-1, 1); 0 draws independent noise.
    short_threshold: a chunk whose short-term score exceeds its lineage's baseline by more than this is worth
      remembering.
    long_threshold: a chunk whose long-term score falls by more than this marks a change of scene.
    fusion_cap: largest weight of the short-term score in the hybrid score, in [0, 1].
    sliding_window: chunks the video reward sees, the current one included.
    max_sink_frames: latent frames the sinks may grow to.
    sink_ema_decay: weight kept by the old sink in an EMA update.
    first_candidate: "reuse" gives candidate 0 its parent's fresh noise again (released code); "fresh" draws a new one.
    short_baseline: "history" averages every short-term score of the lineage (released code); "window" the last
      `sliding_window - 1`.
    sink_ema_dtype: "compute" mixes sinks in the memory's dtype (released code: in bfloat16 the decay is lost);
      "float32" accumulates in float32.
    reward_decode: "streamed" decodes every chunk once with the codec's carried state; "scratch" decodes each
      candidate's chunk and window anew, as the released code does.
    sink_distance: most latent frames between a chunk and the first sink as the chunk sees it. None sees sinks where
      they are (released code, and LongLive 1.0), for videos of up to `max_frames` latent frames; 9 is what LongLive's
      endless videos do. With a number a video has no longest length.
    reward_codec: what windows and whole videos go through before the video reward sees them, a name of
      `rewards.window_codecs.REWARD_CODECS`: "none"; "h264" as in the released code, which writes and reads mp4 files.
    policy: who survives a chunk, a `policies.Policy`; None is `policies.TopK`, what the paper does.
    judges: whether rewards judge the candidates. Without them all scores are 0, so a beam draws one candidate.
    judge_every: chunks from one that is judged to the next; the first is judged. In a chunk between, every beam goes on
      with one candidate that is not judged: its lineage's history of scores stays, and the chunk is not worth
      remembering.
    look_ahead: chunks by which every candidate of a judged chunk is carried on before survivors are chosen; they are
      judged and thrown away. A candidate is ranked by the mean of its own scores and theirs. Nothing is made behind the
      video's last chunk.
    settle_within: chunks after which all beams must share a chunk, so that a stream which shows what they share lags
      behind by no more. Where beams still differ in an older chunk, only candidates that descend from the same one as
      the best survivor may survive. In chunks that are not judged nothing is decided; the next judged one does it. 0
      sets no limit.
    round_size: candidates of a beam that are drawn at one time, so that a chunk has beam_size / round_size rounds; 0
      draws all at once. Nothing large of a round is kept: winners are decoded again.
    accept: hybrid score that is good enough: no further round is drawn once `top_k` candidates have it. None never is.
    least_gain: by how much one more candidate must be expected to raise the sum of the survivors' hybrid scores; no
      further round is drawn once it is less, see `rounds.expected_gain`. None draws on.
    round_budget: rounds that a chunk is given. Those that it does not draw are given to later chunks, which have at
      most beam_size / round_size. 0 gives every chunk that many.
  """

  beam_size: int = 2
  top_k: int = 2
  noise_sigma: float = -0.1
  short_threshold: float = 0.0
  long_threshold: float = 0.2
  fusion_cap: float = 0.4
  sliding_window: int = 10
  max_sink_frames: int = 15
  sink_ema_decay: float = 0.999
  first_candidate: Literal["reuse", "fresh"] = "reuse"
  short_baseline: Literal["history", "window"] = "history"
  sink_ema_dtype: Literal["compute", "float32"] = "compute"
  reward_decode: Literal["streamed", "scratch"] = "streamed"
  reward_codec: str = dataclasses.field(default="none", metadata=LATER)
  # Typed as Any, because policies know the search and not the other way round.
  policy: Any = dataclasses.field(default=None, metadata=LATER)
  judges: bool = dataclasses.field(default=True, metadata=LATER)
  sink_distance: int | None = dataclasses.field(default=None, metadata=LATER)
  judge_every: int = dataclasses.field(default=1, metadata=LATER)
  look_ahead: int = dataclasses.field(default=0, metadata=LATER)
  settle_within: int = dataclasses.field(default=0, metadata=LATER)
  round_size: int = dataclasses.field(default=0, metadata=LATER)
  accept: float | None = dataclasses.field(default=None, metadata=LATER)
  least_gain: float | None = dataclasses.field(default=None, metadata=LATER)
  round_budget: int = dataclasses.field(default=0, metadata=LATER)

  def __post_init__(self):
    # Upper bounds: released seeds are seed + 1000 * chunk + 100 * beam + candidate, and must stay distinct.
    require(1 <= self.beam_size <= 100, f"beam_size must be in 1..100, got {self.beam_size}")
    require(1 <= self.top_k <= 10, f"top_k must be in 1..10, got {self.top_k}")
    require(-1.0 < self.noise_sigma < 1.0, f"noise_sigma must be in (-1, 1), got {self.noise_sigma}")
    require(0.0 <= self.fusion_cap <= 1.0, f"fusion_cap must be in [0, 1], got {self.fusion_cap}")
    require(self.sliding_window >= 1, f"sliding_window must be at least 1 chunk, got {self.sliding_window}")
    require(0.0 <= self.sink_ema_decay <= 1.0, f"sink_ema_decay must be in [0, 1], got {self.sink_ema_decay}")
    require(
      self.short_baseline != "window" or self.sliding_window >= 2,
      "short_baseline 'window' needs a sliding_window of at least 2 chunks",
    )
    require(
      self.judges or self.beam_size == 1,
      f"judges=False leaves nothing to choose by: beam_size must be 1, got {self.beam_size}",
    )
    require(self.judge_every >= 1, f"judge_every must be at least 1 chunk, got {self.judge_every}")
    require(
      self.judges or self.judge_every == 1,
      f"judges=False judges no chunk: judge_every must be 1, got {self.judge_every}",
    )
    require(self.look_ahead >= 0, f"look_ahead must be at least 0 chunks, got {self.look_ahead}")
    require(
      self.judges or self.look_ahead == 0,
      f"judges=False judges nothing that follows: look_ahead must be 0, got {self.look_ahead}",
    )
    self._require_settling()
    self._require_rounds()
    require(
      self.policy is None or _is_policy(self.policy),
      f"policy must have init and select and be an instance of a frozen dataclass, got {self.policy!r}",
    )
    require_choices(self)

  def _require_settling(self) -> None:
    chunks = self.settle_within
    require(chunks >= 0, f"settle_within must be at least 0 chunks, got {chunks}")
    require(self.judges or chunks == 0, f"judges=False leaves every beam alone: settle_within must be 0, got {chunks}")
    require(
      self.round_size == 0 or chunks == 0,
      f"rounds stop by the candidates of all beams: settle_within must be 0, got {chunks}",
    )
    require(
      chunks == 0 or self.beam_size > 1 or self.top_k == 1 or self.first_candidate == "fresh",
      f"first_candidate must be 'fresh' for settle_within {chunks} with one candidate per beam: copies of a beam would "
      f"draw the same noise, got {self.first_candidate!r}",
    )

  def _require_rounds(self) -> None:
    size, budget, accept, gain = self.round_size, self.round_budget, self.accept, self.least_gain
    require(size >= 0, f"round_size must be at least 0, got {size}")
    if size == 0:
      stops = accept is not None or gain is not None or budget != 0
      require(not stops, "accept, least_gain and round_budget need rounds: round_size must be above 0, got 0")
      return
    require(self.beam_size % size == 0, f"round_size must divide beam_size {self.beam_size}, got {size}")
    require(0 <= budget <= self.most_rounds, f"round_budget must be in 0..{self.most_rounds} rounds, got {budget}")
    require(accept is None or math.isfinite(accept), f"accept must be a finite score, got {accept}")
    require(gain is None or 0.0 < gain < math.inf, f"least_gain must be a finite score above 0, got {gain}")
    require(self.judges, f"judges=False draws one candidate of a beam: round_size must be 0, got {size}")
    require(self.look_ahead == 0, f"rounds do not look ahead: look_ahead must be 0, got {self.look_ahead}")

  @property
  def most_rounds(self) -> int:
    """Rounds that a chunk has at most; 1 for a search without."""
    return self.beam_size // self.round_size if self.round_size else 1

  @property
  def num_candidates(self) -> int:
    return self.beam_size * self.top_k

  def judges_chunk(self, chunk_index: int) -> bool:
    """Whether the candidates of a chunk, counted from 0 from the beginning of the video, are judged."""
    return self.judges and chunk_index % self.judge_every == 0

  def unjudged(self) -> SearchConfig:
    """What the same search does in a chunk that it does not judge: one candidate per beam."""
    rounds: dict[str, Any] = {"round_size": 0, "accept": None, "least_gain": None, "round_budget": 0}
    others: dict[str, Any] = {"judge_every": 1, "look_ahead": 0, "settle_within": 0}
    return dataclasses.replace(self, beam_size=1, policy=None, judges=False, **others, **rounds)

  @classmethod
  def released(cls, **overrides) -> SearchConfig:
    """What the released code does; the published numbers came from it."""
    return cls(**overrides)

  @classmethod
  def of(cls, model: ModelConfig) -> SearchConfig:
    """The released search with the numbers that `model` has as its own defaults."""
    return cls.released(**vars(model.search))

  @classmethod
  def paper(cls, **overrides) -> SearchConfig:
    """What the paper's text says, where the released code differs."""
    corrected: dict[str, Any] = {"first_candidate": "fresh", "short_baseline": "window", "sink_ema_dtype": "float32"}
    return cls(**(corrected | overrides))

  @classmethod
  def streaming(cls, model: ModelConfig) -> SearchConfig:
    """Plain streaming: one candidate, independent noise, no judges, and the first sink stays what it is."""
    return cls(
      beam_size=1,
      top_k=1,
      noise_sigma=0.0,
      first_candidate="fresh",
      max_sink_frames=model.sink_frames,
      sink_ema_decay=1.0,
      judges=False,
    )

  def max_chunks(self, model: ModelConfig) -> int:
    """Chunks of the longest video that `model` can make."""
    return model.max_chunks if self.sink_distance is None else _MOST_CHUNKS

  def validate_for(self, model: ModelConfig) -> None:
    """Raises ConfigError unless this search can run on `model`."""
    chunk = model.chunk_frames
    require(
      self.max_sink_frames % chunk == 0 and self.max_sink_frames >= model.sink_frames,
      f"max_sink_frames must be a multiple of the chunk ({chunk}) and at least sink_frames ({model.sink_frames}), "
      f"got {self.max_sink_frames}",
    )
    nearest = model.local_attention_frames - chunk
    require(
      self.sink_distance is None or self.sink_distance >= nearest,
      f"sink_distance must be at least {nearest}, where the window begins, got {self.sink_distance}",
    )
    longest = model.backbone.max_frames
    require(
      self.sink_distance is None or self.sink_distance <= longest,
      f"sink_distance must be at most {longest} (rotary tables), got {self.sink_distance}",
    )


def _is_policy(value: Any) -> bool:
  """Whether `value` may be a `policies.Policy`. A dataclass that is not frozen has no hash, and cannot be static."""
  methods = all(callable(getattr(value, name, None)) for name in ("init", "select"))
  return methods and not isinstance(value, type) and isinstance(value, Hashable)
