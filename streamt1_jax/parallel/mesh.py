"""Devices as a grid.

A user divides devices by four axes, as in "data:2,candidate:4":

  data        prompts: every one is a search of its own
  candidate   candidates of a search
  model       attention heads, feed-forward channels, rows of the video decoder
  seq         tokens of a chunk, with the backbone's weights whole; in self-attention, heads

Both `model` and `seq` make a single chunk sooner. With `model` every device holds a part of the weights, and devices
sum activations three times a block. With `seq` every device holds all weights of the backbone, and devices exchange
queries, keys, values and results, which are a fraction of those sums. Both divide everything else alike.

In the mesh, `candidate` is two axes, `beam` and `sibling`. A beam's memory lies where its candidates are made, and
only siblings, the candidates of one beam, need copies of it. Beams come first, so "candidate:4" of a search with two
beams of two candidates is beam:2 x sibling:2.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig
from streamt1_jax.typing import Device

AXES = ("data", "candidate", "model", "seq")
MESH_AXES = ("data", "beam", "sibling", "model", "seq")


def parse_sizes(text: str) -> dict[str, int]:
  """Sizes by axis of a text like "data:2,candidate:4"; axes that it does not name have size 1.

  Raises:
    ConfigError: the text is anything else.
  """
  sizes = {}
  for entry in text.split(","):
    axis, _, size = entry.partition(":")
    if axis not in AXES or axis in sizes or not size.isascii() or not size.isdigit() or int(size) < 1:
      raise ConfigError(
        f"a mesh is written axis:size,axis:size with the axes {', '.join(AXES)}, each at most once, and sizes of at "
        f"least 1, got {entry!r}"
      )
    sizes[axis] = int(size)
  return {axis: sizes.get(axis, 1) for axis in AXES}


def default_sizes(
  num_devices: int, model: ModelConfig, search: SearchConfig, num_prompts: int = 1, *, every: bool = False
) -> dict[str, int]:
  """Sizes that use as many of the devices as they can: candidates first, then prompts, then the model.

  Candidates and prompts do not meet before their scores are compared, but shards of the model talk in every block.

  Args:
    num_devices: devices of the run.
    model: what is divided by `model`.
    search: what is divided by `candidate`.
    num_prompts: videos to make.
    every: leaves no device out: `data` may then be larger than `num_prompts`.
  """
  candidate = max(size for size in _candidate_sizes(search) if num_devices % size == 0)
  data = math.gcd(num_devices // candidate, num_prompts)
  model_shards = math.gcd(num_devices // (candidate * data), _model_shards(model))
  if every:
    data = num_devices // (candidate * model_shards)
  return {"data": data, "candidate": candidate, "model": model_shards, "seq": 1}


def make_mesh(
  sizes: Mapping[str, int], model: ModelConfig, search: SearchConfig, devices: Sequence[Device] | None = None
) -> Mesh | None:
  """The mesh of these sizes, or None if they are all 1: one device needs none.

  Args:
    sizes: by axis, as `parse_sizes` gives them; an axis that is not there has size 1.
    model: `model` must divide its heads and feed-forward channels, `model * seq` its heads, and `seq` the tokens of a
      latent frame.
    search: `candidate` must divide its beams and the candidates that they draw at one time.
    devices: all devices of the run by default. If there are more than the sizes ask for, the first ones are used.

  Raises:
    ConfigError: the sizes do not divide the devices, heads, tokens or candidates.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  count = math.prod(sizes.values())
  if len(devices) % count:
    raise ConfigError(f"a mesh of {_text(sizes)} takes {count} devices, which does not divide the {len(devices)} here")
  if _model_shards(model) % sizes["model"]:
    raise ConfigError(
      f"model:{sizes['model']} does not divide the {model.backbone.num_heads} heads and {model.backbone.ffn_dim} "
      f"feed-forward channels; allowed: {', '.join(map(str, _divisors(_model_shards(model))))}"
    )
  heads, tokens = model.backbone.num_heads, model.frame_tokens
  if tokens % sizes["seq"] or heads % (sizes["model"] * sizes["seq"]):
    raise ConfigError(
      f"seq:{sizes['seq']} must divide the {tokens} tokens of a latent frame, and with model:{sizes['model']} the "
      f"{heads} heads"
    )
  if sizes["candidate"] not in _candidate_sizes(search):
    raise ConfigError(
      f"candidate:{sizes['candidate']} does not divide {search.top_k} beams of {search.round_size or search.beam_size} "
      f"candidates{' in a round' if search.round_size else ''}; allowed: "
      f"{', '.join(map(str, _candidate_sizes(search)))}"
    )
  if count == 1:
    return None
  beam = math.gcd(sizes["candidate"], search.top_k)
  shape = (sizes["data"], beam, sizes["candidate"] // beam, sizes["model"], sizes["seq"])
  return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices[:count])


def _text(sizes: Mapping[str, int]) -> str:
  return ",".join(f"{axis}:{sizes[axis]}" for axis in AXES)


def _model_shards(model: ModelConfig) -> int:
  """The largest number of shards. Its divisors divide the heads and the feed-forward channels too."""
  return math.gcd(model.backbone.num_heads, model.backbone.ffn_dim)


def _candidate_sizes(search: SearchConfig) -> list[int]:
  """Sizes of `candidate`, in ascending order. Beams take what they can of a size; the rest divides their candidates.

  These are the ones that are drawn at one time.
  """
  sizes, drawn = range(1, search.num_candidates + 1), search.round_size or search.beam_size
  return [size for size in sizes if drawn % (size // math.gcd(size, search.top_k)) == 0]


def _divisors(number: int) -> list[int]:
  return [size for size in range(1, number + 1) if number % size == 0]
