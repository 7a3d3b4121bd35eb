"""Real processes over loopback: they search as one, agree before, and end together."""

import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from streamt1_jax import drivers, save_folder, saved_search
from streamt1_jax.cli import results
from streamt1_jax.config import ConfigError
from streamt1_jax.execution import Execution
from streamt1_jax.io import manifest, part_files
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel.sharding import tree_shardings
from tests import command_line
from tests import small_search as small

PROMPTS = ["a red circle moves left over a dark blue background", "a blue square stays", "a green star moves up"]
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
    save_folder.write_description(epath.Path(folder), save_folder.Description({}, []))
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


def start_by_slurm(folder, address, index):
  """As `srun --nodes=4 --ntasks-per-node=1` begins a process. JAX finds the port from the number of the job."""
  port = int(address.rpartition(":")[2])
  variables = {
    "JOB_ID": port, "STEP_NODELIST": "127.0.0.1", "NTASKS": 4, "STEP_NUM_NODES": 4, "PROCID": index, "LOCALID": 0
  }  # fmt: skip
  # JAX lets process 0 alone keep what it compiled. With a cache, process 0 would reach the search much sooner than the
  # others, and Gloo lets two of them wait for each other for 30 s at most when they first exchange something.
  settings = {"jax_disable_most_optimizations": True, "jax_enable_compilation_cache": False}
  return command_line.start_function(folder, _by_slurm, variables, jax_settings=settings)


def _by_slurm(variables):
  os.environ.update({f"SLURM_{name}": str(value) for name, value in variables.items()})
  os.environ["JAX_COORDINATOR_PORT"] = os.environ["SLURM_JOB_ID"]
  _in_process(None, None, None, _search_on_whole_nodes)


def _search_on_whole_nodes(index):
  assert jax.process_count() == 4
  # JAX would take one GPU for each task.
  assert jax.config.values["jax_cuda_visible_devices"] == "all"
  _search(index)


