"""Shows a search live: a page where a video is made, steered by prompts, and watched while its candidates compete.

  streamt1 serve
  streamt1 serve --port=9000 --search=2x2 --checkpoint=checkpoints/mine
  streamt1 serve --host=0.0.0.0 --token="$TOKEN"

Needs the extra `serve`: pip install 'streamt1_jax[serve]'. The page is on this machine alone unless --host says
otherwise; then everybody needs a token, which is made if --token gives none. One client steers at a time, others wait
in a line, and up to 256 look. Programs speak to /v1/realtime/video (docs/serve.md); /healthz and /metrics are for
machines.

Several processes serve as one: process 0 is spoken to, and a session runs on the devices of all.

Exit codes: 2 for bad input, such as a port in use or a checkpoint that cannot stream; 3 if several processes cannot go
on together; 130 when interrupted, 143 by SIGTERM: in both cases a session that runs is saved in --output_dir first.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import os
import secrets
import signal
import socket
import sys
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from jax.sharding import Mesh

from streamt1_jax import drivers
from streamt1_jax.cli import (
  command,
  device_flags,
  flag_types,
  host_flags,
  memory_plans,
  search_flags,
  telling,
)
from streamt1_jax.cli.files import find_checkpoint, make_folder
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, SessionConfig, require_video_model
from streamt1_jax.config.session import SINK_DISTANCE
from streamt1_jax.execution import Decoding, Execution
from streamt1_jax.io import pictures
from streamt1_jax.io.checkpoint import load_config
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel.sharding import RULES
from streamt1_jax.pipeline import Pipeline, display_scale
from streamt1_jax.planning.memory import WAYS
from streamt1_jax.report.pictures import FRAMES_PER_STRIP
from streamt1_jax.rewards import selection
from streamt1_jax.serve import processes
from streamt1_jax.serve.presets import PRESETS
from streamt1_jax.state import ChunkTrace

if TYPE_CHECKING:
  from streamt1_jax.serve.app import Server
  from streamt1_jax.serve.protocol import Start
  from streamt1_jax.serve.studio import Studio
  from streamt1_jax.session import Session

_WARM_UP = ("a red circle moves left over a dark blue background", "a blue square moves up over a gray background")


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_checkpoint(values)
  flag_types.define_integer(values, "port", 8000, "Where to listen; 0 for any port that is free.", 0, 65535)
  flag_types.define_string(values, "host", "127.0.0.1", "Address to listen at; one of this machine alone by default.")
  flag_types.define_string(values, "token", None, "What clients must know; needed, or else made, where --host is open.")
  flag_types.define_choice(values, "search", next(iter(PRESETS)), list(PRESETS), "Search of a session that names none.")
  flag_types.define_float(values, "max_minutes", 30.0, "Longest session, in minutes.", 0.1, 24 * 60.0)
  flag_types.define_path(values, "output_dir", "outputs/", "Where sessions are saved.", url=False)
  flag_types.define_switch(values, "warm_up", True, "Compile before the first client comes.")
  device_flags.define_dtype(values, ["float32", "bfloat16"], "Dtype of weights and activations.")
  device_flags.define(values)
  memory_plans.define(values)
  host_flags.define(values)


def run(values: flags.FlagValues) -> None:
  """Serves until a signal comes."""
  app = _require_aiohttp()
  token = token_of(values)
  host_flags.start(values)
  with contextlib.ExitStack() as stack:
    listening: list[socket.socket] = []
    # Only process 0 is spoken to. If it cannot be, all processes end with its message.
    hosts.first_decides(lambda: listening.append(stack.enter_context(contextlib.closing(_listen(values)))))
    pipeline, searches = load(values)
    studio = make_studio(pipeline, searches, values)
    if not hosts.is_first():
      # Ctrl-C is passed on too.
      signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))
      try:
        processes.follow(studio.open)
      except processes.OutOfStep as error:
        raise command.RunFailed(str(error)) from error
      raise command.Terminated("terminated")
    ending = Ending()
    shared = processes.share(studio, lambda: ending.put(signal.SIGTERM), ending.put)
    server = app.Server(
      shared if jax.process_count() > 1 else studio,
      token=token,
      most_seconds=60 * values.max_minutes,
      warm_up=_WARM_UP if values.warm_up else (),
    )
    device_flags.tell_devices(device_flags.use_dtype(values.dtype), pipeline.models.execution.mesh)
    address = address_of(values.host, listening[0].getsockname()[1], token)
    reason, saved = asyncio.run(serve(server, listening[0], address, ending))
  if saved is not None:
    print(f"the session is saved in {saved}", file=sys.stderr, flush=True)
  if isinstance(reason, processes.OutOfStep):
    raise command.RunFailed(str(reason)) from reason
  if reason == signal.SIGINT:
    raise KeyboardInterrupt
  raise command.Terminated("terminated")


class Ending:
  """Why the server ends: the first signal that comes, to this process or to another, or an error of all processes.

  `put` may be called from any thread.
  """

  def __init__(self):
    self._first: concurrent.futures.Future[int | processes.OutOfStep] = concurrent.futures.Future()

  def put(self, reason: int | processes.OutOfStep) -> None:
    """The server is to end. All but the first reason change nothing."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
      self._first.set_result(reason)

  async def get(self) -> int | processes.OutOfStep:
    """Waits for it."""
    return await asyncio.wrap_future(self._first)


