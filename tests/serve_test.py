"""The live server over real websockets: who steers, who waits, what comes, and what nobody can break."""

import asyncio
import dataclasses
import functools
import importlib.util
import io
import json
import pathlib
import threading
import time
import types

import av
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.measuring import live_viewer
from streamt1_jax.receipts import Receipt
from streamt1_jax.serve import app, hub
from streamt1_jax.serve.control import CLOSED, Control
from streamt1_jax.serve.doors import HEADERS
from streamt1_jax.serve.fragments import Fragment
from streamt1_jax.serve.numbers import Numbers
from streamt1_jax.serve.pace import Pace
from streamt1_jax.serve.protocol import Start
from streamt1_jax.serve.studio import Item, KeepsNothing, Saved, Studio
from streamt1_jax.serve.take import Take
from streamt1_jax.serve.viewers import Viewer
from tests import small_session
from tests.live_server import PATIENCE, live, pictures, studio

_CLIENT = pathlib.Path(__file__).resolve().parents[1] / "docs" / "live_client.py"


def decoded(content: bytes) -> list[tuple[float, np.ndarray]]:
  """Time in seconds and picture of every frame."""
  with av.open(io.BytesIO(content)) as container:
    return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def brisk(**changes) -> Studio:
  """A studio whose chunks last a quarter of a second, for tests in which the server waits for a viewer's clock."""
  return studio(fps=12, **changes)


def test_a_session_from_its_start_to_its_end():
  async def run():
    async with live(studio(num_chunks=4)) as server:
      client = await server.client()
      assert (await client.hear())["type"] == "session.hello"
      await client.say("session.start", prompt="a", search="one", seed=5)
      done = await client.hear_until("session.done")
      return client, done, await server.metric("chunks_total")

  client, done, counted = asyncio.run(run())
  expected = list(small_session.session("a", num_chunks=4, seed=5))
  assert done["reason"] == "over"
  assert done["chunks"] == counted == 4
  start, chunks = client.of("video.start"), client.of("video.chunk_metadata")
  assert start[0]["config"] == {"fps": 3, "seed": 5, "search": "one", "beam_size": 2, "top_k": 1, "given_chunks": 0}
  assert [chunk["generation_chunk_index"] for chunk in chunks] == [0, 1, 2, 3]
  assert [chunk["has_init"] for chunk in chunks] == [True, False, False, False]
  # The video that came is the video that the session makes without a server.
  frames = decoded(b"".join(chunk["binary"] for chunk in chunks))
  np.testing.assert_allclose([time for time, _ in frames], np.arange(12) / 3)
  made = np.concatenate([pictures(chunk.frames) for chunk in expected]).repeat(8, axis=1).repeat(8, axis=2)
  difference = np.abs(np.stack([picture for _, picture in frames]).astype(int) - made)
  # H.264 halves the resolution of colour; blocks of one colour keep theirs.
  assert difference.mean() < 6
  # And the candidates are those of its traces.
  judged = [event for event in client.of("search.candidates") if event["state"] == "judged"]
  assert [event["generation_chunk_index"] for event in judged] == [0, 1, 2, 3]
  for event, chunk, sent in zip(judged, expected, chunks, strict=True):
    scores = chunk.trace.candidates
    for candidate in event["candidates"]:
      parent, place = divmod(candidate["candidate"], 2)
      assert candidate["short"] == float(scores.short[parent, place])
      assert candidate["hybrid"] == float(scores.hybrid[parent, place])
    assert event["survivors"] == chunk.trace.survivor.tolist() == [sent["winner"]]


def test_a_prompt_takes_effect_between_two_chunks():
  async def run():
    async with live(brisk(), lead=0.125) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      await client.switch("b", "my id")
      applied = await client.hear_until("session.interaction.applied")
      first = await client.hear_until("video.chunk_metadata")
      await client.say("session.stop")
      await client.hear_until("session.done")
      return client, applied, first

  client, applied, first = asyncio.run(run())
  assert client.of("session.interaction.queued")[0]["event_id"] == applied["event_id"] == "my id"
  assert first["generation_chunk_index"] == applied["generation_chunk_index"]
  assert first["prompt"] == "b"
  assert first["started_event_ids"] == ["my id"]


