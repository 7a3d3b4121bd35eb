"""How near a video of the shapes world is to a perfect one: numbers where `verify` says yes or no.

frames ── coverage of each object ── where it fits best ── the nearest ideal clip ── PSNR, colours, outlines
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from streamt1_jax.data import shapes, sight, world
from streamt1_jax.data.world import Description, FrameStates

_SIZE = shapes.FRAME_SIZE
_DRAWN = 32  # frames drawn at once
_BEST_PSNR = 99.0  # dB, of equal clips


class Closeness(NamedTuple):
  """How near a video is to the nearest ideal one.

  Attributes:
    psnr: dB, over all pixels.
    color: mean distance of objects' pixels from their colour, RGB in 0..255.
    outline: mean distance of outlines in pixels: pixels on their wrong side, by the length of a circle's outline.
    ideal: the states of the frames of the ideal video.
  """

  psnr: float
  color: float
  outline: float
  ideal: FrameStates


def closeness(
  frames: UInt8[np.ndarray, "T 64 64 3"], descriptions: Sequence[Description], begins: Sequence[int]
) -> Closeness:
  """How near a video is to the nearest ideal one of its timeline.

  Objects of the ideal one start where they fit best, those that appear later too. What captions are silent about is
  what fits best.

  Args:
    frames: `[T, 64, 64, 3]` uint8 RGB.
    descriptions: of the captions.
    begins: the frame with which each begins; the first is 0.
  """
  pixels = sight.checked(frames)
  coverage = _coverage(pixels, descriptions, begins)
  fits = (_fitted(coverage, complete, begins) for complete in _completions(descriptions))
  _, ideal, lives = max(fits, key=lambda fit: fit[0])
  ideal = _refined(pixels, ideal, lives)
  target = drawn(ideal)
  error = float(np.square(target - pixels).mean())
  psnr = _BEST_PSNR if error == 0 else min(_BEST_PSNR, 10.0 * np.log10(255.0**2 / error))
  return Closeness(float(psnr), *_object_distances(pixels, coverage, ideal), ideal)


def _segments(
  descriptions: Sequence[Description], begins: Sequence[int], end: int
) -> Iterator[tuple[Description, slice]]:
  for description, begin, until in zip(descriptions, begins, [*begins[1:], end], strict=True):
    yield description, slice(begin, until)


def _coverage(pixels: np.ndarray, descriptions: Sequence[Description], begins: Sequence[int]) -> np.ndarray:
  """[T, 2, 64, 64] how much of each object of its caption every pixel shows."""
  found = np.zeros((len(pixels), world.MOST_OBJECTS, _SIZE, _SIZE), np.float32)
  palette = np.array(list(shapes.COLORS.values()), np.float32)
  for description, when in _segments(descriptions, begins, len(pixels)):
    background = np.median(pixels[when].reshape(len(pixels[when]), -1, 3), axis=1)
    covers, _ = sight.unmix(pixels[when], background, palette[[thing.color for thing in description.things]])
    for index, cover in enumerate(covers):
      found[when, index] = cover
  return found


def _completions(descriptions: Sequence[Description]) -> Iterator[list[Description]]:
  """All complete timelines that a timeline may mean: the first caption's silence is about the video's beginning.

  A later caption that is silent about what the one before said, or may have meant, goes on with it.
  """
  open_fields = [
    (index, field) for index, thing in enumerate(descriptions[0].things) for field in ("size", "speed")
    if getattr(thing, field) is None
  ]  # fmt: skip
  for values in itertools.product((0, 1), repeat=len(open_fields)):
    chosen = dict(zip(open_fields, values, strict=True))
    complete: list[Description] = []
    for number, description in enumerate(descriptions):
      before = world.followed(descriptions[number - 1], description) if number else []
      things = []
      for index, thing in enumerate(description.things):
        old = complete[-1].things[before[index]] if number and before[index] >= 0 else None
        guess = lambda field, index=index, old=old, chosen=chosen: (
          getattr(old, field) if old else chosen.get((index, field), 0)
        )
        silent = {field: guess(field) for field in ("size", "speed") if getattr(thing, field) is None}
        things.append(thing._replace(**silent))
      complete.append(description._replace(things=tuple(things)))
    yield complete


def _lives(descriptions: Sequence[Description], begins: Sequence[int], end: int) -> Int[np.ndarray, "T 2"]:
  """Which object, counted over the whole video, is in either place of every frame; -1 for none."""
  lives, now, born = np.full((end, world.MOST_OBJECTS), -1), [], 0
  for number, (description, when) in enumerate(_segments(descriptions, begins, end)):
    old = world.followed(descriptions[number - 1], description) if number else [-1] * len(description.things)
    after = []
    for index in old:
      after.append(now[index] if index >= 0 else born)
      born += index < 0
    now = after
    lives[when, : len(now)] = now
  return lives


def _fitted(
  coverage: np.ndarray, descriptions: Sequence[Description], begins: Sequence[int]
) -> tuple[float, FrameStates, np.ndarray]:
  """How well the objects fit in all, the states of the frames, and which object is where."""
  states = world.play(descriptions, begins, np.zeros((2, 2), np.int32), np.arange(len(coverage)))
  lives, total = _lives(descriptions, begins, len(coverage)), 0.0
  center = np.array(states.center)
  for life in range(lives.max() + 1):
    times, places = np.nonzero(lives == life)
    score, move = _best_move(coverage[times, places], _at(states, times, places), center[times, places])
    center[times, places] += move
    total += score
  return total, states._replace(center=center % _SIZE), lives


def _at(states: FrameStates, times: np.ndarray, places: np.ndarray) -> list[tuple[int, int]]:
  """(size, shape) of an object at some times."""
  pick = lambda values: np.asarray(values)[times, places].tolist()
  return list(zip(pick(states.size), pick(states.shape), strict=True))


def _best_move(coverage: np.ndarray, looks: list[tuple[int, int]], center: np.ndarray) -> tuple[float, np.ndarray]:
  """By how many pixels (x, y) an object's places must move to fit its coverage, and how well it then does."""
  frequency = np.fft.fftfreq(_SIZE)[:, None], np.fft.rfftfreq(_SIZE)[None]
  total = np.zeros((_SIZE, _SIZE // 2 + 1), complex)
  for cover, look, (x, y) in zip(coverage, looks, center, strict=True):
    back = np.exp(2j * np.pi * (frequency[0] * y + frequency[1] * x))
    # Against all that is wrong: what is covered outside counts as much as what is not covered inside.
    total += np.fft.rfft2(2.0 * cover - 1.0) * _spectrum(*look).conj() * back
  fit = np.fft.irfft2(total, s=(_SIZE, _SIZE))
  row, column = np.unravel_index(fit.argmax(), fit.shape)
  return float(fit.max()), np.array([column, row])


@functools.cache
def _spectrum(size: int, shape: int) -> np.ndarray:
  radius = list(shapes.SIZES.values())[size]
  return np.fft.rfft2(sight.ideal_coverage(shape, radius, np.zeros((1, 2)))[0])


@functools.cache
def _draw():
  return jax.jit(world.draw)


def drawn(states: FrameStates) -> Float[np.ndarray, "T 64 64 3"]:
  """Frames, RGB in 0..255 as bytes hold them."""
  count = len(states.background)
  pieces = []
  for begin in range(0, count, _DRAWN):
    index = np.minimum(np.arange(begin, begin + _DRAWN), count - 1)
    pieces.append(np.asarray(jnp.round(255.0 * _draw()(FrameStates(*(field[index] for field in states))))))
  return np.concatenate(pieces)[:count]


def _refined(pixels: np.ndarray, states: FrameStates, lives: np.ndarray) -> FrameStates:
  """The states with every object moved by at most a pixel in either direction, where that is nearer."""
  chosen = np.linspace(0, len(pixels) - 1, _DRAWN).astype(int)
  error = lambda tried: np.square(drawn(FrameStates(*(f[chosen] for f in tried))) - pixels[chosen]).mean()
  for life in range(lives.max() + 1):
    moves = itertools.product((0, -1, 1), repeat=2)
    tried = [_shifted(states, lives == life, np.array(move)) for move in moves]
    states = min(tried, key=error)
  return states


def _shifted(states: FrameStates, where: np.ndarray, move: np.ndarray) -> FrameStates:
  return states._replace(center=(states.center + where[..., None] * move) % _SIZE)


def _object_distances(pixels: np.ndarray, coverage: np.ndarray, ideal: FrameStates) -> tuple[float, float]:
  """Mean distances of colours and of outlines."""
  radii, palette = np.array(list(shapes.SIZES.values())), np.array(list(shapes.COLORS.values()), np.float32)
  of_color, of_outline, hidden = [], [], np.zeros((len(pixels), _SIZE, _SIZE))
  for index in range(world.MOST_OBJECTS):
    there = ideal.present[:, index]
    covers = np.zeros_like(hidden)
    looks = _at(ideal, np.arange(len(pixels)), np.full(len(pixels), index))
    for size, shape in set(itertools.compress(looks, there)):
      when = there & np.array([look == (size, shape) for look in looks])
      covers[when] = sight.ideal_coverage(shape, radii[size], np.asarray(ideal.center)[when, index].astype(float))
    visible = covers * (1.0 - hidden)
    hidden = np.maximum(hidden, covers)
    wrong = ((coverage[:, index] > 0.5) != (visible > 0.5)).sum(axis=(1, 2))
    wrong = wrong / (2 * np.pi * radii[ideal.size[:, index]])
    of_outline += wrong[there].tolist()
    distance = np.linalg.norm(pixels - palette[ideal.color[:, index]][:, None, None], axis=-1)
    of_color += distance[visible > 0.99].tolist()
  return float(np.mean(of_color)), float(np.mean(of_outline))
