"""The causal DiT against diffusers' `WanTransformer3DModel`, and adapters against peft; every parameter is random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from streamt1_jax.backbone import attention  # noqa: E402
from streamt1_jax.backbone.dit import CausalWanDiT  # noqa: E402
from streamt1_jax.backbone.schedule import time_features  # noqa: E402
from streamt1_jax.config import BackboneConfig, ModelConfig  # noqa: E402
from streamt1_jax.convert import adapters  # noqa: E402
from streamt1_jax.convert.tables import wan_dit  # noqa: E402
from tests.oracle import libraries  # noqa: E402

TOLERANCE = 5e-5  # diffusers computes angles in float32 and is itself 1.3e-5 away from the published code.
MODEL = ModelConfig(
  name="oracle",
  backbone=BackboneConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, freq_dim=32, text_dim=20, text_len=7, latent_channels=16
  ),
  codec=None,
  text=None,
  latent_height=6,
  latent_width=8,
)
PROMPT_TOKENS = 4
WAN, DIFFUSERS = wan_dit.wan_flavour(MODEL), wan_dit.diffusers_flavour(MODEL)


@functools.cache
def _pair():
  """The oracle, and our graph definition and parameters converted from its own names."""
  oracle = libraries.wan_transformer(MODEL.backbone)
  tensors = {name: value.numpy() for name, value in oracle.state_dict().items()}
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: CausalWanDiT(MODEL, nnx.Rngs(0))))
  return oracle, graphdef, jax.tree.map(jnp.asarray, DIFFUSERS.convert(tensors))


def _inputs():
  generator = np.random.default_rng(0)
  latents = generator.standard_normal(MODEL.latent_shape).astype(np.float32)
  text = generator.standard_normal((MODEL.backbone.text_len, MODEL.backbone.text_dim)).astype(np.float32)
  text[PROMPT_TOKENS:] = 0.0  # Padding, which is attended to.
  return latents, text


def _oracle_velocity(latents, text, timesteps):
  per_token = np.repeat(np.asarray(timesteps, np.float32), MODEL.frame_tokens)
  with torch.no_grad():
    out = _pair()[0](
      hidden_states=torch.from_numpy(latents).transpose(0, 1)[None],
      timestep=torch.from_numpy(per_token)[None],
      encoder_hidden_states=torch.from_numpy(text)[None],
      return_dict=False,
    )[0]
  return out[0].transpose(0, 1).numpy()


@jax.jit
def _our_velocity(params, latents, text, features):
  model = nnx.merge(_pair()[1], params)
  attend = lambda q, k, v, layer: attention.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
  return model(latents, features, model.text_memory(text), attend)[0]


class TestVelocity:
  @pytest.mark.parametrize("timesteps", [[625.0, 625.0, 625.0], [1000.0, 937.5, 0.0]], ids=["equal", "per_frame"])
  def test_one_chunk(self, timesteps):
    latents, text = _inputs()
    expected = _oracle_velocity(latents, text, timesteps)
    features = time_features(np.array(timesteps), MODEL.backbone.freq_dim)
    np.testing.assert_allclose(_our_velocity(_pair()[2], latents, text, features), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected).mean() > 0.1

  def test_padding_is_attended_to(self):
    """The negative control: a text of half the length, without its zero rows, is another text."""
    latents, text = _inputs()
    timesteps = [500.0] * MODEL.chunk_frames
    features = time_features(np.array(timesteps), MODEL.backbone.freq_dim)
    short = _our_velocity(_pair()[2], latents, text[:PROMPT_TOKENS], features)
    assert np.abs(short - _oracle_velocity(latents, text, timesteps)).max() > 1e-3
    np.testing.assert_allclose(
      short, _oracle_velocity(latents, text[:PROMPT_TOKENS], timesteps), rtol=0, atol=TOLERANCE
    )

  def test_names(self):
    """The oracle holds the tensors of our table, no more and no less, in these shapes."""
    theirs = {name: tuple(value.shape) for name, value in _pair()[0].state_dict().items()}
    assert {name: spec.shape for name, spec in DIFFUSERS.specs.items()} == theirs


class _Attention(torch.nn.Module):
  def __init__(self, dim):
    super().__init__()
    for name in "qkvo":
      setattr(self, name, torch.nn.Linear(dim, dim))


class _Block(torch.nn.Module):
  """The linear layers of a Wan block under Wan's names."""

  def __init__(self, dim, ffn_dim):
    super().__init__()
    self.self_attn, self.cross_attn = _Attention(dim), _Attention(dim)
    self.ffn = torch.nn.Sequential(torch.nn.Linear(dim, ffn_dim), torch.nn.GELU(), torch.nn.Linear(ffn_dim, dim))


class _Blocks(torch.nn.Module):
  def __init__(self, config):
    super().__init__()
    self.blocks = torch.nn.ModuleList(_Block(config.dim, config.ffn_dim) for _ in range(config.num_layers))


class TestAdapter:
  RANK, ALPHA = 4, 6

  def test_merge(self, tmp_path):
    """A peft adapter, saved under peft's names and merged by us, against peft's own merge."""
    base = _Blocks(MODEL.backbone)
    libraries.fill(base.named_parameters(), seed=1)
    generator = np.random.default_rng(2)
    rest = {name: generator.standard_normal(spec.shape).astype(np.float32) for name, spec in WAN.specs.items()}
    before = rest | {name: value.numpy().copy() for name, value in base.state_dict().items()}
    assert before.keys() == WAN.specs.keys()

    targets = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=self.RANK, lora_alpha=self.ALPHA, target_modules=targets))
    libraries.fill(((name, p) for name, p in adapted.named_parameters() if "lora_" in name), seed=3)
    adapter = {name: value.numpy().copy() for name, value in peft.get_peft_model_state_dict(adapted).items()}
    merged = {name: value.numpy() for name, value in adapted.merge_and_unload().state_dict().items()}
    expected = WAN.convert(rest | merged)

    assert len(adapter) == 2 * 10 * MODEL.backbone.num_layers
    safetensors.numpy.save_file(adapter, tmp_path / "lora.safetensors")
    loaded = adapters.load(tmp_path / "lora.safetensors", self.ALPHA, WAN, [WAN, DIFFUSERS])
    params, ours = WAN.convert(before), WAN.convert(adapters.merged(before, loaded))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6), ours, expected)
    change = np.abs(expected["blocks"]["ffn_in"]["kernel"] - params["blocks"]["ffn_in"]["kernel"])
    assert change.mean() > 0.1
