"""The table of full-size compilations: which there are, and one row of each."""

from collections.abc import Mapping
from typing import Any

from streamt1_jax.measuring.compilation_report import GIB

_ONE_CHIP = {"topology": "v6e:1x1", "mesh": "candidate:1", "decoding": "twice"}
_SLICES = (
  {"topology": "v5e:2x4", "mesh": "candidate:2,model:4", "decoding": "in_turn"},
  {"topology": "v6e:2x4", "mesh": "candidate:4,model:2", "decoding": "in_turn"},
  {"topology": "v5p:2x2x1", "mesh": "candidate:4", "decoding": "in_turn"},
  {"topology": "tpu7x:2x2x1", "mesh": "candidate:4,model:2", "decoding": "in_turn"},
  {"topology": "v5e:16x16", "mesh": "data:32,candidate:2,model:4", "decoding": "in_turn"},
)
_LATER = (
  {**_ONE_CHIP, "rewards": False},
  # One chip holds both rewards beside the search only in int8 and without added sinks.
  {**_ONE_CHIP, "rewards": True, "reward_dtype": "int8", "max_sink_frames": 3},
  {**_SLICES[0], "rewards": True},
  *({**one, "rewards": False} for one in _SLICES),
  {**_SLICES[0], "mesh": "candidate:2,seq:4", "rewards": False},
  *({**one, "rewards": True} for one in _SLICES[1:]),
)
_SWITCHES = tuple({**case, "rewards": False, "switch": "released"} for case in (_ONE_CHIP, _SLICES[0]))
CASES = (*_LATER, *({**case, "first_chunk": True} for case in _LATER), *_SWITCHES)
"""Flags of `experiments.measure.aot_compile`, one compilation each: a search compiles its step twice, and what a new
prompt does."""

COLUMNS = (
  "slice", "mesh", "decoding", "rewards", "sink frames", "chunk", "arguments", "outputs", "temporaries", "peak", "of",
  "fits", "collectives, GB", "per block", "between candidates", "compile, s",
)  # fmt: skip


def cells(case: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[str, ...]:
  """One row of the table; sizes are GiB per chip, collectives GB sent by a device in one chunk."""
  size = lambda name: "" if report[name] is None else f"{report[name] / GIB:.2f}"
  sent = report["collectives"]
  kinds = "" if sent is None else ", ".join(f"{kind} {one['bytes'] / 1e9:.2f}" for kind, one in sent.items()) or "none"
  of_model = lambda name: "" if sent is None else f"{report[name]:g}"
  return (
    case["topology"],
    case["mesh"],
    case["decoding"],
    report["reward_dtype"] or "built in",
    str(report["max_sink_frames"]),
    _program(case),
    *(size(name) for name in ("argument_bytes", "output_bytes", "temporary_bytes")),
    size("hbm_peak_bytes_per_chip"),
    size("hbm_limit_bytes"),
    "yes" if report["fits"] else "no",
    kinds,
    of_model("activation_collectives_per_block"),
    of_model("candidate_collectives_in_denoising"),
    f"{report['compile_seconds']:.0f}",
  )


def _program(case: Mapping[str, Any]) -> str:
  if "switch" in case:
    return f"new prompt, {case['switch']}"
  return "first" if case.get("first_chunk") else "later"


def is_row(row: Mapping[str, Any]) -> bool:
  """Whether `row`, a JSON object, has what `cells` shows."""
  try:
    cells(**row)
  except (AttributeError, KeyError, TypeError, ValueError):
    return False
  return True
