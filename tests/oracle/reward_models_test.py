"""Qwen2-VL as a reward backbone against transformers, and VideoAlign's adapters against peft.

Stock Qwen2-VL is driven as the reward models drive theirs: media features written over the embeddings, positions 0,
1, 2, ...
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# ruff: noqa: E402
from streamt1_jax.convert import hpsv3 as convert_hpsv3
from streamt1_jax.convert import qwen2_vl
from streamt1_jax.convert import videoalign as convert_videoalign
from streamt1_jax.rewards.config import DecoderConfig, Qwen2VLConfig, VisionConfig
from streamt1_jax.rewards.hpsv3 import HPSv3, HPSv3Config
from streamt1_jax.rewards.qwen2_vl import PromptTokens
from streamt1_jax.rewards.videoalign import VideoAlign, VideoAlignConfig

_VISION = VisionConfig(dim=48, ffn_dim=96, num_heads=3, num_layers=3)
_DECODER = DecoderConfig(dim=96, ffn_dim=112, num_heads=6, num_kv_heads=2, num_layers=3, vocab_size=120)
_BACKBONE = Qwen2VLConfig(_VISION, _DECODER, "float32")
_HPSV3 = HPSv3(HPSv3Config(_BACKBONE, head_dims=(24, 8)))
_VIDEOALIGN = VideoAlign(16.0, VideoAlignConfig(_BACKBONE))
_RANK, _ALPHA = 5, 15
_GRID = (4, 6)
_BEFORE, _AFTER, _REWARD_INDEX = 4, 17, [2, 9, 14]
# Float32 on both sides, six blocks, results of size 1 to 10: the tolerance of the recorded traces.
_CLOSE = {"atol": 1e-4, "rtol": 1e-5}


def _random_fill(model) -> None:
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      scale = 0.25 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
      parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("norm" in name or "ln_q" in name))


def _stock_model(head):
  """Stock Qwen2-VL with a reward head beside its language-model head, as the published classes have it."""
  config = transformers.Qwen2VLConfig(
    text_config={
      "vocab_size": _DECODER.vocab_size,
      "hidden_size": _DECODER.dim,
      "intermediate_size": _DECODER.ffn_dim,
      "num_hidden_layers": _DECODER.num_layers,
      "num_attention_heads": _DECODER.num_heads,
      "num_key_value_heads": _DECODER.num_kv_heads,
      "rms_norm_eps": _DECODER.eps,
      "rope_parameters": {"rope_type": "default", "rope_theta": _DECODER.rope_theta, "mrope_section": [2, 3, 3]},
      "bos_token_id": None,
      "eos_token_id": None,
    },
    vision_config={
      "depth": _VISION.num_layers,
      "embed_dim": _VISION.dim,
      "num_heads": _VISION.num_heads,
      "mlp_ratio": _VISION.ffn_dim // _VISION.dim,
      "hidden_size": _DECODER.dim,
    },
  )
  model = transformers.Qwen2VLForConditionalGeneration(config).eval()
  model.rm_head = head
  return model


@pytest.fixture(scope="module")
def hpsv3_oracle():
  first, second = _HPSV3.config.head_dims
  head = torch.nn.Sequential(
    torch.nn.Linear(_DECODER.dim, first),
    torch.nn.ReLU(),
    torch.nn.Dropout(0.05),
    torch.nn.Linear(first, second),
    torch.nn.ReLU(),
    torch.nn.Linear(second, 2),
  )
  model = _stock_model(head)
  _random_fill(model)
  return model.eval()


@pytest.fixture(scope="module")
def videoalign_oracle():
  """With unmerged adapters on the seven linear layers of every decoder block, under peft's names."""
  layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
  lora = peft.LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=rf".*language_model\.layers\..*\.({layers})")
  model = peft.get_peft_model(_stock_model(torch.nn.Linear(_DECODER.dim, 1, bias=False)), lora)
  _random_fill(model)
  return model.eval()


def _tensors(model, old_names: bool) -> dict[str, np.ndarray]:
  """The state dict; `old_names` as transformers before 4.52 would write it."""
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  if old_names:
    rename = lambda name: name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
  return tensors


def _inputs(slices: int, seed: int):
  generator = np.random.default_rng(seed)
  patches = generator.normal(size=(slices, _GRID[0] * _GRID[1], _VISION.patch_values)).astype(np.float32)
  ids = generator.integers(0, _DECODER.vocab_size, _BEFORE + _AFTER).astype(np.int32)
  return patches, ids


