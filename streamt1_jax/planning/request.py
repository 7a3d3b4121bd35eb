"""From what a search is asked to do to the bytes it takes: shapes are evaluated, and nothing is allocated."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Container, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.generator import Models
from streamt1_jax.models import abstract_params, make_models
from streamt1_jax.parallel.sharding import Layout, placed
from streamt1_jax.planning import memory
from streamt1_jax.planning.memory import Plan, Sizes
from streamt1_jax.policies import candidates_drawn
from streamt1_jax.rewards import folder
from streamt1_jax.rewards.selection import RewardChoice
from streamt1_jax.rewards.spec import RewardSpec, RewardTable
from streamt1_jax.rewards.table import DEFAULT_REWARDS, REWARDS
from streamt1_jax.state import SearchState, init_state
from streamt1_jax.wan_generator import WanGenerator

_LARGE_FRAME = 256 * 256  # pixels; a candidate's chunk then takes a gigabyte or so to decode


@dataclasses.dataclass(frozen=True)
class Request:
  """What decides the bytes of a search.

  Attributes:
    model: sizes.
    search: the search.
    rewards: specification and configuration of every reward with weights, by name.
    dtype: of weights and activations.
    reward_dtype: of the rewards' backbones.
    execution: devices and attention; how it decodes does not count.
    kernel: whether a kernel computes attention, so that no scores are in memory.
    num_chunks: length of the video; None for one that fills the window.
    decoding: the only way to decode that is allowed; None for any.
    kept_states: copies of the state that the search keeps beside the one in work.
  """

  model: ModelConfig
  search: SearchConfig
  rewards: Mapping[str, tuple[RewardSpec, Any]]
  dtype: DTypeLike
  reward_dtype: DTypeLike
  execution: Execution
  kernel: bool
  num_chunks: int | None = None
  decoding: Decoding | None = None
  kept_states: int = 0


def reward_configs(
  directory: epath.PathLike, choice: RewardChoice, table: RewardTable = REWARDS
) -> dict[str, tuple[RewardSpec, Any]]:
  """Specification and configuration of the chosen rewards with weights; no weight is read.

  Raises ConfigError for a folder that is damaged.
  """
  parts = epath.Path(directory) / folder.REWARDS_FOLDER
  return {name: folder.load_config(parts / name, table) for name in choice.stored}


def uses_kernel(attention: str | None, platform: str, head_dim: int) -> bool:
  """Whether attention leaves no scores in memory, as `backbone.attention` chooses by platform."""
  if attention is None:
    return platform == "tpu" and head_dim % 128 == 0
  return attention != "fold"


def device_limit(mesh: Mesh | None) -> int | None:
  """Bytes that one device of this process gives to programs; None where it does not say.

  A CPU gives the memory of the machine, which its devices share.
  """
  here = jax.process_index()
  devices = jax.local_devices()[:1] if mesh is None else [d for d in mesh.devices.flat if d.process_index == here]
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
  if devices and devices[0].platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
  return min((limit for limit in limits if limit), default=None)


def sizes(request: Request) -> Sizes:
  """Bytes on one device, by shapes."""
  model, search, mesh = request.model, request.search, request.execution.mesh
  models, params, state, prompt = _shapes(model, search, jnp.dtype(request.dtype), request.num_chunks)
  on_device = lambda layout, tree: _device_bytes(mesh, layout, tree)
  parts = {name: state.beams._replace(**{name: None}) for name in ("memory", "codec")}
  whole = on_device("state", state)
  kept = {name: whole - on_device("state", state._replace(beams=beams)) for name, beams in parts.items()}
  shards = _shards(request.execution)
  beams = _part(search.top_k, shards["beam"])
  drawn = search.round_size or candidates_drawn(search)
  candidates = beams * _part(drawn, shards["candidate"])
  weights = {"the backbone": on_device("backbone", params["backbone"]), "the decoder": on_device((), params["codec"])}
  weights |= {
    name: on_device(spec.layout, spec.searched(spec.weight_shapes(config, request.reward_dtype)))
    for name, (spec, config) in request.rewards.items()
  }
  itemsize = np.dtype(request.dtype).itemsize
  frames = models.codec.num_frames(model.chunk_frames, first=False)
  frame_bytes = int(np.prod(models.codec.frame_shape())) * models.codec.frame_dtype().itemsize
  # Chunks of the window that is decoded from scratch.
  window = None if state.beams.latents is None else state.beams.latents.shape[1]
  codec = model.codec
  pixels = 0 if codec is None else model.latent_height * model.latent_width * codec.spatial_stride**2
  return Sizes(
    weights=weights,
    memory=kept["memory"],
    decoder_state=kept["codec"] // beams,
    rest=whole - kept["memory"] - kept["codec"],
    prompt=on_device("text", prompt),
    results=search.top_k * frames * frame_bytes,
    beams=beams,
    candidates=candidates,
    decoded_frames=model.chunk_frames * (window or 1),
    window=0 if window is None else models.codec.num_frames(model.chunk_frames * window, first=True) * frame_bytes,
    chunk_memory=2 * model.backbone.num_layers * model.chunk_tokens * model.backbone.dim * itemsize // shards["head"],
    block=weights["the backbone"] // model.backbone.num_layers,
    generated=_generated(request, shards["head"], itemsize),
    decoded=0 if codec is None else codec.base_dim * codec.temporal_stride * pixels // codec.patch_size**2 * itemsize,
    rows_divided=shards["row"] > 1,
    large_frames=pixels > _LARGE_FRAME,
    keeps_candidates=search.judges and search.reward_decode == "streamed" and search.round_size == 0,
    beams_in_all=search.top_k,
    looks_ahead=search.look_ahead > 0,
    kept_states=request.kept_states,
  )


@functools.lru_cache(maxsize=32)
def _shapes(
  model: ModelConfig, search: SearchConfig, dtype: Any, num_chunks: int | None
) -> tuple[Models, dict[str, Any], SearchState, Any]:
  """The static half of a search, and the shapes of its weights, of its state and of a prompt, on no device yet."""
  # Rewards change nothing here.
  models = make_models(model, *(cast(Any, REWARDS[name].make(None, model.fps)) for name in DEFAULT_REWARDS))
  params = {**abstract_params(model, dtype), "image_reward": {}, "video_reward": {}}
  state = jax.eval_shape(lambda params: init_state(params, models, search, 0, num_chunks), params)
  text = jax.ShapeDtypeStruct((model.backbone.text_len, model.backbone.text_dim), dtype)
  text_memory = cast(WanGenerator, models.generator).text_memory
  return models, params, state, jax.eval_shape(text_memory, params["backbone"], text)


def _shards(execution: Execution) -> dict[str, int]:
  mesh = execution.mesh
  if mesh is None:
    return dict.fromkeys(("beam", "candidate", "head", "row"), 1)
  heads = mesh.shape["model"] * mesh.shape["seq"]
  return {"beam": mesh.shape["beam"], "candidate": mesh.shape["sibling"], "head": heads, "row": heads}


def _part(size: int, shards: int) -> int:
  """What one device has of an axis, which stays whole if its devices do not divide it."""
  return size if size % shards else size // shards


def _generated(request: Request, shards: int, itemsize: int) -> int:
  """Bytes of one candidate's activations in a block: the inner ones of the feed-forward layer, and scores.

  Scores with one chunk of memory exist as logits and as weights in float32, and as weights in the compute dtype.
  """
  model, tokens = request.model, request.model.chunk_tokens
  scores = 0 if request.kernel else model.backbone.num_heads * tokens**2 * (4 + 4 + itemsize)
  return (scores + tokens * model.backbone.ffn_dim * itemsize) // shards


def _device_bytes(mesh: Mesh | None, layout: str | Layout, tree: Any) -> int:
  """Bytes of a tree of shapes on one device of the mesh."""

  def of_leaf(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(shape)) * leaf.dtype.itemsize

  return sum(map(of_leaf, jax.tree.leaves(placed(mesh, layout, tree))))


def plan(request: Request, limit: int | None) -> Plan:
  """How the search decodes on devices of `limit` bytes."""
  return memory.make_plan(sizes(request), limit, request.decoding)


def remedy(request: Request, limit: int, flags: Container[str]) -> str | None:
  """Those of `flags` with which the search would fit, as few as possible; None if no flags would do."""
  offers = [(flag, change) for flag, change in _offers(request) if flag.lstrip("-").partition("=")[0] in flags]
  for count in range(1, len(offers) + 1):
    for chosen in itertools.combinations(offers, count):
      changed = request
      for _, change in chosen:
        changed = change(changed)
      if plan(changed, limit).fits:
        return f"{' '.join(flag for flag, _ in chosen)} would fit"
  return None


def _offers(request: Request) -> Iterator[tuple[str, Any]]:
  """Flags that take memory from a search, and what they make of a request; those that change least come first."""
  least = request.model.sink_frames
  if request.decoding not in (None, "twice"):
    yield "--decoding=twice", lambda r: dataclasses.replace(r, decoding="twice")
  if np.dtype(request.dtype).itemsize == 4:
    narrow = lambda r: dataclasses.replace(
      r, dtype=jnp.bfloat16, reward_dtype=jnp.bfloat16 if r.reward_dtype == request.dtype else r.reward_dtype
    )
    yield "--dtype=bfloat16", narrow
  if request.rewards and request.reward_dtype != jnp.int8:
    yield "--reward_dtype=int8", lambda r: dataclasses.replace(r, reward_dtype=jnp.dtype("int8"))
  if request.search.max_sink_frames > least:
    sinks = lambda r: dataclasses.replace(r, search=dataclasses.replace(r.search, max_sink_frames=least))
    yield f"--max_sink_frames={least}", sinks
