"""`streamt1 serve`: what it refuses before anything is loaded, and saves that can be made again."""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.parse

import aiohttp
import numpy as np
import pytest

from streamt1_jax.cli import command, live_result, results, search_flags, serve
from streamt1_jax.cli import generate as generating
from streamt1_jax.execution import Execution
from streamt1_jax.io import part_files
from streamt1_jax.parallel.mesh import make_mesh
from streamt1_jax.report import account
from streamt1_jax.serve import presets
from tests import command_line, trace_schema
from tests.command_line import call, generate, save_model, small_model
from tests.live_server import PATIENCE, Client, live
from tests.searched_results import Searched
from tests.trace_schema import JUDGES

RED, BLUE = "a red circle moves left over a dark blue background", "a blue square moves up over a gray background"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


def refused(folder, *arguments) -> str:
  """The one line that the command ends with."""
  done = call("serve", folder, *arguments, package="streamt1_jax.cli")
  assert done.code == command.BAD_INPUT
  assert done.stderr.count("\n") == 1
  return done.stderr


def test_bad_input(tmp_path, checkpoint):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert f"--port={port}" in refused(tmp_path, f"--port={port}")
  assert "--host=no.such.host.invalid" in refused(tmp_path, "--host=no.such.host.invalid")
  assert "missing" in refused(tmp_path, "--port=0", "--checkpoint=missing")
  assert "--token" in refused(tmp_path, "--port=0", "--token=")
  assert "particles" in refused(tmp_path, "--search=3x3")
  (tmp_path / "file").write_text("")
  assert "--output_dir=file" in refused(tmp_path, "--port=0", f"--checkpoint={checkpoint}", "--output_dir=file")


def test_a_checkpoint_that_cannot_stream(tmp_path):
  config = json.loads((save_model(tmp_path / "model") / "config.json").read_text())
  config["model"]["codec"] = None
  (tmp_path / "model/config.json").write_text(json.dumps(config))
  assert "model" in refused(tmp_path, "--port=0", "--checkpoint=model")


def test_a_default_search_that_does_not_fit_is_refused(tmp_path, checkpoint):
  given = [f"--checkpoint={checkpoint}", "--mesh=data:1", "--device_memory=0.0006"]
  line = refused(tmp_path, "--port=0", *given)
  assert line.startswith("error: --search=1x4: this search takes about")
  remedy = re.search(r"((?:--\S+ )+)would fit", line)[1].split()
  assert remedy == ["--dtype=bfloat16"]
  command.parse(serve.define_flags, remedy)


@pytest.mark.parametrize(
  ("gib", "names", "decoding"),
  [
    # What holds four beams holds all; in between two beams are decoded in turn, which one beam need not.
    ("0.01", ["1x4", "2x2", "particles", "plain"], "together"),
    ("0.0013", ["1x4", "2x2", "plain"], "in_turn"),
    ("0.0011", ["1x4", "plain"], "together"),
  ],
)
def test_other_searches_that_do_not_fit_are_not_offered(checkpoint, capsys, gib, names, decoding):
  values = command.parse(serve.define_flags, [f"--device_memory={gib}"])
  searches, model = serve.find_searches(small_model()), small_model()
  found = serve.plan_searches(values, results.epath.Path(checkpoint), model, searches, None)
  assert (list(found[0]), found[1]) == (names, decoding)
  assert ("not offered" in capsys.readouterr().err) == (len(names) < len(searches))


def test_others_need_a_token():
  values = command.parse(serve.define_flags, ["--host=0.0.0.0"])
  made = serve.token_of(values), serve.token_of(values)
  assert made[0] != made[1]
  assert min(map(len, made)) >= 32
  assert serve.token_of(command.parse(serve.define_flags, [])) is None
  assert serve.token_of(command.parse(serve.define_flags, ["--token=open"])) == "open"


def test_the_address_holds_any_token():
  address = urllib.parse.urlsplit(serve.address_of("::1", 80, "a&b#c+d%20 /"))
  assert (address.hostname, address.port, address.path) == ("::1", 80, "/")
  assert urllib.parse.parse_qs(address.query) == {"token": ["a&b#c+d%20 /"]}