def test_pause_stops_the_video_and_resume_goes_on():
  async def run():
    async with live() as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      await client.say("session.pause")
      await client.hear_until("session.paused")
      # A client that comes now is told so too.
      await (await server.client()).hear_until("session.paused")
      # A chunk that had been begun still comes.
      await asyncio.sleep(0.5)
      before = await server.metric("chunks_total")
      await asyncio.sleep(0.3)
      after = await server.metric("chunks_total")
      await client.say("session.resume")
      await client.hear_until("session.resumed")
      while await server.metric("chunks_total") == after:
        await asyncio.sleep(0.01)
      return before, after

  before, after = asyncio.run(run())
  assert before == after


def test_one_session_at_a_time_and_others_see_their_place():
  async def run():
    async with live() as server:
      one, two, three, looks = [await server.client() for _ in range(4)]
      await one.say("session.start", prompt="a")
      await one.hear_until("video.chunk_metadata")
      await two.say("session.start", prompt="b")
      assert (await two.hear_until("session.queued"))["place"] == 1
      await three.say("session.start", prompt="c")
      assert (await three.hear_until("session.queued"))["place"] == 2
      # A client that waits or looks cannot steer.
      for other in (two, looks):
        await other.switch("mine")
        assert (await other.hear_until("error"))["code"] == "not_yours"
      # A client that vanishes frees the session.
      await one.socket.close()
      assert (await three.hear_until("session.queued"))["place"] == 1
      await two.hear_until("session.accepted")
      assert (await two.hear_until("video.start"))["prompt"] == "b"
      await two.say("session.stop")
      await three.hear_until("session.accepted")
      assert (await looks.hear_until("video.start"))["prompt"] in ("a", "b")
      while (await looks.hear_until("video.start"))["prompt"] != "c":
        pass
      assert (await looks.hear_until("video.chunk_metadata"))["has_init"]

  asyncio.run(run())


def test_a_first_chunk_that_waits_for_a_compiler_is_counted_apart():
  async def run():
    async with live(studio(num_chunks=2)) as server:
      client, counts = await server.client(), []
      for _ in range(2):
        await client.say("session.start", prompt="a")
        await client.hear_until("session.done")
        names = ("cold_first_chunk_seconds_count", "first_chunk_seconds_count")
        counts.append([await server.metric(name) for name in names])
      return counts, [event["warm"] for event in client.of("session.accepted")]

  assert asyncio.run(run()) == ([[1, 0], [1, 1]], [False, True])


def test_more_than_there_is_room_for_is_refused(monkeypatch):
  assert (hub.MOST_VIEWERS, hub.MOST_WAITING, hub.MOST_PENDING) == (256, 32, 8)
  for name in ("MOST_VIEWERS", "MOST_WAITING"):
    monkeypatch.setattr(hub, name, {"MOST_VIEWERS": 4, "MOST_WAITING": 2}[name])

  async def run():
    async with live(brisk(), lead=0.125) as server:
      clients = [await server.client() for _ in range(4)]
      for client in clients:
        await client.say("session.start", prompt="a")
        await client.hear_of("session.accepted", "session.queued", "error")
      # The first steers, two wait; the last one may look all the same.
      refused = clients[3].of("error")
      await clients[3].hear_until("video.chunk_metadata")
      late = await server.client()
      told, closed = await late.hear(), await late.socket.receive()
      # Who leaves makes room.
      await clients[2].socket.close()
      await clients[3].say("session.start", prompt="b")
      assert (await clients[3].hear_until("session.queued"))["place"] == 2
      while await server.metric("viewers") > 3:
        await asyncio.sleep(0.01)
      assert (await (await server.client()).hear())["type"] == "session.hello"
      return refused, told, closed

  refused, told, closed = asyncio.run(run())
  assert [(error["code"], error["message"]) for error in refused] == [("busy", "2 clients wait already")]
  assert (told["type"], told["code"], told["message"]) == ("error", "busy", "there are 4 viewers already")
  assert closed.data == 1013


def test_prompts_that_are_being_read_have_a_bound():
  async def run():
    go = threading.Event()

    def read(session, prompt):
      assert go.wait(PATIENCE)
      return type(session).switch(session, prompt)

    chosen = brisk()

    def open_slow(start, on_trace):
      session = chosen.open(start, on_trace)
      session.switch = functools.partial(read, session)
      return session

    async with live(dataclasses.replace(chosen, open=open_slow), rate=(1e9, 1e9), lead=0.125) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      for number in range(hub.MOST_PENDING + 1):
        await client.switch("b", str(number))
      error = await client.hear_until("error")
      go.set()
      await client.hear_until("session.interaction.applied")
      return error

  error = asyncio.run(run())
  assert (error["code"], error["event_id"]) == ("rate", "8")


