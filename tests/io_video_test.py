"""Videos on disk look as they were written, and a failed write leaves nothing."""

import fractions
import struct

import av
import numpy as np
import pytest
from PIL import Image

from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, video
from tests import videos


def _moving_disc(frames=24, height=64, width=64):
  """A red disc that moves right over dark blue, one pixel per frame."""
  y, x = np.mgrid[:height, :width]
  inside = [((x - 12 - t) ** 2 + (y - 30) ** 2)[..., None] < 100 for t in range(frames)]
  red, blue = np.array([220, 40, 30], np.uint8), np.array([20, 30, 90], np.uint8)
  return np.stack([np.where(mask, red, blue) for mask in inside]).astype(np.uint8)


def _psnr(a, b):
  error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
  return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(("scale", "least"), [(1, 30.0), (4, 38.0)])
def test_round_trip(tmp_path, scale, least):
  frames = _moving_disc()
  video.write_video(tmp_path / "clips" / "disc.mp4", frames, 16, scale=scale)
  loaded, fps = videos.read_video(tmp_path / "clips" / "disc.mp4")
  enlarged = np.kron(frames, np.ones((1, scale, scale, 1), np.uint8))
  assert loaded.dtype == np.uint8
  assert loaded.shape == enlarged.shape
  assert fps == 16.0
  assert _psnr(loaded, enlarged) > least
  assert [path.name for path in (tmp_path / "clips").iterdir()] == ["disc.mp4"]


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 120, 40)])
def test_colors_survive(tmp_path, color):
  frames = np.full((3, 32, 32, 3), color, np.uint8)
  video.write_video(tmp_path / "flat.mp4", frames, 8)
  loaded, _ = videos.read_video(tmp_path / "flat.mp4")
  # Eight-bit YCbCr in the range 16..235 is coarser than RGB: two neighbouring levels may share a code.
  assert np.abs(loaded.astype(int) - frames).max() <= 3


@pytest.mark.parametrize("fps", [1, 23.976, 29.97, 60])
def test_frame_rate(tmp_path, fps):
  video.write_video(tmp_path / "clip.mp4", _moving_disc(5), fps)
  loaded, found = videos.read_video(tmp_path / "clip.mp4")
  assert len(loaded) == 5
  assert found == pytest.approx(fps, abs=1e-3)


def test_one_frame(tmp_path):
  video.write_video(tmp_path / "clip.mp4", _moving_disc(1), 16)
  assert len(videos.read_video(tmp_path / "clip.mp4")[0]) == 1


def test_odd_sizes_repeat_the_last_row_and_column(tmp_path):
  # Grey, so that halved colour resolution costs nothing and the position of every pixel is what is measured.
  frames = _moving_disc(4, height=33, width=47)[..., :1].repeat(3, axis=-1)
  video.write_video(tmp_path / "odd.mp4", frames, 16)
  loaded, _ = videos.read_video(tmp_path / "odd.mp4")
  assert loaded.shape == (4, 34, 48, 3)
  assert _psnr(loaded, np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")) > 38


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"frames": np.zeros((4, 8, 8, 3), np.float32)}, "uint8"),
    ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, "T at least 1"),
    ({"frames": np.zeros((4, 8, 8), np.uint8)}, r"\[4, 8, 8\]"),
    ({"fps": 0}, "fps must be positive"),
    ({"fps": float("nan")}, "fps must be positive"),
    ({"scale": 0}, "scale must be a positive integer"),
    ({"scale": 1.5}, "scale must be a positive integer"),
    ({"constant_rate_factor": 52}, "0..51"),
    ({"path": "clip.avi"}, "must end in .mp4"),
  ],
)
def test_wrong_arguments_write_nothing(tmp_path, change, message):
  arguments = {"path": "clip.mp4", "frames": _moving_disc(2), "fps": 16} | change
  with pytest.raises(ConfigError, match=message):
    video.write_video(tmp_path / arguments.pop("path"), **arguments)
  assert list(tmp_path.iterdir()) == []


def test_a_failing_write_keeps_the_earlier_file(tmp_path, monkeypatch):
  path = tmp_path / "clip.mp4"
  video.write_video(path, _moving_disc(3), 16)
  before = path.read_bytes()

  def full(self, content):
    self.touch()
    raise OSError("No space left on device")

  monkeypatch.setattr(type(atomic.epath.Path(path)), "write_bytes", full)
  with pytest.raises(OSError, match="No space left"):
    video.write_video(path, _moving_disc(5), 16)
  assert path.read_bytes() == before
  assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.95])