def _expected(model, patches: np.ndarray, ids: np.ndarray):
  """Media tokens and hidden states after the final norm of stock modules, and positions of the reward tokens."""
  inner = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).model
  with torch.no_grad():
    grid = torch.tensor([[patches.shape[0], *_GRID]])
    media = inner.visual(torch.from_numpy(patches.reshape(-1, patches.shape[-1])), grid_thw=grid).pooler_output
    text = inner.language_model.embed_tokens(torch.from_numpy(ids.astype(np.int64)))
    sequence = torch.cat([text[:_BEFORE], media, text[_BEFORE:]])[None]
    positions = torch.arange(sequence.shape[1]).expand(3, 1, -1)
    hidden = inner.language_model(inputs_embeds=sequence, position_ids=positions).last_hidden_state[0]
  return media, hidden, [_BEFORE + len(media) + index for index in _REWARD_INDEX]


def _prompt(ids: np.ndarray, reward_index: list[int]) -> PromptTokens:
  """Cut after the last reward token, then padded with junk."""
  used = _BEFORE + reward_index[-1] + 1
  ids = np.concatenate([ids[:used], np.full(5, 7, np.int32)])
  return PromptTokens(*map(jnp.asarray, (ids[:_BEFORE], ids[_BEFORE:], np.asarray(reward_index, np.int32))))


@pytest.mark.parametrize("old_names", [False, True])
def test_hpsv3(hpsv3_oracle, old_names):
  params = convert_hpsv3.convert(_tensors(hpsv3_oracle, old_names), _HPSV3.config)
  index = _REWARD_INDEX[1]
  patches, ids = _inputs(1, seed=1)

  @jax.jit
  def ours(params, patches, tokens):
    model = _HPSV3.model(params)
    return model.backbone.vision(patches, _GRID), model(model.backbone.embed_prompt(tokens), patches, _GRID)

  media, hidden, positions = _expected(hpsv3_oracle, patches, ids)
  with torch.no_grad():
    logits = hpsv3_oracle.rm_head(hidden[positions[1]])
  found_media, found = ours(params, patches, _prompt(ids, [index]))
  np.testing.assert_allclose(found_media[0], media, **_CLOSE)
  np.testing.assert_allclose(found[0], logits, **_CLOSE)


@pytest.mark.parametrize("old_names", [False, True])
def test_videoalign_with_adapters(videoalign_oracle, old_names):
  tensors = _tensors(videoalign_oracle, old_names)
  params = convert_videoalign.convert(tensors, _VIDEOALIGN.config, lora_rank=_RANK, lora_alpha=_ALPHA)
  patches, ids = _inputs(3, seed=2)

  @jax.jit
  def ours(params, patches, tokens):
    model = _VIDEOALIGN.model(params)
    return model.backbone.vision(patches, _GRID), model(model.backbone.embed_prompt(tokens), patches, _GRID)

  media, hidden, positions = _expected(videoalign_oracle, patches, ids)
  with torch.no_grad():
    raw = videoalign_oracle.base_model.model.rm_head(hidden[positions])[:, 0]
  found_media, found = ours(params, patches, _prompt(ids, _REWARD_INDEX))
  np.testing.assert_allclose(found_media.reshape(media.shape), media, **_CLOSE)
  np.testing.assert_allclose(found, raw, **_CLOSE)


def test_rounded_frequencies(hpsv3_oracle):
  """The decoder with frequencies rounded to bfloat16, as the published models are run."""
  rotary = hpsv3_oracle.model.language_model.rotary_emb
  exact = rotary.inv_freq
  patches, ids = _inputs(1, seed=3)
  rotary.inv_freq = exact.bfloat16().float()
  try:
    media, hidden, positions = _expected(hpsv3_oracle, patches, ids)
  finally:
    rotary.inv_freq = exact
  backbone = dataclasses.replace(_BACKBONE, rope_dtype="bf16_reference")
  reward = HPSv3(dataclasses.replace(_HPSV3.config, backbone=backbone))
  params = convert_hpsv3.convert(_tensors(hpsv3_oracle, old_names=False), reward.config)

  @jax.jit
  def ours(params, media, tokens):
    backbone = reward.model(params).backbone
    return backbone.read(backbone.embed_prompt(tokens), media)

  found = ours(params, jnp.asarray(media.numpy()), _prompt(ids, _REWARD_INDEX))
  np.testing.assert_allclose(found, hidden[positions], **_CLOSE)


def test_new_names_are_those_of_transformers(hpsv3_oracle):
  names = set(hpsv3_oracle.state_dict()) - set(qwen2_vl.UNUSED)
  assert {rule.source for rule in convert_hpsv3.rules(_HPSV3.config, new_names=True)} == {
    name if ".blocks." not in name and ".layers." not in name else _templated(name) for name in names
  }


def _templated(name: str) -> str:
  parts = name.split(".")
  place = next(index for index, part in enumerate(parts) if part in ("blocks", "layers")) + 1
  return ".".join([*parts[:place], "{layer}", *parts[place + 1 :]])