def test_who_comes_late_can_play_from_the_next_chunk():
  async def run():
    async with live(brisk(), lead=0.0) as server:
      one = await server.client()
      await one.say("session.start", prompt="a")
      for _ in range(3):
        await one.hear_until("video.chunk_metadata")
      late = await server.client()
      return await late.hear_until("video.start"), await late.hear_until("video.chunk_metadata")

  start, chunk = asyncio.run(run())
  assert start["prompt"] == "a"
  assert chunk["generation_chunk_index"] >= 3
  times = [time for time, _ in decoded(chunk["binary"])]
  np.testing.assert_allclose(times, 0.25 * chunk["generation_chunk_index"] + np.arange(3) / 12)


def test_a_session_that_fails_is_told_in_one_line_and_the_next_begins():
  async def run():
    async with live(studio(num_chunks=1)) as server:
      client = await server.client()
      await client.say("session.start", prompt="fails")
      error = await client.hear_until("error")
      assert (await client.hear_until("session.done"))["reason"] == "failed"
      await client.say("session.start", prompt="a")
      assert (await client.hear_until("session.done"))["reason"] == "over"
      await client.say("session.start", prompt="a", search="unknown")
      return error, await client.hear_until("error")

  error, unknown = asyncio.run(run())
  assert error["message"] == r"this prompt\nfails"
  assert unknown["message"] == "search must be one of one, two, got 'unknown'"


def test_the_length_of_a_session_is_limited():
  async def run():
    async with live(most_seconds=0.2) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      return await client.hear_until("session.done")

  assert asyncio.run(run())["reason"] == "time"


def test_doors():
  async def run():
    async with live(token="open sesame") as server:
      get = server.http.get
      assert (await get("/")).status == 401
      assert (await get("/metrics")).status == 401
      assert (await get("/", params={"token": "open sesamE"})).status == 401
      assert (await get("/healthz")).status == 200
      assert (await get("/metrics", headers={"Authorization": "Bearer open sesame"})).status == 200
      page = await get("/", params={"token": "open sesame"})
      assert page.status == 200
      assert "token" not in str(page.url)
      assert dict(page.headers).items() >= HEADERS.items()
      # The cookie opens the rest, also the websocket; a page of another origin stays outside.
      client = await server.client()
      assert (await client.hear())["type"] == "session.hello"
      foreign = await get("/v1/realtime/video", headers={"Origin": "http://elsewhere.example"})
      assert foreign.status == 403
      assert (await get("/", headers={"Origin": "http://["})).status == 403
    async with live() as server:
      assert (await server.http.get("/", headers={"Host": "elsewhere.example"})).status == 403
      assert (await server.http.get("/../serve/app.py")).status == 404

  asyncio.run(run())


def test_a_scripted_viewer():
  async def run():
    async with live(brisk(), lead=0.125) as server:
      address = str(server.http.make_url("/"))
      return await live_viewer.watch(address, "one", "abc", seconds=0, switch_every=0, least_switches=2)

  seen = asyncio.run(run())
  report = seen.report()
  assert report["chunks"] >= 3
  # What was there is played first.
  assert report["switches"] == 2
  assert 0 < report["switch_median"] <= report["switch_worst"]
  assert seen.arrivals == sorted(seen.arrivals)
  assert seen.arrivals[0] == report["first_chunk"] > 0
  assert seen.media == [0.25] * (report["chunks"] - 1)
  assert report["gap_p50"] <= report["gap_p95"] <= report["gap_p99"]


def test_the_example_client(tmp_path, capsys):
  spec = importlib.util.spec_from_file_location("live_client", _CLIENT)
  client = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(client)

  async def run():
    async with live(brisk(), lead=0.125) as server:
      url = str(server.http.make_url("")).rstrip("/")
      await client.record(url, str(tmp_path / "video.mp4"), "a", "b", chunks=4)

  asyncio.run(run())
  frames = decoded((tmp_path / "video.mp4").read_bytes())
  assert len(frames) % 3 == 0
  assert len(frames) >= 12
  assert "session.interaction.queued" in capsys.readouterr().out


