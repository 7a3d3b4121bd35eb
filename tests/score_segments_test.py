"""A video whose prompt changes is scored segment by segment."""

import json

import numpy as np
import pytest
from etils import epath

from streamt1_jax.cli import score, score_inputs
from streamt1_jax.io import video

SEGMENTS = [
  {"chunk": 0, "start": 0, "end": 0.5, "frames": [0, 8], "prompt": "ab"},
  {"chunk": 2, "start": 0.5, "end": 0.75, "frames": [8, 12], "prompt": "abcde"},
]


class LengthScorer:
  """The prompt's length for the video, and the mean of every second frame."""

  columns = ("length", "length_frames")
  reads_prompt = True

  def look_at(self, num_frames, fps):
    return np.arange(0, num_frames, 2)

  def __call__(self, prompt, frames):
    return {"length": float(len(prompt)), "length_frames": frames.mean(axis=(1, 2, 3)).tolist()}


class CountScorer(LengthScorer):
  columns = ("count",)
  reads_prompt = False

  def __call__(self, prompt, frames):
    return {"count": float(len(frames))}


def _save(folder, segments, frames=12):
  shades = np.arange(frames, dtype=np.uint8) * 20
  pictures = np.broadcast_to(shades[:, None, None, None], (frames, 16, 16, 3))
  video.write_video(folder / "video.mp4", pictures, 16, constant_rate_factor=0)
  (folder / "manifest.json").write_text(json.dumps({"settings": {"prompt": "ab"}, "segments": segments}))
  (task,) = score_inputs.with_own_prompts([epath.Path(folder / "video.mp4")])
  return task


def test_scores_are_means_over_segments(tmp_path):
  task = _save(tmp_path, SEGMENTS)
  row = score.score_video(task, score.start_row(task), [LengthScorer(), CountScorer()])
  assert row.error is None
  assert row.prompt == "ab | abcde"
  assert row.scores["length"] == pytest.approx((8 * 2 + 4 * 5) / 12)
  np.testing.assert_allclose(row.scores["length_frames"], np.arange(0, 12, 2) * 20, atol=3)
  # What reads no prompt sees the video whole.
  assert row.scores["count"] == 6


def test_one_segment_is_a_video_of_one_prompt(tmp_path):
  task = _save(tmp_path, [{**SEGMENTS[0], "frames": [0, 12]}])
  assert (task.prompt, task.segments) == ("ab", ())


@pytest.mark.parametrize(
  ("segments", "frames", "message"),
  [
    ([SEGMENTS[0], {**SEGMENTS[1], "frames": [9, 12]}], 12, "segments that do not follow one another"),
    ([SEGMENTS[0], {"frames": [8, 12]}], 12, "segments that do not follow one another"),
    (SEGMENTS, 10, "has 10 frames, and 12 by its manifest.json"),
  ],
)
def test_segments_of_another_video_are_told(tmp_path, segments, frames, message):
  task = _save(tmp_path, segments, frames)
  row = score.score_video(task, score.start_row(task), [LengthScorer()])
  assert message in row.error
  assert "length" not in row.scores
