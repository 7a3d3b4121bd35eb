"""What a compiled chunk step needs of the chips it is for, as JSON and as a table."""

from collections.abc import Sequence
from typing import Any

from streamt1_jax.measuring import hlo_collectives
from streamt1_jax.measuring.compiled_step import Analysis, Program
from streamt1_jax.measuring.hlo_collectives import Collective
from streamt1_jax.parallel.sharding import RULES
from streamt1_jax.typing import Device

GIB = 1 << 30
# What is left of the chip's memory for programs, as the compiler says where a program does not fit.
_DEVICE_GIB = {"TPU v4": 15.25, "TPU v5 lite": 15.75, "TPU v5": 95.73, "TPU v6 lite": 31.24, "TPU7x": 94.74}


def device_limit(kind: str) -> int:
  """Bytes that a device of this kind gives to programs."""
  return int(_DEVICE_GIB[kind] * GIB)


def describe(program: Program, devices: Sequence[Device], analysis: Analysis, flop: float) -> dict[str, Any]:
  """What was found, as JSON values; `flop` is that of one prompt, bytes are per chip."""
  mesh = program.models.execution.mesh
  # Chips with two cores show as two devices of one place.
  cores = len(devices) // len({tuple(device.coords) for device in devices})
  limit = device_limit(devices[0].device_kind)
  report = {
    "chip": devices[0].device_kind,
    "mesh": None if mesh is None else dict(mesh.shape),
    "hbm_peak_bytes_per_chip": analysis.peak * cores,
    "hbm_limit_bytes": limit * cores,
    "fits": analysis.arguments is not None and analysis.peak <= limit,
    "argument_bytes": _times(analysis.arguments, cores),
    "output_bytes": _times(analysis.outputs, cores),
    "temporary_bytes": _times(analysis.temporaries, cores),
    "flop": flop * program.num_prompts,
    "collectives": None,
    "compile_seconds": round(analysis.seconds, 1),
  }
  if analysis.collectives is None:
    return report
  sent = hlo_collectives.by_kind(analysis.collectives)
  return report | {"collectives": sent} | _in_blocks(program, analysis.collectives)


def _times(number: int | None, factor: int) -> int | None:
  return None if number is None else number * factor


def _in_blocks(program: Program, collectives: list[Collective]) -> dict[str, Any]:
  """What the targets speak of: activation-sized collectives per block, and any between candidates while denoising."""
  model = program.model
  denoising = [one for one in collectives if one.phase == "denoise"]
  passes = len(model.schedule.denoising_steps) * model.backbone.num_layers
  one_candidate = model.chunk_tokens * model.backbone.dim * 2
  mesh = program.models.execution.mesh
  part = one_candidate // (1 if mesh is None else mesh.shape[RULES["patch"]])
  in_blocks = [one for one in denoising if one.executions >= model.backbone.num_layers]
  large = sum(one.executions for one in in_blocks if one.bytes >= part // 2) / passes
  between = sum(one.executions for one in denoising if {"beam", "sibling"} & set(one.axes.split("+")))
  return {"activation_collectives_per_block": large, "candidate_collectives_in_denoising": between}


def lines(report: dict[str, Any], collectives: list[Collective] | None) -> list[str]:
  """For people: memory, then what is sent, by phase and axis."""
  sizes = ("argument_bytes", "output_bytes", "temporary_bytes", "hbm_peak_bytes_per_chip", "hbm_limit_bytes")
  found = [f"{name:<26}{report[name] / GIB:10.2f} GiB" for name in sizes if report[name] is not None]
  found.append(f"{'fits':<26}{'yes' if report['fits'] else 'no':>10}")
  found.append(f"{'flop of a chunk':<26}{report['flop'] / 1e12:10.1f} TFLOP")
  found.append(f"{'compile_seconds':<26}{report['compile_seconds']:10.1f} s")
  for one in sorted(collectives or [], key=lambda one: -one.bytes * one.executions):
    sent = f"{one.bytes:>14,} bytes{one.executions:>7,} times"
    found.append(f"{one.phase or 'elsewhere':<10}{one.axes:<16}{one.kind:<20}{sent}")
  return found