def test_a_slow_viewer_loses_previews_first_and_then_chunks():
  async def run():
    slow = Viewer(1, Numbers())
    fragment = Fragment(b"init", b"media", 0, 1)
    for index in range(10):
      slow.put(Item({"type": "search.candidates", "chunk": index}, "preview"))
      slow.put(Item({"type": "video.chunk_metadata", "chunk": index}, "media", fragment))
    slow.put(Item({"type": "session.done"}))
    slow.close()
    return [(json.loads(frame.text), frame.binary) async for frame in slow.frames()]

  got = asyncio.run(run())
  assert [event["chunk"] for event, _ in got if event["type"] == "search.candidates"] == [0, 1]
  assert [event["chunk"] for event, _ in got if event["type"] == "video.chunk_metadata"] == [0, 1, 2, 3, 4, 5]
  assert [binary for _, binary in got if binary] == [b"initmedia", *[b"media"] * 5]
  assert got[-1][0]["type"] == "session.done"


def test_previews_that_wait_have_a_bound_although_no_chunk_is_settled():
  slow = Viewer(1, Numbers())
  for index in range(100):
    slow.put(Item({"type": "search.candidates", "chunk": index}, "preview"))
  slow.close()

  async def run():
    return [json.loads(frame.text)["chunk"] async for frame in slow.frames()]

  assert asyncio.run(run()) == [0, 1, 2, 3]


async def joined(server, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
  """A websocket without a client that answers by itself; `limit` bytes are read before anybody asks for them."""
  reader, writer = await asyncio.open_connection("127.0.0.1", server.http.port, limit=limit)
  key = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
  writer.write(f"GET /v1/realtime/video HTTP/1.1\r\nHost: localhost\r\n{key}{'A' * 22}==\r\n\r\n".encode())
  while await server.metric("viewers") != 1:
    await asyncio.sleep(0.01)
  return reader, writer


def test_who_takes_nothing_is_cut_off(monkeypatch):
  monkeypatch.setattr(app, "_MOST_SENDING", 0.2)

  async def run():
    async with live() as server:
      _, writer = await joined(server, 1)
      # More than all buffers between the two hold.
      server.server.hub.tell(Item({"type": "video.chunk_metadata"}, "media", Fragment(b"", bytes(1 << 26), 0, 1)))
      while await server.metric("viewers") != 0:
        await asyncio.sleep(0.01)
      writer.close()

  asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_ping_may_be_answered_as_late_as_a_frame_may_be_taken(monkeypatch):
  # Sixty times as fast as they are.
  for name in ("_MOST_SENDING", "_HEARTBEAT"):
    monkeypatch.setattr(app, name, getattr(app, name) / 60)

  async def run():
    async with live() as server:
      reader, writer = await joined(server, 1 << 16)
      await reader.readuntil(b"\x89\x00")
      asked = time.monotonic()
      await reader.read()
      writer.close()
      return time.monotonic() - asked

  # The ping may be read a little late. A heartbeat that is too short by half leaves half the time.
  assert asyncio.run(asyncio.wait_for(run(), PATIENCE)) >= 0.8 * app._MOST_SENDING


class Broken(KeepsNothing):
  """A disk that is full when a save is prepared, or when it is written."""

  def __init__(self, early: bool):
    self.early = early

  def prepare_save(self, session):
    return self.fail() if self.early else self.fail

  def fail(self):
    raise RuntimeError("no space\nleft")

  def close(self):
    raise OSError("no space left")


@pytest.mark.parametrize("early", [True, False])
def test_a_save_that_fails_ends_no_session_and_a_full_disk_does_not_end_the_server(early):
  async def run():
    async with live(brisk(num_chunks=160, keeper=lambda start: Broken(early)), lead=0.075) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      await client.say("session.save")
      error = await client.hear_until("error")
      await client.hear_until("video.chunk_metadata")
      await client.say("session.stop")
      assert (await client.hear_until("session.done"))["reason"] == "failed"
      await client.say("session.start", prompt="b")
      await client.hear_until("video.chunk_metadata")
      return error

  error = asyncio.run(run())
  assert error["code"] == "not_saved"
  assert error["message"] == r"it cannot be saved: no space\nleft"


class Slow(KeepsNothing):
  """A disk that takes its time: it writes when it is told to. It notes what was shown when each save began."""

  def __init__(self):
    self.go, self.shown, self.saves, self.closed = threading.Semaphore(0), 0, [], False

  def add(self, shown):
    self.shown += 1

  def prepare_save(self, session):
    self.saves.append(self.shown)
    name = f"save {len(self.saves)}"

    def write():
      assert self.go.acquire(timeout=PATIENCE)
      assert not self.closed
      return Saved(name, "no report")

    return write

  def close(self):
    self.closed = True


def test_the_video_goes_on_while_a_save_is_written(monkeypatch):
  monkeypatch.setattr("streamt1_jax.serve.take.IDLE", 0.05)

  async def run():
    disk, idle = Slow(), []
    chosen = brisk(keeper=lambda start: disk, idle=lambda: idle.append(len(disk.saves)))
    async with live(chosen, lead=0.075) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      await client.say("session.save")
      while not disk.saves:
        await client.hear_until("video.chunk_metadata")
      # The second waits for the first.
      await client.say("session.save")
      for _ in range(4):
        await client.hear_until("video.chunk_metadata")
      assert len(disk.saves) == 1
      disk.go.release()
      first = await client.hear_until("session.saved")
      while len(disk.saves) == 1:
        await client.hear_until("video.chunk_metadata")
      # A session that is stopped is over when its save is written.
      await client.say("session.stop")
      with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.hear_until("session.done"), 0.2)
      # Other processes hear from this one meanwhile.
      before = len(idle)
      while len(idle) == before:
        await asyncio.sleep(0.01)
      disk.go.release()
      await client.hear_of("session.done")
      return disk, first, client.of("session.saved")[1]

  disk, first, second = asyncio.run(run())
  assert (first["folder"], first["chunks"]) == ("save 1", disk.saves[0])
  assert first["no_report"] == "no report"
  assert (second["folder"], second["chunks"]) == ("save 2", disk.saves[1])
  assert disk.saves[1] >= disk.saves[0] + 4
  assert disk.closed


