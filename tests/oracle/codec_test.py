"""The codec against diffusers' `AutoencoderKLWan`, with every parameter random."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from streamt1_jax.codec.vae import VideoCodec  # noqa: E402
from streamt1_jax.config import CodecConfig  # noqa: E402
from streamt1_jax.convert import engine  # noqa: E402
from streamt1_jax.convert.tables import wan_vae  # noqa: E402

TOLERANCE = 5e-5
PATCHES = pytest.mark.parametrize("patch", [1, 2])


@functools.cache
def _pair(patch: int):
  """The oracle, and our encoder and decoder with the same parameters."""
  colors = 3 * patch**2
  oracle = diffusers.AutoencoderKLWan(
    base_dim=8, z_dim=16, in_channels=colors, out_channels=colors, patch_size=None if patch == 1 else patch
  ).eval()
  generator = torch.Generator().manual_seed(patch)
  with torch.no_grad():
    for name, parameter in oracle.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if name.endswith("gamma"):
        parameter.copy_(1.0 + 0.2 * noise)
      elif name.endswith("bias"):
        parameter.copy_(0.1 * noise)
      else:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
  config = CodecConfig(base_dim=8, patch_size=patch)
  tensors = {name: value.numpy() for name, value in oracle.state_dict().items()}
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: VideoCodec(config, rngs=nnx.Rngs(0))))
  rules = wan_vae.rules(config, wan_vae.DIFFUSERS_NAMES)
  return oracle, nnx.merge(graphdef, engine.convert(tensors, rules, wan_vae.abstract_params(config)))


def _latents(frames: int) -> np.ndarray:
  return np.random.default_rng(3).standard_normal((frames, 16, 4, 3)).astype(np.float32)


def _denormalised(codec: VideoCodec, latents: np.ndarray):
  config = codec.decoder.config
  mean, std = (np.asarray(values, np.float32) for values in (config.latent_mean, config.latent_std))
  return torch.from_numpy(latents * std.reshape(1, -1, 1, 1) + mean.reshape(1, -1, 1, 1)).transpose(0, 1)[None]


def _frames_last(video) -> np.ndarray:
  """[1, 3, T, H, W] to [T, H, W, 3]."""
  return video[0].permute(1, 2, 3, 0).numpy()


@PATCHES
def test_decode(patch):
  oracle, codec = _pair(patch)
  latents = _latents(3)
  with torch.no_grad():
    expected = _frames_last(oracle.decode(_denormalised(codec, latents)).sample)
  frames = jax.jit(codec.decoder.decode)(latents)
  assert np.abs(expected).max() > 0.3
  np.testing.assert_allclose(frames, expected, atol=TOLERANCE, rtol=0)


@PATCHES
def test_encode(patch):
  oracle, codec = _pair(patch)
  size = codec.encoder.config.spatial_stride
  frames = np.random.default_rng(4).uniform(-1, 1, (9, 2 * size, size, 3)).astype(np.float32)
  with torch.no_grad():
    posterior = oracle.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None]).latent_dist
  moments = jax.jit(codec.encoder.moments)(frames)
  np.testing.assert_allclose(moments.mean, posterior.mean[0].transpose(0, 1), atol=TOLERANCE, rtol=0)
  np.testing.assert_allclose(moments.logvar, posterior.logvar[0].transpose(0, 1), atol=TOLERANCE, rtol=0)


@PATCHES
def test_streamed_decode(patch):
  """The oracle decodes frame by frame from its feature cache; we decode two steps of two frames."""
  oracle, codec = _pair(patch)
  latents = _latents(4)
  oracle.clear_cache()
  with torch.no_grad():
    hidden = oracle.post_quant_conv(_denormalised(codec, latents))
    pieces = [
      oracle.decoder(hidden[:, :, [index]], feat_cache=oracle._feat_map, feat_idx=[0], first_chunk=index == 0)
      for index in range(4)
    ]
  expected = torch.cat(pieces, dim=2)
  if patch > 1:
    expected = diffusers.models.autoencoders.autoencoder_kl_wan.unpatchify(expected, patch)
  expected = np.clip(_frames_last(expected), -1, 1)
  step = jax.jit(codec.decoder.decode_step, static_argnames="first")
  state = codec.decoder.init_state(4, 3)
  first_frames, state = step(latents[:2], state, first=True)
  next_frames, state = step(latents[2:], state, first=False)
  np.testing.assert_allclose(np.concatenate([first_frames, next_frames]), expected, atol=TOLERANCE, rtol=0)
