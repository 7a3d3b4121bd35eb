"""A live server of the small search, and a client: real websockets on this machine, in one event loop."""

import asyncio
import contextlib
import json

import numpy as np
from aiohttp.test_utils import TestClient, TestServer

from streamt1_jax.config import ConfigError
from streamt1_jax.serve.app import Server
from streamt1_jax.serve.studio import Studio
from tests import small_session

PRESETS = {"one": small_session.ONE_BEAM, "two": small_session.TWO_BEAMS}
PATIENCE = 300.0
"""Seconds: a chunk of the small search compiles in a few, but a busy machine is slow."""


def pictures(frames) -> np.ndarray:
  """Latent frames [T, C, H, W] as pictures."""
  colour = np.moveaxis(np.asarray(frames)[:, :3], 1, -1)
  return np.clip(128 + 40 * colour, 0, 255).astype(np.uint8)


def studio(num_chunks: int | None = None, **changes) -> Studio:
  """Sessions without an end, unless `num_chunks` says how many chunks they have."""

  def open_session(start, on_trace):
    search = PRESETS[start.search or "one"]
    if start.prompt == "fails":
      raise ConfigError("this prompt\nfails")
    session = small_session.session(start.prompt, search=search, num_chunks=num_chunks, seed=start.seed)
    session._on_trace = on_trace
    return session

  return Studio(
    **{"open": open_session, "fps": 3, "scale": 8, "presets": tuple(PRESETS), "pictures": pictures} | changes
  )


def no_constant(name: str):
  raise AssertionError(f"a browser does not read {name}")


class Client:
  """One websocket. What comes is kept in order: events, and binary frames after theirs."""

  def __init__(self, socket):
    self.socket, self.events, self.binaries = socket, [], []

  async def say(self, kind: str, **fields) -> None:
    await self.socket.send_str(json.dumps({"type": kind, **fields}))

  async def switch(self, prompt: str, event_id: str | None = None) -> None:
    await self.say("session.interaction", interaction={"event_id": event_id, "event": {"prompt": prompt}})

  async def hear(self) -> dict:
    """The next event, with `binary` if it has any."""
    event = json.loads(await asyncio.wait_for(self.socket.receive_str(), PATIENCE), parse_constant=no_constant)
    if "byte_length" in event:
      event["binary"] = await asyncio.wait_for(self.socket.receive_bytes(), PATIENCE)
      assert len(event["binary"]) == event["byte_length"]
    self.events.append(event)
    return event

  async def hear_until(self, kind: str) -> dict:
    """Events up to the next of a kind, which is returned."""
    while True:
      event = await self.hear()
      if event["type"] == kind:
        return event

  async def hear_of(self, *kinds: str) -> dict:
    """The next event of one of these kinds."""
    while True:
      event = await self.hear()
      if event["type"] in kinds:
        return event

  def of(self, kind: str) -> list[dict]:
    return [event for event in self.events if event["type"] == kind]


class Live:
  """A running server."""

  def __init__(self, server: Server, http: TestClient):
    self.server, self.http = server, http

  async def client(self, **options) -> Client:
    return Client(await self.http.ws_connect("/v1/realtime/video", **options))

  async def metric(self, name: str) -> float:
    text = await (await self.http.get("/metrics")).text()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"streamt1_{name} "))


@contextlib.asynccontextmanager
async def live(chosen: Studio | None = None, **options):
  """A server of the small search that does not wait for a viewer's clock, unless `lead` says so."""
  server = Server(chosen or studio(), **{"lead": 1e9} | options)
  async with TestClient(TestServer(server.app)) as http:
    yield Live(server, http)