def test_a_server_that_ends_writes_its_saves_first():
  disk = Slow()
  disk.go.release(2)

  async def run():
    async with live(brisk(keeper=lambda start: disk), lead=0.075) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      return await server.server.close(save=True)

  assert asyncio.run(run()) == f"save {len(disk.saves)}"
  assert disk.saves[-1] == disk.shown
  assert disk.closed


def test_scores_that_are_no_numbers_are_null():
  async def run():
    usual = studio(num_chunks=1)
    broken = lambda trace: trace._replace(
      candidates=trace.candidates._replace(short=np.full_like(trace.candidates.short, np.nan))
    )
    opened = lambda start, on_trace: usual.open(start, lambda trace: on_trace(broken(trace)))
    async with live(dataclasses.replace(usual, open=opened)) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("session.done")
      return client

  judged = [event for event in asyncio.run(run()).of("search.candidates") if event["state"] == "judged"]
  assert [candidate["short"] for candidate in judged[0]["candidates"]] == [None, None]


def test_what_beams_shared_last_is_not_poured_on_a_slow_viewer():
  """Every chunk that is shown comes after a look at whether the viewer can take it."""
  seen = []

  def hold() -> bool:
    seen.append("look")
    return len(seen) % 2 == 0

  def tell(item: Item) -> None:
    seen.append("judged" if item.event.get("state") == "judged" else item.kind)
    if seen.count("judged") - seen.count("media") == 3:
      control.stop()

  control = Control("session-1", Start("a", "two"))
  Take(studio(), control, tell, Numbers(), most_seconds=60, lead=1e9, hold=hold).run()
  shown = [kind for kind in seen if kind in ("look", "media")]
  assert shown.count("media") == seen.count("judged") >= 3
  assert ["media", "media"] not in [shown[at : at + 2] for at in range(len(shown))]


def test_the_time_to_make_a_chunk_has_all_of_it_but_no_wait(monkeypatch):
  """Every part takes a known time of a clock that nothing else moves."""
  now, told, numbers = [0.0], [], Numbers()
  monkeypatch.setattr("streamt1_jax.serve.take.time", types.SimpleNamespace(monotonic=lambda: now[0]))

  def passing(seconds, work=lambda *_: None):
    def done(*arguments):
      now[0] += seconds
      return work(*arguments)

    return done

  keeper = KeepsNothing()
  keeper.add = passing(0.25)
  usual = studio(num_chunks=2)

  def open_session(start, on_trace):
    session = usual.open(start, on_trace)
    session._step = passing(1.0, session._step)
    return session

  chosen = dataclasses.replace(usual, open=open_session, keeper=lambda start: keeper)
  control = Control("session-1", Start("a"))
  made = Take(chosen, control, told.append, numbers, most_seconds=60, lead=1e9, hold=lambda: False)
  made.film.add = passing(0.5, made.film.add)
  made.run()
  chunks = [item.event for item in told if item.kind == "media"]
  assert [chunk["making_seconds"] for chunk in chunks] == [1.75, 1.75]
  assert numbers["making_seconds_total"] == numbers.quantiles("chunk_seconds").total == 3.5


