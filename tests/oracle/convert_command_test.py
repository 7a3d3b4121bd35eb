"""The user's path against the libraries that publish weights.

Random models of diffusers, transformers and peft, saved by their own `save_pretrained` or `torch.save`; converted by
the command; restored and run in JAX; equal to the library's own output. Every parameter is random.
"""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# ruff: noqa: E402
from streamt1_jax.backbone import attention
from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.backbone.schedule import time_features
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import BackboneConfig, CodecConfig, ModelConfig, TextConfig
from streamt1_jax.convert import flavours
from streamt1_jax.io import checkpoint
from streamt1_jax.text.umt5 import UMT5Encoder
from tests.command_line import REPOSITORY, convert
from tests.oracle import libraries

TOLERANCE = 5e-5
TEXT_TOLERANCE = 1e-5
MODEL = ModelConfig(
  name="oracle",
  backbone=BackboneConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=3, freq_dim=32, text_dim=24, text_len=7),
  codec=CodecConfig(base_dim=8),
  text=TextConfig(
    vocab_size=128,
    dim=24,
    attn_dim=32,
    ffn_dim=40,
    num_heads=4,
    num_layers=3,
    num_buckets=16,
    max_distance=24,
    max_len=7,
  ),
  latent_height=6,
  latent_width=8,
)
RANK, ALPHA = 4, 6
SHARD = "30KB"


@functools.cache
def _backbone():
  return libraries.wan_transformer(MODEL.backbone)


@functools.cache
def _vae():
  oracle = diffusers.AutoencoderKLWan(base_dim=MODEL.codec.base_dim, z_dim=16).eval()
  libraries.fill(oracle.named_parameters(), seed=1)
  return oracle


@functools.cache
def _text_encoder():
  return libraries.umt5_encoder(MODEL.text, seed=2)


def _wan_names(part: str, state_dict: dict) -> dict:
  """Wan's names of a library's tensors, from the published lists (so at this size, of the same blocks)."""
  file = {"backbone": "dit", "codec": "vae", "text": "umt5"}[part]
  rows = (REPOSITORY / "tests" / "published_keys" / f"{file}.tsv").read_text().splitlines()
  translation = dict(row.split("\t")[:2] for row in rows)
  return {translation[name]: tensor for name, tensor in state_dict.items()}


@functools.cache
def _model_file(folder: pathlib.Path) -> pathlib.Path:
  path = folder / "model.json"
  path.write_text(json.dumps(checkpoint.model_config_to_dict(MODEL)))
  return path


def _converted(folder: pathlib.Path, part: str, *arguments: str):
  """Graph definition and parameters of one part, converted by the command."""
  result = convert(folder, f"--model={_model_file(folder)}", "--output=out", "--dtype=float32", *arguments)
  assert result.code == 0, result
  build = {
    "backbone": lambda: CausalWanDiT(MODEL, nnx.Rngs(0)),
    "codec": lambda: VideoCodec(MODEL.codec, rngs=nnx.Rngs(0)),
    "text": lambda: UMT5Encoder(MODEL.text, nnx.Rngs(0)),
  }[part]
  graphdef, abstract = nnx.split(nnx.eval_shape(build), nnx.Param)
  return graphdef, checkpoint.load_params(folder / "out" / part, nnx.to_pure_dict(abstract))


def _assert_same_velocity(oracle, graphdef, params) -> None:
  generator = np.random.default_rng(0)
  latents = generator.standard_normal(MODEL.latent_shape).astype(np.float32)
  text = generator.standard_normal((MODEL.backbone.text_len, MODEL.backbone.text_dim)).astype(np.float32)
  timesteps = np.array([1000.0, 937.5, 0.0], np.float32)
  with torch.no_grad():
    expected = oracle(
      hidden_states=torch.from_numpy(latents).transpose(0, 1)[None],
      timestep=torch.from_numpy(np.repeat(timesteps, MODEL.frame_tokens))[None],
      encoder_hidden_states=torch.from_numpy(text)[None],
      return_dict=False,
    )[0][0].transpose(0, 1)

  @jax.jit
  def velocity(params, latents, text, features):
    model = nnx.merge(graphdef, params)
    attend = lambda q, k, v, layer: attention.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
    return model(latents, features, model.text_memory(text), attend)[0]

  found = velocity(params, latents, text, time_features(timesteps, MODEL.backbone.freq_dim))
  np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE)
  assert expected.abs().mean() > 0.1


