"""Video files from strangers: they are scored or refused in one line, reach nothing else and take no more memory."""

import io
import os
import pathlib
import socket
import struct
import sys
import threading

import av
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.io import video, video_source
from tests import videos

SDP = (
  "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)


def refusal(path: pathlib.Path) -> str:
  """The one line with which a file is refused, without its path."""
  with pytest.raises(ConfigError) as caught:
    videos.read_video(path)
  message = str(caught.value)
  assert message.startswith(str(path))
  assert "\n" not in message
  return message.removeprefix(f"{path} ")


@pytest.mark.parametrize(
  ("format", "codec"), [("mp4", "mpeg4"), ("mov", "mpeg4"), ("avi", "mpeg4"), ("matroska", "mpeg4"), ("flv", "flv1")]
)
def test_titles_that_are_not_utf8(tmp_path, format, codec):
  path = tmp_path / "clip.mp4"
  content = videos.encode(format, codec, title=b"caf\xe9")
  assert b"caf\xe9" in content
  path.write_bytes(content)
  frames, fps = videos.read_video(path)
  assert (frames.shape, fps) == ((9, 32, 48, 3), 16.0)


@pytest.fixture
def opened_sockets():
  """Sockets that this process opens, with Python or not: those that the kernel lists as its own."""
  own = lambda: {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_socket(fd)}
  if not pathlib.Path("/proc/self/fd").exists():
    pytest.skip("no /proc")
  before, found, done = own(), set(), threading.Event()

  def watch():
    while not done.wait(0.001):
      found.update(own() - before)

  watcher = threading.Thread(target=watch)
  watcher.start()
  yield found
  done.set()
  watcher.join()


def _is_socket(fd: str) -> bool:
  try:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
  except OSError:
    return False


def test_a_session_description_opens_no_socket(tmp_path, opened_sockets):
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1] & ~1
  opened_sockets.clear()
  path = tmp_path / "clip.mp4"
  path.write_text(SDP.format(port=port))
  assert "its format is none of mp4, mov" in refusal(path)
  assert not opened_sockets


@pytest.mark.parametrize(
  "text",
  [
    "ffconcat version 1.0\nfile whole.mp4\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n",
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile:isoff-live:2011">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>whole.mp4</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "<ASX version = '3.0'><Entry><Ref href='whole.mp4'/></Entry></ASX>",
    "[Reference]\nRef1=http://127.0.0.1:9/whole.mp4\n",
    "file whole.mp4",
  ],
  ids=["concat", "m3u8", "dash", "asx", "ref", "file"],
)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.mpd", "concat:whole.mp4", "picture%d.mp4"])
def test_lists_of_other_files_are_no_videos(tmp_path, monkeypatch, text, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "whole.mp4").write_bytes(videos.encode("mp4"))
  (tmp_path / name).write_text(text)
  assert "is not a readable video" in refusal(tmp_path / name)