def test_only_searches_are_offered_that_the_devices_divide():
  searches = serve.find_searches(small_model())
  mesh = make_mesh({"candidate": 4}, small_model(), searches["1x4"])
  assert list(serve.offered(searches, Execution())) == list(serve.offered(searches, Execution(mesh))) == list(searches)
  # Two candidates of each beam cannot be shared by four devices, nor can one.
  in_turn = Execution(mesh, decoding="in_turn")
  divided = [name for name, search in searches.items() if search.beam_size % 4 == 0]
  assert "1x4" in divided
  assert list(serve.offered(searches, in_turn)) == divided != list(searches)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_flags_ask_for_the_search_of_their_name(name):
  values = command.parse(generating.define_flags, ["--prompt=a", *presets.PRESETS[name].flags])
  assert search_flags.search_config(values, small_model()) == presets.PRESETS[name].search(small_model())


class Late:
  """Keeps what `keeper` keeps, and writes a save when `CHUNKS` more chunks were shown."""

  CHUNKS = 2

  def __init__(self, keeper):
    self.keeper, self.later, self.asked, self.go = keeper, [], False, threading.Event()

  def add(self, shown):
    self.keeper.add(shown)
    if self.asked and len(self.later) < self.CHUNKS:
      self.later.append(shown.chunk.latents)
    if len(self.later) == self.CHUNKS:
      self.go.set()

  def prepare_save(self, session):
    write, self.asked = self.keeper.prepare_save(session), True

    def write_late():
      assert self.go.wait(PATIENCE)
      return write()

    return write_late

  def close(self):
    self.keeper.close()


@contextlib.contextmanager
def started(folder, checkpoint, *arguments):
  """A server in a process of its own, and its address."""
  settings = command_line.quick_compilation(folder / "compiled")
  given = ["--port=0", f"--checkpoint={checkpoint}", "--output_dir=out", "--search=plain", *arguments]
  process = command_line.start_function(folder, _serve, given, jax_settings=settings)
  try:
    wait_for(process, folder / ".stdout", "http")
    yield process, (folder / ".stdout").read_text().strip()
  finally:
    process.kill()
    process.join()


def _serve(arguments):
  raise SystemExit(serve.main(arguments))


def wait_for(process, file, words):
  deadline = time.monotonic() + PATIENCE
  while not file.exists() or words not in file.read_text():
    assert process.is_alive()
    assert time.monotonic() < deadline
    time.sleep(0.05)


# Slow: a process of its own imports and compiles.
@pytest.mark.slow
def test_sigterm_saves_the_session(tmp_path, checkpoint):
  async def run(process, address):
    async with aiohttp.ClientSession() as web, web.ws_connect(f"{address}v1/realtime/video") as socket:
      client = Client(socket)
      await client.say("session.start", prompt=RED)
      await client.hear_until("video.chunk_metadata")
      os.kill(process.pid, signal.SIGTERM)
      saved = await client.hear_of("session.saved", "error")
      assert (await client.hear_until("session.done"))["reason"] == "closed"
      return saved

  with started(tmp_path, checkpoint, "--warm_up=false") as (process, address):
    saved = asyncio.run(run(process, address))
    process.join(PATIENCE)
    result = command_line.result_of(process.exitcode, tmp_path)
  assert result.code == command.TERMINATED, result
  assert f"the session is saved in {saved['folder']}\n" in result.stderr
  (folder,) = (tmp_path / "out").iterdir()
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["length"]["chunks"] == saved["chunks"] >= 1
  assert part_files.describe_files(results.epath.Path(folder)).items() >= manifest["files"].items()


