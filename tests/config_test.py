"""Refusals, presets, and the sizes that follow from a configuration."""

import dataclasses
import re

import pytest

from streamt1_jax.config import (
  PRESETS,
  BackboneConfig,
  CodecConfig,
  ConfigError,
  ScheduleConfig,
  SearchConfig,
  SearchDefaults,
  SwitchConfig,
  preset,
)
from streamt1_jax.io.config_json import from_json_value, to_json_value
from streamt1_jax.models import make_models

BACKBONE = BackboneConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=8, text_dim=6, text_len=5)
MODEL = preset("golden")
CODEC = CodecConfig()


@pytest.mark.parametrize(
  ("config", "field", "value"),
  [
    (BACKBONE, "num_heads", 5),  # 24 is no multiple
    (BACKBONE, "num_heads", 8),  # a head of 3 channels has no pairs
    (BACKBONE, "freq_dim", 7),
    (CODEC, "spatial_down", (True, True)),
    (CODEC, "temporal_down", (True,)),
    (CODEC, "num_res_blocks", 0),
    (CODEC, "latent_mean", (0.0,) * 15),
    (CODEC, "latent_std", (1.0,) * 17),
    (ScheduleConfig(), "denoising_steps", ()),
    (ScheduleConfig(), "denoising_steps", (1000, 500, 500)),
    (ScheduleConfig(), "denoising_steps", (250, 500)),
    (ScheduleConfig(), "denoising_steps", (1000, 0)),
    (ScheduleConfig(), "denoising_steps", (1001, 500)),
    (MODEL, "latent_height", 7),
    (MODEL, "latent_width", 9),
    (MODEL, "sink_frames", 0),
    (MODEL, "sink_frames", 4),
    (MODEL, "local_attention_frames", 13),
    (MODEL, "local_attention_frames", 3),  # no room for the current chunk
    (SearchConfig(), "beam_size", 0),
    (SearchConfig(), "beam_size", 101),
    (SearchConfig(), "top_k", 0),
    (SearchConfig(), "top_k", 11),
    (SearchConfig(), "noise_sigma", 1.0),
    (SearchConfig(), "noise_sigma", -1.0),
    (SearchConfig(), "noise_sigma", float("nan")),
    (SearchConfig(), "fusion_cap", 1.1),
    (SearchConfig(), "fusion_cap", -0.1),
    (SearchConfig(), "sliding_window", 0),
    (SearchConfig(), "sink_ema_decay", 1.01),
    (SearchConfig(), "first_candidate", "none"),
    (SearchConfig(), "short_baseline", "mean"),
    (SearchConfig(), "sink_ema_dtype", "bfloat16"),
    (SearchConfig(), "reward_decode", ""),
    (SearchConfig(), "judges", False),  # two candidates per beam and nothing to choose by
    (SearchConfig(), "policy", "top_k"),
  ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refusal_names_the_field(config, field, value):
  """One line that names the field and what was found, or what it should have been."""
  named = {"latent_height": "latent 7x", "latent_width": "x9 "}.get(field, field)
  with pytest.raises(ConfigError, match=re.escape(named)) as caught:
    dataclasses.replace(config, **{field: value})
  assert "\n" not in str(caught.value)


def test_switches_that_cannot_be():
  """The keys of the chunk that becomes the sink are gone; and what is decoded from scratch is the whole window."""
  with pytest.raises(ConfigError, match="sinks 'move' .* recache must compute them, got 'none'"):
    SwitchConfig(sinks="move", recache="none")
  with pytest.raises(ConfigError, match="'since' needs reward_decode 'streamed'"):
    SwitchConfig(video="since").validate_for(SearchConfig(reward_decode="scratch"))
  SwitchConfig(video="since").validate_for(SearchConfig())
  SwitchConfig().validate_for(SearchConfig(reward_decode="scratch"))


def test_a_baseline_window_needs_a_past_chunk():
  SearchConfig(short_baseline="window", sliding_window=2)
  with pytest.raises(ConfigError, match="sliding_window"):
    SearchConfig(short_baseline="window", sliding_window=1)


@pytest.mark.parametrize(("field", "value"), [("beam_size", 100), ("top_k", 10), ("fusion_cap", 1.0), ("beam_size", 1)])
def test_bounds_are_allowed(field, value):
  assert getattr(SearchConfig(**{field: value}), field) == value


@pytest.mark.parametrize("frames", [0, 4])
def test_search_that_does_not_fit_the_model(frames):
  with pytest.raises(ConfigError, match="max_sink_frames"):
    SearchConfig(max_sink_frames=frames).validate_for(MODEL)


def test_search_that_fits():
  for frames in (3, 15):
    SearchConfig(max_sink_frames=frames).validate_for(MODEL)


class TestPresets:
  def test_names(self):
    assert {"wan_1_3b", "tiny", "golden", "bench_mid"} <= set(PRESETS)
    for name in PRESETS:
      assert preset(name).name == name
      SearchConfig.streaming(preset(name)).validate_for(preset(name))

  def test_unknown_name_lists_the_known(self):
    with pytest.raises(ConfigError, match=r"'huge'.*tiny"):
      preset("huge")

  def test_wan_sizes(self):
    """480 x 832 pixels at stride 8, 2 x 2 patches: 30 * 52 tokens a frame (docs/reference/wan_dit.md)."""
    model = preset("wan_1_3b")
    assert (model.frame_tokens, model.chunk_tokens) == (1560, 4680)
    assert model.latent_shape == (3, 16, 60, 104)
    assert model.backbone.head_dim == 128
    assert model.window_chunks == 3
    assert (model.codec.spatial_stride, model.codec.temporal_stride) == (8, 4)

  def test_tiny_pixels(self):
    """64 x 64 pixels."""
    model = preset("tiny")
    stride = model.codec.spatial_stride
    assert (model.latent_height * stride, model.latent_width * stride) == (64, 64)
    assert model.text.max_len == model.backbone.text_len
    assert model.text.dim == model.backbone.text_dim


class TestSearchPresets:
  def test_released_is_the_default(self):
    assert SearchConfig.released() == SearchConfig()
    assert SearchConfig().num_candidates == 4

  def test_a_model_has_the_published_numbers_unless_it_says_otherwise(self):
    own = SearchDefaults(noise_sigma=0.25, short_threshold=0.5, long_threshold=0.75, max_sink_frames=9)
    tuned = dataclasses.replace(MODEL, search=own)
    assert SearchConfig.of(MODEL) == SearchConfig.released()
    assert SearchConfig.of(tuned) == SearchConfig(
      noise_sigma=0.25, short_threshold=0.5, long_threshold=0.75, max_sink_frames=9
    )
    with pytest.raises(ConfigError, match=r"noise_sigma must be in \(-1, 1\), got 1.5"):
      SearchDefaults(noise_sigma=1.5)

  def test_paper_differs_where_the_text_does(self):
    released, paper = SearchConfig.released(), SearchConfig.paper()
    differing = {
      field.name
      for field in dataclasses.fields(SearchConfig)
      if getattr(released, field.name) != getattr(paper, field.name)
    }
    assert differing == {"first_candidate", "short_baseline", "sink_ema_dtype"}

  def test_overrides(self):
    assert SearchConfig.paper(beam_size=5, first_candidate="reuse") == SearchConfig(
      beam_size=5, short_baseline="window", sink_ema_dtype="float32"
    )

  def test_streaming_is_one_candidate_without_growth(self):
    search = SearchConfig.streaming(MODEL)
    assert (search.num_candidates, search.noise_sigma, search.max_sink_frames) == (1, 0.0, MODEL.sink_frames)
    assert not search.judges


class TestFieldsThatCameLater:
  """Files that were written before a field existed read as they always did."""

  def test_stored_only_where_they_say_something(self):
    assert "sampler" not in to_json_value(ScheduleConfig())
    assert to_json_value(ScheduleConfig(sampler="other"))["sampler"] == "other"
    assert to_json_value(SearchConfig.streaming(MODEL))["judges"] is False

  @pytest.mark.parametrize("schedule", [ScheduleConfig(), ScheduleConfig(shift=3.0, sampler="other")], ids=str)
  def test_there_and_back(self, schedule):
    assert from_json_value(ScheduleConfig, to_json_value(schedule), "schedule") == schedule

  def test_other_fields_must_be_there(self):
    stored = to_json_value(ScheduleConfig())
    del stored["shift"]
    with pytest.raises(ConfigError, match="schedule lacks shift"):
      from_json_value(ScheduleConfig, stored, "schedule")


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_sampler():
  with pytest.raises(ConfigError, match="sampler must be one of renoise, got 'euler'"):
    make_models(dataclasses.replace(MODEL, schedule=ScheduleConfig(sampler="euler")), None, None)
