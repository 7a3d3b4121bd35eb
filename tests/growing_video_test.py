"""A video file that grows: it shows what a file shows that is written at once, and is there whole or not at all."""

import contextlib

import av
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.io import video
from streamt1_jax.io.growing_video import GrowingVideo
from tests import videos


def _frames():
  """Ten seconds of a bar that moves over noise."""
  noise = np.random.default_rng(0).integers(0, 60, (31, 47, 3), dtype=np.uint8)
  frames = np.repeat(noise[None], 160, axis=0)
  for index, frame in enumerate(frames):
    frame[:, index % 40 : index % 40 + 6] = 220
  return frames


def test_it_shows_what_a_video_shows_that_is_written_at_once(tmp_path):
  frames, sizes = _frames(), []
  with GrowingVideo(tmp_path / "new" / "grown.mp4", 16, scale=2) as growing:
    for begin in range(0, len(frames), 16):
      growing.add(frames[begin : begin + 16])
      partial = tmp_path / "new" / ".grown.mp4.partial"
      # The encoder looks at some seconds before it writes the first.
      sizes.append(partial.stat().st_size if partial.exists() else 0)
  assert 0 < sizes[6] < sizes[-1]
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["grown.mp4"]
  video.write_video(tmp_path / "written.mp4", frames, 16, scale=2)
  grown, written = (videos.read_video(tmp_path / name) for name in ("new/grown.mp4", "written.mp4"))
  assert grown[1] == written[1] == 16
  np.testing.assert_array_equal(grown[0], written[0])


def test_fragments_can_be_watched_before_the_end(tmp_path):
  frames = _frames()
  with GrowingVideo(tmp_path / "grown.mp4", 16) as growing:
    growing.add(frames)
    with av.open(str(tmp_path / ".grown.mp4.partial")) as container:
      shown = sum(1 for _ in container.decode(video=0))
  assert 16 <= shown < len(frames)


def test_a_failure_leaves_the_earlier_file(tmp_path):
  (tmp_path / "grown.mp4").write_bytes(b"earlier")
  with contextlib.suppress(KeyError), GrowingVideo(tmp_path / "grown.mp4", 16) as growing:
    growing.add(_frames()[:8])
    raise KeyError
  with GrowingVideo(tmp_path / "grown.mp4", 16):
    pass
  assert [path.name for path in tmp_path.iterdir()] == ["grown.mp4"]
  assert (tmp_path / "grown.mp4").read_bytes() == b"earlier"


@pytest.mark.parametrize(("name", "fps"), [("grown.avi", 16), ("grown.mp4", 0), ("gs://bucket/grown.mp4", 16)])
def test_impossible_files_are_refused(tmp_path, name, fps):
  with pytest.raises(ConfigError, match="grow"):
    GrowingVideo(name if ":" in name else tmp_path / name, fps)
  with GrowingVideo(tmp_path / "grown.mp4", 16) as growing:
    growing.add(_frames()[:8])
    with pytest.raises(ConfigError, match="8x8 do not fit"):
      growing.add(np.zeros((1, 8, 8, 3), np.uint8))
