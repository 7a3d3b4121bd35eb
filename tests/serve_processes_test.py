"""A live server of several processes: all of them apply the same events before the same chunk."""

import asyncio
import dataclasses
import itertools
import json
import os
import pathlib
import queue
import signal
import sys
import threading

import jax
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from streamt1_jax.cli import serve
from streamt1_jax.config import ConfigError
from streamt1_jax.drivers import SearchError
from streamt1_jax.execution import Execution
from streamt1_jax.io import timeline
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel.sharding import tree_shardings
from streamt1_jax.serve import processes
from streamt1_jax.serve.app import Server
from streamt1_jax.serve.protocol import Start
from streamt1_jax.serve.studio import KeepsNothing
from streamt1_jax.session import Session
from tests import hosts_test, small_session
from tests import small_search as small
from tests.live_server import Client, studio


def noting(open_session, opened):
  """`open_session`, whose sessions come into the list `opened`."""

  def open_noted(start, on_trace):
    opened.append(open_session(start, on_trace))
    return opened[-1]

  return open_noted


def test_the_others_do_what_process_0_does(monkeypatch):
  """Two threads stand for two processes, which hear each other's words."""
  said, answers = queue.Queue(), queue.Queue()

  def everyone(value):
    if isinstance(value, dict):
      said.put(json.dumps(value))
      return [value, answers.get(timeout=60)]
    answers.put(value)
    return [json.loads(said.get(timeout=60)), value]

  monkeypatch.setattr(hosts, "everyone", everyone)
  first, other = [], []
  usual = studio()
  follower = threading.Thread(target=processes.follow, args=[noting(usual.open, other)])
  follower.start()
  shared = processes.share(dataclasses.replace(usual, open=noting(usual.open, first)), pytest.fail, pytest.fail)
  session = shared.open(Start("a", seed=3), lambda trace: None)
  chunks = [next(session)]
  shared.idle()
  receipts = [session.switch("b"), session.switch(" ")]
  assert [receipt.status for receipt in receipts] == ["queued", "queued"]
  chunks += [next(session), next(session)]
  session.stop()
  assert list(session) == []
  assert session.switch("too late").status == "dropped"
  shared.end()
  follower.join(timeout=60)
  assert not follower.is_alive()
  assert [receipt.status for receipt in receipts] == ["applied", "failed"]
  assert receipts[0].chunk == 1
  assert "empty" in receipts[1].reason
  assert other[0].segments == first[0].segments == [(0, "a"), (1, "b")]
  assert other[0].config.seed == 3
  with pytest.raises(StopIteration):
    next(other[0])
  # The state of the other is that of the first, to the last bit.
  for one, two in zip(jax.tree.leaves(first[0]._state), jax.tree.leaves(other[0]._state), strict=True):
    np.testing.assert_array_equal(one, two)


def test_sigterm_to_another_ends_process_0_once(monkeypatch):
  """The signal may come to all at once. The others say so until process 0, which has saved by then, says the end."""
  monkeypatch.setattr(hosts, "everyone", lambda value: [value, True])

  async def first_of(*before):
    ending = serve.Ending()
    for number in before:
      ending.put(number)
    shared = processes.share(studio(), lambda: ending.put(signal.SIGTERM), pytest.fail)
    shared.idle()
    shared.end()
    return await ending.get()

  # Nothing but the one that waits hears of it: a signal to this process would end it at the second time.
  monkeypatch.setattr(os, "kill", pytest.fail)
  assert asyncio.run(first_of()) == signal.SIGTERM
  assert asyncio.run(first_of(signal.SIGINT)) == signal.SIGINT


def failing(error):
  """Opens sessions whose first chunk is an error."""

  def open_session(start, on_trace):
    return fails(small_session.session(start.prompt), error, 0)

  return open_session


def fails(session, error, at):
  """`session`, whose chunk `at` is an error."""
  made, make = itertools.count(), session._step

  def step():
    if next(made) == at:
      raise error
    make()

  session._step = step
  return session


def commands(*words):
  """What process 0 says, as process 1 hears it; SIGTERM has come to nobody."""
  start = dataclasses.asdict(Start("a"))
  said = iter([{"do": word, "start": start, "prompts": [], "stop": False} for word in words])
  return lambda value: [next(said), value]


def test_another_goes_on_after_an_error_of_all(monkeypatch):
  for error in (ConfigError("no such prompt"), SearchError("every candidate is NaN")):
    monkeypatch.setattr(hosts, "everyone", commands("open", "next", "nothing", "end"))
    processes.follow(failing(error))
    # It has heard everything, up to the end.
    with pytest.raises(StopIteration):
      hosts.everyone(None)


def test_another_ends_after_an_error_of_its_own(monkeypatch):
  monkeypatch.setattr(hosts, "everyone", commands("open", "next", "nothing", "end"))
  with pytest.raises(processes.OutOfStep) as failed:
    processes.follow(failing(TypeError("two\nlines")))
  assert str(failed.value) == r"process 0 cannot go on with the others: TypeError: two\nlines"


@pytest.mark.parametrize("where", ["open", "next", "idle"])
def test_process_0_ends_the_server_after_an_error_that_others_may_not_have(monkeypatch, where):
  said, reasons = [], []

  def everyone(value):
    said.append(value["do"])
    if where == "idle":
      raise ValueError("[gloo] closed by peer")
    return [value, False]

  monkeypatch.setattr(hosts, "everyone", everyone)
  opened = failing(MemoryError("full")) if where == "next" else lambda *_: [].pop()
  shared = processes.share(dataclasses.replace(studio(), open=opened), pytest.fail, reasons.append)
  match where:
    case "open":
      with pytest.raises(processes.OutOfStep, match="IndexError"):
        shared.open(Start("a"), lambda trace: None)
    case "next":
      session = shared.open(Start("a"), lambda trace: None)
      with pytest.raises(processes.OutOfStep, match="MemoryError: full"):
        next(session)
      assert session.switch("b").status == "dropped"
    case "idle":
      shared.idle()
  (reason,) = reasons
  before = len(said)
  # Nothing more is said, which nobody would hear, and no session begins.
  shared.idle()
  with pytest.raises(processes.OutOfStep) as later:
    shared.open(Start("b"), lambda trace: None)
  shared.end()
  assert later.value is reason
  assert len(said) == before


