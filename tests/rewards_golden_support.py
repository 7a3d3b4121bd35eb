"""Reads recorded traces of the reward models (tests/golden/rewards) and computes ours under the same names."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from streamt1_jax.rewards.hpsv3 import HPSv3, HPSv3Config
from streamt1_jax.rewards.qwen2_vl import preprocess
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, Qwen2VLConfig, VisionConfig
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.videoalign import DIMENSIONS, VideoAlign, VideoAlignConfig
from tests import small_rewards

MEDIA = {"hpsv3": "image", "videoalign": "video"}
NUMERICS = {
  "fp32": ("float32", jnp.float32),
  "control_mrope": ("float32", jnp.float32),
  "bf16_rope": ("bf16_reference", jnp.float32),
  "bf16_sdpa": ("bf16_reference", jnp.bfloat16),
  "bf16_eager": ("bf16_reference", jnp.bfloat16),
  "bf16_merged": ("bf16_reference", jnp.bfloat16),
}
"""Recorded modes as `rope_dtype` and the dtype of weights; what differs in kernels alone is one mode of ours."""


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path) as arrays:
    return dict(arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
  """One model's files.

  Attributes:
    model: "hpsv3" or "videoalign".
    config: its configuration file.
    weights: checkpoint under published names.
    inputs: frames and batches.
    trace: recorded arrays, `<batch>/<mode>/<name>`.
  """

  model: str
  config: dict
  weights: dict[str, np.ndarray]
  inputs: dict[str, np.ndarray]
  trace: dict[str, np.ndarray]

  def recorded(self, batch: str, mode: str) -> dict[str, np.ndarray]:
    prefix = f"{batch}/{mode}/"
    return {name.removeprefix(prefix): array for name, array in self.trace.items() if name.startswith(prefix)}


@functools.cache
def recording(folder: pathlib.Path, model: str) -> Recording:
  files = (load(folder / f"{model}_{part}.npz") for part in ("weights", "inputs", "trace"))
  return Recording(model, json.loads((folder / f"{model}_config.json").read_text()), *files)


def _backbone(recorded: dict, rope_dtype: str) -> Qwen2VLConfig:
  v = recorded["vision_config"]
  vision = VisionConfig(
    dim=v["embed_dim"],
    ffn_dim=v["mlp_dim"],
    num_heads=v["num_heads"],
    num_layers=v["depth"],
    patch_size=v["patch_size"],
    temporal_patch=v["temporal_patch_size"],
    merge_size=v["spatial_merge_size"],
    rope_theta=v["rope_theta"],
    eps=v["layer_norm_eps"],
  )
  decoder = DecoderConfig(
    dim=recorded["hidden_size"],
    ffn_dim=recorded["intermediate_size"],
    num_heads=recorded["num_attention_heads"],
    num_kv_heads=recorded["num_key_value_heads"],
    num_layers=recorded["num_hidden_layers"],
    vocab_size=recorded["vocab_size"],
    rope_theta=recorded["rope_theta"],
    eps=recorded["rms_norm_eps"],
  )
  return Qwen2VLConfig(vision, decoder, rope_dtype)


@functools.cache
def load_model(recording: Recording, numerics: tuple) -> tuple[HPSv3Config | VideoAlignConfig, dict]:
  """Configuration and parameters in one of the `NUMERICS`."""
  recorded = recording.config
  rope_dtype, dtype = numerics
  backbone = _backbone(recorded, rope_dtype)
  budget = {"min_pixels": recorded["min_pixels"], "max_pixels": recorded["max_pixels"]}
  if recording.model == "hpsv3":
    config = HPSv3Config(backbone, tuple(recorded["reward_head"]["sizes"][1:-1]), **budget)
    params = small_rewards.convert(recording.weights, config, dtype)
  else:
    constants = recorded["inference_config"]
    config = VideoAlignConfig(
      backbone,
      **budget,
      sample_fps=recorded["sample_fps"],
      min_frames=recorded["min_frames"],
      max_frames=recorded["max_frames"],
      mean=tuple(constants[f"{name}_mean"] for name in DIMENSIONS),
      std=tuple(constants[f"{name}_std"] for name in DIMENSIONS),
    )
    lora = recorded["lora"]
    params = small_rewards.convert(recording.weights, config, dtype, (lora["r"], lora["alpha"]))
  return config, jax.tree.map(jnp.asarray, params)


def resized(recording: Recording, size: tuple[int, int]) -> tuple[int, int]:
  """Size in which the model looks at frames of `size`."""
  vision = recording.config["vision_config"]
  factor = vision["patch_size"] * vision["spatial_merge_size"]
  return preprocess.smart_resize(*size, factor, recording.config["min_pixels"], recording.config["max_pixels"])


def prompt_tokens(recording: Recording, batch: str, row: int) -> PromptTokens:
  """The row's text around its media tokens; what follows the last reward token is dropped, and junk takes its place.

  All rows of a batch get one length, so that they share compilations.
  """
  ids, z = recording.inputs[f"{batch}/input_ids"][row], recording.inputs
  places = np.flatnonzero(ids == recording.config["special_token_ids"][f"{MEDIA[recording.model]}_pad"])
  assert places[-1] - places[0] + 1 == len(places)
  read_at = z[f"{batch}/reward_position"][row]
  after = places[-1] + 1
  padded = np.full(ids.shape, 7, np.int32)
  padded[: read_at[-1] + 1 - after] = ids[after : read_at[-1] + 1]
  return PromptTokens(*(jnp.asarray(x) for x in (ids[: places[0]], padded, read_at - after)))


def media_frames(recording: Recording, batch: str, row: int, kind: str) -> np.ndarray:
  """Frames [n, H, W, 3] uint8 of a row's media.

  `kind` is "resized" for those the model sees, "sampled" for the same before they were resized, or "raw" for all.
  """
  media = MEDIA[recording.model]
  source = f"{media}_{recording.inputs[f'{batch}/{media}_index'][row]}"
  if kind == "resized":
    frames = recording.inputs[f"{source}/resized_u8"]
  else:
    frames = recording.inputs[f"{source}/{'raw_u8' if media == 'image' else 'frames_u8'}"]
  if media == "image":
    return frames[None]
  return frames[recording.inputs[f"{source}/sample_index"]] if kind == "sampled" else frames


def resized_exactly(recording: Recording, batch: str, row: int) -> bool:
  """Whether a video's frames are resized to the recorded bytes in every program.

  A byte on a rounding tie is a level off in some: which way it falls depends on the processor, and on what is fused.
  """
  expected = media_frames(recording, batch, row, "resized")
  sampled = jnp.asarray(media_frames(recording, batch, row, "sampled"), jnp.float32)
  exact = {"antialias": True, "precision": jax.lax.Precision.HIGHEST}
  levels = np.asarray(jax.image.resize(sampled, expected.shape, "cubic", **exact))
  # Levels below 256 are 1.5e-5 apart in float32.
  has_tie = np.abs(levels - np.floor(levels) - 0.5).min() < 2e-5
  return not has_tie and np.array_equal(np.clip(np.round(levels), 0, 255), expected)


def reward_of(recording: Recording, config: HPSv3Config | VideoAlignConfig, fps: float = 16.0) -> HPSv3 | VideoAlign:
  return HPSv3(config) if recording.model == "hpsv3" else VideoAlign(fps, config)


@functools.partial(jax.jit, static_argnames=("vision", "single"))
def _to_patches(frames: jax.Array, vision: VisionConfig, single: bool) -> jax.Array:
  make = preprocess.pictures_to_patches if single else preprocess.to_patches
  return make(preprocess.normalise(frames), vision)


def row_patches(recording: Recording, vision: VisionConfig, batch: str, row: int) -> tuple[jax.Array, tuple[int, int]]:
  """Patches [S, N, V] of a row's media and their grid."""
  frames = media_frames(recording, batch, row, "resized")
  return _to_patches(frames, vision, recording.model == "hpsv3"), preprocess.grid_of(frames.shape[1:3], vision)


