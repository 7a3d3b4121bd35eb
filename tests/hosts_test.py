"""Real processes over loopback: they search as one, agree before, and end together."""

import dataclasses
import errno
import functools
import os
import pathlib
import signal
import socket
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from streamt1_jax import drivers, saved_search
from streamt1_jax.config import ConfigError
from streamt1_jax.execution import Execution
from streamt1_jax.io import manifest, part_files
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel.sharding import tree_shardings
from tests import command_line
from tests import small_search as small

NUM_CHUNKS, SEEDS = 4, (0, 5)
HEARTBEAT_SECONDS = 10
START_SECONDS = 60
PATIENCE_SECONDS = 600  # A busy machine is slow. No process waits so long for another one.
ABORTED = -signal.SIGABRT


def free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def start_all(folder, count, start):
  """Begins processes by `start(folder, address, index)`, each in a folder of its own."""
  address = f"127.0.0.1:{free_port()}"
  folders = [folder / str(index) for index in range(count)]
  for own in folders:
    own.mkdir()
  return [start(own, address, index) for index, own in enumerate(folders)], folders


def finish(processes, folders):
  """The results of processes, each once its process has ended."""
  deadline = time.monotonic() + PATIENCE_SECONDS
  for process in processes:
    process.join(max(0.0, deadline - time.monotonic()))
  return [command_line.result_of(process.exitcode, own) for process, own in zip(processes, folders, strict=True)]


def run_processes(folder, count, start):
  """Results and folders; once more if another program took the port."""
  for attempt in range(2):
    own = folder / f"attempt{attempt}"
    own.mkdir()
    processes, folders = start_all(own, count, start)
    found = finish(processes, folders)
    if "Failed to start RPC server" not in found[0].stderr:
      break
  return found, folders


def start_work(folder, address, index, *, count, work):
  settings = {"jax_num_cpu_devices": 1, "jax_disable_most_optimizations": True}
  return command_line.start_function(folder, _in_process, address, count, index, work, jax_settings=settings)


def run_work(folder, count, work):
  return run_processes(folder, count, functools.partial(start_work, count=count, work=work))


def _in_process(address, count, index, work):
  def body():
    times = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "initialization_timeout_seconds": START_SECONDS}
    hosts.start(address, count, index, **times)
    try:
      return work(index) or 0
    except ConfigError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2

  sys.exit(hosts.run_together(body))


def _sharded(values):
  """`values` along all devices."""
  mesh = jax.make_mesh((jax.device_count(),), ("all",))
  return jax.make_array_from_callback(values.shape, NamedSharding(mesh, PartitionSpec("all")), lambda at: values[at])


def search(devices, count):
  """Two prompts of the small search: those are divided first, then candidates."""
  sizes = device_mesh.parse_sizes(f"data:{min(count, 2)},candidate:{max(1, count // 2)}")
  mesh = device_mesh.make_mesh(sizes, small.MODEL, small.SEARCH, devices)
  models = dataclasses.replace(small.models(), execution=Execution(mesh=mesh))
  params = small.params()
  if mesh is not None:
    shardings = tree_shardings(mesh, "backbone", params["backbone"])
    params["backbone"] = jax.tree.map(jax.device_put, params["backbone"], shardings)
  conditions = [jax.device_get(small.condition(NUM_CHUNKS, prompt)) for prompt in range(2)]
  together = drivers.stack_conditions(conditions, mesh)
  options = {"num_chunks": NUM_CHUNKS, "seed": SEEDS}
  return [hosts.to_host(trace) for trace in drivers.stream(params, together, models, small.SEARCH, **options)]


def _search(index):
  traces = search(jax.devices(), jax.device_count())
  if hosts.is_first():
    np.savez("traces.npz", survivor=[t.survivor for t in traces], latents=[t.latents for t in traces])


def _agree(index):
  """Values, decisions and arrays; then a search; then a save that one process cannot read; then all refuse."""
  longer = "chunks and frames " * 400 * index + "é"
  assert hosts.everyone([index, longer[-index:]]) == [[0, "é"], [1, "é"]]
  assert [len(text) for text in hosts.everyone(longer)] == [1, 7201]
  assert hosts.first_decides(lambda: [index, "value"]) == [0, "value"]
  values = np.arange(3.0 * jax.device_count(), dtype=np.float32).reshape(-1, 3)
  tree = {"apart": _sharded(values), "here": jnp.float32(index), "none": None}
  found = hosts.to_host(tree)
  np.testing.assert_array_equal(found["apart"], values)
  assert found["here"] == index
  assert found["none"] is None
  assert hosts.is_first() == (index == 0)
  with pytest.raises(ConfigError, match="seen by 0"):
    hosts.first_decides(lambda: _refuse(f"seen by {index}"))
  _search(index)
  _restore(index)
  hosts.require_same({"--seed": "0", "--dtype": "'float32'"})
  hosts.require_same({"--seed": str(index), "the disk": "same"} | ({"--new": "1"} if index else {}))


def _refuse(message):
  raise ConfigError(message)


def _restore(index):
  """What process 0 finds damaged, process 1 cannot read."""
  folder = pathlib.Path("../saved").resolve()
  if hosts.is_first():
    manifest.write_json(folder / "search.json", {"format_version": 1, "settings": {}, "resumed_at": []})
    for item in ("state", "trace"):
      (folder / "000001" / item).mkdir(parents=True)
  else:
    part_files.verify_files = _refuse_to_read
  hosts.everyone(None)
  refused = pytest.raises(ConfigError, match="cannot go on after chunk 1.*Permission denied")
  with saved_search.SavedSearch(folder, {}) as saved, refused:
    saved.restore(None, print)
  assert (folder / "000001/state").is_dir()


