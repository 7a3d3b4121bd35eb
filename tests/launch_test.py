"""The scripts that start a run on other machines: what they would run there, word for word.

The commands they call are replaced by ones that write their arguments down. What `gcloud ssh` and `srun` are given to
run is run, by a shell in a folder of its own with an interpreter that writes down as well: that shows the quoting.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from streamt1_jax.cli import command, generate
from tests.command_line import HOST_DEVICES, REPOSITORY

LAUNCH = REPOSITORY / "experiments/launch"
FLAGS = ["--flagfile=experiments/flagfiles/paper_5s.flags", '--prompt=a cat\'s $HOME, "quoted" & more']

# Writes its name, arguments and XLA's variables as a line of JSON, and does what the fake needs.
_NOTE = (
  f"#!{sys.executable} -IS"
  + """
import json, os, subprocess, sys
entry = dict(name=os.path.basename(sys.argv[0]), args=sys.argv[1:])
entry |= {key: os.environ[key] for key in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") if key in os.environ}
with open(os.environ["NOTES"], "a") as notes:
  notes.write(json.dumps(entry) + "\\n")
"""
)
_GCLOUD = """
action = sys.argv[4]
states = os.environ["STATES"].split() if "STATES" in os.environ else []
if action == "describe":
  notes = [json.loads(line) for line in open(os.environ["NOTES"])]
  print(states[sum(note["args"][3:4] == ["describe"] for note in notes) - 1])
# Codes of the calls of an action, one after the other: SCP="1 0".
codes = os.environ.get(action.upper(), "").split()
if codes:
  notes = [json.loads(line) for line in open(os.environ["NOTES"])]
  sys.exit(int(codes[sum(note["args"][3:4] == [action] for note in notes) - 1]))
if action == "ssh":
  command = next(arg for arg in sys.argv if arg.startswith("--command=")).removeprefix("--command=")
  if "experiments.generate" in command:
    os.chdir(os.environ["WORKER"])
    sys.exit(subprocess.run(["bash", "-c", command]).returncode)
"""
_SRUN = """
at = next(index for index, arg in enumerate(sys.argv) if index and not arg.startswith("--"))
count = int(sys.argv[1].removeprefix("--ntasks="))
codes = [subprocess.run(sys.argv[at:], env=os.environ | {"SLURM_PROCID": str(n)}).returncode for n in range(count)]
sys.exit(max(codes))
"""
_SCONTROL = 'print("node7\\nnode8")\n'
_PYTHON = """
runs = sum("experiments.generate" in json.loads(line)["args"] for line in open(os.environ["NOTES"]))
codes = os.environ.get("CODE", "0").split()
sys.exit(int(codes[min(runs, len(codes)) - 1]))
"""


@pytest.fixture
def launch(tmp_path):
  """Runs a script with fake commands; returns the process and what was called."""
  (tmp_path / "bin").mkdir()
  (tmp_path / "worker/streamt1_jax").mkdir(parents=True)
  (tmp_path / "worker/venv/bin").mkdir(parents=True)
  fakes = {"bin/gcloud": _GCLOUD, "bin/srun": _SRUN, "bin/scontrol": _SCONTROL, "worker/venv/bin/python": _PYTHON}
  for name, behaviour in fakes.items():
    (tmp_path / name).write_text(_NOTE + behaviour)
    (tmp_path / name).chmod(0o755)
  notes = tmp_path / "notes"

  def run(script, *arguments, **variables):
    notes.write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "LIBTPU_"))}
    environment |= {"NOTES": str(notes), "WORKER": str(tmp_path / "worker"), "HOME": str(tmp_path)} | variables
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    return done, [json.loads(line) for line in notes.read_text().splitlines()]

  run.python = str(tmp_path / "worker/venv/bin/python")
  return run


TPU = {"TPU_NAME": "stream", "ZONE": "us-east5-b", "ACCELERATOR": "v6e-8", "BUCKET": "gs://bucket/stream"}


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_syntax(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize(
  ("accelerator", "version"),
  [
    ("v4-16", "tpu-ubuntu2204-base"),
    ("v5litepod-8", "v2-alpha-tpuv5-lite"),
    ("v5p-8", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
  ],
)
def test_create_a_slice(launch, accelerator, version):
  done, calls = launch("tpu_slice.sh", "create", **TPU | {"ACCELERATOR": accelerator, "SPOT": "1"})
  assert done.returncode == 0, done.stderr
  (call,) = calls
  assert call["args"] == [
    "compute", "tpus", "tpu-vm", "create", "stream", "--zone=us-east5-b", f"--accelerator-type={accelerator}",
    f"--version={version}", "--spot",
  ]  # fmt: skip


def test_install_on_all_workers(launch):
  done, (copy, install) = launch("tpu_slice.sh", "install", **TPU)
  assert done.returncode == 0, done.stderr
  assert copy["args"][3] == "scp"
  assert copy["args"][5:] == ["stream:", "--zone=us-east5-b", "--worker=all"]
  archive = pathlib.PurePath(copy["args"][4]).name
  assert install["args"][3:7] == ["ssh", "stream", "--zone=us-east5-b", "--worker=all"]
  command = install["args"][7].removeprefix("--command=")
  subprocess.run(["bash", "-n", "-c", command], check=True)
  assert f"tar -xzf {archive} -C streamt1_jax" in command
  assert '"./streamt1_jax[tpu,gcs,tensorboard]"' in command


def test_run_on_all_workers(launch):
  done, (ssh, python) = launch("tpu_slice.sh", "run", *FLAGS, "--save_every=2", **TPU)
  assert done.returncode == 0, done.stderr
  assert ssh["args"][3:7] == ["ssh", "stream", "--zone=us-east5-b", "--worker=all"]
  assert python["args"] == [
    "-m", "experiments.generate", "--output_dir=gs://bucket/stream/videos",
    "--compilation_cache_dir=gs://bucket/stream/compiled", "--save_every=5", *FLAGS, "--save_every=2",
  ]  # fmt: skip
  assert "--xla_tpu_scoped_vmem_limit_kib=98304" in python["LIBTPU_INIT_ARGS"].split()


def test_the_program_has_the_flags_that_the_scripts_give_it():
  given = {
    "output_dir": "a", "compilation_cache_dir": "b", "save_every": "5", "process_id": "1", "num_processes": "2",
    "coordinator_address": "node7:20041",
  }  # fmt: skip
  values = command.parse(generate.define_flags, FLAGS + [f"--{name}={value}" for name, value in given.items()])
  assert {name: str(values[name].value) for name in given} == given


def test_lost_slices_are_made_again(launch):
  """The slice is missing; the run fails because it is taken away; on the second slice the program itself fails."""
  states = "MISSING PREEMPTED PREEMPTED READY"
  done, calls = launch("tpu_slice.sh", "keep_running", *FLAGS, **TPU, STATES=states, CODE="3")
  assert done.returncode == 3, done.stderr
  made = ["create", "scp", "ssh", "ssh"]
  actions = [call["args"][3] for call in calls if call["name"] == "gcloud"]
  assert actions == ["describe", *made, "describe", "describe", "delete", *made, "describe"]


def _keep_running(launch, **variables):
  """The exit code and the actions of gcloud."""
  done, calls = launch("tpu_slice.sh", "keep_running", *FLAGS, **TPU, RETRY_SECONDS="0", **variables)
  return done.returncode, [call["args"][3] for call in calls if call["name"] == "gcloud"]


def test_an_installation_that_failed_is_made_again(launch):
  code, actions = _keep_running(launch, STATES="MISSING READY READY", SCP="1 0")
  assert code == 0
  assert actions == ["describe", "create", "scp", "describe", "scp", "ssh", "ssh"]


def test_a_slice_that_is_there_is_installed(launch):
  code, actions = _keep_running(launch, STATES="READY")
  assert code == 0
  assert actions == ["describe", "scp", "ssh", "ssh"]


@pytest.mark.parametrize("lost", ["134", "143", "255"])
def test_a_preemption_or_a_lost_connection_is_no_end(launch, lost):
  """The slice still looks healthy; once it is what it was, once it is gone."""
  code, actions = _keep_running(launch, STATES="READY READY PREEMPTED", CODE=f"{lost} {lost} 0")
  assert code == 0
  assert actions == [
    "describe", "scp", "ssh", "ssh", "describe", "ssh", "describe", "delete", "create", "scp", "ssh", "ssh",
  ]  # fmt: skip


def test_processes_that_die_on_a_healthy_slice_are_an_end(launch):
  code, actions = _keep_running(launch, STATES=" ".join(["READY"] * 6), CODE="134")
  assert code == 134
  assert actions == ["describe", "scp", "ssh", *["ssh", "describe"] * 5]


def test_what_is_missing_is_named(launch):
  for missing in ("TPU_NAME", "ZONE", "ACCELERATOR", "BUCKET"):
    done, calls = launch("tpu_slice.sh", "run", *FLAGS, **{name: TPU[name] for name in TPU if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr
    assert calls == []
  done, calls = launch("tpu_slice.sh", "keep_running", *FLAGS, **TPU | {"ACCELERATOR": "v99-8"})
  assert done.returncode == 2
  assert "v99-8" in done.stderr
  done, calls = launch("tpu_slice.sh", "start", **TPU)
  assert done.returncode == 2
  assert "keep_running" in done.stdout


def test_slurm(launch):
  slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "PYTHON": launch.python}
  done, (scontrol, srun, *processes) = launch("slurm_gpu.sh", *FLAGS, "--output_dir=/shared/videos", **slurm)
  assert done.returncode == 0, done.stderr
  assert scontrol["args"] == ["show", "hostnames", "node[7-8]"]
  assert srun["args"][:3] == ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
  for number, process in enumerate(processes):
    assert process["args"] == [
      "-m", "experiments.generate", f"--process_id={number}", "--coordinator_address=node7:20041", "--num_processes=2",
      f"--compilation_cache_dir={pathlib.Path(launch.python).parents[3]}/.cache/streamt1_jax", "--save_every=5", *FLAGS,
      "--output_dir=/shared/videos",
    ]  # fmt: skip
    assert process["XLA_FLAGS"].split() == ["--xla_gpu_enable_latency_hiding_scheduler=true"]
  assert len(processes) == 2
  done, _ = launch("slurm_gpu.sh", *FLAGS, **slurm, CODE="3")
  assert done.returncode == 3, done.stderr
  done, calls = launch("slurm_gpu.sh", *FLAGS)
  assert done.returncode == 2
  assert "sbatch" in done.stderr
  assert calls == []


def test_flags_are_explained_and_known_to_xla():
  """A page has every flag; the installed XLA knows those of GPUs, and refuses others."""
  text = (LAUNCH / "xla_flags.sh").read_text()
  names = set(re.findall(r"--(xla_\w+)=", text))
  assert len(names) >= 5
  pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")]
  told = "".join(page.read_text() for page in pages)
  assert not [name for name in names if name not in told]
  settings = re.findall(r"--xla_gpu_\w+=\w+", text)
  environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(HOST_DEVICES, "")}
  code = "import jax; jax.devices()"
  for flags, known in ((settings, True), (["--xla_gpu_nonsense=true"], False)):
    environment["XLA_FLAGS"] = " ".join(flags)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == known, done.stderr
