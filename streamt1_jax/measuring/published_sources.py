"""Every file that real weights are published in, with random weights of the same names, shapes, dtypes and format.

backbone  Wan safetensors | diffusers shards | training .pt with generator_ema, and a LoRA .pt to merge into it
codec     Wan2.1_VAE.pth  | diffusers safetensors
text      UMT5-XXL .pth   | Hugging Face shards in float32
rewards   HPSv3.safetensors (16.6 GB), VideoAlign's model.pth with unmerged adapters
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from streamt1_jax import shipped
from streamt1_jax.config import ModelConfig
from streamt1_jax.convert import flavours
from streamt1_jax.convert.tables.rewards import CONVERSIONS
from streamt1_jax.io.checkpoint import TOKENIZER_FILE
from streamt1_jax.measuring import random_rewards, random_weights
from streamt1_jax.measuring.random_weights import Tensor
from streamt1_jax.rewards.folder import REWARDS_FOLDER

LORA_RANKS = {"wan_1_3b": 256, "tiny": 4}
"""Ranks of the adapter by the preset of the model. Only these models have sources."""
_SHARD_BYTES = 5 << 30


@dataclasses.dataclass(frozen=True)
class Source:
  """A published file, or folder of files, that is written and converted.

  Attributes:
    name: names the stage and the file.
    part: folder of the checkpoint its conversion makes.
    arguments: flags of the conversion; `{path}` stands for the file.
    final: whether its conversion is the one that is restored.
    write: writes it.
    with_adapter: whether an adapter is merged into it: then it holds other weights than the part's other sources.
  """

  name: str
  part: str
  arguments: tuple[str, ...]
  final: bool
  write: Callable[[pathlib.Path], None]
  with_adapter: bool = False


def tensors_of(model: ModelConfig, part: str, names: str, dtype: str, prefix: str = "") -> dict[str, Tensor]:
  """Every tensor of a flavour; the i-th holds the same values in each flavour of the part."""
  flavour = next(f for f in flavours.of_model(model) if (f.part, f.names) == (part, names))
  return {
    prefix + name: Tensor(tuple(spec.shape), dtype, seed) for seed, (name, spec) in enumerate(flavour.specs.items())
  }


def bytes_at_worst(model: ModelConfig) -> int:
  """Disk at the worst moment: the text encoder in float32, its conversion, and all that is converted."""
  size = lambda part: sum(tensor.nbytes for tensor in tensors_of(model, part, "Wan", "float32").values())
  return 2 * size("text") + size("backbone")


def _lora_tensors(model: ModelConfig, seed: int) -> dict[str, Tensor]:
  """A peft adapter on the ten linear layers of every block."""
  rank, adapter = LORA_RANKS[model.name], {}
  for name, kernel in tensors_of(model, "backbone", "Wan", "float32").items():
    if name.startswith("blocks.") and len(kernel.shape) == 2:
      outputs, inputs = kernel.shape
      module = "base_model.model." + name.removesuffix(".weight")
      adapter[f"{module}.lora_A.weight"] = Tensor((rank, inputs), "float32", seed + len(adapter))
      adapter[f"{module}.lora_B.weight"] = Tensor((outputs, rank), "float32", seed + len(adapter))
  return adapter


def _write_training_backbone(model: ModelConfig, path: pathlib.Path) -> None:
  """What a training leaves: averaged weights under the names of its wrapper, and adapters of generator and critic."""
  path.mkdir()
  averaged = tensors_of(model, "backbone", "Wan", "float32", prefix="model._fsdp_wrapped_module.")
  random_weights.write_torch(path / "model.pt", {"generator_ema": averaged})
  adapters = {"generator_lora": _lora_tensors(model, 1000), "critic_lora": _lora_tensors(model, 5000), "step": 3000}
  random_weights.write_torch(path / "lora.pt", adapters)


def sources(model: ModelConfig) -> list[Source]:
  """All files, in the order in which they are converted."""
  of = lambda *which: tensors_of(model, *which)
  safetensors = lambda *which: lambda path: random_weights.write_safetensors(path, of(*which))
  sharded = lambda stem, *which: lambda path: random_weights.write_sharded(path, stem, of(*which), _SHARD_BYTES)
  torch = lambda *which: lambda path: random_weights.write_torch(path, of(*which))
  lora = ("--backbone={path}/model.pt", "--lora={path}/lora.pt", f"--lora_alpha={LORA_RANKS[model.name]}")
  diffusion = "diffusion_pytorch_model"
  float32, backbone, text = "float32", ("--backbone={path}",), ("--text_encoder={path}",)
  vae = ("--vae={path}", f"--tokenizer={shipped.checkpoint() / TOKENIZER_FILE}")
  return [
    Source("wan_backbone", "backbone", backbone, False, safetensors("backbone", "Wan", float32)),
    Source("diffusers_backbone", "backbone", backbone, False, sharded(diffusion, "backbone", "diffusers", float32)),
    Source("training_backbone_lora", "backbone", lora, True, lambda path: _write_training_backbone(model, path), True),
    Source("wan_vae", "codec", vae, True, torch("codec", "Wan", float32)),
    Source("diffusers_vae", "codec", vae, False, safetensors("codec", "diffusers", float32)),
    Source("wan_umt5", "text", text, True, torch("text", "Wan", "bfloat16")),
    Source("hugging_face_umt5", "text", text, False, sharded("model", "text", "Hugging Face", float32)),
    *(_reward_source(name, model) for name in CONVERSIONS),
  ]


def _reward_source(name: str, model: ModelConfig) -> Source:
  """A reward model. It is not in the final checkpoint: the search is to run without 20 GB of judges."""
  write = lambda path: random_rewards.write(path, name, model)
  return Source(name, f"{REWARDS_FOLDER}/{name}", random_rewards.convert_arguments(name), False, write)
