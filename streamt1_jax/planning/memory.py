"""Whether a search fits a device, from sizes in bytes. No array, no device and no compiler takes part.

  Sizes ── estimate, once for each way to decode ── Plan ── the way that fits, or why none does

Weights, state and prompt are exact, by shapes. What a chunk needs in between is a rule of thumb, and its constants are
read off the recorded compilations. `docs/evidence/pods.md` compares the rule with every one of them.

A chunk has two phases that take turns with the memory:

  generate   scores of attention and activations of all candidates; keys and values of the winners, written and gathered
  decode     decoder states that candidates and winners leave, and the activations of what is decoded at one time

Where rewards see candidates decoded from scratch, each needs a decoder state of its own and the frames of its window.
No recorded compilation has that.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from streamt1_jax.config import ConfigError
from streamt1_jax.execution import Decoding

GIB = 1 << 30
WAYS: tuple[Decoding, ...] = typing.get_args(Decoding)
"""Ways to decode, from the most memory to the least."""

# Largest activations of one latent frame that live at one time. Where rows of a frame are divided among devices the
# compiler keeps borders and gathered rows as well; the sizes of an undivided frame count there too.
_WHOLE, _DIVIDED = 7.4, 15.0
# How far recorded compilations lie from the rule, and a newer compiler from the one that made them, in the same unit.
_WHOLE_ERROR, _DIVIDED_ERROR = 1.9, 5.0
# The same of the other phase, as a part of it: only a small model on a CPU is recorded for it.
_GENERATE_ERROR = 0.1
# Copies of the keys and values of a chunk: computed, gathered and written.
_CHUNK_COPIES = 3
# Copies of what candidates are carried on with, all at once: to make room in their memories the compiler copies them.
# Where they take turns it does not. A small model on a CPU, with one or two beams of one to eight candidates, is the
# only one that was compiled.
_CARRIED_COPIES = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Bytes on one device, unless an attribute says otherwise.

  Attributes:
    weights: of every model that lies on the device, by its name.
    memory: attention memories of the device's beams.
    decoder_state: of one video.
    rest: the rest of the state of these beams, above all the frames of their windows.
    prompt: what the generator reads of it.
    results: what a chunk hands to the host.
    beams: number of beams on the device.
    candidates: number of candidates on the device.
    decoded_frames: number of latent frames that are decoded for a candidate: its chunk, or from scratch its window.
    window: frames of a candidate's window that is decoded from scratch; 0 where nothing is.
    chunk_memory: keys and values of one chunk, all blocks.
    block: weights of one block of the backbone.
    generated: activations of one candidate while it is generated, scores of attention included.
    decoded: the largest activation of the decoder, for one latent frame of one candidate; undivided.
    rows_divided: whether devices share the rows of a frame.
    large_frames: whether one candidate alone keeps a device busy while it is decoded.
    keeps_candidates: whether the decoder states of candidates can be kept for the winners.
    beams_in_all: number of beams of a search, on all devices.
    looks_ahead: whether candidates are carried on to be judged by what follows.
    kept_states: copies of the state that a search from the host keeps.
  """

  weights: Mapping[str, int]
  memory: int
  decoder_state: int
  rest: int
  prompt: int
  results: int
  beams: int
  candidates: int
  decoded_frames: int
  window: int
  chunk_memory: int
  block: int
  generated: int
  decoded: int
  rows_divided: bool
  large_frames: bool
  keeps_candidates: bool
  beams_in_all: int
  looks_ahead: bool = False
  kept_states: int = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What one way to decode takes.

  Attributes:
    decoding: the way.
    arguments: bytes by part that exist between two chunks: weights, state and prompt.
    temporaries: bytes by part that a chunk needs in between, at its worst moment.
    results: bytes of what a chunk hands to the host.
    error: bytes by which the temporaries may be off, either way.
  """

  decoding: Decoding
  arguments: Mapping[str, int]
  temporaries: Mapping[str, int]
  results: int
  error: int

  @property
  def argument_bytes(self) -> int:
    return sum(self.arguments.values())

  @property
  def temporary_bytes(self) -> int:
    return sum(self.temporaries.values())

  @property
  def total(self) -> int:
    return self.argument_bytes + self.temporary_bytes + self.results

  @property
  def largest(self) -> tuple[str, int]:
    """Name and bytes of the largest part."""
    parts = {**self.arguments, **self.temporaries}
    return max(parts.items(), key=lambda part: part[1])

  def surely_fits(self, limit: int | None) -> bool:
    """Whether it fits even if the error adds to it. Anything fits where the limit is not known."""
    return limit is None or self.total + self.error <= limit

  def may_fit(self, limit: int | None) -> bool:
    """Whether it fits if the error takes from it."""
    return limit is None or self.total - self.error <= limit


def estimate(sizes: Sizes, decoding: Decoding) -> Estimate:
  """Bytes of a search that decodes in this way."""
  arguments = {f"weights of {name}": size for name, size in sizes.weights.items()}
  arguments["memory of the beams"] = sizes.memory
  arguments["decoder states of the beams"] = sizes.beams * sizes.decoder_state
  arguments["frames of the windows and the rest of the state"] = sizes.rest
  arguments["the prompt"] = sizes.prompt
  whole = sizes.memory + sizes.rest + sizes.beams * sizes.decoder_state
  if sizes.kept_states:
    arguments["copies of the state"] = sizes.kept_states * whole
  generating = {
    "keys and values of the winners": _CHUNK_COPIES * sizes.beams * sizes.chunk_memory + sizes.block,
    "attention and activations of the candidates": sizes.candidates * sizes.generated,
  }
  kept = sizes.candidates if sizes.keeps_candidates and decoding != "twice" else sizes.beams
  candidates = sizes.candidates if decoding == "together" else 1
  at_once = candidates * sizes.decoded_frames if decoding == "together" else 1
  # Winners are decoded once candidates have been judged.
  states = max(kept + _moved(sizes), candidates if sizes.window else 0)
  unit, error = (_DIVIDED, _DIVIDED_ERROR) if sizes.rows_divided else (_WHOLE, _WHOLE_ERROR)
  decoding_parts = {
    "decoder states of candidates and winners": states * sizes.decoder_state,
    "windows decoded from scratch": candidates * sizes.window,
    "activations of the decoder": round(unit * sizes.decoded) * at_once,
  }
  phases = (
    (generating, round(_GENERATE_ERROR * sum(generating.values()))),
    (decoding_parts, round(error * sizes.decoded) * at_once),
  )
  temporaries, off_by = max(phases, key=lambda phase: sum(phase[0].values()))
  if sizes.looks_ahead:
    # Scores of the candidates are known by then. Each that is carried on has all that a beam has.
    carried = _CARRIED_COPIES * sizes.candidates if decoding == "together" else sizes.beams
    temporaries = {**temporaries, "what candidates are carried on with": whole // sizes.beams * carried}
  return Estimate(decoding, arguments, temporaries, sizes.results, off_by)


def _moved(sizes: Sizes) -> int:
  """Decoder states that a device holds twice while beams move to their places. A beam that is alone stays."""
  return sizes.beams if sizes.beams_in_all > 1 and sizes.candidates > 1 else 0


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a search will decode.

  Attributes:
    estimates: of every way that can be chosen, from the most memory to the least.
    limit: bytes that the device gives; None where it does not say.
  """

  estimates: Sequence[Estimate]
  limit: int | None

  @property
  def chosen(self) -> Estimate:
    """The first way that surely fits; else the one that takes the least."""
    sure = [one for one in self.estimates if one.surely_fits(self.limit)]
    return sure[0] if sure else min(self.estimates, key=lambda one: one.total)

  @property
  def fits(self) -> bool:
    """Whether the chosen way may fit: a plan is refused only if it is too large by more than its error."""
    return self.chosen.may_fit(self.limit)