@pytest.mark.slow
def test_four_processes_of_slurm(tmp_path):
  found, folders = run_processes(tmp_path, 4, start_by_slurm)
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
  hosts.start(address, 2, 1, **TIMES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return command_line.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return command_line.quick_compilation(tmp_path_factory.mktemp("compiled"))


def host_arguments(address, index):
  return [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"]


def start_generate(folder, address, index, *, arguments, settings, terminated=None):
  given = ["--num_latent_frames=6", *arguments, *host_arguments(address, index)]
  if index == terminated:
    return command_line.start_function(folder, command_line.generate_terminated, given, jax_settings=settings)
  return command_line.start(folder, *given, jax_settings=settings)


def documents(folder, name):
  """A JSON file of every video, by prompt."""
  return {prompt: json.loads((results.result_folder(folder, prompt) / name).read_text()) for prompt in PROMPTS}


class TestGenerate:
  @pytest.mark.slow
  def test_sigterm_to_one_stops_both_and_both_go_on(self, tmp_path, checkpoint, settings):
    """Three prompts do not divide by two processes. In the end every video is the one that a single process makes."""
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS))
    outputs = tmp_path / "outputs"
    arguments = [
      f"--checkpoint={checkpoint}", f"--prompts_file={tmp_path / 'list.txt'}", "--mesh=data:2", "--save_every=1",
      f"--output_dir={outputs}",
    ]  # fmt: skip
    start = functools.partial(start_generate, arguments=arguments, settings=settings)
    found, _ = run_processes(tmp_path, 2, functools.partial(start, terminated=1))
    for result in found:
      assert result.code == 143, found
      assert result.stderr.splitlines()[-1].startswith("error: terminated, saved after chunk 1 of 2: "), result
    (tmp_path / "resumed").mkdir()
    found, _ = run_processes(tmp_path / "resumed", 2, start)
    assert [result.code for result in found] == [0, 0], found
    for prompt in PROMPTS:
      assert found[0].stdout.count(str(results.result_folder(outputs, prompt) / "video.mp4")) == 1
    assert "video.mp4" not in found[1].stdout
    assert "chunk" not in found[1].stderr
    assert len(list(outputs.iterdir())) == len(PROMPTS)
    alone = command_line.generate(
      tmp_path, *arguments[:-1], f"--output_dir={tmp_path / 'alone'}", "--num_latent_frames=6",
      jax_settings=settings | {"jax_num_cpu_devices": 2},
    )  # fmt: skip
    assert alone.code == 0, alone
    traces, expected = documents(outputs, "trace.json"), documents(tmp_path / "alone", "trace.json")
    manifests, undisturbed = documents(outputs, "manifest.json"), documents(tmp_path / "alone", "manifest.json")
    for prompt in PROMPTS:
      assert traces[prompt]["final"]["best"] == expected[prompt]["final"]["best"]
      survivors = lambda trace: [chunk["survivors"] for chunk in trace["chunks"]]
      assert survivors(traces[prompt]) == survivors(expected[prompt])
      assert manifests[prompt]["sha256"] == undisturbed[prompt]["sha256"]
    assert [manifests[prompt]["resumed_at_chunks"] for prompt in PROMPTS] == [[1], [1], []]

  def test_programs_that_differ(self, tmp_path, settings):
    """Flags, versions and sources, all in one line."""

    def start(folder, address, index):
      given = ["--prompt=a star", f"--seed={index}", *host_arguments(address, index)]
      return command_line.start_function(folder, _generate_otherwise, index, given, jax_settings=settings)

    found, folders = run_processes(tmp_path, 2, start)
    for result, folder in zip(found, folders, strict=True):
      assert result.code == 2, result
      assert result.stderr == (
        "error: --seed is 0 on process 0 and 1 on process 1; the version of libtpu is none on process 0 and 0.1 on "
        "process 1; the SHA-256 of the sources of streamt1_jax is source 0 on process 0 and source 1 on process 1\n"
      )
      assert not (folder / "outputs").exists()

  def test_inputs_that_differ(self, tmp_path, checkpoint, settings):
    """Each has a checkpoint of its own, alike but for the rewards: one is missing, one has other weights."""
    rewards = {0: {"hpsv3": "some", "videoalign": "these"}, 1: {"hpsv3": "others"}}

    def start(folder, address, index):
      shutil.copytree(checkpoint, folder / "model")
      for name, content in rewards[index].items():
        (folder / "model/rewards" / name).mkdir(parents=True)
        (folder / "model/rewards" / name / "part.json").write_text(content)
      (folder / "list.txt").write_text("\n".join(PROMPTS[index:]))
      arguments = ["--checkpoint=model", "--prompts_file=list.txt", "--reward=quality+coherence"]
      return start_generate(folder, address, index, arguments=arguments, settings=settings)

    for result in run_processes(tmp_path, 2, start)[0]:
      assert result.code == 2, result
      assert "the list of its rewards is hpsv3, videoalign on process 0 and hpsv3 on process 1; " in result.stderr
      assert "the SHA-256 of hpsv3 is " in result.stderr
      assert "the number of prompts is 3 on process 0 and 2 on process 1" in result.stderr
      assert "SHA-256 of the checkpoint" not in result.stderr

  @pytest.mark.slow
  def test_a_failed_search_is_published(self, tmp_path, settings):
    """The first process takes longer to write its trace than the other one waits for it once it has failed."""
    model, outputs = command_line.save_model(tmp_path / "model", backbone_scale=1e30), tmp_path / "outputs"

    def start(folder, address, index):
      arguments = [
        f"--checkpoint={model}", f"--prompt={PROMPTS[0]}", "--num_latent_frames=6", f"--output_dir={outputs}",
        "--mesh=candidate:2", *host_arguments(address, index),
      ]  # fmt: skip
      return command_line.start_function(folder, _generate_slowly, arguments, jax_settings=settings)

    found, _ = run_processes(tmp_path, 2, start)
    assert [result.code for result in found] == [3, 3], found
    (folder,) = outputs.iterdir()
    assert {path.name for path in folder.iterdir()} == {"trace.json", "failed.json", "pictures.zip", "report.html"}


