"""Moving pictures: what a reader of GIFs finds in them, and how the gallery lays out its pairs."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation import gallery
from streamt1_jax.io.moving_picture import write_gif


def test_a_gif_holds_its_frames_their_time_and_their_colours(tmp_path):
  frames = np.zeros((8, 6, 10, 3), np.uint8)
  frames[:, :, :5] = (20, 40, 160)
  frames[np.arange(8), :, 5] = np.arange(8)[:, None, None] * [30, 10, 0]
  write_gif(tmp_path / "a.gif", frames, 16, scale=3)
  with Image.open(tmp_path / "a.gif") as picture:
    assert picture.info["loop"] == 0
    pages = [(page.info["duration"], np.asarray(page.convert("RGB"))) for page in ImageSequence.Iterator(picture)]
  durations, shown = zip(*pages, strict=True)
  np.testing.assert_array_equal(shown, frames.repeat(3, axis=1).repeat(3, axis=2))
  assert sum(durations) == 500  # milliseconds
  assert set(durations) == {60, 70}


@pytest.mark.parametrize("fps", [0, 51, float("nan")])
def test_speeds_that_no_viewer_shows_are_refused(tmp_path, fps):
  with pytest.raises(ConfigError, match=r"fps of a GIF must be in \(0, 50\]"):
    write_gif(tmp_path / "a.gif", np.zeros((1, 2, 2, 3), np.uint8), fps)
  assert not list(tmp_path.iterdir())


def test_pairs_stand_one_above_the_other_in_reading_order():
  video = lambda value: np.full((2, 8, 8, 3), value, np.uint8)
  found = gallery.sheet([video(1), video(2), video(3)], [video(11), video(12), video(13)], columns=2)
  assert found.shape == (2, 2 * (8 + 2 + 8 + 8), 2 * (8 + 8), 3)
  at = lambda row, column: int(found[1, row, column, 0])
  assert [at(8, 8), at(18, 8), at(8, 24), at(18, 24), at(34, 8), at(44, 8)] == [1, 11, 2, 12, 3, 13]
  assert {at(0, 0), at(12, 5), at(13, 5), at(25, 5), at(34, 24), at(44, 24)} == {128}
