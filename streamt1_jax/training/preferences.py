"""Pairs of clips, the better one first: the small reward models learn from them.

  caption ──┬─ the clip it describes ────────────────┐
            └─ the same with one corruption, or more ┴─ looks shared by both (codec, blur, noise)

`corruptions` has the corruptions, `scene_pairs` says which captions make pairs, `pair_frames` draws their frames.

Windows have the lengths that a search shows to a video reward, and some begin under another caption. Only the frames
that the reward looks at are drawn. The window of an image reward is one frame. Pairs are drawn on the host, since
captions of two objects are far too many for a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32

from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import Description, FrameStates
from streamt1_jax.training import scene_pairs
from streamt1_jax.training.appearance import Look
from streamt1_jax.training.corruptions import CORRUPTIONS, NAMES, VISIBLE_FIELDS
from streamt1_jax.typing import HostArray

LAST_CHUNK = 12
"""Frames of a chunk but the first."""
_BASE = 512  # the frame of the world at time 0 of a window: a multiple of all periods, and longer than any window
_LONG_AGO = 400
_WEAKEST = 0.35
_GRADED = ("blur", "noise", "ghost", "faint", "eroded", "mixed_shape", "mixed_color", "flicker", "vanish", "resize")
_WITH_SWITCH = ("text", "picture")  # families of what may happen behind a change of caption


@dataclasses.dataclass(frozen=True)
class PairConfig:
  """How pairs are drawn.

  Attributes:
    on_frames: single frames for an image reward instead of windows.
    split: of the captions.
    other_splits: of the captions that they are compared with.
    two_objects: how often there are two objects.
    switch_probability: how often a window begins under another caption, where the corruption allows it.
    late_probability: how often only the newest chunk of a window is worse: there candidates of a search differ.
    omit_probability: how often a caption leaves out a size, and how often a speed, unless the pair is about it.
    milder_probability: how often the better clip has the same defect, only less of it.
    soft_probability: how often both clips are slightly blurred and noisy.
    emphasis: pairs (corruption, factor): the factor multiplies how often the corruption is drawn.
  """

  on_frames: bool
  split: str = "train"
  other_splits: tuple[str, ...] = ("train",)
  two_objects: float = 0.65
  switch_probability: float = 0.25
  late_probability: float = 0.5
  omit_probability: float = 0.2
  milder_probability: float = 0.25
  soft_probability: float = 0.5
  emphasis: tuple[tuple[str, float], ...] = ()


class Event(NamedTuple):
  """What happens to the motion of the target of a clip, at a time of the window.

  Attributes:
    time: when.
    freeze: it stands still.
    turn: it goes back.
    jump: frames that it skips.
    morph: it becomes what `other` says, and so does the background.
  """

  time: int = 0
  freeze: bool = False
  turn: bool = False
  jump: int = 0
  morph: Description | None = None


class Clip(NamedTuple):
  """One clip.

  Attributes:
    descriptions: one after the other.
    begins: times of the window with which each begins; that of the first does not matter.
    starts: places of the objects at time 0.
    look: how it looks.
    event: what happens to the target.
  """

  descriptions: tuple[Description, ...]
  begins: tuple[int, ...]
  starts: Int32[np.ndarray, "2 2"]
  look: Look
  event: Event = Event()

  def states(self, times: Int[np.ndarray, " T"]) -> FrameStates:
    """What the frames at `times`, int32 [T] and at least -512, show."""
    begins = [0, *(_BASE + begin for begin in self.begins[1:])]
    play = lambda at: world.play(self.descriptions, begins, self.starts, _BASE + at)
    states, event, target = play(times), self.event, int(self.look.target)
    after = times >= event.time
    warped = np.minimum(times, event.time) if event.freeze else times
    warped = np.where(after, 2 * event.time - times, warped) if event.turn else warped
    warped = warped + event.jump * after
    states.center[:, target] = play(warped).center[:, target]
    if event.morph is not None:
      thing = event.morph.things[target]
      for field, value in (("size", thing.size), ("color", thing.color), ("shape", thing.shape)):
        getattr(states, field)[after, target] = value
      states.background[after] = event.morph.background
    return states


class Pair(NamedTuple):
  """A pair before its frames are drawn.

  Attributes:
    better: the clip that should win.
    worse: the clip that should lose; it is the better one before `since`.
    since: time of the window.
    kind: index into `NAMES`.
    late: whether only the newest chunk of the window is worse.
    steady: whether the better clip is under one caption all the time.
    caption: what both are judged by, complete.
    other: another caption; the worse clip shows it in the end if the corruption is of the family "text".
    omit: whether captions leave out (size, speed), of every object.
  """

  better: Clip
  worse: Clip
  since: int
  kind: int
  late: bool
  steady: bool
  caption: Description
  other: Description
  omit: tuple[tuple[bool, bool], ...]

  @property
  def texts(self) -> tuple[Description, Description]:
    """The two captions as they are written."""
    return world.without(self.caption, self.omit), world.without(self.other, self.omit)

  @property
  def shows_other(self) -> bool:
    """Whether the worse clip shows what the other caption says, and not only in its last chunk."""
    return CORRUPTIONS[NAMES[self.kind]].family == "text" and not self.late


class Clips(NamedTuple):
  """Clips as arrays: fields of `states` are [B, T, ...], those of `look` [B, ...]."""

  states: FrameStates
  look: Look


def shares(config: PairConfig) -> Float[np.ndarray, " kinds"]:
  """[kinds] probabilities."""
  drawn = lambda corruption: corruption.on_frames or not config.on_frames
  emphasis = dict(config.emphasis)
  odds = np.array([c.share * drawn(c) * emphasis.get(name, 1.0) for name, c in CORRUPTIONS.items()])
  return odds / odds.sum()


def draw_pairs(
  rng: np.random.Generator, config: PairConfig, count: int, length: int, kind: str | None = None
) -> list[Pair]:
  """`count` pairs of windows of `length` frames, of one corruption or of all."""
  kinds = rng.choice(len(NAMES), size=count, p=shares(config)) if kind is None else [NAMES.index(kind)] * count
  return [_draw_pair(rng, config, length, int(each)) for each in kinds]


def _draw_pair(rng: np.random.Generator, config: PairConfig, length: int, kind: int) -> Pair:
  corruption = CORRUPTIONS[NAMES[kind]]
  change = _drawn_change(rng, config, kind)
  caption, other = scene_pairs.draw(rng, config.split, config.other_splits, change, config.two_objects)
  # A first chunk is shorter: all of it would be worse.
  late = not config.on_frames and length > LAST_CHUNK and corruption.family != "motion"
  late = bool(late and rng.random() < config.late_probability)
  since = length - LAST_CHUNK if late else -_LONG_AGO
  better = _better_clip(rng, config, length, kind, caption, other, late)
  worse, better = _worse_clip(rng, config, length, kind, better, other, since)
  named = {"size": 0, "speed": 1}.get(change)
  omitted = lambda column: (
    change not in ("swapped", "stale") and named != column and rng.random() < config.omit_probability
  )
  omit = tuple((omitted(0), omitted(1)) for _ in range(world.MOST_OBJECTS))
  steady = len(better.descriptions) == 1
  return Pair(better, worse, since, kind, late, steady, caption, other, omit)


def _drawn_change(rng: np.random.Generator, config: PairConfig, kind: int) -> str:
  fields = CORRUPTIONS[NAMES[kind]].fields
  if config.on_frames:
    fields = [_ON_FRAMES.get(field, field) for field in fields if field in VISIBLE_FIELDS or field in _ANY_FRAME]
  return fields[rng.integers(len(fields))]


_ON_FRAMES = {"swapped": "swapped_looks"}
_ANY_FRAME = ("swapped", "missing", "extra")


def _better_clip(
  rng: np.random.Generator,
  config: PairConfig,
  length: int,
  kind: int,
  caption: Description,
  other: Description,
  late: bool,
) -> Clip:
  """The captioned clip; a window may begin under another caption, and for "stale" under the other one."""
  soft = rng.random() < config.soft_probability
  target = _target(rng, caption, other)
  shown = other.things[min(target, len(other.things) - 1)]
  look = Look(
    target=target,
    shape=shown.shape,
    color=shown.color,
    background=other.background,
    end=length,
    blur=soft * rng.uniform(0.0, 0.8),
    noise=soft * rng.uniform(0.0, 0.03),
    seed=_seed(rng),
  )
  starts = _starts(rng, caption)
  borders = range(length - LAST_CHUNK, 0, -LAST_CHUNK)
  if NAMES[kind] == "stale" and len(borders):
    begin = borders[0] if late else borders[rng.integers(len(borders))]
    return Clip((other, caption), (0, begin), starts, look)
  earlier = borders[1:] if late else borders
  may = CORRUPTIONS[NAMES[kind]].family in _WITH_SWITCH and len(earlier) and not config.on_frames
  if may and rng.random() < config.switch_probability:
    before = world.draw_event(rng, caption, config.split)
    return Clip((before, caption), (0, earlier[rng.integers(len(earlier))]), starts, look)
  return Clip((caption,), (0,), starts, look)


def _starts(rng: np.random.Generator, caption: Description) -> np.ndarray:
  """Where the objects of a video are in one of its frames: they began apart, on the grid or anywhere."""
  grid = shapes.START_POSITIONS[rng.integers(len(shapes.START_POSITIONS))]
  start = grid if rng.random() < 0.5 else rng.integers(shapes.FRAME_SIZE, size=2)
  states = world.play([caption], [0], world.starts_of(start), rng.integers(shapes.FRAME_SIZE, size=1))
  # An object that appears later begins where a second one would have been.
  return np.where(states.present[0][:, None], states.center[0], world.starts_of(start))


def _target(rng: np.random.Generator, caption: Description, other: Description) -> int:
  """The object in which two captions differ, or any."""
  pairs = list(zip(caption.things, other.things))
  differing = [index for index, (a, b) in enumerate(pairs) if a != b]
  return int(differing[0]) if len(differing) == 1 else int(rng.integers(len(caption.things)))


def _worse_clip(
  rng: np.random.Generator, config: PairConfig, length: int, kind: int, better: Clip, other: Description, since: int
) -> tuple[Clip, Clip]:
  """The worse clip and the better one, which may have the same defect, only less of it."""
  corruption = CORRUPTIONS[NAMES[kind]]
  if corruption.family == "text":
    worse = better._replace(look=better.look._replace(seed=_seed(rng)))
    if NAMES[kind] == "stale":
      return worse._replace(descriptions=(other,), begins=(0,)), better
    if since > 0:
      return worse._replace(descriptions=(*better.descriptions, other), begins=(*better.begins, since)), better
    return worse._replace(descriptions=(*better.descriptions[:-1], other)), better
  strength = rng.uniform(_WEAKEST, 1.0)
  milder = strength - rng.uniform(_WEAKEST, 1.0) if rng.random() < config.milder_probability else 0.0
  same = rng.integers(2**31)
  corrupted = lambda clip, amount: _corrupted(np.random.default_rng(same), config, length, kind, clip, other, amount)
  worse = corrupted(better._replace(look=better.look._replace(seed=_seed(rng))), strength)
  graded = milder > 0 and NAMES[kind] in _GRADED
  return worse, corrupted(better, milder) if graded else better


def _corrupted(
  rng: np.random.Generator, config: PairConfig, length: int, kind: int, clip: Clip, other: Description, strength: float
) -> Clip:
  """`clip` with a defect; `strength` is in (0, 1]."""
  name, look = NAMES[kind], clip.look
  of = lambda *names: strength * (name in names)
  # Events leave a few frames to be seen in; often they are in the newest chunk, where candidates of a search differ.
  latest = max(length - 5, 0)
  earliest = max(length - LAST_CHUNK, 0) if rng.random() < config.late_probability else 0
  event = -_LONG_AGO if config.on_frames else int(rng.integers(earliest, latest + 1))
  until = event + max(LAST_CHUNK, int(rng.uniform(0.3, 1.0) * length)) + 2 * _LONG_AGO * config.on_frames
  thing = clip.descriptions[-1].things[int(look.target)]
  assert thing.size is not None
  assert thing.speed is not None
  radius, speed = list(shapes.SIZES.values())[thing.size], list(shapes.SPEEDS.values())[thing.speed]
  angle, distance = rng.uniform(0.0, 2 * np.pi), rng.uniform(8.0, 28.0)
  sign, eaten = rng.choice((-1, 1)), rng.random() < 0.5
  jump = round(sign * rng.uniform(10.0, 31.0) / speed) * (name == "jump")
  look = look._replace(
    event=event,
    until=until,
    vanish=of("vanish"),
    flicker=of("flicker"),
    resize=0.6 * sign * of("resize"),
    mix_shape=0.5 * of("mixed_shape"),
    mix_color=0.6 * of("mixed_color"),
    mix_background=0.6 * of("mixed_color"),
    faint=0.8 * of("faint"),
    ghost=0.5 * of("ghost"),
    shift=(distance * np.cos(angle), distance * np.sin(angle)),
    erode=3.5 * of("eroded") * eaten,
    cut=1.3 * radius * of("eroded") * (not eaten),
    blur=look.blur + 3.0 * of("blur"),
    noise=look.noise + 0.15 * of("noise"),
    latent_noise=0.8 * of("noise"),
  )
  morph = other if name == "morph" else None
  return clip._replace(look=look, event=Event(event, name == "freeze", name == "turn", jump, morph))


def _seed(rng: np.random.Generator) -> int:
  return int(rng.integers(2**31))


def clip_arrays(clips: Sequence[Clip], times: Int32[HostArray, " T"]) -> Clips:
  """Clips, one or more, at these times."""
  found = [clip.states(np.asarray(times)) for clip in clips]
  states = FrameStates(*(np.stack(fields) for fields in zip(*found, strict=True)))
  dtypes = [np.asarray(default).dtype for default in Look()]
  single = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
  fields: Any = zip(zip(*(clip.look for clip in clips), strict=True), dtypes, strict=True)
  return Clips(states, Look(*(np.asarray(values, single[dtype]) for values, dtype in fields)))