def test_no_protocol_is_left_to_a_format_that_is_opened(tmp_path, monkeypatch):
  """Although concat scripts are let in, they open nothing."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "whole.mp4").write_bytes(videos.encode("mp4"))
  (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")
  with av.open(io.BytesIO((tmp_path / "list.mp4").read_bytes()), format="concat") as container:
    assert container.streams.video
  monkeypatch.setattr(video_source, "FORMATS", (*video_source.FORMATS, "concat"))
  assert "is not a readable video" in refusal(tmp_path / "list.mp4")


@pytest.mark.parametrize(("format", "codec"), [("matroska", "mpeg4"), ("webm", "libvpx-vp9"), ("flv", "flv1")])
def test_a_rate_that_the_time_stamps_contradict(tmp_path, format, codec):
  """The file speaks of 16 frames per second, and shows 12 frames 250 ms apart; or ever slower, 11 steps in 8.25 s."""
  path = tmp_path / "clip"
  path.write_bytes(videos.encode(format, codec, frames=12, times=lambda i: 250 * i))
  assert video.probe_video(path).fps == 4.0
  path.write_bytes(videos.encode(format, codec, frames=12, times=lambda i: 125 * i * (i + 1) // 2))
  assert video.probe_video(path).fps == pytest.approx(11 / 8.25)


@pytest.mark.parametrize("rate", [10, 24, 30, 60])
@pytest.mark.parametrize(("format", "codec"), [("matroska", "mpeg4"), ("flv", "flv1"), ("mp4", "mpeg4")])
def test_rounded_time_stamps_contradict_no_rate(tmp_path, format, codec, rate):
  """Milliseconds cannot express 1/24 s. Two frames alone are the hardest case."""
  for frames in (2, 3, 9):
    path = tmp_path / f"{frames}"
    path.write_bytes(videos.encode(format, codec, frames=frames, rate=rate))
    assert video.probe_video(path).fps == rate


def test_the_last_frame_counts_as_long_as_it_is_shown(tmp_path):
  """Four frames a quarter of a second apart; the file says that the last is shown for a sixteenth."""
  path = tmp_path / "clip.mp4"
  path.write_bytes(videos.encode("mp4", frames=4, times=lambda i: 250 * i))
  assert video.probe_video(path).fps == pytest.approx(4 / (0.75 + 1 / 16))


def test_more_frames_than_bytes(tmp_path):
  """A file of 1 kB that speaks of 67 million frames: 2.4 GB of memory, before a single one is read."""
  path, count = tmp_path / "clip.mp4", struct.pack(">I", 2**26)
  content = videos.patched(videos.encode("mp4"), b"stsz", 4, struct.pack(">I", 1) + count)
  path.write_bytes(videos.patched(videos.patched(content, b"stts", 8, count), b"stsc", 12, count))
  assert "it says it holds 67108864 frames in" in refusal(path)


def test_a_header_that_promises_frames(tmp_path):
  """The header of an AVI: two thousand million frames would be looked for."""
  path, content = tmp_path / "clip.avi", videos.encode("avi")
  place = content.index(b"strh") + 40
  assert content[place : place + 4] == struct.pack("<I", 9)
  path.write_bytes(content[:place] + struct.pack("<I", 2**31 - 1) + content[place + 4 :])
  assert refusal(path) == "is incomplete: 9 frames of 2147483647"


@pytest.mark.parametrize("said", [None, (32, 48)])
def test_frames_that_are_too_large(tmp_path, said):
  path = tmp_path / "clip.avi"
  path.write_bytes(videos.pictures([(9000, 9000)], said=said))
  assert "more than 67108864 pixels" in refusal(path)


def test_frames_that_become_too_large(tmp_path):
  path = tmp_path / "clip.avi"
  path.write_bytes(videos.pictures([(32, 48), (9000, 9000)]))
  assert "is not a readable video" in refusal(path)


def test_frames_that_change_their_size(tmp_path):
  path = tmp_path / "clip.avi"
  path.write_bytes(videos.pictures([(32, 48), (32, 48), (32, 64)]))
  assert refusal(path) == "changes the size of its frames midway"


def test_frames_larger_than_the_file_says(tmp_path, monkeypatch):
  """Their reader has made room for what the file says."""
  path = tmp_path / "clip.avi"
  path.write_bytes(videos.pictures([(64, 96)] * 3))
  stream = video_source._video_stream

  def smaller(source, container):
    found = stream(source, container)
    found.codec_context.height = 32
    return found

  monkeypatch.setattr(video_source, "_video_stream", smaller)
  with pytest.raises(ConfigError, match="its frames are larger than it says"):
    video.read_frames(path, [0], 3)


@pytest.mark.parametrize("format", ["avi", "mp4", "matroska", "flv"])
def test_no_frames(tmp_path, format):
  path = tmp_path / "clip.mp4"
  path.write_bytes(videos.encode(format, "flv1" if format == "flv" else "mpeg4", frames=0))
  assert refusal(path).startswith("is ")


def test_sound_alone(tmp_path):
  path = tmp_path / "clip.mp4"
  with av.open(path, "w") as container:
    stream = container.add_stream("aac", rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.rate, frame.pts = 8000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  assert refusal(path) == "is not a video: it has no pictures"


def _folder(path):
  path.mkdir()


def _broken_link(path):
  path.symlink_to("nowhere")


def _endless_link(path):
  path.symlink_to(path)


@pytest.mark.parametrize("make", [_folder, os.mkfifo, _broken_link, _endless_link])
def test_what_is_no_file_is_not_opened(tmp_path, make):
  """A pipe would be waited for."""
  make(tmp_path / "clip.mp4")
  assert refusal(tmp_path / "clip.mp4") == "does not exist or is not a file; expected a video"


def test_places_outside_the_file_are_no_exceptions(tmp_path):
  """PyAV would print a traceback of each, and go on."""
  (tmp_path / "file").write_bytes(b"12345")
  with (tmp_path / "file").open("rb") as file:
    source = video_source._Nameless(file)
    assert [source.seek(-3, 0), source.seek(-9, 1), source.seek(2, 0)] == [-1, -1, 2]
    assert source.read(2) == b"34"


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files")
def test_a_file_larger_than_memory_is_not_read_whole(tmp_path):
  path = tmp_path / "clip.mp4"
  with path.open("wb") as file:
    file.truncate(1 << 42)
  assert "is not a readable video" in refusal(path)