def test_an_error_of_all_ends_a_session_and_no_server(monkeypatch):
  monkeypatch.setattr(hosts, "everyone", lambda value: [value, False])
  opened = failing(SearchError("every candidate is NaN"))
  shared = processes.share(dataclasses.replace(studio(), open=opened), pytest.fail, pytest.fail)
  for _ in range(2):
    session = shared.open(Start("a"), lambda trace: None)
    with pytest.raises(SearchError):
      next(session)
  shared.idle()


def _session(start, on_trace, devices, told=None):
  """A session of the small search, whose candidates are divided by devices."""
  mesh = device_mesh.make_mesh({"candidate": len(devices)}, small.MODEL, small_session.ONE_BEAM, devices)
  runtime = small_session.SmallRuntime(
    dataclasses.replace(small.models(), execution=Execution(mesh=mesh)), small.params()
  )
  if mesh is not None:
    shardings = tree_shardings(mesh, "backbone", runtime.params["backbone"])
    runtime.params["backbone"] = jax.tree.map(jax.device_put, runtime.params["backbone"], shardings)
  config = dataclasses.replace(small_session.session().config, num_chunks=None, seed=start.seed)
  return Session(runtime, small_session.CLOCK, told or start.prompt, config, on_trace=on_trace)


class Keeps(KeepsNothing):
  def __init__(self):
    self.latents = []

  def add(self, shown):
    self.latents.append(shown.chunk.latents)


def _live(index):
  """Process 0 serves a client that switches once; the other follows."""
  opened, keeper = [], Keeps()
  here = dataclasses.replace(
    studio(), open=noting(lambda *start: _session(*start, jax.devices()), opened), keeper=lambda start: keeper
  )
  if hosts.is_first():
    asyncio.run(_client(processes.share(here, lambda: None, pytest.fail)))
    np.save("latents.npy", np.stack(keeper.latents))
  else:
    processes.follow(here.open)
  opened[-1].timeline.save("timeline.json")


async def _client(shared):
  server = Server(shared, lead=0.5)
  async with TestClient(TestServer(server.app)) as http:
    client = Client(await http.ws_connect("/v1/realtime/video"))
    # Nothing happens for a while; the other waits.
    await asyncio.sleep(1.5)
    await client.say("session.start", prompt="a", seed=5)
    await client.hear_until("video.chunk_metadata")
    await client.switch("b")
    await client.hear_until("session.interaction.applied")
    await client.hear_until("video.chunk_metadata")
    await client.say("session.stop")
    await client.hear_until("session.done")


# Slow: two processes import, compile and join.
@pytest.mark.slow
def test_two_processes_make_one_session(tmp_path):
  found, folders = hosts_test.run_work(tmp_path, 2, _live)
  assert [result.code for result in found] == [0, 0], found
  timelines = [timeline.load(folder / "timeline.json") for folder in folders]
  assert timelines[0] == timelines[1]
  assert [entry.prompt for entry in timelines[0].entries] == ["a", "b"]
  # And it is the session that one device makes when it is told the same.
  latents = np.load(folders[0] / "latents.npy")
  alone = _session(Start("a", seed=5), lambda trace: None, jax.devices()[:1], timelines[0])
  expected = np.stack([next(alone).latents for _ in latents])
  np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5)


def _apart(index):
  """Process 1 has an error of its own in the second chunk. What process 0 tells its client comes into a file."""
  if not hosts.is_first():
    opened = lambda *start: fails(_session(*start, jax.devices()), IndexError("none"), 1)
    try:
      processes.follow(opened)
    except processes.OutOfStep as error:
      print(f"error: {error}", file=sys.stderr)
      return 3
    return 0
  here = dataclasses.replace(studio(), open=lambda *start: _session(*start, jax.devices()))
  ending = serve.Ending()
  reason = asyncio.run(_client_of_a_broken(processes.share(here, pytest.fail, ending.put), ending))
  print(f"error: {reason}", file=sys.stderr)
  return 3


async def _client_of_a_broken(shared, ending):
  server = Server(shared, lead=0.5)
  async with TestClient(TestServer(server.app)) as http:
    client = Client(await http.ws_connect("/v1/realtime/video"))
    await client.say("session.start", prompt="a", seed=5)
    error = await client.hear_until("error")
    done = await client.hear_until("session.done")
    pathlib.Path("told.json").write_text(json.dumps([error, done]))
    reason = await ending.get()
    await server.close(save=True)
    return reason


# Slow: two processes import, compile and join, and one waits for the other that has gone.
@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
  found, folders = hosts_test.run_work(tmp_path, 2, _apart)
  assert [result.code for result in found] == [3, 3], found
  last = [result.stderr.strip().splitlines()[-1] for result in found]
  assert last[1] == "error: process 1 cannot go on with the others: IndexError: none"
  assert last[0].startswith("error: process 0 cannot go on with the others: ")
  error, done = json.loads((folders[0] / "told.json").read_text())
  assert error["message"] == last[0].removeprefix("error: ")
  assert (done["reason"], done["chunks"]) == ("failed", 1)