def _refuse_to_read(folder):
  raise PermissionError(errno.EACCES, "Permission denied")


def _compute(index, *, leave=None):
  """Computations of all processes, until `leave` comes back or one of them dies."""
  total = jax.jit(jnp.sum)
  values = _sharded(np.ones(jax.device_count(), np.float32))
  while True:
    assert float(total(values)) == jax.device_count()
    pathlib.Path("ready").touch()
    if leave is not None and index == 1:
      return leave()


def _wait(index):
  """No computation tells it when another process dies."""
  _compute(index=1, leave=lambda: None)
  time.sleep(PATIENCE_SECONDS)


def _one_fails(index):
  return _compute(index, leave=lambda: 2)


def assert_same_search(folder):
  one = search(jax.devices()[:1], 1)
  with np.load(folder / "traces.npz") as traces:
    np.testing.assert_array_equal(traces["survivor"], [t.survivor for t in one])
    # The sums of a divided program have another order.
    np.testing.assert_allclose(traces["latents"], [t.latents for t in one], rtol=0, atol=1e-5)


def test_two_processes(tmp_path):
  """Both search as one device does. Then both refuse what they were told, and each ends with its own exit code."""
  found, folders = run_work(tmp_path, 2, _agree)
  for result in found:
    assert result.code == 2, result
    refusals = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert refusals == [
      "error: --seed is 0 on process 0 and 1 on process 1; --new is unknown on process 0 and 1 on process 1"
    ]
  assert not (folders[1] / "traces.npz").exists()
  assert_same_search(folders[0])


@pytest.mark.slow
def test_four_processes(tmp_path):
  found, folders = run_work(tmp_path, 4, _search)
  assert [result.code for result in found] == [0] * 4, found
  assert not any((folder / "traces.npz").exists() for folder in folders[1:])
  assert_same_search(folders[0])


@pytest.mark.slow
@pytest.mark.parametrize("work", [_compute, _wait])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_ends_the_other_process(tmp_path, victim, work):
  processes, folders = start_all(tmp_path, 2, functools.partial(start_work, count=2, work=work))
  deadline = time.monotonic() + PATIENCE_SECONDS
  while not all((folder / "ready").exists() for folder in folders):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  os.kill(processes[victim].pid, signal.SIGKILL)
  killed = time.monotonic()
  other = finish(processes, folders)[1 - victim]
  # Silence of the heartbeat's time, the time for last words, and a busy machine.
  assert time.monotonic() - killed < 4 * HEARTBEAT_SECONDS
  broken_off = other.code == 3 and "\nerror: a computation of all processes broke off" in other.stderr
  aborted = other.code == ABORTED and "another task died" in other.stderr
  assert broken_off or aborted, other
  if work is _wait and victim == 1:
    assert "unhealthy (stopped sending heartbeats):\n1\n" in other.stderr, other


@pytest.mark.slow
def test_one_that_fails_keeps_its_exit_code_and_ends_the_other(tmp_path):
  began = time.monotonic()
  found, _ = run_work(tmp_path, 2, _one_fails)
  assert time.monotonic() - began < 4 * HEARTBEAT_SECONDS + START_SECONDS
  assert found[1].code == 2, found
  assert found[0].code in (3, ABORTED), found


@pytest.mark.slow
def test_nobody_comes(tmp_path):
  def start(folder, address, index):
    return command_line.start_function(folder, _start_alone, address, jax_settings={})

  (result,), _ = run_processes(tmp_path, 1, start)
  assert result.code == ABORTED, result
  assert "DEADLINE_EXCEEDED" in result.stderr


def _start_alone(address):
  hosts.start(address, 2, 1, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout_seconds=1)


def test_difference():
  """Four processes: pairs differ in one text, and all but the first have another."""
  texts = [{"--seed": str(index // 2), "the disk": "same"} | ({"--new": "1"} if index else {}) for index in range(4)]
  expected = "--seed is 0 on process 0, 1 and 1 on process 2, 3; --new is unknown on process 0 and 1 on process 1, 2, 3"
  assert hosts.describe_difference(texts) == expected
  assert hosts.describe_difference([texts[2], texts[3]]) == ""


class TestAddress:
  TIMES = {"heartbeat_timeout_seconds": 10, "initialization_timeout_seconds": 1}

  @pytest.mark.parametrize(
    ("given", "fragment"),
    [
      (("somewhere", 2, 0), "host:port, got 'somewhere'"),
      (("somewhere:99999", 2, 0), "host:port, got 'somewhere:99999'"),
      ((":1234", 2, 0), "host:port, got ':1234'"),
    ],
  )
  def test_impossible(self, given, fragment):
    with pytest.raises(ConfigError, match=fragment):
      hosts.start(*given, **self.TIMES)

  def test_alone(self):
    """These tests have used their devices, as a notebook has."""
    hosts.start(None, None, None, **self.TIMES)
    hosts.start("somewhere:1234", 1, None, **self.TIMES)
    assert not jax.distributed.is_initialized()
    assert hosts.is_first()
    assert hosts.everyone("value") == ["value"]


def test_default_mesh_leaves_no_process_out():
  sizes = functools.partial(device_mesh.default_sizes, 16, small.MODEL, small.SEARCH, 1)
  assert sizes() == {"data": 1, "candidate": 4, "model": 2, "seq": 1}
  assert sizes(every=True) == {"data": 2, "candidate": 4, "model": 2, "seq": 1}