def _residual_stream(stack, name: str, x, cos, sin) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Runs stacked blocks. Returns the last output, and a trace of every block."""
  graphdef, blocks = nnx.split(stack)
  first = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], blocks))
  attended = first.attention(x, cos, sin)
  trace = {f"{name}_0_attn": attended, f"{name}_0_mlp": first.feed_forward(x + attended)}

  def step(x, block):
    x = nnx.merge(graphdef, block)(x, cos, sin)
    return x, x

  x, outputs = jax.lax.scan(step, x, blocks)
  return x, trace | {f"{name}_{layer}": output for layer, output in enumerate(outputs)}


@functools.partial(jax.jit, static_argnames=("graphdef", "grid"))
def _vision(graphdef, params, patches: jax.Array, grid: tuple[int, int]) -> dict[str, jax.Array]:
  tower = nnx.merge(graphdef, params).backbone.vision
  cos, sin = tower.rotation(grid)
  x = tower.embed_patches(patches)
  repeated = lambda table: jnp.tile(table, (patches.shape[0], 1))
  trace = {"patch_embed": x, "rope_cos": repeated(cos), "rope_sin": repeated(sin)}
  x, blocks = _residual_stream(tower.blocks, "block", x, cos, sin)
  trace |= blocks | {"merger": tower.merger(x)}
  return {f"vision/{name}": array.reshape(-1, array.shape[-1]) for name, array in trace.items()}


@functools.partial(jax.jit, static_argnames="graphdef")
def _decoder(graphdef, params, embeddings: jax.Array) -> dict[str, jax.Array]:
  """The decoder on a batch [B, L, M]; rows past a sequence's end hold padding, which no valid row sees."""
  decoder = nnx.merge(graphdef, params).backbone.decoder
  cos, sin = decoder.rotation(embeddings.shape[1], embeddings.dtype)

  def one(x):
    y, trace = _residual_stream(decoder.blocks, "layer", x, cos, sin)
    return trace | {"inputs_embeds": x, "final_norm": decoder.final_norm(y)}

  both_halves = lambda table: jnp.concatenate([table, table], axis=-1)
  trace = jax.vmap(one)(embeddings) | {"rope_cos": both_halves(cos), "rope_sin": both_halves(sin)}
  return {f"lm/{name}": array for name, array in trace.items()}


