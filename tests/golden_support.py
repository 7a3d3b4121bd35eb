"""Reads recorded traces (tests/golden/README.md) and sets up the search that should reproduce them."""

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax import drivers, memory_sinking
from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.backbone.schedule import sigma_table
from streamt1_jax.config import BackboneConfig, ModelConfig, ScheduleConfig, SearchConfig
from streamt1_jax.convert.tables import wan_dit
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Models
from streamt1_jax.models import make_models
from streamt1_jax.nn import rotary
from streamt1_jax.noise_propagation import NoiseDraws
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel import sharding
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import ChunkTrace, Condition


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)


def sigma_of(timesteps: np.ndarray, config: ScheduleConfig) -> np.ndarray:
  """Noise level of the table's entry nearest to each timestep, as the released scheduler looks it up."""
  sigmas = sigma_table(config)
  distance = np.abs(config.num_train_timesteps * sigmas - np.asarray(timesteps, np.float64)[..., None])
  return sigmas[np.argmin(distance, axis=-1)]


def read_config(arrays: dict) -> dict:
  return json.loads(str(arrays["config_json"]))


def model_config(recorded: dict) -> ModelConfig:
  """ModelConfig of a file's `config_json`."""
  m = recorded["model"]
  case = recorded.get("case", {})
  return ModelConfig(
    name="golden",
    backbone=BackboneConfig(
      dim=m["dim"],
      ffn_dim=m["ffn_dim"],
      num_heads=m["num_heads"],
      num_layers=m["num_layers"],
      freq_dim=m["freq_dim"],
      text_dim=m["text_dim"],
      text_len=m["text_len"],
      latent_channels=m["in_dim"],
      patch_size=m["patch_size"][-1],
      eps=m["eps"],
    ),
    codec=None,
    text=None,
    latent_height=recorded.get("latent_h", case.get("latent_h")),
    latent_width=recorded.get("latent_w", case.get("latent_w")),
    chunk_frames=case.get("num_frame_per_block", 3),
    schedule=ScheduleConfig(
      denoising_steps=tuple(case.get("denoising_step_list", (1000, 750, 500, 250))),
      shift=recorded.get("timestep_shift", case.get("timestep_shift")),
      context_timestep=float(case.get("context_noise", 0)),
    ),
    local_attention_frames=m["local_attn_size"],
    sink_frames=m["sink_size"],
  )


def search_config(recorded: dict) -> SearchConfig:
  case = recorded["case"]
  return SearchConfig.released(
    beam_size=case["beam_size"],
    top_k=case["top_k"],
    noise_sigma=case["noise_fusion_sigma"],
    short_threshold=case["short_threshold"],
    long_threshold=case["long_threshold"],
    fusion_cap=case["short_score_fusion_threshold"],
    sliding_window=case["sliding_window_size"],
    max_sink_frames=recorded["model"]["max_sink_size"],
    sink_ema_decay=recorded["ema_alpha"],
  )


@functools.cache
def load_backbone(folder: pathlib.Path, model: ModelConfig) -> tuple[nnx.GraphDef, dict]:
  params = wan_dit.wan_flavour(model).convert(load(folder / "weights.npz"))
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: CausalWanDiT(model, nnx.Rngs(0))))
  return graphdef, jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnums=0)
def text_memory(graphdef, params, embeds):
  return nnx.merge(graphdef, params).text_memory(embeds)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentImageReward(Promptless):
  """a_s * tanh(g_s * (mean(x * P) - m_s)) of a chunk of latents."""

  pattern: np.ndarray
  constants: dict

  def __call__(self, params, condition, chunk, info):
    c = self.constants
    return c["a_s"] * jnp.tanh(c["g_s"] * ((chunk * self.pattern[None]).mean() - c["m_s"]))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentVideoReward(Promptless):
  """a_l * tanh(g_l * (m - m_l)) - b_l * d: a time-weighted match with Q, less the mean change between frames."""

  pattern: np.ndarray
  constants: dict

  def __call__(self, params, condition, window, info):
    c, count = self.constants, window.num_frames
    index = jnp.arange(window.past.shape[0] + window.chunk.shape[0])
    frames = window.take(jnp.minimum(index, count - 1))
    valid = index < count
    match = (frames * self.pattern[None]).mean(axis=(1, 2, 3))
    m = jnp.where(valid, (index + 1) / count * match, 0.0).sum() / count
    change = jnp.abs(frames[1:] - frames[:-1]).mean(axis=(1, 2, 3))
    d = jnp.where(valid[1:], change, 0.0).sum() / (count - 1)
    return c["a_l"] * jnp.tanh(c["g_l"] * (m - c["m_l"])) - c["b_l"] * d


@dataclasses.dataclass(frozen=True, eq=False)
class ScriptedReward(Promptless):
  """A table [chunk, candidate]."""

  table: np.ndarray

  def __call__(self, params, condition, frames, info):
    return jnp.asarray(self.table, jnp.float32)[info.chunk_index, info.candidate_index]


def recorded_noise(arrays: dict):
  """Draws the recorded noise of a seed."""

  def draw(seed):
    row = jnp.argmax(jnp.asarray(arrays["noise_seed"], jnp.int32) == seed)
    return NoiseDraws(jnp.asarray(arrays["fresh_noise"])[row], jnp.asarray(arrays["renoise"])[row])

  return draw