def _generate_otherwise(index, arguments):
  from streamt1_jax.cli import host_flags

  version = importlib.metadata.version
  libtpu = ["", "0.1"][index]
  host_flags._version = lambda name: libtpu if name == "libtpu" else version(name)
  host_flags.source_sha256 = lambda: f"source {index}"
  command_line.run_generate(arguments)


def _generate_slowly(arguments):
  write_json = manifest.write_json

  def slowly(path, content):
    time.sleep(hosts._GRACE_SECONDS + 2)
    write_json(path, content)

  hosts._GRACE_SECONDS, manifest.write_json = 1.0, slowly
  command_line.run_generate(arguments)


def test_difference():
  """Four processes: pairs differ in one text, and all but the first have another."""
  texts = [{"--seed": str(index // 2), "the disk": "same"} | ({"--new": "1"} if index else {}) for index in range(4)]
  expected = "--seed is 0 on process 0, 1 and 1 on process 2, 3; --new is unknown on process 0 and 1 on process 1, 2, 3"
  assert hosts.describe_difference(texts) == expected
  assert hosts.describe_difference([texts[2], texts[3]]) == ""


TIMES = {"heartbeat_timeout_seconds": 10, "initialization_timeout_seconds": 1}
IMPOSSIBLE = {
  ("somewhere", 2, 0): "coordinator_address must be host:port, got 'somewhere'",
  (":1234", 2, 0): "coordinator_address must be host:port, got ':1234'",
  ("somewhere:99999", 2, 0): "coordinator_address must be host:port, got 'somewhere:99999'",
  (None, 2, 0): "(num_processes=2, process_id=0): coordinator_address should be defined",
  ("somewhere:1234", None, 0): "(coordinator_address=somewhere:1234, process_id=0): Number of processes must be",
  ("somewhere:1234", 2, None): "The process id of the current process must be defined",
  (None, 1, 3): "process_id must be less than num_processes, got process_id=3",
  ("somewhere:1234", 2, 2): "process_id < num_processes. Got process_id=2, num_processes=2",
}


def test_impossible_addresses(tmp_path):
  """All in one process, which has used no device yet."""
  process = command_line.start_function(tmp_path, _join_all, jax_settings={})
  (result,) = finish([process], [tmp_path])
  assert result.code == 0, result
  lines = result.stdout.splitlines()
  assert len(lines) == len(IMPOSSIBLE) + 1
  for line, fragment in zip(lines, [*IMPOSSIBLE.values(), "JAX_LOCAL_DEVICE_IDS=0,x"], strict=True):
    assert fragment in line


def _join_all():
  for given in IMPOSSIBLE:
    _join(given)
  os.environ["JAX_LOCAL_DEVICE_IDS"] = "0,x"
  _join(("somewhere:1234", 2, 0))
  del os.environ["JAX_LOCAL_DEVICE_IDS"]
  hosts.start(None, None, None, **TIMES)
  assert not jax.distributed.is_initialized()


def _join(given):
  with pytest.raises(ConfigError) as refusal:
    hosts.start(*given, **TIMES)
  print(refusal.value)


def test_alone():
  """These tests have used their devices, as a notebook has."""
  jax.devices()
  hosts.start(None, None, None, **TIMES)
  hosts.start("somewhere:1234", 1, None, **TIMES)
  assert not jax.distributed.is_initialized()
  assert hosts.is_first()
  assert hosts.everyone("value") == ["value"]


def test_default_mesh_leaves_no_process_out():
  sizes = functools.partial(device_mesh.default_sizes, 16, small.MODEL, small.SEARCH, 1)
  assert sizes() == {"data": 1, "candidate": 4, "model": 2, "seq": 1}
  assert sizes(every=True) == {"data": 2, "candidate": 4, "model": 2, "seq": 1}
