"""Replays recorded forward passes of the published reward models, layer by layer.

`pytest tests/rewards_golden_test.py --golden_rewards_dir=DIR` replays another folder. Tolerances are the recording's
own (tests/golden/rewards/README.md).
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.rewards.base import CandidateInfo, FrameWindow
from streamt1_jax.rewards.qwen2_vl import mrope, preprocess
from streamt1_jax.rewards.qwen2_vl.config import DecoderConfig, VisionConfig
from tests import rewards_golden_support as golden

_HERE = pathlib.Path(__file__).parent / "golden" / "rewards"
_FLOAT32 = {"atol": 1e-4, "rtol": 1e-5}
# A byte on a rounding tie is one level off in 5e-5 of the bytes (README): 0.015 of a pixel's scale.
_OTHER_BYTES = {"atol": 1e-3, "rtol": 0}
_EXACT_MODES = ("fp32", "bf16_rope")
_BF16_MODES = ("bf16_sdpa", "bf16_eager", "bf16_merged")
_ROPE_DTYPE = {"fp32": "float32", "bf16_rope": "bf16_reference"}
_INFO = CandidateInfo(jnp.int32(0), jnp.int32(0))


def pytest_generate_tests(metafunc):
  option = metafunc.config.getoption("--golden_rewards_dir")
  folder = pathlib.Path(option or _HERE).absolute()
  if "folder" in metafunc.fixturenames:
    metafunc.parametrize("folder", [folder], ids=[folder.name])
  if "case" not in metafunc.fixturenames:
    return
  modes = _BF16_MODES if metafunc.function.__name__.endswith("bfloat16") else _EXACT_MODES
  cases = []
  for model in golden.MEDIA:
    recording = golden.recording(folder, model)
    recorded = {tuple(name.split("/")[:2]) for name in recording.trace}
    for batch, mode in sorted(recorded):
      if mode in modes:
        # Its only row is the first of the batch `mixed`: the same text and video, and in float32 the same results.
        slow = option is None and batch == "single"
        marks = [pytest.mark.slow] * slow
        cases.append(pytest.param((recording, batch, mode), marks=marks, id=f"{model}-{batch}-{mode}"))
  metafunc.parametrize("case", cases)


@functools.cache
def _tables(folder):
  return golden.load(folder / "tables.npz")


def _rotary_sizes(folder) -> dict[str, float]:
  """Width of a head and base of the frequencies that the rotary tables were recorded with."""
  return json.loads(str(_tables(folder)["rope/meta_json"]))


@functools.partial(jax.jit, static_argnums=0)
def _judge(reward, params, tokens, frames_or_window):
  return reward(params, reward.init(params, tokens), frames_or_window, _INFO)


def _recordings(folder):
  return [golden.recording(folder, model) for model in golden.MEDIA]


class TestForward:
  def test_every_layer(self, case):
    recording, batch, mode = case
    expected = recording.recorded(batch, mode)
    found = golden.trace_layers(recording, batch, golden.NUMERICS[mode])
    # The angles themselves are checked through their cosines and sines; positions and slices have tests of their own.
    indirect = {"vision/rope_freqs", "vision/cu_seqlens", "lm/position_ids"}
    names = [name for name in expected if not name.startswith("final/") and name not in indirect]
    assert set(names) <= set(found)
    valid = recording.inputs[f"{batch}/attention_mask"].astype(bool)
    for name in names:
      is_sequence = name.startswith("lm/") and expected[name].shape[:2] == valid.shape
      rows = valid if is_sequence else ...
      assert found[name].shape == expected[name].shape
      np.testing.assert_allclose(np.asarray(found[name])[rows], expected[name][rows], err_msg=name, **_FLOAT32)

  def test_result(self, case):
    recording, batch, mode = case
    expected = recording.recorded(batch, mode)
    found = golden.final_scores(recording, batch, golden.NUMERICS[mode])
    if recording.model == "hpsv3":
      np.testing.assert_allclose(found, expected["final/logits"], **_FLOAT32)
      np.testing.assert_allclose(found[:, 0].mean(), expected["final/short_score"], **_FLOAT32)
      return
    reward = golden.reward_of(recording, golden.load_model(recording, golden.NUMERICS[mode])[0])
    results = {
      "raw": found,
      "normed": reward.normalise(jnp.asarray(found)),
      "overall": reward.overall(jnp.asarray(found)),
      "overall_raw": found.sum(axis=1),
    }
    for row in range(len(found)):
      tolerance = _FLOAT32 if golden.resized_exactly(recording, batch, row) else _OTHER_BYTES
      for name, result in results.items():
        np.testing.assert_allclose(result[row], expected[f"final/{name}"][row], err_msg=name, **tolerance)

  def test_bfloat16(self, case):
    recording, batch, mode = case
    expected = recording.recorded(batch, mode)
    hidden = np.asarray(
      golden.trace_layers(recording, batch, golden.NUMERICS[mode])["lm/reward_hidden"].astype(jnp.float32)
    )
    error = hidden - expected["lm/reward_hidden"]
    assert np.sqrt(np.mean(error**2) / np.mean(expected["lm/reward_hidden"] ** 2)) <= 0.06
    raw = expected["final/logits" if recording.model == "hpsv3" else "final/raw"]
    np.testing.assert_allclose(golden.final_scores(recording, batch, golden.NUMERICS[mode]), raw, atol=0.25, rtol=0)

  def test_multimodal_positions_do_not_match(self, folder):
    for recording in _recordings(folder):
      for batch in {name.split("/")[0] for name in recording.trace}:
        control = recording.recorded(batch, "control_mrope")
        raw = control["final/logits" if recording.model == "hpsv3" else "final/raw"]
        difference = np.abs(golden.final_scores(recording, batch, golden.NUMERICS["control_mrope"]) - raw)
        assert difference.max(axis=1).min() > 100 * _FLOAT32["atol"]

  def test_positions_and_slices(self, folder):
    for recording in _recordings(folder):
      for batch in {name.split("/")[0] for name in recording.trace}:
        expected = recording.recorded(batch, "fp32")
        positions = expected["lm/position_ids"]
        np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(positions.shape[2]), positions.shape))
        vision = golden.load_model(recording, golden.NUMERICS["fp32"])[0].backbone.vision
        rows = range(len(recording.inputs[f"{batch}/length"]))
        shapes = [golden.row_patches(recording, vision, batch, row)[0].shape for row in rows]
        slices = [patches for count, patches, _ in shapes for _ in range(count)]
        np.testing.assert_array_equal(np.cumsum([0, *slices]), expected["vision/cu_seqlens"])


class TestPreprocessing:
  def test_patches(self, folder):
    for recording in _recordings(folder):
      vision = golden.load_model(recording, golden.NUMERICS["fp32"])[0].backbone.vision
      for batch in {name.split("/")[0] for name in recording.trace}:
        z = recording.inputs
        name = "pixel_values" if recording.model == "hpsv3" else "pixel_values_videos"
        rows = [golden.row_patches(recording, vision, batch, row) for row in range(len(z[f"{batch}/length"]))]
        found = np.concatenate([np.asarray(patches).reshape(-1, vision.patch_values) for patches, _ in rows])
        np.testing.assert_array_equal(found, z[f"{batch}/{name}"])
        grids = [(patches.shape[0], *grid) for patches, grid in rows]
        np.testing.assert_array_equal(grids, z[f"{batch}/{golden.MEDIA[recording.model]}_grid_thw"])

  def test_pillow_resize(self, folder):
    recording = golden.recording(folder, "hpsv3")
    for name in (name for name in recording.inputs if name.endswith("/raw_u8")):
      raw, expected = recording.inputs[name], recording.inputs[name.replace("raw_u8", "resized_u8")]
      size = golden.resized(recording, raw.shape[:2])
      assert size == expected.shape[:2]
      np.testing.assert_array_equal(preprocess.resize_like_pillow(jnp.asarray(raw)[None], size)[0], expected)

  def test_video_resize_and_sampling(self, folder):
    recording = golden.recording(folder, "videoalign")
    wrong = total = 0
    for name in (name for name in recording.inputs if name.endswith("/frames_u8")):
      video = name.removesuffix("/frames_u8")
      frames, expected = recording.inputs[name], recording.inputs[f"{video}/resized_u8"]
      limits = (recording.config[name] for name in ("sample_fps", "min_frames", "max_frames"))
      index = preprocess.sample_frames(len(frames), float(recording.inputs[f"{video}/fps"]), *limits)
      np.testing.assert_array_equal(index, recording.inputs[f"{video}/sample_index"])
      size = golden.resized(recording, frames.shape[1:3])
      assert size == expected.shape[1:3]
      error = np.abs(np.asarray(preprocess.resize(jnp.asarray(frames[index]), size)).astype(int) - expected)
      assert error.max() <= 1
      wrong, total = wrong + np.count_nonzero(error), total + error.size
    assert wrong <= 2e-4 * total

  def test_window_of_raw_frames(self, folder):
    """The reward of the search: a window of decoded frames, its capacity only partly used."""
    recording = golden.recording(folder, "videoalign")
    config, params = golden.load_model(recording, golden.NUMERICS["bf16_rope"])
    recorded = [name.split("/") for name in recording.trace if name.endswith("/bf16_rope/final/overall")]
    assert recorded
    for batch, *rest in recorded:
      for row, score in enumerate(recording.trace["/".join((batch, *rest))]):
        frames = jnp.asarray(golden.media_frames(recording, batch, row, "raw"))
        index = recording.inputs[f"{batch}/video_index"][row]
        reward = golden.reward_of(recording, config, float(recording.inputs[f"video_{index}/fps"]))
        begin = len(frames) - min(3, len(frames) - 1)
        past = jnp.concatenate([frames[:begin], jnp.full((9, *frames.shape[1:]), 77, jnp.uint8)])
        window = FrameWindow(past, jnp.int32(begin), frames[begin:])
        found = _judge(reward, params, golden.prompt_tokens(recording, batch, row), window)
        np.testing.assert_allclose(found, score, **_OTHER_BYTES)


class TestTables:
  def test_sampling(self, folder):
    tables = _tables(folder)
    for name in (name for name in tables if name.startswith("sampling/") and name.endswith("/total")):
      prefix = name.removesuffix("total")
      fps = float(prefix.removeprefix("sampling/fps").removesuffix("/"))
      for total, count, index in zip(tables[name], tables[f"{prefix}nframes"], tables[f"{prefix}index"], strict=True):
        np.testing.assert_array_equal(preprocess.sample_frames(int(total), fps), index[:count])

  def test_smart_resize(self, folder):
    tables = _tables(folder)
    degenerate = tables["smart_resize/degenerate"]
    for budget, results, refused in zip(
      tables["smart_resize/min_max_pixels"].tolist(), tables["smart_resize/result_hw"], degenerate, strict=True
    ):
      for size, expected, is_degenerate in zip(
        tables["smart_resize/size_hw"].tolist(), results.tolist(), refused, strict=True
      ):
        if is_degenerate:
          with pytest.raises(ConfigError, match="too elongated"):
            preprocess.smart_resize(*size, 28, *budget)
        else:
          assert preprocess.smart_resize(*size, 28, *budget) == tuple(expected)
    for size in tables["smart_resize/rejected_hw"].tolist():
      with pytest.raises(ConfigError, match="aspect ratio"):
        preprocess.smart_resize(*size, 28, 3136, 12845056)

  @pytest.mark.parametrize("mode", _EXACT_MODES)
  def test_decoder_rotary(self, folder, mode):
    tables, sizes = _tables(folder), _rotary_sizes(folder)
    one_head = {"num_heads": 1, "num_kv_heads": 1, "num_layers": 1, "vocab_size": 1}
    config = DecoderConfig(dim=sizes["lm_head_dim"], ffn_dim=1, rope_theta=sizes["lm_theta"], **one_head)
    position = tables["rope/lm_position"]
    cos, sin = mrope.decoder_tables(position, config, _ROPE_DTYPE[mode])
    # One ulp of a float32 frequency is 1.4e-4 at position 2710 (README); rounded frequencies have no such ulp.
    atol = 3e-4 * max(1.0, position.max() / 2710) if mode == "fp32" else 1e-6
    np.testing.assert_allclose(cos, tables[f"rope/{mode}/lm_cos"], atol=atol, rtol=0)
    np.testing.assert_allclose(sin, tables[f"rope/{mode}/lm_sin"], atol=atol, rtol=0)

  @pytest.mark.parametrize("mode", _EXACT_MODES)
  def test_vision_rotary(self, folder, mode):
    tables, sizes = _tables(folder), _rotary_sizes(folder)
    config = VisionConfig(dim=sizes["vision_head_dim"], num_heads=1, rope_theta=sizes["vision_theta"])
    length = len(tables[f"rope/{mode}/vision_cos"])
    cos, sin = mrope.vision_axis_tables(length, config, _ROPE_DTYPE[mode])
    # One ulp of the largest float32 angle, 3.8e-6 for 63; the bfloat16 tables must be equal bit for bit.
    atol = 1.05 * np.spacing(np.float32(length - 1)) if mode == "fp32" else 0
    np.testing.assert_allclose(cos, tables[f"rope/{mode}/vision_cos"], atol=atol, rtol=0)
    np.testing.assert_allclose(sin, tables[f"rope/{mode}/vision_sin"], atol=atol, rtol=0)

  def test_normalisation(self, folder):
    levels = jnp.broadcast_to(jnp.arange(256, dtype=jnp.uint8).reshape(1, 256, 1, 1), (1, 256, 1, 3))
    found = np.asarray(jax.jit(preprocess.normalise)(levels))[0, :, 0]
    np.testing.assert_array_equal(found, _tables(folder)["normalise/level_to_value"])
