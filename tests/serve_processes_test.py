"""A live server of several processes: all of them apply the same events before the same chunk."""

import asyncio
import dataclasses
import json
import os
import queue
import signal
import threading

import jax
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from streamt1_jax.cli import serve
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
  shared = processes.share(dataclasses.replace(usual, open=noting(usual.open, first)), pytest.fail)
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
    came = serve.Came()
    for number in before:
      came.put(number)
    shared = processes.share(studio(), lambda: came.put(signal.SIGTERM))
    shared.idle()
    shared.end()
    return await came.get()

  # Nothing but the one that waits hears of it: a signal to this process would end it at the second time.
  monkeypatch.setattr(os, "kill", pytest.fail)
  assert asyncio.run(first_of()) == signal.SIGTERM
  assert asyncio.run(first_of(signal.SIGINT)) == signal.SIGINT


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
    asyncio.run(_client(processes.share(here, lambda: None)))
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
