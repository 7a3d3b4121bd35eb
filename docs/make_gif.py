"""Makes the moving picture of a page from a video: every second frame.

PYTHONPATH=. python docs/make_gif.py outputs/.../video.mp4 docs/first_video.gif
"""

import sys

from streamt1_jax.io.moving_picture import write_gif
from streamt1_jax.io.video import probe_video, read_frames

_EVERY = 2


def main(source: str, target: str) -> None:
  info = probe_video(source)
  frames = read_frames(source, range(0, info.num_frames, _EVERY), info.num_frames)
  write_gif(target, frames, info.fps / _EVERY)


if __name__ == "__main__":
  main(*sys.argv[1:])
