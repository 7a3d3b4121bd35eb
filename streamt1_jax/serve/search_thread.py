"""The one thread that uses the devices. It makes one session after the other and tells what happens.

  order() ── session ── chunk by chunk, on media time ── tell(Item) ── hub, in another thread
  Control ── switch, pause, resume, stop, save ── between two chunks; a save is written by a thread of its own

It knows no network: what it tells are events and fragments of video. While nobody asks for a session it compiles the
searches that somebody may ask for.
"""

from __future__ import annotations

import collections
import logging
import queue
import threading
from collections.abc import Callable, Sequence

from streamt1_jax.messages import one_line
from streamt1_jax.serve import protocol
from streamt1_jax.serve.control import CLOSED, Control
from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.protocol import Start, event
from streamt1_jax.serve.studio import Item, Studio
from streamt1_jax.serve.take import IDLE, Take

LEAD = 1.0
"""Seconds of video that are made before a viewer needs them."""
_LOGGER = logging.getLogger(__name__)


class SearchThread(threading.Thread):
  """Makes sessions in the order they are asked for.

  Attributes:
    ready: set when nothing is left to compile.
  """

  def __init__(
    self,
    studio: Studio,
    tell: Callable[[Item], None],
    numbers: Numbers,
    *,
    most_seconds: float = 600.0,
    lead: float = LEAD,
    hold: Callable[[], bool] = lambda: False,
    warm_up: Sequence[str] = (),
  ):
    """Begins with `start()`.

    Args:
      studio: what sessions are made with.
      tell: called with everything that happens, in this thread; of a save, in the thread that writes it.
      numbers: counts.
      most_seconds: of a session, on the clock of the wall.
      lead: seconds of video that are made before a viewer needs them.
      hold: whether the one who steers cannot follow; no chunk is begun then.
      warm_up: prompts: with every search a video that shows one after the other is begun, to compile its programs.
    """
    super().__init__(name="search", daemon=True)
    self._studio, self._tell, self._numbers = studio, tell, numbers
    self._options = {"most_seconds": most_seconds, "lead": lead, "hold": hold}
    self._prompts = warm_up
    self._cold = collections.deque(studio.presets if warm_up else ())
    self._warm: set[str | None] = set()
    self.ready = threading.Event()
    self._orders: queue.SimpleQueue[Control | None] = queue.SimpleQueue()
    self._current: Control | None = None
    self._closing = threading.Event()

  def order(self, request: str, start: Start) -> Control:
    """Asks for a session. It is told of by `video.start`, and by `session.done` when it is over."""
    control = Control(request, start)
    self._orders.put(control)
    return control

  def is_warm(self, search: str | None) -> bool:
    """Whether the programs of a preset are compiled; None stands for the default."""
    return self._studio.preset(search) in self._warm

  def close(self, *, save: bool = False) -> Control | None:
    """The thread ends before its next chunk; with `save` a session is saved first.

    Returns the session's control, which then says where, or None if there is no session.
    """
    self._closing.set()
    current = self._current
    if current is not None:
      if save:
        current.save()
      current.stop(CLOSED)
    self._orders.put(None)
    return current

  def run(self) -> None:
    """The thread's work."""
    try:
      while not self._closing.is_set():
        self._say_if_ready()
        try:
          # Before the next look at `closing`, so that `close` finds it or the thread ends here.
          control = self._current = self._orders.get(timeout=0 if self._cold else IDLE)
        except queue.Empty:
          self._use_time()
          continue
        if control is None or self._closing.is_set():
          return
        self._numbers.set("running", 1)
        try:
          self._play(control)
        finally:
          self._numbers.set("running", 0)
          self._current = None
    finally:
      self._studio.end()

  def _say_if_ready(self) -> None:
    if not self._cold and not self.ready.is_set():
      self.ready.set()
      self._tell(Item(event("server.ready")))

  def _use_time(self) -> None:
    """Nobody asks for a session."""
    if self._cold:
      self._compile(self._cold.popleft())
    else:
      self._studio.idle()

  def _compile(self, search: str) -> None:
    try:
      session = self._studio.open(Start(self._prompts[0], search), lambda trace: None)
      # The first chunk, one of all others, and one after a switch.
      for then in (*self._prompts[1:], None, None):
        if not self._orders.empty():
          # Somebody asks. What is compiled stays so, and the rest comes later.
          self._cold.appendleft(search)
          return
        next(session)
        if then is not None:
          session.switch(then)
    except Exception as error:
      # A client that asks for such a session is told the same.
      _LOGGER.warning(f"the first chunks of search {search} cannot be made: {one_line(str(error))}")
    else:
      self._warm.add(search)

  def _play(self, control: Control) -> None:
    """One session, from its first chunk to `session.done`."""
    warm = self.is_warm(control.start.search)
    take = Take(self._studio, control, self._tell, self._numbers, **self._options, warm=warm)
    reason = "failed"
    try:
      try:
        take.run()
      finally:
        take.close()
      reason = control.stopped or "over"
    except Exception as error:
      # Whatever happens to one session, the next one can begin.
      self._numbers.count("failures_total")
      _LOGGER.warning(f"a session has failed: {type(error).__name__}: {one_line(str(error))}")
      self._tell(Item(protocol.error_event(error, control.request)))
    if take.shown > 1:
      self._warm.add(self._studio.preset(control.start.search))
    told = {"reason": reason, "chunks": take.shown, "seconds": round(take.film.seconds, 4)}
    self._tell(Item(event("session.done", control.request, **told)))