async def serve(
  server: Server, listening: socket.socket, address: str, ending: Ending
) -> tuple[int | processes.OutOfStep, str | None]:
  """Serves until there is a reason to end. Returns it, and the folder of the session that was saved, or None.

  It prints its address as soon as it can be used, and a signal would end it properly.
  """
  from aiohttp import web

  loop = asyncio.get_running_loop()
  runner = web.AppRunner(server.app, access_log=None)
  await runner.setup()
  try:
    await web.SockSite(runner, listening).start()
    for number in (signal.SIGINT, signal.SIGTERM):
      loop.add_signal_handler(number, ending.put, number)
    print(address, flush=True)
    reason = await ending.get()
    # A second signal to this process does not wait: it ends the process as if nothing handled it.
    for each in (signal.SIGINT, signal.SIGTERM):
      loop.remove_signal_handler(each)
      signal.signal(each, signal.SIG_DFL)
    if isinstance(reason, int):
      print("ending after the chunk that is made; once more ends at once", file=sys.stderr, flush=True)
    return reason, await server.close(save=True)
  finally:
    await runner.cleanup()


def find_searches(model: ModelConfig) -> dict[str, SearchConfig]:
  """The searches that clients may choose, as they run in a video without an end. Raises ConfigError."""
  made = {name: preset.search(model) for name, preset in PRESETS.items()}
  return {name: dataclasses.replace(search, sink_distance=SINK_DISTANCE) for name, search in made.items()}


def load(values: flags.FlagValues) -> tuple[Pipeline, dict[str, SearchConfig]]:
  """The model of the flags, and the searches that clients may choose. Raises ConfigError."""
  checkpoint = find_checkpoint(values.checkpoint)
  model = load_config(checkpoint)
  require_video_model(model, str(checkpoint))
  searches = find_searches(model)
  host_flags.require_same_inputs(checkpoint, [])
  hosts.first_decides(lambda: make_folder("output_dir", values.output_dir, writable=True))
  mesh = device_flags.make_mesh(values, model, searches[values.search])
  searches, decoding = plan_searches(values, checkpoint, model, searches, mesh)
  pipeline = load_pipeline(values, checkpoint, model, mesh, decoding)
  for search in searches.values():
    drivers.check_length(pipeline.models, search, None)
  return pipeline, offered(searches, pipeline.models.execution)


def plan_searches(
  values: flags.FlagValues,
  checkpoint: epath.Path,
  model: ModelConfig,
  searches: Mapping[str, SearchConfig],
  mesh: Mesh | None,
) -> tuple[dict[str, SearchConfig], Decoding]:
  """The searches that fit the devices, and how all of them decode; no weight is read.

  Raises ConfigError, with a remedy, if the default search does not fit.
  """
  dtype = device_flags.use_dtype(values.dtype)
  choice = selection.choose(checkpoint, None, chunk_frames=model.required_codec.temporal_stride * model.chunk_frames)
  asked = {
    name: memory_plans.request(values, checkpoint, model, search, choice, mesh, dtype)
    for name, search in searches.items()
  }
  # Raises for the default search, which is then one of those that fit.
  memory_plans.decide(values, {f"--search={values.search}: ": asked[values.search]})
  ways = memory_plans.fitting(values, asked)
  too_large = [name for name in searches if name not in ways]
  if too_large:
    telling.warn(f"not offered, since they take more memory than the device gives: {', '.join(too_large)}")
  return {name: searches[name] for name in searches if name in ways}, max(ways.values(), key=WAYS.index)


