"""What live sessions are made with, what happens in them, and what keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped, UInt8

from streamt1_jax.config import ConfigError, SessionConfig
from streamt1_jax.io.timeline import Timeline
from streamt1_jax.receipts import Receipt
from streamt1_jax.serve.fragments import Fragment
from streamt1_jax.serve.protocol import Start
from streamt1_jax.session import Chunk
from streamt1_jax.state import ChunkTrace, Condition


class Item(NamedTuple):
  """Something to tell.

  Attributes:
    event: as JSON values.
    kind: "news" reaches everybody; "preview" may be left out for a slow viewer; "media" has a fragment with it.
    fragment: a chunk of the video, or None.
  """

  event: dict[str, Any]
  kind: Literal["news", "preview", "media"] = "news"
  fragment: Fragment | None = None


class Saved(NamedTuple):
  """A save that was written.

  Attributes:
    folder: its path.
    no_report: why there is no page in it; None if there is one.
  """

  folder: str
  no_report: str | None = None


class Shown(NamedTuple):
  """A chunk that was shown.

  Attributes:
    chunk: the chunk.
    fragment: its encoded frames.
    row: what the trace says of it, as `trace.describe_chunk`; None for a chunk that was given.
    strips: JPEGs of candidates by number, as in `report.pictures`.
    searching: seconds that the search took since the chunk before was shown.
  """

  chunk: Chunk
  fragment: Fragment
  row: dict[str, Any] | None
  strips: Mapping[int, bytes]
  searching: float = 0.0


@runtime_checkable
class LiveSession(Protocol):
  """What is needed of a `Session`, which says what each of these is."""

  @property
  def config(self) -> SessionConfig: ...

  @property
  def num_given(self) -> int: ...

  @property
  def prompt(self) -> str: ...

  @property
  def segments(self) -> list[tuple[int, str]]: ...

  @property
  def condition(self) -> Condition: ...

  @property
  def timeline(self) -> Timeline: ...

  def switch(self, prompt: str) -> Receipt: ...

  def stop(self) -> object: ...

  def prepare_save(self) -> Callable[[Any], None]: ...

  def __iter__(self) -> Iterator[Chunk]: ...

  def __next__(self) -> Chunk: ...


class Keeper(Protocol):
  """Keeps what a session shows, so that it can be saved."""

  def add(self, shown: Shown) -> None:
    """The next chunk."""
    ...

  def prepare_save(self, session: LiveSession) -> Callable[[], Saved]:
    """Notes what is kept so far, and of the session what cannot wait. If it raises, the session goes on.

    What it returns writes that to a folder, and says which. It is called once, in another thread, while more is
    added; `close` comes after it.
    """
    ...

  def close(self) -> None:
    """Nothing is kept any longer."""
    ...


class KeepsNothing:
  """A `Keeper` that cannot save."""

  def add(self, shown: Shown) -> None:
    pass

  def prepare_save(self, session: LiveSession) -> Callable[[], Saved]:
    raise ConfigError("this server saves nothing")

  def close(self) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Studio:
  """What sessions are made with.

  Attributes:
    open: makes a session; the other argument is what it calls with every trace. Raises ConfigError.
    fps: frames per second.
    scale: every pixel becomes a square of this many pixels on a side.
    presets: names of the searches that a client may choose, the default first.
    pictures: frames of a chunk as uint8 `[T, H, W, 3]`.
    keeper: makes what keeps a new session.
    idle: called at least once a second while no chunk is made.
    end: called when no session will be opened any more.
  """

  open: Callable[[Start, Callable[[ChunkTrace], None]], LiveSession]
  fps: int
  scale: int = 1
  presets: tuple[str, ...] = ()
  pictures: Callable[[Shaped[np.ndarray, "T ..."]], UInt8[np.ndarray, "T H W 3"]] = np.asarray
  keeper: Callable[[Start], Keeper] = lambda start: KeepsNothing()
  idle: Callable[[], None] = lambda: None
  end: Callable[[], None] = lambda: None

  def preset(self, search: str | None) -> str | None:
    """The preset that a client asks for: the default if it names none; None where there are no presets."""
    return search if search is not None else next(iter(self.presets), None)