class TestBackbone:
  def test_diffusers_in_shards(self, tmp_path):
    _backbone().save_pretrained(tmp_path / "transformer", max_shard_size=SHARD)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    _assert_same_velocity(_backbone(), *_converted(tmp_path, "backbone", "--backbone=transformer"))

  def test_diffusers_in_one_file(self, tmp_path):
    _backbone().save_pretrained(tmp_path / "transformer")
    _assert_same_velocity(_backbone(), *_converted(tmp_path, "backbone", "--backbone=transformer"))

  def test_training_program(self, tmp_path):
    """Wan's names below FSDP and activation checkpointing, beside an optimizer, written by torch.save."""
    weights = _wan_names("backbone", _backbone().state_dict())
    wrapped = {
      f"model._fsdp_wrapped_module.{name}".replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): tensor
      for name, tensor in weights.items()
    }
    optimizer = torch.optim.AdamW(_backbone().parameters()).state_dict()
    torch.save({"generator_ema": wrapped, "generator_optimizer": optimizer, "step": 600}, tmp_path / "dmd.pt")
    _assert_same_velocity(_backbone(), *_converted(tmp_path, "backbone", "--backbone=dmd.pt"))

  def test_wan(self, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = _wan_names("backbone", _backbone().state_dict())
    safetensors.save_file({name: x.contiguous() for name, x in weights.items()}, tmp_path / "wan.safetensors")
    _assert_same_velocity(_backbone(), *_converted(tmp_path, "backbone", "--backbone=wan.safetensors"))

  @pytest.mark.parametrize("rslora", [False, True])
  def test_peft_adapter(self, tmp_path, rslora):
    """Saved by peft, alpha not the rank; the oracle runs it unmerged."""
    assert ALPHA != RANK
    _backbone().save_pretrained(tmp_path / "transformer")
    oracle = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer").eval()
    targets = [f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]
    config = peft.LoraConfig(
      r=RANK, lora_alpha=ALPHA, target_modules=[*targets, "ffn.net.0.proj", "ffn.net.2"], use_rslora=rslora
    )
    adapted = peft.get_peft_model(oracle, config).eval()
    libraries.fill(((name, p) for name, p in adapted.named_parameters() if "lora_" in name), seed=3)
    adapted.save_pretrained(tmp_path / "adapter")
    found = _converted(tmp_path, "backbone", "--backbone=transformer", "--lora=adapter")
    _assert_same_velocity(adapted, *found)
    with pytest.raises(AssertionError):
      _assert_same_velocity(_backbone(), *found)

  def test_adapter_of_a_training_program(self, tmp_path):
    """`generator_lora` under Wan's names, as LongLive writes it; alpha from the flag."""
    _backbone().save_pretrained(tmp_path / "transformer")
    oracle = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer").eval()
    adapted = peft.get_peft_model(oracle, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v"]))
    libraries.fill(((name, p) for name, p in adapted.named_parameters() if "lora_" in name), seed=4)
    prefix = "base_model.model."
    wan = {}
    for name, tensor in peft.get_peft_model_state_dict(adapted).items():
      module, _, matrix = name.removeprefix(prefix).partition(".lora_")
      ((wan_name, _),) = _wan_names("backbone", {f"{module}.weight": tensor}).items()
      wan[f"{prefix}{wan_name.removesuffix('.weight')}.lora_{matrix}"] = tensor
    torch.save({"generator_lora": wan, "critic_lora": wan, "step": 3}, tmp_path / "lora.pt")
    arguments = ("--backbone=transformer", "--lora=lora.pt", f"--lora_alpha={ALPHA}")
    _assert_same_velocity(adapted.eval(), *_converted(tmp_path, "backbone", *arguments))


def _assert_same_video(graphdef, params) -> None:
  generator = np.random.default_rng(3)
  latents = generator.standard_normal((3, 16, 4, 3)).astype(np.float32)
  mean, std = (np.asarray(x, np.float32).reshape(-1, 1, 1) for x in (MODEL.codec.latent_mean, MODEL.codec.latent_std))
  frames = generator.uniform(-1, 1, (9, 16, 8, 3)).astype(np.float32)
  with torch.no_grad():
    decoded = _vae().decode(torch.from_numpy(latents * std + mean).transpose(0, 1)[None]).sample
    posterior = _vae().encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None]).latent_dist
  codec = nnx.merge(graphdef, params)
  found = jax.jit(codec.decoder.decode)(latents)
  np.testing.assert_allclose(found, decoded[0].permute(1, 2, 3, 0).numpy(), rtol=0, atol=TOLERANCE)
  moments = jax.jit(codec.encoder.moments)(frames)
  np.testing.assert_allclose(moments.mean, posterior.mean[0].transpose(0, 1), rtol=0, atol=TOLERANCE)