def offered(searches: Mapping[str, SearchConfig], execution: Execution) -> dict[str, SearchConfig]:
  """The searches that run on these devices. Candidates that are decoded in turn must be divided evenly."""
  if execution.mesh is None or execution.decoding == "together":
    return dict(searches)
  beam, candidate = (execution.mesh.shape[str(RULES[axis])] for axis in ("beam", "candidate"))
  fits = lambda search: search.top_k % beam == 0 and search.beam_size % candidate == 0
  return {name: search for name, search in searches.items() if fits(search)}


def load_pipeline(
  values: flags.FlagValues, checkpoint: epath.Path, model: ModelConfig, mesh: Mesh | None, decoding: Decoding
) -> Pipeline:
  """The model of a checkpoint, whose traces have pictures of all candidates. Raises ConfigError."""
  device_flags.use_compilation_cache(values)
  device_flags.warn_if_slow(model, values.attention)
  pipeline = Pipeline.load(
    checkpoint,
    dtype=jnp.dtype(device_flags.use_dtype(values.dtype)),
    mesh=mesh,
    decoding=decoding,
    attention=values.attention,
  )
  return pipeline.with_previews(FRAMES_PER_STRIP)


def make_studio(pipeline: Pipeline, searches: Mapping[str, SearchConfig], values: flags.FlagValues) -> Studio:
  """What sessions are made with."""
  from streamt1_jax.cli.live_result import LiveResult
  from streamt1_jax.serve.studio import Studio

  default = values.search
  rewards = search_flags.reward_settings(pipeline.rewards.choice, device_flags.use_dtype(values.dtype))
  model_flags = [] if values.checkpoint is None else [f"--checkpoint={values.checkpoint}"]
  model_flags += [f"--{name}={values[name].value}" for name in _REPLAYED if values[name].present]

  def open_session(start: Start, on_trace: Callable[[ChunkTrace], None]) -> Session:
    options: dict[str, Any] = {"search": searches[start.search or default], "seed": start.seed, "on_trace": on_trace}
    return pipeline.session(start.prompt, image=_picture(start), **options)

  def keep(start: Start) -> LiveResult:
    name = start.search or default
    options: dict[str, Any] = {"method": name, "flags": [*model_flags, *PRESETS[name].flags], "rewards": rewards}
    options |= {"session": SessionConfig(searches[name]), "prompt": start.prompt, "picture": _picture(start)}
    return LiveResult(os.path.abspath(values.output_dir), pipeline, **options)

  return Studio(
    open=open_session,
    fps=pipeline.config.fps,
    scale=display_scale(pipeline.models.codec.frame_shape()[0]),
    presets=(default, *(name for name in searches if name != default)),
    keeper=keep,
  )


_REPLAYED = ("dtype", "mesh", "decoding", "attention")


def _picture(start: Start) -> Any:
  return None if start.image is None else pictures.decode_picture(io.BytesIO(start.image), "the picture")


def _require_aiohttp() -> Any:
  try:
    import aiohttp  # noqa: F401
  except ImportError as error:
    raise ConfigError("a live server needs the extra serve: pip install 'streamt1_jax[serve]'") from error
  from streamt1_jax.serve import app

  return app


def token_of(values: flags.FlagValues) -> str | None:
  """What clients must know; None on this machine alone. Raises ConfigError for one that no header can carry."""
  from streamt1_jax.serve import doors

  if values.token is not None and not (values.token.isascii() and values.token.isprintable() and values.token):
    raise ConfigError("--token must be printable ASCII, and not empty")
  if values.token is None and not doors.is_loopback(values.host):
    return secrets.token_urlsafe(24)
  return values.token


def _listen(values: flags.FlagValues) -> socket.socket:
  """Before anything is loaded: a port that is in use is told at once."""
  host, port = values.host, values.port
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
  except OSError as error:
    raise ConfigError(f"--host={host} is no address of this machine: {error.strerror}") from error
  try:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    made.listen(128)
  except OSError as error:
    made.close()
    raise ConfigError(f"cannot listen at --host={host} --port={port}: {error.strerror}") from error
  return made


def address_of(host: str, port: int, token: str | None) -> str:
  """What to open in a browser."""
  query = "" if token is None else f"?token={urllib.parse.quote(token, safe='')}"
  return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