@dataclasses.dataclass(frozen=True)
class Case:
  """One recorded search; `video_reward` is the formula of the final scores, also where the search was scripted."""

  arrays: dict
  model: ModelConfig
  search: SearchConfig
  models: Models
  params: dict
  condition: Condition
  seed: int
  num_chunks: int
  video_reward: LatentVideoReward


def load_case(path: pathlib.Path) -> Case:
  arrays = load(path)
  recorded = read_config(arrays)
  model = model_config(recorded)
  graphdef, backbone = load_backbone(path.parent, model)
  video_reward = LatentVideoReward(arrays["reward_Q"], recorded["reward"])
  if recorded["reward_kind"] == "scripted":
    rewards = ScriptedReward(arrays["script_short"]), ScriptedReward(arrays["script_long"])
  else:
    rewards = LatentImageReward(arrays["reward_P"], recorded["reward"]), video_reward
  models = make_models(model, *rewards, draw_noise=recorded_noise(arrays))
  text = text_memory(graphdef, backbone, arrays["prompt_embeds"][0])
  num_chunks = arrays["x0"].shape[0]
  return Case(
    arrays=arrays,
    model=model,
    search=search_config(recorded),
    models=models,
    params={"backbone": backbone, "codec": {}, "image_reward": {}, "video_reward": {}},
    condition=Condition(text, (), (), jnp.int32(num_chunks)),
    seed=recorded["case"]["seed"],
    num_chunks=num_chunks,
    video_reward=video_reward,
  )


DEVICES = ("one_device", "mesh")


class Block(NamedTuple):
  """What one chunk of a search left behind; numpy arrays.

  Attributes:
    before: memories [K, ...] before the chunk.
    evicted: the same after they made room for the chunk.
    after: memories of the survivors.
    trace: the chunk's trace with its steps.
  """

  before: memory_sinking.Memory
  evicted: memory_sinking.Memory
  after: memory_sinking.Memory
  trace: ChunkTrace


class Run(NamedTuple):
  case: Case
  blocks: list[Block]


def replay(case: Case, devices: str) -> Run:
  """Searches as the recording did.

  Args:
    case: what was recorded.
    devices: "one_device"; "mesh" of as many devices as its candidates and heads can use; or the axes of a mesh.
  """
  if devices != "one_device":
    case = _on_a_mesh(case, devices)

  @jax.jit
  @jax.vmap
  def make_room(memory):
    return memory_sinking.evict(memory, case.model, case.search)[0]

  # Copies survive the donation of the state.
  host = lambda tree: jax.tree.map(np.array, tree)
  state = drivers.jitted_init_state(case.params, case.seed, case.models, case.search, case.num_chunks)
  before, blocks = host(state.beams.memory), []
  states = drivers.stream_states(
    case.params,
    case.condition,
    case.models,
    case.search,
    num_chunks=case.num_chunks,
    seed=case.seed,
    record=True,
    state=state,
  )
  for state, trace in states:
    after = host(state.beams.memory)
    blocks.append(Block(before, host(make_room(before)), after, host(trace)))
    before = after
  return Run(case, blocks)


def _on_a_mesh(case: Case, devices: str) -> Case:
  if devices == "mesh":
    sizes = device_mesh.default_sizes(jax.device_count(), case.model, case.search)
  else:
    sizes = device_mesh.parse_sizes(devices)
  mesh = device_mesh.make_mesh(sizes, case.model, case.search)
  assert mesh.size >= 4
  place = lambda name, tree: jax.device_put(tree, sharding.tree_shardings(mesh, name, tree))
  return dataclasses.replace(
    case,
    models=dataclasses.replace(case.models, execution=Execution(mesh=mesh)),
    params={name: place(name, part) for name, part in case.params.items()},
    condition=place("condition", case.condition),
  )


def _key_rotation(model: ModelConfig) -> np.ndarray:
  """exp(i angle) [T, D / 2] of a chunk's keys at its own frames, complex128."""
  config = model.backbone
  time, height, width = rotary.axis_pairs(config.head_dim)
  rows, columns = model.latent_height // config.patch_size, model.latent_width // config.patch_size
  frame, row, column = np.meshgrid(np.arange(model.chunk_frames), np.arange(rows), np.arange(columns), indexing="ij")
  angle = lambda position, pairs: position.reshape(-1, 1) * 10000.0 ** (-np.arange(pairs) / pairs)
  return np.exp(1j * np.concatenate([angle(frame, time), angle(row, height), angle(column, width)], axis=1))


def raw_keys(keys: np.ndarray, model: ModelConfig) -> np.ndarray:
  """Undoes our storage of keys [L, A, T, D]: the rotation at the chunk's own frames, pair order, head-major layout.

  Returns [L, T, A, D], as recorded. Written with numpy's complex numbers, apart from the code under test.
  """
  half = model.backbone.head_dim // 2
  raw = (keys[..., :half].astype(np.float64) + 1j * keys[..., half:]) / _key_rotation(model)
  return np.stack([raw.real, raw.imag], axis=-1).reshape(keys.shape).transpose(0, 2, 1, 3)


def stored_keys(raw: np.ndarray, model: ModelConfig) -> np.ndarray:
  """The inverse of `raw_keys`, float32."""
  pairs = raw.transpose(0, 2, 1, 3).astype(np.float64)
  turned = (pairs[..., ::2] + 1j * pairs[..., 1::2]) * _key_rotation(model)
  return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)
