"""A comparison of two cases, small enough for its numbers to be found by hand.

In the first case the reward likes the plain video that passes, in the second the other one. Greedy search passes
in both.
"""

import base64

from streamt1_jax.config import preset
from streamt1_jax.evaluation.compare import contenders, held_out
from streamt1_jax.evaluation.compare.outcomes import Results
from streamt1_jax.evaluation.compare.pool import Key, Plan
from streamt1_jax.evaluation.compare.scenes import Case, Scene

METRICS = ("all_at_once", "psnr")
ENTRIES = contenders.read(["none", "best_of_n:2", "greedy:4"], preset("tiny"))
PLAN = {"fixed": {"split": "test"}, "methods": {each.label: {"videos_before": 0} for each in ENTRIES}}
"""What the page says of the plan."""


def signature(value: int = 0) -> str:
  """The signature of a video whose pixels have one value."""
  return base64.b64encode(bytes([value]) * held_out.SIGNATURE_BYTES).decode()


def row(method, prompt, place=0, *, passed, score, forwards=10, tflop=2.0, seconds=1.0, compilations=0, take=0):
  """One video's row."""
  return {
    **Key(method, prompt, take, place)._asdict(),
    "base_seed": 0,
    "score": score,
    "held_out": {"all_at_once": passed, "psnr": 30.0 if passed else 20.0},
    "windows": [1.0, float(passed)],
    "signature": signature(),
    "made": {"cost": {"denoise": forwards - 2, "commit": 2}, "tflop": {"forwards": tflop}},
    "verdict": {"cost": {"video_calls": 1}, "tflop": {"video_reward": 1.0}},
    "depth": 10,
    "seconds": seconds,
    "verdict_seconds": 0.5,
    "compilations": compilations,
  }


def rows():
  """All videos."""
  return [
    row("plain", 0, 0, passed=False, score=1.0, seconds=9.0, compilations=3),
    row("plain", 0, 1, passed=True, score=2.0),
    row("plain", 1, 0, passed=False, score=2.0, seconds=9.0, compilations=1),
    row("plain", 1, 1, passed=True, score=1.0),
    *(row("greedy:4", prompt, passed=True, score=1.5, forwards=15, tflop=7.5) for prompt in (0, 1)),
  ]


def results(found, takes=1):
  """The comparison of these rows."""
  scenes = [Scene((f"caption {index}",)) for index in (0, 1)]
  cases = [Case(prompt, take, 0) for prompt in (0, 1) for take in range(takes)]
  keyed = {Key(*(each[name] for name in Key._fields)): each for each in found}
  return Results(Plan({}, scenes, cases, 2, METRICS[0]), keyed)
