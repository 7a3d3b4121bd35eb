"""A video that is steered while it is made.

  session = pipeline.session("a red circle moves left over a dark blue background")
  for chunk in session:
    show(chunk.frames)
    if tired(): session.switch("a blue square moves up over a gray background")

A runtime is loaded once, a session is one video. Whatever comes from outside, from any thread, takes effect between two
chunks and is answered by a receipt. What a session was told is a timeline: a session that is told the same makes the
same video, to the last bit.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped

from streamt1_jax import drivers, saved_session
from streamt1_jax.config import ConfigError, SearchConfig, SessionConfig
from streamt1_jax.drivers import Given, Segment
from streamt1_jax.finishing import shared_ancestor
from streamt1_jax.io.timeline import ChunkClock, Entry, Timeline
from streamt1_jax.parallel import hosts
from streamt1_jax.receipts import Receipt
from streamt1_jax.state import ChunkTrace, Condition, SearchState
from streamt1_jax.steering import NOTHING, Runtime, Start, Steering


class Chunk(NamedTuple):
  """A finished chunk.

  Attributes:
    index: counted from the beginning of the video.
    frames: its decoded frames, uint8 of a video model.
    latents: the chunk.
    trace: what the search left of it; None for a chunk that was given.
    prompt: under which it was made.
    segment: counts the prompts of the video.
    events: receipts of what took effect before it was made.
    lag: chunks that had been made after it when it was settled.
    beam: which of the survivors of the trace it is; None for a chunk that was given.
  """

  index: int
  frames: Shaped[np.ndarray, "Q ..."]
  latents: Float32[np.ndarray, "F C H W"]
  trace: ChunkTrace | None
  prompt: str
  segment: int
  events: tuple[Receipt, ...]
  lag: int
  beam: int | None = None


class _Made(NamedTuple):
  """A chunk that waits to be shown."""

  trace: ChunkTrace
  index: int
  prompt: str
  segment: int
  events: tuple[Receipt, ...]


class Session:
  """An iterator over the chunks of one video. `Pipeline.session` makes it.

  One thread iterates; `switch`, `stop` and `save` may be called from any. The state is on the device, and of the chunks
  only those are kept that wait to be shown: a session takes the same memory however long it runs.
  """

  def __init__(
    self,
    runtime: Runtime,
    clock: ChunkClock,
    prompt: str | Timeline,
    config: SessionConfig,
    *,
    start: Start = NOTHING,
    on_trace: Callable[[ChunkTrace], None] | None = None,
    identity: Mapping[str, Any] | None = None,
  ):
    """Reads the prompts; nothing is made before the first chunk is asked for.

    Args:
      runtime: what the video is made with.
      clock: when chunks begin.
      prompt: what to show; or a timeline, whose prompts take effect as if somebody switched at their times.
      config: everything else that decides the video.
      start: what the video begins with.
      on_trace: called with the trace of every chunk that is made, on the host; in the order they are made.
      identity: of the model and its devices, as JSON values: a save is for no other.

    Raises:
      ConfigError: a prompt cannot be read, or the search or the length does not fit the model.
    """
    end = config.end(start.num_chunks)
    drivers.check_length(runtime.models, config.search, end)
    script = [(0, prompt)] if isinstance(prompt, str) else prompt.chunks(clock, end, start.num_chunks)
    self.config, self._runtime, self._clock = config, runtime, clock
    self._on_trace, self._identity = on_trace, dict(identity or {})
    length, capacity = config.length(start.num_chunks), config.capacity(start.num_chunks)
    options = {"horizon": length, "capacity": capacity, "start": start}
    self._steering = Steering(runtime, script, config.search, config.switch, **options)
    self._state: SearchState | None = None
    self._steps: Iterator[tuple[SearchState, ChunkTrace]] | None = None
    self._unshown_given = 0
    self._waiting: collections.deque[_Made] = collections.deque()
    self._ended = False
    self._turn, self._busy = threading.Lock(), threading.Lock()
    self._holder: int | None = None

  def switch(self, prompt: str) -> Receipt:
    """Asks for another prompt, from the next chunk that is begun.

    The prompt is read at once, in the caller's thread, while a chunk may be made. If several prompts wait, the
    newest is taken. A prompt that says the same as the one in force changes nothing. If what the memory holds would
    become NaN or Inf, the video goes on under the old prompt, and the receipt says so.

    Raises:
      ConfigError: the prompt is empty or a reward cannot read it; nothing changes.
    """
    return self._steering.switch(prompt)

  def stop(self) -> Receipt:
    """Asks that no further chunk is begun. What has been made is still shown."""
    return self._steering.stop()

  def save(self, folder: epath.PathLike) -> None:
    """Writes all that `Pipeline.resume` needs to go on, in the place of an earlier save. It waits for a running chunk.

    Events that are queued are saved too. A resumed session has them in its queue, with receipts of their own: `queued`.

    Raises:
      ConfigError: the folder holds something else or cannot be written, the session has failed, or it runs in several
        processes.
    """
    with self._exclusively():
      state, progress = self._to_save(folder)
      saved_session.save(folder, state, progress, self._steering.start, self._steering.given)

  def prepare_save(self) -> Callable[[epath.PathLike], None]:
    """Copies to the host what a save is of. What it returns writes that, as `save`, while chunks are made.

    What it returns may be called in any thread, and raises as `save`.

    Raises:
      ConfigError: the session has failed.
    """
    with self._exclusively():
      state, progress = self._to_save("the session")
      # A copy even where the device is the host: the next chunk takes the memory of this state.
      kept, given = jax.tree.map(np.array, state), self._steering.given
      return lambda folder: saved_session.save(folder, kept, progress, self._steering.start, given)

  def _to_save(self, what: epath.PathLike) -> tuple[SearchState, saved_session.Progress]:
    self._begin()
    if self._state is None:
      raise ConfigError(f"cannot save {what}: the session has failed")
    return self._state, saved_session.Progress(
      config=self.config,
      identity=self._identity,
      segments=self.segments,
      script=self._steering.script,
      num_given=self._steering.start.num_chunks,
      unshown_given=self._unshown_given,
      waiting=[(made.index, made.segment, made.trace) for made in self._waiting],
      follow=self._steering.follow,
      queued=[receipt.prompt for receipt in self.queued],
    )

  @property
  def prompt(self) -> str:
    """The prompt in force."""
    return self._steering.prompts[-1]

  @property
  def queued(self) -> list[Receipt]:
    """Receipts of the events that wait for the next chunk to be begun, in order of arrival."""
    return self._steering.queued

  @property
  def segments(self) -> list[tuple[int, str]]:
    """First chunk and prompt of every segment so far."""
    return list(zip(self._steering.begins, self._steering.prompts))

  @property
  def condition(self) -> Condition:
    """The condition of the prompt in force."""
    return self._steering.condition

  @property
  def judged_segments(self) -> list[Segment]:
    """The segments so far as `drivers.final_beams` takes them."""
    return self._steering.segments

  @property
  def given(self) -> Given | None:
    """The chunks that the video began with; None before the first chunk is asked for, or without such chunks."""
    return self._steering.given

  @property
  def num_given(self) -> int:
    """Chunks that the video begins with and that are not made."""
    return self._steering.start.num_chunks

  @property
  def lag(self) -> int:
    """Chunks that are made and not yet shown, because beams differ in them."""
    return len(self._waiting)

  @property
  def timeline(self) -> Timeline:
    """What happened so far, to be told again."""
    entries = tuple(Entry(self._clock.seconds(begin), prompt) for begin, prompt in self.segments)
    return Timeline(entries, self.config.seed)

  def __iter__(self) -> Session:
    return self

  def __next__(self) -> Chunk:
    """The next chunk, as soon as it is final.

    Raises:
      SearchError: every candidate of a chunk is NaN or Inf. The session ends; what was shown before is good.
    """
    with self._exclusively():
      self._begin()
      while True:
        chunk = self._shown()
        if chunk is not None:
          return chunk
        if self._ended:
          raise StopIteration
        self._step()

  @contextlib.contextmanager
  def _exclusively(self) -> Iterator[None]:
    if self._holder == threading.get_ident():
      # `on_trace` may save.
      yield
      return
    # Two locks, so that a save gets its turn although the one who iterates asks again at once.
    with self._turn:
      self._busy.acquire()
    self._holder = threading.get_ident()
    try:
      yield
    finally:
      self._holder = None
      self._busy.release()

  def _begin(self) -> None:
    if self._steps is not None or self._ended:
      return
    if self._state is None:
      try:
        self._state = self._steering.begin(self.config.seed)
      except BaseException:
        self._finish("the session has failed")
        raise
      self._unshown_given = self._steering.start.num_chunks
    self._steps = drivers.stream_states(
      self._runtime.params,
      self._steering.condition,
      self._runtime.models,
      self.config.search,
      num_chunks=self.config.end(self._steering.start.num_chunks),
      seed=self.config.seed,
      state=self._state,
      border=self._steering.border,
    )

  def _step(self) -> None:
    """Makes a chunk, or ends."""
    assert self._steps is not None
    state, self._state = self._state, None
    try:
      made = next(self._steps, None)
    except BaseException:
      self._finish("the session has failed")
      raise
    if made is None:
      self._state = state
      self._finish("the video is over")
      return
    self._state, trace = made[0], hosts.to_host(made[1])
    if self.config.emit == "commit":
      trace = self._committed(trace)
    index = int(hosts.to_host(self._state.chunk_index)) - 1
    segment, events = len(self._steering.prompts) - 1, self._steering.applied
    # Pictures of losers are for `on_trace`; nobody asks for them later.
    self._waiting.append(_Made(trace._replace(previews=None), index, self.prompt, segment, events))
    # Last: if it raises, the chunk is not lost.
    if self._on_trace is not None:
      self._on_trace(trace)

  def _finish(self, reason: str) -> None:
    self._ended = True
    self._steering.end(reason)
    if self._waiting:
      # All that waits is shown now. A session that was stopped and saved goes on from what is shown.
      newest = self._waiting.pop()
      self._waiting.append(newest._replace(trace=self._committed(newest.trace)))

  def _committed(self, trace: ChunkTrace) -> ChunkTrace:
    """The trace of the newest chunk, from whose best beam all beams go on."""
    best = int(np.argmax(trace.score))
    # With one beam there is nothing to follow.
    self._steering.follow = best if len(trace.score) > 1 else None
    same = lambda values: np.broadcast_to(values[best][None], values.shape)
    kept = {name: same(getattr(trace, name)) for name in ("survivor", "score", "latents", "frames")}
    return trace._replace(**kept)

  def _shown(self) -> Chunk | None:
    """The oldest chunk that was not shown, if it is final."""
    given = self._steering.given
    if self._unshown_given and given is not None:
      index = len(given.frames) - self._unshown_given
      self._unshown_given -= 1
      first = self._steering.prompts[0]
      return Chunk(index, given.frames[index], given.latents[index], None, first, 0, (), 0)
    if not self._waiting:
      return None
    beam = _settled([made.trace for made in self._waiting], self.config.search)
    if beam is None:
      return None
    made = self._waiting.popleft()
    trace = made.trace
    shown = np.asarray(trace.frames[beam]), np.asarray(trace.latents[beam]), trace
    return Chunk(made.index, *shown, made.prompt, made.segment, made.events, len(self._waiting), beam)

  def restore(self, saved: saved_session.Saved) -> None:
    """Puts the session where a save was made; before anything else is done with it."""
    progress = saved.progress
    self._state, self._steering.given = saved.state, saved.given
    self._unshown_given, self._steering.follow = progress.unshown_given, progress.follow
    self._steering.resume(int(hosts.to_host(saved.state.chunk_index)), progress.segments, progress.script)
    for prompt in progress.queued:
      self.stop() if prompt is None else self.switch(prompt)
    for index, segment, trace in progress.waiting:
      self._waiting.append(_Made(trace, index, progress.segments[segment][1], segment, ()))


def _settled(traces: list[ChunkTrace], search: SearchConfig) -> int | None:
  """The beam whose oldest chunk is final because all beams descend from it; None if the next chunks decide."""
  return shared_ancestor([trace.survivor for trace in traces], search.beam_size)