# Slow: a process of its own imports.
@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(tmp_path, checkpoint):
  with started(tmp_path, checkpoint) as (process, _):
    # It compiles, which takes longer than the rest of this test.
    os.kill(process.pid, signal.SIGTERM)
    wait_for(process, tmp_path / ".stderr", "once more")
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_a_save_without_a_page_says_why(tmp_path):
  folder = Searched(chunks=2, routes={}).write(tmp_path / "result")
  assert live_result.write_report(results.epath.Path(folder)) is None
  trace = json.loads((folder / "trace.json").read_text())
  (folder / "trace.json").write_text(json.dumps(trace | {"given_chunks": 10**6, "chunks": []}))
  told = live_result.write_report(results.epath.Path(folder))
  assert told == "trace.json has 1000000 chunks, of up to 0 candidates; a report is of at most 100000 chunks of 8000"


# Slow: it compiles a search with pictures of all candidates, its switch, and the same search without them.
@pytest.mark.slow
def test_a_save_is_a_result_that_can_be_made_again(tmp_path, checkpoint):
  flags = [f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / 'out'}", "--mesh=data:1"]
  values = command.parse(serve.define_flags, flags)
  pipeline, searches = serve.load(values)
  studio, keepers = serve.make_studio(pipeline, searches, values), []

  def keep(start):
    keepers.append(Late(studio.keeper(start)))
    return keepers[-1]

  async def run():
    async with live(dataclasses.replace(studio, keeper=keep), lead=0.3) as server:
      client = await server.client()
      await client.say("session.start", prompt=RED, seed=3)
      await client.hear_until("video.chunk_metadata")
      await client.switch(BLUE)
      await client.hear_until("session.interaction.applied")
      await client.hear_until("video.chunk_metadata")
      await client.say("session.save")
      saved = await client.hear_of("session.saved", "error")
      assert saved["type"] == "session.saved", saved
      return client, results.epath.Path(saved["folder"])

  client, folder = asyncio.run(run())
  assert folder.parent == tmp_path / "out"
  manifest = json.loads((folder / "manifest.json").read_text())
  chunks = manifest["length"]["chunks"]
  assert chunks >= 2
  assert [segment["prompt"] for segment in manifest["segments"]] == [RED, BLUE]
  # Every candidate was shown as it lies in the trace, with a picture.
  trace = account.read(folder).trace
  judged = [event for event in client.of("search.candidates") if event["state"] == "judged"]
  for told, kept in zip(judged, trace["chunks"]):
    assert [each["hybrid"] for each in told["candidates"]] == [each["hybrid"] for each in kept["candidates"]]
    assert all(each["strip"].startswith("data:image/jpeg;base64,") for each in told["candidates"])
  trace_schema.check_file(json.loads((folder / "trace.json").read_text()))
  assert part_files.describe_files(folder).items() >= manifest["files"].items()
  done = generate(tmp_path, f"--flagfile={folder / 'replay.flags'}", one_device=False)
  assert done.code == 0, done.stderr
  (again,) = (folder / "replay").iterdir()
  made_again, trace_again = (json.loads((again / f"{name}.json").read_text()) for name in ("manifest", "trace"))
  assert made_again["sha256"] == manifest["sha256"]
  # Both say the same of what judged, and count the same; the verdict on the whole video is the command's alone.
  assert {name: trace[name] for name in JUDGES} == {name: trace_again[name] for name in JUDGES}
  assert [chunk["cost"] for chunk in trace["chunks"]] == [chunk["cost"] for chunk in trace_again["chunks"]]
  for name in ("forwards", "decoded", "image_frames", "plain_tflop"):
    assert manifest["cost"][name] == made_again["cost"][name] > 0
  assert manifest["cost"]["tflop"]["forwards"] == pytest.approx(made_again["cost"]["tflop"]["forwards"])
  assert manifest["cost"]["search_seconds"] == manifest["wall_seconds"]["search"] > 0
  # And the session goes on from there.
  resumed = pipeline.resume(folder / "session")
  again = [next(resumed) for _ in range(Late.CHUNKS)]
  assert [chunk.index for chunk in again] == [chunks + number for number in range(Late.CHUNKS)]
  for chunk, latents in zip(again, keepers[0].later, strict=True):
    np.testing.assert_array_equal(chunk.latents, latents)