@functools.partial(jax.jit, static_argnames="graphdef")
def _head(graphdef, params, hidden: jax.Array) -> dict[str, jax.Array]:
  """The head on hidden states [B, R, M] of the reward tokens."""
  head = nnx.merge(graphdef, params).head
  if isinstance(head, nnx.Linear):
    logits = head(hidden)[..., 0]
    return {"head/logits": logits, "head/logits_fp32_head": logits}
  first = head.first(hidden.astype(jnp.float32))
  second = head.second(jax.nn.relu(first))
  return {"head/fc0": first, "head/fc3": second, "head/fc5": head.out(jax.nn.relu(second))}


@functools.cache
def trace_layers(recording: Recording, batch: str, numerics: tuple) -> dict[str, jax.Array]:
  """Every intermediate array of a batch, under the recorded names."""
  config, params = load_model(recording, numerics)
  graphdef = nnx.graphdef(reward_of(recording, config).model(params))
  lengths = recording.inputs[f"{batch}/length"]
  vision, sequences = [], []
  for row, length in enumerate(lengths):
    vision.append(_vision(graphdef, params, *row_patches(recording, config.backbone.vision, batch, row)))
    ids = recording.inputs[f"{batch}/input_ids"][row]
    text = params["backbone"]["decoder"]["token_embedding"][ids]
    start = int(np.argmax(ids == recording.config["special_token_ids"][f"{MEDIA[recording.model]}_pad"]))
    sequences.append(jax.lax.dynamic_update_slice_in_dim(text, vision[-1]["vision/merger"], start, 0))
    assert length <= len(ids)
  trace = {name: jnp.concatenate([arrays[name] for arrays in vision]) for name in vision[0]}
  trace |= _decoder(graphdef, params, jnp.stack(sequences))
  read_at = recording.inputs[f"{batch}/reward_position"]
  hidden = jnp.take_along_axis(trace["lm/final_norm"], jnp.asarray(read_at)[..., None], axis=1)
  return trace | {"lm/reward_hidden": hidden} | _head(graphdef, params, hidden)


@functools.partial(jax.jit, static_argnums=0)
def _score(reward: HPSv3 | VideoAlign, params, tokens: PromptTokens, frames: jax.Array) -> jax.Array:
  score = reward.frame_scores if isinstance(reward, HPSv3) else reward.raw_scores
  return score(params, reward.init(params, tokens), frames).reshape(-1)


@functools.cache
def final_scores(recording: Recording, batch: str, numerics: tuple) -> np.ndarray:
  """Raw results [B, 2] or [B, 3] of the reward itself, from pictures or sampled frames before they are resized."""
  config, params = load_model(recording, numerics)
  reward = reward_of(recording, config)
  rows = range(len(recording.inputs[f"{batch}/length"]))
  frames = [media_frames(recording, batch, row, "sampled") for row in rows]
  return np.stack([_score(reward, params, prompt_tokens(recording, batch, row), frames[row]) for row in rows])