def make_plan(sizes: Sizes, limit: int | None, decoding: Decoding | None = None) -> Plan:
  """The plan of a search.

  Args:
    sizes: what it takes.
    limit: bytes that the device gives; None where it does not say.
    decoding: the only way that is allowed. By default all are, but for large frames not "together": it takes many times
      the memory to keep a device busy that one candidate keeps busy, and no compilation of it is recorded.
  """
  by_default = WAYS[1:] if sizes.large_frames else WAYS
  ways = by_default if decoding is None else (decoding,)
  return Plan([estimate(sizes, way) for way in ways], limit)


def require_fit(plan: Plan, remedy: str | None) -> None:
  """Raises ConfigError, in one line, for a plan that does not fit; `remedy` is a setting with which it would."""
  if plan.fits:
    return
  assert plan.limit is not None
  one, (name, size) = plan.chosen, plan.chosen.largest
  raise ConfigError(
    f"this search takes about {in_gib(one.total)} GiB (within {in_gib(one.error)}) even with --decoding="
    f"{one.decoding}, and the device gives {in_gib(plan.limit)} GiB; the largest part is {name} with {in_gib(size)} "
    f"GiB; {remedy or 'no single device of this size holds it: use several (--mesh)'}"
  )


def in_gib(size: int) -> str:
  """Bytes as GiB with two digits."""
  return f"{size / GIB:.2f}"