class TestVae:
  def test_diffusers(self, tmp_path):
    _vae().save_pretrained(tmp_path / "vae")
    _assert_same_video(*_converted(tmp_path, "codec", "--vae=vae"))

  def test_wan(self, tmp_path):
    """The same weights under Wan's names are the same parameters; what these compute is tested above."""
    (tmp_path / "wan").mkdir()
    torch.save(_wan_names("codec", _vae().state_dict()), tmp_path / "wan" / "Wan2.1_VAE.pth")
    _vae().save_pretrained(tmp_path / "vae")
    _, found = _converted(tmp_path / "wan", "codec", "--vae=Wan2.1_VAE.pth")
    _, expected = _converted(tmp_path, "codec", "--vae=vae")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _assert_same_embeddings(graphdef, params) -> None:
  ids = np.random.default_rng(0).integers(0, MODEL.text.vocab_size, 40).astype(np.int32)
  mask = np.arange(40) < 31
  with torch.no_grad():
    expected = _text_encoder()(
      input_ids=torch.from_numpy(ids[None].astype(np.int64)), attention_mask=torch.from_numpy(mask[None])
    ).last_hidden_state[0]
  found = jax.jit(lambda params: nnx.merge(graphdef, params)(ids, mask))(params)
  np.testing.assert_allclose(found[:31], expected.numpy()[:31], rtol=0, atol=TEXT_TOLERANCE)


class TestTextEncoder:
  def test_hugging_face_in_shards(self, tmp_path):
    _text_encoder().save_pretrained(tmp_path / "text_encoder", max_shard_size=SHARD)
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    _assert_same_embeddings(*_converted(tmp_path, "text", "--text_encoder=text_encoder"))

  def test_wan(self, tmp_path):
    """Wan's own file; the embedding is one tensor under two names in the module it comes from."""
    torch.save(_wan_names("text", _text_encoder().state_dict()), tmp_path / "t5.pth")
    _assert_same_embeddings(*_converted(tmp_path, "text", "--text_encoder=t5.pth"))


def test_all_parts_are_a_checkpoint(tmp_path):
  _backbone().save_pretrained(tmp_path / "transformer")
  _vae().save_pretrained(tmp_path / "vae")
  _text_encoder().save_pretrained(tmp_path / "text_encoder")
  shutil.copy(REPOSITORY / "checkpoints/tiny/tokenizer.model", tmp_path / "spiece.model")
  arguments = ("--backbone=transformer", "--vae=vae", "--text_encoder=text_encoder", "--tokenizer=spiece.model")
  _converted(tmp_path, "text", *arguments)
  assert checkpoint.load_config(tmp_path / "out") == MODEL
  assert {flavour.part for flavour in flavours.of_model(MODEL)} == set(checkpoint.load_info(tmp_path / "out").parts)
