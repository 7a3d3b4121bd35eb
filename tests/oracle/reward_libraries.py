"""Stock Qwen2-VL of transformers with the reward models' heads, all parameters random; adapters are peft's.

It is driven as the reward models drive theirs: media features written over the embeddings, positions 0, 1, 2, ...
"""

import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from streamt1_jax.convert.tables import videoalign
from streamt1_jax.rewards.hpsv3 import HPSv3, HPSv3Config
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, Qwen2VLConfig, VisionConfig
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.videoalign import VideoAlign, VideoAlignConfig

VISION = VisionConfig(dim=48, ffn_dim=96, num_heads=3, num_layers=3)
DECODER = DecoderConfig(dim=96, ffn_dim=112, num_heads=6, num_kv_heads=2, num_layers=3, vocab_size=120)
BACKBONE = Qwen2VLConfig(VISION, DECODER, "float32")
HPSV3 = HPSv3(HPSv3Config(BACKBONE, head_dims=(24, 8)))
VIDEOALIGN = VideoAlign(16.0, VideoAlignConfig(BACKBONE))
GRID = (4, 6)
BEFORE, AFTER, REWARD_INDEX = 4, 17, [2, 9, 14]
# Float32 on both sides, six blocks, results of size 1 to 10: the tolerance of the recorded traces.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


def random_fill(model) -> None:
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.25 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
      parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("norm" in name or "ln_q" in name))


def stock_model(head):
  """Stock Qwen2-VL with a reward head beside its language-model head, as the published classes have it."""
  config = transformers.Qwen2VLConfig(
    text_config={
      "vocab_size": DECODER.vocab_size,
      "hidden_size": DECODER.dim,
      "intermediate_size": DECODER.ffn_dim,
      "num_hidden_layers": DECODER.num_layers,
      "num_attention_heads": DECODER.num_heads,
      "num_key_value_heads": DECODER.num_kv_heads,
      "rms_norm_eps": DECODER.eps,
      "rope_parameters": {"rope_type": "default", "rope_theta": DECODER.rope_theta, "mrope_section": [2, 3, 3]},
      "bos_token_id": None,
      "eos_token_id": None,
    },
    vision_config={
      "depth": VISION.num_layers,
      "embed_dim": VISION.dim,
      "num_heads": VISION.num_heads,
      "mlp_ratio": VISION.ffn_dim // VISION.dim,
      "hidden_size": DECODER.dim,
    },
  )
  model = transformers.Qwen2VLForConditionalGeneration(config).eval()
  model.rm_head = head
  return model


def hpsv3_oracle() -> transformers.PreTrainedModel:
  first, second = HPSV3.config.head_dims
  head = torch.nn.Sequential(
    torch.nn.Linear(DECODER.dim, first),
    torch.nn.ReLU(),
    torch.nn.Dropout(0.05),
    torch.nn.Linear(first, second),
    torch.nn.ReLU(),
    torch.nn.Linear(second, 2),
  )
  model = stock_model(head)
  random_fill(model)
  return model.eval()


def videoalign_oracle() -> peft.PeftModel:
  """With unmerged adapters on the seven linear layers of every decoder block, under peft's names."""
  layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
  lora = peft.LoraConfig(
    r=videoalign.CONVERSION.lora[0],
    lora_alpha=videoalign.CONVERSION.lora[1],
    target_modules=rf".*language_model\.layers\..*\.({layers})",
  )
  model = peft.get_peft_model(stock_model(torch.nn.Linear(DECODER.dim, 1, bias=False)), lora)
  random_fill(model)
  return model.eval()


def tensors(model, old_names: bool) -> dict[str, np.ndarray]:
  """The state dict; `old_names` as transformers before 4.52 would write it."""
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  if old_names:
    rename = lambda name: name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
  return tensors


def inputs(slices: int, seed: int):
  generator = np.random.default_rng(seed)
  patches = generator.normal(size=(slices, GRID[0] * GRID[1], VISION.patch_values)).astype(np.float32)
  ids = generator.integers(0, DECODER.vocab_size, BEFORE + AFTER).astype(np.int32)
  return patches, ids


def expected(model, patches: np.ndarray, ids: np.ndarray):
  """Media tokens and hidden states after the final norm of stock modules, and positions of the reward tokens."""
  inner = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).model
  with torch.no_grad():
    grid = torch.tensor([[patches.shape[0], *GRID]])
    media = inner.visual(torch.from_numpy(patches.reshape(-1, patches.shape[-1])), grid_thw=grid).pooler_output
    text = inner.language_model.embed_tokens(torch.from_numpy(ids.astype(np.int64)))
    sequence = torch.cat([text[:BEFORE], media, text[BEFORE:]])[None]
    positions = torch.arange(sequence.shape[1]).expand(3, 1, -1)
    hidden = inner.language_model(inputs_embeds=sequence, position_ids=positions).last_hidden_state[0]
  return media, hidden, [BEFORE + len(media) + index for index in REWARD_INDEX]


def prompt(ids: np.ndarray, reward_index: list[int]) -> PromptTokens:
  """Cut after the last reward token, then padded with junk."""
  used = BEFORE + reward_index[-1] + 1
  ids = np.concatenate([ids[:used], np.full(5, 7, np.int32)])
  return PromptTokens(*map(jnp.asarray, (ids[:BEFORE], ids[BEFORE:], np.asarray(reward_index, np.int32))))
