"""The ways in which a clip of the shapes world can be worse than its caption's.

Three families of corruptions, one for each thing that VideoAlign judges:

  text      another clip, right in itself, that is not what the caption says
  picture   blur, noise, two half-transparent copies, mixed shapes, eaten outlines, as undecided generators draw
  motion    freezing, turning back, jumping, vanishing, growing, becoming something else

One object has the defect; the other one, where there are two, is as it should be.
"""

import dataclasses

from streamt1_jax.data import shapes

FAMILIES = ("text", "picture", "motion")
VISIBLE_FIELDS = ("size", "color", "shape", "background", "binding")
"""The differences that a single frame shows."""
FIELDS = (*shapes.Attributes._fields, "binding")
"""How another caption may differ in one thing: an attribute of an object, the background, or the colour of an object
and of the background exchange hues."""


@dataclasses.dataclass(frozen=True)
class Corruption:
  """One way to be worse.

  Attributes:
    family: one of `FAMILIES`.
    fields: what the other caption of the pair may differ in, of `FIELDS` or of `scene_pairs.CHANGES`. For the family
      "text" the worse clip shows it; mixed looks are mixed with it.
    falls: which of VQ, MQ and TA must be lower for the corrupted clip.
    stays: which of them must not change.
    on_frames: whether a single frame shows it.
    share: how often it is drawn, relative to the others.
  """

  family: str
  fields: tuple[str, ...]
  falls: tuple[str, ...]
  stays: tuple[str, ...]
  on_frames: bool
  share: float = 1.0


def _text(field: str, share: float = 1.0, on_frames: bool = True) -> Corruption:
  return Corruption("text", (field,), ("TA",), ("VQ", "MQ"), on_frames, share)


def _picture(
  *falls: str, fields: tuple[str, ...] = FIELDS, stays: tuple[str, ...] = ("MQ",), share: float = 1.0
) -> Corruption:
  return Corruption("picture", fields, falls, stays, True, share)


def _motion(fields: tuple[str, ...] = FIELDS, stays: tuple[str, ...] = (), on_frames: bool = False) -> Corruption:
  return Corruption("motion", fields, ("MQ",), stays, on_frames)


CORRUPTIONS = {
  "color": _text("color", 1.5),
  "background": _text("background"),
  "binding": _text("binding"),
  "shape": _text("shape", 2.0),
  "size": _text("size"),
  "direction": _text("direction", 1.5, on_frames=False),
  "speed": _text("speed", 1.5, on_frames=False),
  "swapped": _text("swapped", 2.0),
  "missing": _text("missing"),
  "extra": _text("extra"),
  "stale": _text("stale", on_frames=False),
  "blur": _picture("VQ"),
  "noise": _picture("VQ"),
  "ghost": _picture("VQ", stays=()),
  "faint": _picture("VQ", stays=()),
  "eroded": _picture("VQ", stays=(), share=2.0),
  "mixed_shape": _picture("VQ", "TA", fields=("shape",), share=2.0),
  "mixed_color": _picture("TA", fields=("color", "background", "binding")),
  "flicker": _picture("VQ", stays=()),
  "freeze": _motion(stays=("VQ",)),
  "turn": _motion(stays=("VQ",)),
  "jump": _motion(stays=("VQ",)),
  "vanish": _motion(on_frames=True),
  "resize": _motion(on_frames=True),
  "morph": _motion(("color", "shape", "size", "background")),
}
"""All corruptions. A wrong direction is a matter of the caption: motion quality is judged before that is read."""
NAMES = tuple(CORRUPTIONS)
