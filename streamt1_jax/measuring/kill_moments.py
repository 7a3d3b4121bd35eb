"""Moments at which to kill a search, and the phase in which a kill fell."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from etils import epath

from streamt1_jax import drivers
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.config import SearchConfig, preset
from streamt1_jax.measuring import random_model
from streamt1_jax.measuring.marks import Marks
from streamt1_jax.measuring.random_search import ConstantReward
from streamt1_jax.pipeline import Pipeline

PHASES = ("load", "compile", "denoise", "reward", "commit", "save", "assemble", "write")
"""Where a kill may fall."""


class Program(NamedTuple):
  """A program that will be killed.

  Attributes:
    lengths: the most seconds of every phase, and of the whole `run`.
    shares: parts of a chunk.
    chunk_seconds: seconds of a chunk.
    num_videos: that it makes.
  """

  lengths: Mapping[str, float]
  shares: Shares
  chunk_seconds: float
  num_videos: int


Moment = tuple[str, int, float]
"""An event, how often it has to come, and the seconds after it at which to kill."""

_uniform = random.uniform
_MOMENTS: Mapping[str, Callable[[Program, int], Moment]] = {
  "compile": lambda run, often: ("+first_chunk", 1, _uniform(0.0, run.lengths["compile"])),
  "denoise": lambda run, often: ("+search", often, _uniform(0.0, run.shares.denoise) * run.chunk_seconds),
  "reward": lambda run, often: ("+search", often, _uniform(run.shares.denoise, run.shares.reward) * run.chunk_seconds),
  "save": lambda run, often: ("+save", often, _uniform(0.0, 1.2) * run.lengths["save"]),
  "write": lambda run, often: (
    "+assemble",
    random.randint(1, run.num_videos),
    _uniform(0.0, run.lengths["assemble"] + run.lengths["write"]),
  ),
  "any": lambda run, often: ("+start", 1, _uniform(0.0, run.lengths["run"])),
}
DRAWN = tuple(_MOMENTS)
"""Where it is meant to fall."""


def save_model(folder: epath.Path, tokenizer: epath.PathLike) -> None:
  """The tiny preset with less of everything, and random weights; most of a chunk is spent in denoising."""
  tiny, width = preset("tiny"), 16
  model = dataclasses.replace(
    tiny,
    backbone=dataclasses.replace(tiny.backbone, dim=128, ffn_dim=256, num_layers=8, freq_dim=32, text_dim=width),
    codec=dataclasses.replace(tiny.required_codec, base_dim=4),
    text=dataclasses.replace(tiny.required_text, dim=width, attn_dim=16, ffn_dim=32, num_heads=2, num_layers=1),
    latent_height=4,
    latent_width=4,
  )
  random_model.save(folder, model, tokenizer)


@dataclasses.dataclass(frozen=True)
class Shares:
  """Ends of the parts of a chunk, as fractions of its time; the rest is the winners' clean pass."""

  denoise: float
  reward: float


def measure_shares(folder: epath.PathLike, prompt: str, num_chunks: int) -> Shares:
  """Compares a chunk of the model in `folder` with one that is neither decoded nor judged."""
  pipeline, search = Pipeline.load(folder), SearchConfig.released()
  condition, model = pipeline.condition(prompt, num_chunks), pipeline.config
  bare = dataclasses.replace(
    pipeline.models,
    codec=LatentCodec(model.latent_shape[1:]),
    image_reward=ConstantReward(),
    video_reward=ConstantReward(),
  )
  seconds = lambda models: _chunk_seconds(pipeline.params, condition, models, search, num_chunks + 3)
  whole, without = seconds(pipeline.models), seconds(bare)
  passes = len(model.schedule.denoising_steps) * search.num_candidates
  judge, denoise = max(0.0, 1 - without / whole), passes / (passes + search.top_k)
  return Shares(denoise=(1 - judge) * denoise, reward=(1 - judge) * denoise + judge)


def _chunk_seconds(params, condition, models, search, num_chunks: int) -> float:
  seconds = []
  state = drivers.jitted_init_state(params, 0, models, search)
  for index in range(num_chunks):
    began = time.perf_counter()
    inputs = params, state, condition, models, search
    state, _ = jax.block_until_ready(drivers.jitted_chunk_step(*inputs, first=index == 0))
    seconds.append(time.perf_counter() - began)
  return min(seconds[2:])


def phase_at(marks: Marks, moment: float, shares: Shares, chunk_seconds: float) -> tuple[str, bool]:
  """What the program was doing, one of `PHASES`, and whether a save was under way beside it."""
  running: dict[str, float] = {}
  compiled = 0.0
  for seconds, event in marks:
    if seconds > moment:
      break
    if event[0] == "+":
      running[event[1:]] = seconds
    else:
      running.pop(event[1:], None)
      compiled = seconds if event == "-compile" else compiled
  for phase in ("copy", "write", "assemble", "compile"):
    if phase in running:
      return {"copy": "save"}.get(phase, phase), "save" in running
  began = max(running.get("search", 0.0), compiled if "first_chunk" in running else 0.0)
  if not began:
    return "load", "save" in running
  share = min(1.0, (moment - began) / chunk_seconds)
  phase = "denoise" if share < shares.denoise else "reward" if share < shares.reward else "commit"
  return phase, "save" in running


def draw_moment(drawn: str, program: Program) -> Moment:
  """A moment at which to kill a program in the phase `drawn`, one of `DRAWN`."""
  return _MOMENTS[drawn](program, random.randint(1, 3))