def test_searches_are_compiled_before_anybody_asks_the_default_first():
  opened = []

  def noted(start, on_trace):
    opened.append(start.search)
    return usual.open(start, on_trace)

  usual = studio()

  async def run():
    async with live(dataclasses.replace(usual, open=noted), warm_up=("a", "b")) as server:
      client = await server.client()
      if not (await client.hear())["ready"]:
        await client.hear_until("server.ready")
      assert opened == ["one", "two"]
      assert (await server.http.get("/healthz")).status == 200
      await client.say("session.start", prompt="a", search="two")
      return (await client.hear_until("session.accepted"))["warm"]

  assert asyncio.run(run())


def test_a_search_that_was_not_compiled_is_told_as_such_until_it_has_run():
  async def run():
    async with live(studio(num_chunks=4)) as server:
      client, told = await server.client(), []
      for _ in range(2):
        await client.say("session.start", prompt="a")
        told.append((await client.hear_until("session.accepted"))["warm"])
        await client.hear_until("session.done")
      return told

  assert asyncio.run(run()) == [False, True]


def test_nobody_hears_what_became_of_a_prompt_before_it_is_queued():
  control, answered = Control("session-1", Start("a")), []
  session = small_session.session()
  # The thread of the search may be so fast.
  session.switch = lambda prompt: Receipt(prompt, 0).decide("applied", 1)
  control.attach(session)
  control.switch("b", "1", lambda: answered.append(control.take_decided()))
  assert answered == [[]]
  assert [asked.event_id for asked in control.take_decided()] == ["1"]


def test_a_prompt_that_is_read_for_longer_than_the_session_is_refused():
  control, session = Control("session-1", Start("a")), small_session.session()
  control.attach(session)
  with pytest.raises(ConfigError, match="over"):
    control.switch("b", "1", lambda: control.attach(None))
  assert control.take_decided() == []


def test_a_prompt_before_a_chunk_that_fails_is_answered():
  told, control = [], Control("session-1", Start("a"))

  def open_session(start, on_trace):
    session = small_session.session()
    session._steps = map(lambda number: 1 / number, [0])
    control.attach(session)
    control.switch("b", "1")
    return session

  chosen = dataclasses.replace(studio(), open=open_session)
  take = Take(chosen, control, told.append, Numbers(), most_seconds=60, lead=1e9, hold=lambda: False)
  with pytest.raises(ZeroDivisionError):
    take.run()
  take.close()
  (answer,) = [item.event for item in told if item.event["type"] == "session.interaction.dropped"]
  assert answer["event_id"] == "1"


def test_a_server_that_ends_waits_for_nobody():
  control = Control("session-1", Start("a"))
  for reason, expected in (("stopped", "stopped"), ("time", "stopped"), (CLOSED, CLOSED), ("stopped", CLOSED)):
    control.stop(reason)
    assert control.stopped == expected


def test_the_clock_of_a_session_stands_still_while_it_is_paused():
  control = Control("session-1", Start("a"))
  began, at = time.monotonic(), control.clock()
  for _ in range(2):
    control.pause()
    time.sleep(0.02)
    control.pause()
    time.sleep(0.02)
    control.resume()
    control.resume()
  passed = control.clock() - at
  assert time.monotonic() - began - passed >= 0.08


def test_pace():
  now = 0.0
  pace = Pace(1.0, lambda: now)
  assert pace.wait < 0
  assert pace.add(0.5)
  now = 0.25
  assert pace.ahead == 0.25
  assert pace.add(2.0)
  # Two seconds and a quarter are ready, and one may be.
  assert pace.wait == 1.25
  # All was played a second ago.
  now = 2.5 + 1.0
  assert not pace.add(0.5)
  assert pace.stood_still == 1.0
  assert pace.ahead == 0.5
