"""What a client may say, and what it is answered: JSON in text frames, and video in binary frames.

The names of the events are those of vLLM-Omni's realtime video sessions, and a few more. `docs/serve.md` has the table.
A message is parsed whole before anything is done with it, and refused in one line.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamt1_jax.config import ConfigError
from streamt1_jax.messages import one_line, shortened

MOST_IMAGE_BYTES = 4 << 20
MOST_BYTES = 16 << 20
"""A larger message ends the connection unread, so a picture that is too large must fit: it gets an answer."""
MOST_PROMPT, MOST_ID = 2000, 128
"""Characters."""
_SEED_LIMIT = 2**31


class Refused(ValueError):
  """A message that cannot be taken.

  Attributes:
    code: what is wrong, one word.
    event_id: of the message, if it has one.
  """

  def __init__(self, code: str, message: str, event_id: str | None = None):
    super().__init__(message)
    self.code, self.event_id = code, event_id


@dataclasses.dataclass(frozen=True)
class Start:
  """Asks for a session.

  Attributes:
    prompt: what to show.
    search: name of a preset, or None for the server's choice.
    seed: base seed.
    image: a picture file that the video begins with, or None.
  """

  prompt: str
  search: str | None = None
  seed: int = 0
  image: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Interaction:
  """Asks for another prompt. `event_id` is what the answers call it."""

  prompt: str
  event_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Pause:
  """Begin no further chunk until a session is resumed."""


@dataclasses.dataclass(frozen=True)
class Resume:
  """Go on."""


@dataclasses.dataclass(frozen=True)
class Stop:
  """End the session."""


@dataclasses.dataclass(frozen=True)
class Save:
  """Write what there is to a folder of the server's choice."""


@dataclasses.dataclass(frozen=True)
class Ping:
  """Is anybody there?"""


Message = Start | Interaction | Pause | Resume | Stop | Save | Ping


def _start(body: Mapping[str, Any]) -> Start:
  _only(body, ("prompt", "search", "seed", "image", "model", "format"))
  if body.get("format", "m4s") != "m4s":
    raise Refused("unsupported", f"format must be m4s, got {shortened(body['format'])}")
  search, seed = body.get("search"), body.get("seed", 0)
  if search is not None and not isinstance(search, str):
    raise Refused("invalid", f"search must be a text, got {shortened(search)}")
  if type(seed) is not int or not -_SEED_LIMIT <= seed < _SEED_LIMIT:
    raise Refused("invalid", f"seed must be a whole number of 32 bits, got {shortened(seed)}")
  return Start(_prompt(body.get("prompt")), search, seed, _image(body.get("image")))


def _interaction(body: Mapping[str, Any]) -> Interaction:
  _only(body, ("interaction",))
  inner = body.get("interaction")
  if not isinstance(inner, dict):
    raise Refused("invalid", f"interaction must be an object, got {shortened(inner)}")
  event_id, event = inner.get("event_id"), inner.get("event")
  if event_id is not None and (not isinstance(event_id, str) or len(event_id) > MOST_ID):
    raise Refused("invalid", f"event_id must be a text of at most {MOST_ID} characters, got {shortened(event_id)}")
  try:
    _only(inner, ("event_id", "event"))
    if not isinstance(event, dict):
      raise Refused("invalid", f"event must be an object, got {shortened(event)}")
    _only(event, ("prompt",))
    return Interaction(_prompt(event.get("prompt")), event_id)
  except Refused as refused:
    raise Refused(refused.code, str(refused), event_id) from refused


def _alone(kind: Callable[[], Message]) -> Callable[[Mapping[str, Any]], Message]:
  def parse(body: Mapping[str, Any]) -> Message:
    _only(body, ())
    return kind()

  return parse


_PARSERS: Mapping[str, Callable[[Mapping[str, Any]], Message]] = {
  "session.start": _start,
  "session.interaction": _interaction,
  "session.pause": _alone(Pause),
  "session.resume": _alone(Resume),
  "session.stop": _alone(Stop),
  "session.save": _alone(Save),
  "session.ping": _alone(Ping),
}


def parse(text: str) -> Message:
  """The message that a text frame holds. Raises Refused."""
  try:
    body = json.loads(text, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise Refused("not_json", f"a message must be JSON: {type(error).__name__}") from error
  if not isinstance(body, dict):
    raise Refused("invalid", f"a message must be an object, got {shortened(body)}")
  kind = body.pop("type", None)
  parser = _PARSERS.get(kind) if isinstance(kind, str) else None
  if parser is None:
    raise Refused("unknown_type", f"type must be one of {', '.join(_PARSERS)}; got {shortened(kind)}")
  return parser(body)


def _no_constant(name: str) -> Any:
  raise ValueError(f"{name} is not JSON")


def _only(body: Mapping[str, Any], known: Sequence[str]) -> None:
  unknown = [name for name in body if name not in known]
  if unknown:
    raise Refused("invalid", f"unknown field {shortened(unknown[0])}; known: {', '.join(known) or 'none'}")


def _prompt(value: Any) -> str:
  if not isinstance(value, str) or not value.strip() or value.encode(errors="ignore").decode() != value:
    raise Refused("invalid", f"prompt must be a text that is not empty, got {shortened(value)}")
  if len(value) > MOST_PROMPT:
    raise Refused("too_long", f"prompt must have at most {MOST_PROMPT} characters, got {len(value)}")
  return value


def _image(value: Any) -> bytes | None:
  if value is None:
    return None
  if not isinstance(value, str):
    raise Refused("invalid", f"image must be a picture in base64, got {shortened(value)}")
  # Four characters are three bytes: what is too large is not decoded.
  size = len(value) * 3 // 4 - value[-2:].count("=")
  if not 0 < size <= MOST_IMAGE_BYTES:
    most = f"{MOST_IMAGE_BYTES} bytes ({MOST_IMAGE_BYTES >> 20} MB)"
    raise Refused("too_long", f"image must have 1 to {most}, got {size}")
  try:
    return base64.b64decode(value, validate=True)
  except (binascii.Error, ValueError) as error:
    raise Refused("invalid", f"image must be a picture in base64: {type(error).__name__}") from error


def event(kind: str, request: str | None = None, /, **fields: Any) -> dict[str, Any]:
  """Something that a client is told. Fields that are None are left out."""
  told = {"type": kind, "request_id": request, **fields}
  return {name: value for name, value in told.items() if value is not None}


def error_event(error: Exception, request: str | None = None) -> dict[str, Any]:
  """What a client is told of an error: one line."""
  code, event_id = getattr(error, "code", None), getattr(error, "event_id", None)
  if not isinstance(code, str):
    code = "invalid" if isinstance(error, ConfigError) else "failed"
  return event("error", request, code=code, message=one_line(str(error)), event_id=event_id)