def test_truncated_videos_are_refused(tmp_path, keep):
  path = tmp_path / "clip.mp4"
  video.write_video(path, np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8), 16)
  content = path.read_bytes()
  path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
  with pytest.raises(ConfigError, match="clip.mp4"):
    videos.read_video(path)


def test_a_missing_or_foreign_file_is_no_video(tmp_path):
  (tmp_path / "notes.mp4").write_text("these are notes " * 100)
  for name in ("absent.mp4", "notes.mp4"):
    with pytest.raises(ConfigError, match=name):
      videos.read_video(tmp_path / name)


def _patched(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
  """`content` with `value` at `offset` bytes after the name of the last `box` of an mp4."""
  place = content.rindex(box) + 4 + offset
  return content[:place] + value + content[place + len(value) :]


@pytest.mark.parametrize(
  ("matrix", "turns"),
  [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
  ids=["clockwise", "upside down", "counter-clockwise"],
)
def test_frames_are_turned_as_the_file_asks(tmp_path, matrix, turns):
  """The track header's matrix takes (x, y), y downwards, to (a x + c y, b x + d y); (0, 1, -1, 0) turns clockwise."""
  path = tmp_path / "clip.mp4"
  video.write_video(path, _moving_disc(3, width=48), 16)
  stored, _ = videos.read_video(path)
  a, b, c, d = (number << 16 for number in matrix)
  path.write_bytes(_patched(path.read_bytes(), b"tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)))
  turned, _ = videos.read_video(path)
  np.testing.assert_array_equal(turned, np.rot90(stored, turns, axes=(1, 2)))


def test_some_frames(tmp_path):
  path = tmp_path / "clip.mp4"
  video.write_video(path, _moving_disc(9), 16)
  every, _ = videos.read_video(path)
  assert video.probe_video(path) == (9, 16.0, 64, 64)
  np.testing.assert_array_equal(video.read_frames(path, [8, 0, 3, 3], 9), every[[8, 0, 3, 3]])
  with pytest.raises(ConfigError, match="clip.mp4 is incomplete: 9 frames of 10"):
    video.read_frames(path, [0], 10)


def _encode_as(path, codec: str, frames: int, rate: int = 30) -> bytes:
  with av.open(path, "w") as container:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
    for frame in _moving_disc(frames):
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())
  return path.read_bytes()


def test_frames_are_counted_where_the_file_does_not_say(tmp_path):
  _encode_as(tmp_path / "clip.webm", "libvpx-vp9", 7)
  assert video.probe_video(tmp_path / "clip.webm") == (7, 30.0, 64, 64)


def _trimmed(path, first: int, frames: int = 20) -> None:
  """An mp4 that holds `frames` frames and shows those from `first` on. Those before have negative times."""
  with av.open(path, "w", options={"movflags": "faststart"}) as container:
    stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
    stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
    for index, frame in enumerate(_moving_disc(frames)):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = index - first, fractions.Fraction(1, 30)
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def test_trimmed_videos_have_the_frames_they_show(tmp_path):
  _trimmed(tmp_path / "whole.mp4", 0)
  _trimmed(tmp_path / "trimmed.mp4", 5)
  with av.open(tmp_path / "trimmed.mp4") as container:
    assert container.streams.video[0].frames == 20
  assert video.probe_video(tmp_path / "trimmed.mp4") == (15, 30.0, 64, 64)
  (shown, _), (every, _) = (videos.read_video(tmp_path / name) for name in ("trimmed.mp4", "whole.mp4"))
  np.testing.assert_array_equal(shown, every[5:])
  # A cut at the end: 200 of a second's 1000 parts.
  content = (tmp_path / "trimmed.mp4").read_bytes()
  (tmp_path / "trimmed.mp4").write_bytes(_patched(content, b"elst", 8, struct.pack(">I", 200)))
  assert video.probe_video(tmp_path / "trimmed.mp4").num_frames == 6
  np.testing.assert_array_equal(videos.read_video(tmp_path / "trimmed.mp4")[0], shown[:6])


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_trimmed_videos_that_are_cut_off_are_refused(tmp_path, keep):
  """The beginning, which says how many frames there are, is whole."""
  path = tmp_path / "clip.mp4"
  _trimmed(path, 5)
  content = path.read_bytes()
  assert content.index(b"moov") < content.index(b"mdat") < 0.3 * len(content)
  path.write_bytes(content[: int(keep * len(content))])
  with pytest.raises(ConfigError, match="clip.mp4 is (incomplete|damaged|not a readable video)"):
    videos.read_video(path)


def test_files_without_a_frame_rate_are_refused(tmp_path):
  _encode_as(tmp_path / "raw.h264", "libx264", 7)
  Image.fromarray(_moving_disc(1)[0]).save(tmp_path / "picture.png")
  # All durations of an mp4 are 0: those of its frames and that of the track.
  content = _encode_as(tmp_path / "instant.mp4", "mpeg4", 7)
  content = _patched(_patched(content, b"stts", 12, bytes(4)), b"mdhd", 16, bytes(4))
  (tmp_path / "instant.mp4").write_bytes(content)
  # Without its default duration a track of one frame has no rate. 0xEC makes the entry a void one.
  content = _encode_as(tmp_path / "frame.mkv", "mpeg4", 1)
  place = content.index(bytes.fromhex("23e38384"))
  (tmp_path / "frame.mkv").write_bytes(content[:place] + bytes.fromhex("ec86") + content[place + 2 :])
  for name in ("raw.h264", "picture.png", "instant.mp4", "frame.mkv"):
    with pytest.raises(ConfigError, match=f"{name} does not say its frame rate"):
      video.probe_video(tmp_path / name)


def test_unknown_codecs_are_refused(tmp_path):
  path = tmp_path / "clip.mp4"
  video.write_video(path, _moving_disc(3), 16)
  path.write_bytes(_patched(path.read_bytes(), b"avc1", -4, b"zzzz"))
  with pytest.raises(ConfigError, match="clip.mp4 is not readable: FFmpeg knows no decoder"):
    videos.read_video(path)


def test_damaged_frames_are_refused(tmp_path):
  """A decoder hides what it cannot read, and goes on."""
  path = tmp_path / "clip.mp4"
  video.write_video(path, np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8), 16)
  content = bytearray(path.read_bytes())
  for place in range(len(content) // 2, len(content) - 4000, 997):
    content[place] ^= 0x55
  path.write_bytes(content)
  assert video.probe_video(path).num_frames == 12
  with pytest.raises(ConfigError, match="clip.mp4 is damaged: frame"):
    videos.read_video(path)


def _sheet(frames, *, count, columns, scale=1):
  indices = video.sheet_indices(len(frames), count)
  return video.sheet_of(frames[indices], indices, 16, columns=columns, scale=scale)


def test_contact_sheet_shows_evenly_spaced_frames():
  frames = np.stack([np.full((20, 40, 3), 40 + 20 * t, np.uint8) for t in range(10)])
  sheet = _sheet(frames, count=4, columns=2, scale=2)
  height = (sheet.shape[0] - 4) // 2
  assert sheet.dtype == np.uint8
  assert sheet.shape[1] == 4 + 2 * (80 + 4)
  for index, (row, column) in zip((0, 3, 6, 9), np.ndindex(2, 2), strict=True):
    y, x = 4 + row * height, 4 + column * 84
    assert (sheet[y : y + 40, x : x + 80] == 40 + 20 * index).all()
    label = sheet[y + 40 : y + height - 4, x : x + 80]
    assert label.max() > 150


def test_contact_sheet_of_a_short_video_has_no_empty_cells():
  frames = _moving_disc(3)
  sheet = _sheet(frames, count=20, columns=5)
  assert sheet.shape[1] == 4 + 3 * 68


def test_contact_sheet_labels_fit_under_tiny_frames():
  """Frames narrower than their time stamps are set apart, so that no stamp covers the next."""
  sheet = _sheet(_moving_disc(4, height=8, width=8), count=4, columns=4)
  label_row = sheet[12:].max(axis=(0, 2)) > 100
  starts = np.flatnonzero(np.diff(np.concatenate([[0], label_row.astype(int)])) == 1)
  assert len(starts) >= 4
  assert sheet.shape[1] > 4 * 20


def test_contact_sheet_refuses():
  with pytest.raises(ConfigError, match="scale must be a positive integer, got 0"):
    _sheet(_moving_disc(3), count=3, columns=4, scale=0)


def test_png_is_lossless(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (17, 23, 3), np.uint8)
  video.write_png(tmp_path / "sheets" / "noise.png", image)
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheets" / "noise.png")), image)


@pytest.mark.usefixtures("unchecked_types")
def test_png_refuses_other_arrays(tmp_path):
  with pytest.raises(ConfigError, match="uint8"):
    video.write_png(tmp_path / "x.png", np.zeros((4, 4)))
  assert list(tmp_path.iterdir()) == []
