"""What steers a video while it is made: prompts from a script or from people, which take effect between two chunks.

  script, switch(), stop() ── queue ── border ── state and prompt that the next chunk begins with ── receipts

`Steering.border` is what `drivers.stream_states` calls before every chunk. A session steers, and so does the command
line with a timeline; a video that nothing steers has no border. Source: docs/reference/interactive.md.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from streamt1_jax import drivers
from streamt1_jax.between_chunks import commit_given, switch_prompt
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.drivers import Given, Segment
from streamt1_jax.generator import Models
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel.sharding import with_shardings
from streamt1_jax.receipts import Receipt
from streamt1_jax.state import Condition, SearchState
from streamt1_jax.typing import IntScalar, SearchParams


@runtime_checkable
class Runtime(Protocol):
  """What a video is made with. A `Pipeline` is one."""

  @property
  def models(self) -> Models: ...

  @property
  def params(self) -> SearchParams: ...

  def condition(self, prompt: str, num_chunks: int) -> Condition:
    """Everything that depends on the prompt alone. Raises ConfigError for a prompt that cannot be read."""
    ...


class Start(NamedTuple):
  """What a video begins with instead of nothing.

  Attributes:
    latents: chunks that are given, [m, F, C, H, W] float32; None if none are.
    image: latent frame [C, H, W] that the first chunk begins with; None for all models that were not trained for it.
  """

  latents: Any = None
  image: Any = None

  @property
  def num_chunks(self) -> int:
    return 0 if self.latents is None else len(self.latents)


NOTHING = Start()


@functools.partial(jax.jit, static_argnames=("models", "search", "switch"))
def switch_if_finite(
  params: SearchParams,
  state: SearchState,
  condition: Condition,
  models: Models,
  search: SearchConfig,
  switch: SwitchConfig,
) -> tuple[SearchState, Bool[Array, ""]]:
  """`between_chunks.switch_prompt`, and whether the memories it leaves are finite. The state before stays whole."""
  switched = switch_prompt(params, state, condition, models, search, switch)
  leaves = [leaf for leaf in jax.tree.leaves(switched.beams.memory) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  return switched, functools.reduce(jnp.logical_and, (jnp.isfinite(leaf).all() for leaf in leaves), jnp.bool(True))


@functools.partial(jax.jit, static_argnames="models", donate_argnames="state")
def follow(state: SearchState, beam: IntScalar, models: Models) -> SearchState:
  """The state in which all beams go on from one of them.

  Args:
    state: between two chunks; may be donated.
    beam: the one.
    models: static.
  """
  parents = jnp.full(state.beams.seed.shape, beam, jnp.int32)
  take = lambda tree: jax.tree.map(lambda x: jnp.take(x, parents, axis=0, mode="clip"), tree)
  memory = models.generator.gather(state.beams.memory, parents)
  beams = take(state.beams._replace(memory=None))._replace(memory=memory)
  return with_shardings(models.execution.mesh, "state", state._replace(beams=beams, policy=take(state.policy)))


@jax.jit
def _equal(one: Condition, other: Condition) -> Bool[Array, ""]:
  same = jax.tree.leaves(jax.tree.map(jnp.array_equal, one, other))
  return functools.reduce(jnp.logical_and, same, jnp.bool(True))


def same_condition(one: Condition, other: Condition) -> bool:
  """Whether two prompts mean the same to everything that reads them."""
  like = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  if jax.tree.structure(one) != jax.tree.structure(other) or like(one) != like(other):
    return False
  return bool(hosts.to_host(_equal(one, other)))


class Steering:
  """The prompts of one video: those that were in force, the one that is, and those that wait.

  `switch` and `stop` may be called from any thread. With several processes all of them must make the same calls
  between the same chunks.

  Attributes:
    condition: of the prompt in force.
    begins: the first chunks of the segments so far.
    prompts: of the segments.
    given: the chunks that the video began with, or None; known after `begin`.
    applied: receipts of what took effect before the chunk that was begun last.
    follow: the beam that all beams go on from at the next border; None if each goes on by itself.
  """

  def __init__(
    self,
    runtime: Runtime,
    script: Sequence[tuple[int, str]],
    search: SearchConfig,
    switch: SwitchConfig,
    *,
    horizon: int,
    capacity: int,
    start: Start = NOTHING,
  ):
    """Reads all prompts of the script.

    Args:
      runtime: what the video is made with.
      script: prompts, and the chunks that they begin with: 0 first, in order.
      search: how to search.
      switch: how prompts change.
      horizon: what `Condition.num_chunks` is to be.
      capacity: the `num_chunks` that `state.init_state` makes the state for.
      start: what the video begins with.

    Raises:
      ConfigError: a prompt cannot be read, or this search cannot switch so.
    """
    switch.validate_for(search)
    self._runtime, self._search, self._switch = runtime, search, switch
    self._horizon, self._capacity, self.start = horizon, capacity, start
    self._script = dict(script[1:])
    self._lock = threading.Lock()
    self._queue: list[tuple[Receipt, Condition | None]] = []
    self._numbers = itertools.count()
    self._newest: Receipt | None = None
    self._ended: str | None = None
    self.condition = self._read(script[0][1])
    for prompt in self._script.values():
      self._read(prompt)
    self.begins, self.prompts = [0], [script[0][1]]
    self.given: Given | None = None
    self.applied: tuple[Receipt, ...] = ()
    self.follow: int | None = None

  def switch(self, prompt: str) -> Receipt:
    """Asks for another prompt from the next chunk on; it is read before this returns, in the caller's thread.

    Raises ConfigError for a prompt that cannot be read; nothing changes then.
    """
    with self._lock:
      number = next(self._numbers)
    condition = self._read(prompt)
    return self._queued(Receipt(prompt, number), condition)

  def stop(self) -> Receipt:
    """Asks that no further chunk is begun."""
    with self._lock:
      number = next(self._numbers)
    return self._queued(Receipt(None, number), None)

  @property
  def queued(self) -> list[Receipt]:
    """Receipts of the events that wait, in order of arrival."""
    with self._lock:
      return sorted((receipt for receipt, _ in self._queue), key=lambda receipt: receipt.number)

  def end(self, reason: str) -> None:
    """Drops what waits, and whatever comes later; the first reason counts."""
    with self._lock:
      self._ended = self._ended or reason
      for receipt, _ in self._queue:
        receipt.decide("dropped", None, reason=self._ended)
      self._queue.clear()

  def begin(self, seed: int) -> SearchState:
    """The state before the first chunk that is made, with `given` in all its memories."""
    runtime, search = self._runtime, self._search
    inputs = runtime.params, np.asarray(seed, np.int32), runtime.models, search, self._capacity
    state = drivers.jitted_init_state(*inputs)
    if self.start.latents is not None:
      chunks = []
      for index, latents in enumerate(self.start.latents):
        given = jnp.asarray(latents, jnp.float32)
        state, frames = commit_given(
          runtime.params, state, self.condition, given, runtime.models, search, first=index == 0
        )
        chunks.append(hosts.to_host(frames))
      self.given = Given(np.asarray(self.start.latents, np.float32), chunks)
    return state

  @property
  def segments(self) -> list[Segment]:
    """The segments so far, and what judges the whole video reads of them.

    Prompts are read again for it: what rewards read is large, and a video without an end has many prompts.
    """
    return [self.segment(index) for index in range(len(self.begins))]

  def segment(self, index: int) -> Segment:
    """One of them."""
    condition = self._read(self.prompts[index])
    return Segment(self.begins[index], condition._replace(text=(), image_reward=(), image=None))

  @property
  def script(self) -> list[tuple[int, str]]:
    """What is left of the script: first chunks and prompts."""
    return sorted(self._script.items())

  def resume(
    self,
    chunk: int,
    segments: Sequence[tuple[int, str]] | None = None,
    script: Sequence[tuple[int, str]] | None = None,
  ) -> None:
    """Puts the prompts in force that a video had whose next chunk is `chunk`.

    Args:
      chunk: as it says.
      segments: first chunks and prompts of the segments so far; by default those of the script.
      script: what is left of the script; by default what begins with `chunk` or later.
    """
    past = [(begin, prompt) for begin, prompt in self._script.items() if begin < chunk]
    left = [(begin, prompt) for begin, prompt in self._script.items() if begin >= chunk]
    self._script = dict(left if script is None else script)
    if segments is not None:
      self.begins, self.prompts = [0], [segments[0][1]]
      self.condition = self._read(segments[0][1])
      past = list(segments[1:])
    for begin, prompt in past:
      condition = self._read(prompt)
      if not same_condition(self.condition, condition):
        self._enter(begin, prompt, condition)

  def border(self, state: SearchState, condition: Condition) -> tuple[SearchState, Condition] | None:
    """Applies what waits: see `drivers.Border`."""
    # The search itself sends nothing to the device, and may be guarded against it.
    with jax.transfer_guard_host_to_device("allow"):
      return self._border(state)

  def _border(self, state: SearchState) -> tuple[SearchState, Condition] | None:
    chunk = int(hosts.to_host(state.chunk_index))
    stop, newest = self._decide(chunk)
    if stop is not None:
      self.end("the session was stopped")
      return None
    self.applied = ()
    try:
      if self.follow is not None:
        state, self.follow = follow(state, jnp.int32(self.follow), self._runtime.models), None
      if newest is not None:
        state = self._apply(state, chunk, *newest)
    except BaseException as error:
      # Somebody may wait for the answer.
      if newest is not None:
        newest[0].decide("failed", chunk, reason=f"{type(error).__name__}: {error}")
      raise
    if newest is not None and newest[0].status in ("applied", "failed"):
      self.applied = (newest[0],)
    return state, self.condition

  def _apply(self, state: SearchState, chunk: int, receipt: Receipt, condition: Condition | None) -> SearchState:
    assert receipt.prompt is not None
    assert condition is not None
    if same_condition(self.condition, condition):
      receipt.decide("unchanged", chunk)
      return state
    # Before the first chunk nothing is remembered under the old prompt.
    if chunk > 0:
      inputs = self._runtime.models, self._search, self._switch
      # What rewards read of a prompt may be longer than before, and is not needed: nothing is compiled for it.
      text = condition._replace(image_reward=(), video_reward=(), image=None)
      switched, finite = switch_if_finite(self._runtime.params, state, text, *inputs)
      if not hosts.to_host(finite):
        receipt.decide("failed", chunk, reason="what the memory holds is NaN or Inf under this prompt")
        return state
      state = switched
    self._enter(chunk, receipt.prompt, condition)
    receipt.decide("applied", chunk)
    return state

  def _enter(self, chunk: int, prompt: str, condition: Condition) -> None:
    """A segment begins. One that has no chunk goes away: its prompt was never shown."""
    self.condition = condition
    if self.begins[-1] == chunk:
      self.begins.pop()
      self.prompts.pop()
    self.begins.append(chunk)
    self.prompts.append(prompt)

  def _decide(self, chunk: int) -> tuple[Receipt | None, tuple[Receipt, Condition | None] | None]:
    """Empties the queue: a stop that waits, or else the newest prompt that waits."""
    scripted = self._script.pop(chunk, None)
    condition = None if scripted is None else self._read(scripted)
    with self._lock:
      events = sorted(self._queue, key=lambda event: event[0].number)
      self._queue.clear()
      if scripted is not None:
        # The script was there before anybody spoke.
        events.insert(0, (Receipt(scripted, -1), condition))
      stops = [receipt for receipt, _ in events if receipt.prompt is None]
      switches = [event for event in events if event[0].prompt is not None]
      if stops:
        for receipt, _ in switches:
          receipt.decide("dropped", chunk, reason="the session was stopped")
        for receipt in stops:
          receipt.decide("applied", chunk)
        return stops[0], None
      if not switches:
        return None, None
      newest = switches[-1]
      # A prompt that took long to read may come after one that was asked for later.
      if self._newest is not None and newest[0].number >= 0 and self._newest.number > newest[0].number:
        newest = None
      for receipt, _ in switches:
        if newest is None or receipt is not newest[0]:
          receipt.decide("superseded", chunk, superseded_by=newest[0] if newest else self._newest)
      if newest is not None and newest[0].number >= 0:
        self._newest = newest[0]
      return None, newest

  def _queued(self, receipt: Receipt, condition: Condition | None) -> Receipt:
    with self._lock:
      if self._ended is not None:
        return receipt.decide("dropped", None, reason=self._ended)
      self._queue.append((receipt, condition))
    return receipt

  def _read(self, prompt: str) -> Condition:
    condition = self._runtime.condition(prompt, self._horizon)
    return condition if self.start.image is None else condition._replace(image=jnp.asarray(self.start.image))
