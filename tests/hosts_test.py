"""Real processes over loopback: they search as one, agree before, and end together."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from streamt1_jax import drivers, executables, saved_search
from streamt1_jax.cli import results
from streamt1_jax.config import ConfigError
from streamt1_jax.execution import Execution
from streamt1_jax.io import manifest, part_files
from streamt1_jax.parallel import hosts
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel.relay import Relay
from streamt1_jax.parallel.sharding import tree_shardings
from tests import command_line
from tests import small_search as small

PROMPTS = ["a red circle moves left over a dark blue background", "a blue square stays", "a green star moves up"]
NUM_CHUNKS, SEEDS = 4, (0, 5)
TIMEOUT_SECONDS = 5
PATIENCE_SECONDS = 600  # of a test on a busy machine, never of a process for another


def free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def run_processes(folder, count, start):
  """Results of processes that `start(folder, address, index)` begins; once more if another program took the port."""
  for attempt in range(2):
    address = f"127.0.0.1:{free_port()}"
    folders = [folder / f"{attempt}-{index}" for index in range(count)]
    for own in folders:
      own.mkdir()
    processes = [start(own, address, index) for index, own in enumerate(folders)]
    for process in processes:
      process.join(PATIENCE_SECONDS)
    found = [command_line.result_of(process.exitcode, own) for process, own in zip(processes, folders, strict=True)]
    if "in use" not in found[0].stderr:
      break
  return found, folders


def start_work(folder, address, index, *, count, work):
  settings = {"jax_num_cpu_devices": 1, "jax_disable_most_optimizations": True}
  return command_line.start_function(folder, _in_process, address, count, index, work, jax_settings=settings)


def run_work(folder, count, work):
  return run_processes(folder, count, functools.partial(start_work, count=count, work=work))


def _in_process(address, count, index, work):
  def body():
    times = {"heartbeat_timeout_seconds": TIMEOUT_SECONDS, "initialization_timeout_seconds": PATIENCE_SECONDS}
    hosts.start(hosts.Address(address, count, index), **times)
    try:
      return _WORK[work](index) or 0
    except ConfigError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2

  sys.exit(hosts.run_together(body))


def _sharded(values):
  """`values` along all devices."""
  mesh = jax.make_mesh((jax.device_count(),), ("all",))
  return jax.make_array_from_callback(values.shape, NamedSharding(mesh, PartitionSpec("all")), lambda at: values[at])


def _agree(index):
  hosts.require_same({"--seed": "0", "--dtype": "'float32'"})
  assert hosts.first_decides(lambda: [index, "value"]) == [0, "value"]
  values = np.arange(3.0 * jax.device_count(), dtype=np.float32).reshape(-1, 3)
  tree = {"apart": _sharded(values), "here": jnp.float32(index), "none": None}
  found = hosts.to_host(tree)
  np.testing.assert_array_equal(found["apart"], values)
  assert found["here"] == index
  assert hosts.is_first() == (index == 0)
  with pytest.raises(ConfigError, match="seen by 0"):
    hosts.first_decides(lambda: _refuse(f"seen by {index}"))
  with pytest.raises(ConfigError) as refusal:
    hosts.require_same({"--seed": str(index // 2), "the disk": "same"} | ({"--new": "1"} if index else {}))
  print(f"refused: {refusal.value}")


def _refuse(message):
  raise ConfigError(message)


def _search(index):
  traces = search(jax.devices(), jax.device_count())
  if hosts.is_first():
    save_traces("traces.npz", traces)


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


def save_traces(path, traces):
  np.savez(path, survivor=[t.survivor for t in traces], latents=[t.latents for t in traces])


def _talk(index, stop=False):
  """Collectives until somebody dies, or only one."""
  total = jax.jit(jnp.sum)
  values = _sharded(np.ones(jax.device_count(), np.float32))
  pathlib.Path("ready").write_text(str(os.getpid()))
  while True:
    assert float(total(values)) == jax.device_count()
    if stop:
      return
    time.sleep(0.05)


def _fail(index):
  _talk(index, stop=index == 1)
  hosts.announce(2, "its disk is gone")
  return 2


def _fail_together(index):
  hosts.announce(3, "every candidate is NaN or Inf")
  return 3


def _restore(index):
  """What process 0 finds damaged, process 1 cannot read."""
  saved_folder = pathlib.Path("../saved").resolve()
  if index:
    part_files.verify_files = _refuse_to_read
  with saved_search.SavedSearch(saved_folder, {}) as saved:
    saved.restore(None, print)


def _refuse_to_read(folder):
  raise PermissionError(errno.EACCES, "Permission denied")


def _fail_and_write(index):
  hosts._GRACE_SECONDS = 1.0
  hosts.announce(3, "every candidate is NaN or Inf")
  if hosts.is_first():
    time.sleep(hosts._GRACE_SECONDS + 4 * hosts._PULSE_SECONDS)
    pathlib.Path("trace.json").touch()
  return 3


_WORK = {
  "agree": _agree,
  "search": _search,
  "talk": _talk,
  "fail": _fail,
  "fail_together": _fail_together,
  "fail_and_write": _fail_and_write,
  "restore": _restore,
}


@pytest.mark.parametrize("count", [2, 4])
def test_agreement(tmp_path, count):
  found, _ = run_work(tmp_path, count, "agree")
  who = "0 on process 0, 1" if count == 2 else "0 on process 0, 1 and 1 on process 2, 3"
  others = ", ".join(map(str, range(1, count)))
  expected = f"--new is unknown on process 0 and 1 on process {others}"
  if count == 4:
    expected = f"--seed is {who}; {expected}"
  for result in found:
    assert result.code == 0, result
    assert f"refused: {expected}\n" in result.stdout


def test_same_search(tmp_path):
  count = 4
  found, folders = run_work(tmp_path, count, "search")
  assert [result.code for result in found] == [0] * count, found
  assert not any((folder / "traces.npz").exists() for folder in folders[1:])
  one = search(jax.devices()[:1], 1)
  with np.load(folders[0] / "traces.npz") as traces:
    np.testing.assert_array_equal(traces["survivor"], [t.survivor for t in one])
    np.testing.assert_allclose(traces["latents"], [t.latents for t in one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_named(tmp_path, victim):
  address, folders = f"127.0.0.1:{free_port()}", [tmp_path / str(index) for index in range(3)]
  for folder in folders:
    folder.mkdir()
  processes = [start_work(folder, address, index, count=3, work="talk") for index, folder in enumerate(folders)]
  deadline = time.monotonic() + PATIENCE_SECONDS
  while not all((folder / "ready").exists() for folder in folders) and time.monotonic() < deadline:
    time.sleep(0.1)
  os.kill(processes[victim].pid, signal.SIGKILL)
  killed = time.monotonic()
  for process in processes:
    process.join(PATIENCE_SECONDS)
  # Silence for the timeout, the pulse of a second, and a busy machine.
  assert time.monotonic() - killed < 6 * TIMEOUT_SECONDS
  for index in {0, 1, 2} - {victim}:
    result = command_line.result_of(processes[index].exitcode, folders[index])
    assert result.code == 3, result
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: process {victim} on {socket.gethostname()} died or cannot be reached: "), result


def test_a_failure_is_passed_on(tmp_path):
  found, _ = run_work(tmp_path, 2, "fail")
  assert [result.code for result in found] == [2, 2], found
  assert found[0].stderr.splitlines()[-1] == f"error: process 1 on {socket.gethostname()}: its disk is gone"


def test_a_failure_of_all_is_one_of_each(tmp_path):
  found, _ = run_work(tmp_path, 2, "fail_together")
  assert [result.code for result in found] == [3, 3], found
  assert not any("process" in result.stderr for result in found)


def test_what_one_cannot_read_no_other_removes(tmp_path):
  saved_folder = tmp_path / "saved"
  manifest.write_json(saved_folder / "search.json", {"format_version": 1, "settings": {}, "resumed_at": []})
  for item in ("state", "trace"):
    (saved_folder / "000001" / item).mkdir(parents=True)
  found, _ = run_work(tmp_path, 2, "restore")
  for result in found:
    assert result.code == 2, result
    assert "cannot go on after chunk 1" in result.stderr
    assert "Permission denied" in result.stderr
  assert (saved_folder / "000001/state").is_dir()


def test_who_writes_after_a_failure_of_all_may_finish(tmp_path):
  found, folders = run_work(tmp_path, 2, "fail_and_write")
  assert [result.code for result in found] == [3, 3], found
  assert (folders[0] / "trace.json").exists()
  assert not any("process" in result.stderr for result in found)


def _generate_otherwise(index, arguments):
  from streamt1_jax.cli import common, generate

  version = executables.version
  executables.version = lambda name: [None, "0.1"][index] if name == "libtpu" else version(name)
  executables.source_digest = lambda: f"source {index}"
  sys.argv = ["experiments/generate.py", *arguments]
  common.run(generate.main)


def _generate_slowly(arguments):
  from streamt1_jax.cli import common, generate

  write_json = manifest.write_json

  def slowly(path, content):
    time.sleep(hosts._GRACE_SECONDS + 2 * hosts._PULSE_SECONDS)
    write_json(path, content)

  hosts._GRACE_SECONDS, manifest.write_json = 1.0, slowly
  sys.argv = ["experiments/generate.py", *arguments]
  common.run(generate.main)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return command_line.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return command_line.quick_compilation(tmp_path_factory.mktemp("compiled"))


def start_generate(folder, address, index, *, flags, settings, prompts=PROMPTS, terminated=None):
  (folder / "list.txt").write_text("\n".join(prompts[index] if isinstance(prompts, dict) else prompts))
  host_flags = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"]
  of_all = ["--num_latent_frames=6", "--prompts_file=list.txt"]
  arguments = [*of_all, *host_flags, *flags(index)]
  if index == terminated:
    return command_line.start_function(folder, command_line.generate_terminated, arguments, jax_settings=settings)
  return command_line.start(folder, *arguments, jax_settings=settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, checkpoint, settings):
  """Two processes that make three videos: their results, their folders and where the videos are."""
  folder = tmp_path_factory.mktemp("undisturbed")
  outputs = folder / "outputs"
  flags = lambda index: [f"--checkpoint={checkpoint}", "--mesh=data:2", f"--output_dir={outputs}"]
  found, folders = run_processes(folder, 2, functools.partial(start_generate, flags=flags, settings=settings))
  assert [result.code for result in found] == [0, 0], found
  return found, folders, outputs


class TestGenerate:
  def test_every_video_once(self, undisturbed, checkpoint, settings):
    """Three prompts do not divide by two processes; both write below one folder."""
    found, folders, outputs = undisturbed
    for prompt in PROMPTS:
      assert found[0].stdout.count(str(results.result_folder(outputs, prompt) / "video.mp4")) == 1
    assert "video.mp4" not in found[1].stdout
    assert "chunk" not in found[1].stderr
    alone = command_line.generate(
      folders[0], f"--checkpoint={checkpoint}", "--num_latent_frames=6", "--prompts_file=list.txt",
      jax_settings=settings,
    )  # fmt: skip
    assert alone.code == 0, alone
    assert len(list(outputs.iterdir())) == len(PROMPTS)
    for prompt in PROMPTS:
      trace, expected = (
        json.loads((results.result_folder(folder, prompt) / "trace.json").read_text())
        for folder in (outputs, folders[0] / "outputs")
      )
      assert [chunk["survivors"] for chunk in trace["chunks"]] == [chunk["survivors"] for chunk in expected["chunks"]]
      assert trace["final"]["best"] == expected["final"]["best"]

  def test_sigterm_to_one_stops_both_and_both_go_on(self, tmp_path, undisturbed, checkpoint, settings):
    outputs, prompts = tmp_path / "outputs", PROMPTS[:2]
    flags = lambda index: [f"--checkpoint={checkpoint}", "--mesh=data:2", f"--output_dir={outputs}", "--save_every=1"]
    start = functools.partial(start_generate, flags=flags, settings=settings, prompts=prompts)
    found, _ = run_processes(tmp_path, 2, functools.partial(start, terminated=1))
    for result in found:
      assert result.code == 143, found
      assert result.stderr.splitlines()[-1].startswith("error: terminated, saved after chunk 1 of 2: "), result
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    found, _ = run_processes(resumed, 2, start)
    assert [result.code for result in found] == [0, 0], found
    for prompt in prompts:
      made, expected = (
        json.loads((results.result_folder(folder, prompt) / "manifest.json").read_text())
        for folder in (outputs, undisturbed[-1])
      )
      assert made["sha256"] == expected["sha256"]
      assert (made["resumed_at_chunks"], expected["resumed_at_chunks"]) == ([1], [])

  def test_flags_that_differ(self, tmp_path, settings):
    flags = lambda index: [f"--seed={index}"]
    found, folders = run_processes(tmp_path, 2, functools.partial(start_generate, flags=flags, settings=settings))
    for result, folder in zip(found, folders, strict=True):
      assert result.code == 2, result
      assert result.stderr == "error: --seed is 0 on process 0 and 1 on process 1\n"
      assert not (folder / "outputs").exists()

  def test_prompts_that_differ(self, tmp_path, checkpoint, settings):
    flags = lambda index: [f"--checkpoint={checkpoint}"]
    prompts = {0: PROMPTS, 1: PROMPTS[:2]}
    start = functools.partial(start_generate, flags=flags, settings=settings, prompts=prompts)
    for result in run_processes(tmp_path, 2, start)[0]:
      assert result.code == 2, result
      assert "the number of prompts is 3 on process 0 and 2 on process 1" in result.stderr

  def test_rewards_that_differ(self, tmp_path, checkpoint, settings):
    """Both have a checkpoint of their own, alike but for the rewards: one is missing, one has other weights."""
    rewards = {0: {"hpsv3": "some", "videoalign": "these"}, 1: {"hpsv3": "others"}}

    def start(folder, address, index):
      shutil.copytree(checkpoint, folder / "model")
      for name, content in rewards[index].items():
        (folder / "model/rewards" / name).mkdir(parents=True)
        (folder / "model/rewards" / name / "part.json").write_text(content)
      return start_generate(folder, address, index, flags=lambda index: ["--checkpoint=model"], settings=settings)

    for result in run_processes(tmp_path, 2, start)[0]:
      assert result.code == 2, result
      assert "the list of its rewards is videoalign, hpsv3 on process 0 and hpsv3 on process 1; " in result.stderr
      assert "the SHA-256 of hpsv3 is " in result.stderr
      assert "SHA-256 of the checkpoint" not in result.stderr

  def test_programs_that_differ(self, tmp_path, settings):
    def start(folder, address, index):
      arguments = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}", "--prompt=a star"]
      return command_line.start_function(folder, _generate_otherwise, index, arguments, jax_settings=settings)

    for result in run_processes(tmp_path, 2, start)[0]:
      assert result.code == 2, result
      assert "the version of libtpu is none on process 0 and 0.1 on process 1" in result.stderr
      assert "the SHA-256 of the sources of streamt1_jax is source 0 on process 0 and source 1 on" in result.stderr
      assert "jaxlib" not in result.stderr

  def test_a_failed_search_is_published(self, tmp_path, settings):
    """The first process takes longer to write its trace than the other one waits for it."""
    model, outputs = command_line.save_model(tmp_path / "model", backbone_scale=1e30), tmp_path / "outputs"

    def start(folder, address, index):
      arguments = [
        f"--checkpoint={model}", f"--prompt={PROMPTS[0]}", "--num_latent_frames=6", f"--output_dir={outputs}",
        "--mesh=candidate:2", f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}",
      ]  # fmt: skip
      return command_line.start_function(folder, _generate_slowly, arguments, jax_settings=settings)

    found, _ = run_processes(tmp_path, 2, start)
    assert [result.code for result in found] == [3, 3], found
    (folder,) = outputs.iterdir()
    assert {path.name for path in folder.iterdir()} == {"trace.json", "failed.json"}

  def test_nobody_comes(self, tmp_path, settings):
    flags = lambda index: ["--initialization_timeout_seconds=1"]
    process = start_generate(tmp_path, f"127.0.0.1:{free_port()}", 1, flags=flags, settings=settings)
    process.join(PATIENCE_SECONDS)
    result = command_line.result_of(process.exitcode, tmp_path)
    assert result.code == 3, result
    assert "process 1 has waited too long: not all 2 processes came to 127.0.0.1:" in result.stderr


class TestAddress:
  @pytest.mark.parametrize(
    ("given", "fragment"),
    [
      (("somewhere:1234", None, 0), "num_processes is missing"),
      ((None, 2, 0), "coordinator_address is missing"),
      (("somewhere:1234", 2, None), "process_id is missing"),
      (("somewhere", 2, 0), "host:port"),
      (("somewhere:99999", 2, 0), "host:port"),
      (("somewhere:1234", 2, 2), "in 0..1, got 2"),
    ],
  )
  def test_impossible(self, given, fragment):
    with pytest.raises(ConfigError, match=fragment):
      hosts.find(*given, 1)

  @pytest.mark.parametrize("text", ["0,x", "0,", "-1"])
  def test_impossible_devices(self, monkeypatch, text):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", text)
    with pytest.raises(ConfigError, match=f"JAX_LOCAL_DEVICE_IDS must be numbers, as 0,1, got '{text}'"):
      hosts.find("somewhere:1234", 2, 0, 1)

  def test_devices(self, monkeypatch):
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2, 3")
    assert hosts.find("somewhere:1234", 2, 0, 1).local_device_ids == [2, 3]

  def test_alone(self):
    assert hosts.find(None, None, None, 1) is None
    assert hosts.find("somewhere:1234", 1, None, 1) is None

  def test_slurm(self, monkeypatch):
    variables = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in variables.items():
      monkeypatch.setenv(f"SLURM_{name}", value)
    address = hosts.find(None, None, None, 1)
    assert address.coordinator.startswith("node3:")
    assert address[1:] == (2, 1, [0])
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert hosts.find(None, None, None, 1)[1:] == (2, 1, None)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.find(None, None, None, 1) is None


class TestRelay:
  @pytest.fixture
  def lost(self):
    return threading.Event()

  @pytest.fixture
  def connected(self, lost):
    """A client's socket and the server's end of it, with a relay between them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
      relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", 1.0, lost.set)
      host, _, port = relay.address.rpartition(":")
      with socket.create_connection((host, int(port))) as client:
        remote, _ = server.accept()
        with remote:
          yield client, remote

  def test_passes_on(self, connected, lost):
    client, remote = connected
    client.sendall(b"question")
    assert remote.recv(100) == b"question"
    remote.sendall(b"answer")
    assert client.recv(100) == b"answer"
    assert not lost.is_set()

  def test_a_lost_coordinator_is_told_and_hidden(self, connected, lost):
    client, remote = connected
    remote.close()
    assert lost.wait(PATIENCE_SECONDS)
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
      client.recv(1)

  def test_a_client_that_leaves_is_no_loss(self, connected, lost):
    client, remote = connected
    client.close()
    assert remote.recv(1) == b""
    assert not lost.wait(0.2)


def test_default_mesh_leaves_no_process_out():
  sizes = functools.partial(device_mesh.default_sizes, 16, small.MODEL, small.SEARCH, 1)
  assert sizes() == {"data": 1, "candidate": 4, "model": 2, "seq": 1}
  assert sizes(every=True) == {"data": 2, "candidate": 4, "model": 2, "seq": 1}
