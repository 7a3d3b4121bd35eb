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
import tomllib

import pytest
import yaml

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
# gcloud compute tpus tpu-vm ACTION, gcloud compute instance-groups managed ACTION, gcloud compute ssh.
action = sys.argv[2] if sys.argv[2] in ("ssh", "scp") else sys.argv[4]
if action == "list-instances":
  print("stream-ab12\\nstream-cd34")
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
  fakes = {"bin/kubectl": "json.dump(sys.stdin.read(), open(os.environ['NOTES'] + '.yaml', 'w'))\n"}
  fakes |= {"bin/gcloud": _GCLOUD, "bin/srun": _SRUN, "bin/scontrol": _SCONTROL, "worker/venv/bin/python": _PYTHON}
  for name, behaviour in fakes.items():
    (tmp_path / name).write_text(_NOTE + behaviour)
    (tmp_path / name).chmod(0o755)
  notes = tmp_path / "notes"
  # To compress the repository takes 20 times as long as all else that a script does here.
  plain_archive = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "tar.tar.gz.command", "GIT_CONFIG_VALUE_0": "cat"}

  def run(script, *arguments, **variables):
    notes.write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "LIBTPU_"))}
    environment |= plain_archive
    environment |= {"NOTES": str(notes), "WORKER": str(tmp_path / "worker"), "HOME": str(tmp_path)} | variables
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    command = ["bash", str(LAUNCH / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    return done, [json.loads(line) for line in notes.read_text().splitlines()]

  run.applied = lambda: yaml.safe_load(json.loads((tmp_path / "notes.yaml").read_text()))
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


def test_the_cloud_tpu_api_is_said_to_get_fixes_only(launch):
  done, _ = launch("tpu_slice.sh", "delete", **TPU)
  (line,) = done.stderr.splitlines()
  assert "fixes only" in line
  for script in re.findall(r"\w+\.sh", line):
    assert (LAUNCH / script).exists()


MIG = {
  "NAME": "stream",
  "ZONE": "us-east5-b",
  "MACHINE": "ct6e-standard-4t",
  "TOPOLOGY": "2x4",
  "BUCKET": "gs://bucket/a",
}
_GROUP = ["compute", "instance-groups", "managed"]


def test_create_a_group_of_two_hosts(launch):
  done, (template, policy, group, wait) = launch("tpu_mig.sh", "create", **MIG, SPOT="1")
  assert done.returncode == 0, done.stderr
  assert template["args"] == [
    "compute", "instance-templates", "create", "stream", "--machine-type=ct6e-standard-4t",
    "--maintenance-policy=TERMINATE", "--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e",
    "--image-project=ubuntu-os-accelerator-images", "--boot-disk-type=hyperdisk-balanced", "--boot-disk-size=200GB",
    "--scopes=cloud-platform", "--provisioning-model=SPOT", "--instance-termination-action=STOP",
  ]  # fmt: skip
  assert policy["args"] == [
    "compute", "resource-policies", "create", "workload-policy", "stream", "--region=us-east5",
    "--type=HIGH_THROUGHPUT", "--accelerator-topology=2x4",
  ]  # fmt: skip
  assert group["args"] == [
    *_GROUP, "create", "stream", "--zone=us-east5-b", "--template=stream", "--size=2",
    "--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing", "--workload-policy=stream",
  ]  # fmt: skip
  assert wait["args"] == [*_GROUP, "wait-until", "stream", "--zone=us-east5-b", "--stable"]


def test_a_single_host_needs_no_policy(launch):
  _, calls = launch("tpu_mig.sh", "create", **MIG | {"MACHINE": "ct6e-standard-8t"})
  assert [call["args"][1] for call in calls] == ["instance-templates", "instance-groups", "instance-groups"]
  assert "--size=1" in calls[1]["args"]
  _, calls = launch("tpu_mig.sh", "delete", **MIG | {"MACHINE": "ct6e-standard-8t"})
  assert [call["args"][1] for call in calls] == ["instance-groups", "instance-templates"]


def test_a_group_is_installed_and_run_on_every_host(launch):
  done, (listed, *calls) = launch("tpu_mig.sh", "install", **MIG)
  assert done.returncode == 0, done.stderr
  assert listed["args"] == [*_GROUP, "list-instances", "stream", "--zone=us-east5-b", "--format=value(NAME)"]
  assert [(call["args"][1], call["args"][2]) for call in calls[:2]] == [("scp", calls[0]["args"][2])] + [
    ("scp", calls[1]["args"][2])
  ]
  assert [call["args"][3] for call in calls[:2]] == ["stream-ab12:", "stream-cd34:"]
  commands = [call["args"][4] for call in calls if call["args"][1] == "ssh"]
  assert len(commands) == 2
  assert all('"./streamt1_jax[tpu,gcs,tensorboard]"' in command for command in commands)
  done, calls = launch("tpu_mig.sh", "run", *FLAGS, **MIG)
  assert done.returncode == 0, done.stderr
  runs = [call for call in calls if call["name"] == "python"]
  assert len(runs) == 2
  for run in runs:
    assert run["args"] == [
      "-m", "experiments.generate", "--output_dir=gs://bucket/a/videos", "--compilation_cache_dir=gs://bucket/a/compiled",
      "--save_every=5", *FLAGS,
    ]  # fmt: skip
    assert "--xla_tpu_scoped_vmem_limit_kib=98304" in run["LIBTPU_INIT_ARGS"].split()
  assert launch("tpu_mig.sh", "run", *FLAGS, **MIG, CODE="3")[0].returncode == 3


def test_a_dry_run_of_a_group_calls_nothing(launch):
  for action in ("create", "install", "run", "delete"):
    done, calls = launch("tpu_mig.sh", "--dry_run", action, *FLAGS, **MIG)
    assert done.returncode == 0, done.stderr
    assert calls == []
    assert "gcloud compute" in done.stdout


@pytest.mark.parametrize(
  ("changes", "fragment"),
  [
    ({"MACHINE": "n2-standard-4"}, "MACHINE=n2-standard-4"),
    ({"MACHINE": "ct6e-standard"}, "MACHINE=ct6e-standard"),
    ({"TOPOLOGY": "2x3"}, "6 chips"),
    ({"MACHINE": "tpu7x-standard-4t", "TOPOLOGY": "2x2x1"}, "IMAGE_FAMILY"),
    ({"TOPOLOGY": ""}, "TOPOLOGY"),
  ],
)
def test_an_impossible_group_is_one_line(launch, changes, fragment):
  done, calls = launch("tpu_mig.sh", "create", **MIG | changes)
  assert done.returncode != 0
  assert calls == []
  (line,) = done.stderr.splitlines()
  assert fragment in line


JOBSET = {"NAME": "stream", "IMAGE": "images/streamt1:1", "HOSTS": "2", "CHIPS": "4"}
TPU_NODES = {"TARGET": "tpu", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "2x4"}
JOBSET_FLAGS = [*FLAGS, "--prompts_file=a\\b\tc"]


def _pod(manifest):
  (job,) = manifest["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 2
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert container["args"] == JOBSET_FLAGS
  assert container["image"] == "images/streamt1:1"
  return pod, container, {entry["name"]: entry.get("value") for entry in container["env"]}


def test_a_slice_on_kubernetes(launch):
  done, (call,) = launch("jobset.sh", *JOBSET_FLAGS, **JOBSET, **TPU_NODES)
  assert done.returncode == 0, done.stderr
  assert (call["name"], call["args"]) == ("kubectl", ["apply", "--filename=-"])
  manifest = launch.applied()
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert list(manifest["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]
  pod, container, variables = _pod(manifest)
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "2x4"
  }  # fmt: skip
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  assert "--xla_tpu_scoped_vmem_limit_kib=98304" in variables["LIBTPU_INIT_ARGS"]
  assert not [name for name in variables if name.startswith("JAX_")]


@pytest.mark.parametrize(("target", "limits"), [("cuda", {"limits": {"nvidia.com/gpu": 4}}), ("cpu", None)])
def test_other_hosts_on_kubernetes_are_told_where_the_first_one_is(launch, target, limits):
  done, calls = launch("jobset.sh", "--dry_run", *JOBSET_FLAGS, **JOBSET, TARGET=target)
  assert done.returncode == 0, done.stderr
  assert calls == []
  _, container, variables = _pod(yaml.safe_load(done.stdout))
  assert variables["JAX_COORDINATOR_ADDRESS"] == "stream-hosts-0-0.stream:20041"
  assert variables["JAX_NUM_PROCESSES"] == "2"
  assert "JAX_PROCESS_ID" in variables
  assert limits is None or container["resources"] == limits


@pytest.mark.parametrize(
  ("variables", "fragment"),
  [
    ({"TARGET": "rocm"}, "TARGET=rocm"),
    ({"TARGET": "tpu"}, "ACCELERATOR"),
    ({**TPU_NODES, "ACCELERATOR": "gpu"}, "ACCELERATOR=gpu"),
    ({"TARGET": "cpu", "IMAGE": ""}, "IMAGE"),
  ],
)
def test_an_impossible_jobset_is_one_line(launch, variables, fragment):
  done, calls = launch("jobset.sh", *FLAGS, **JOBSET | variables)
  assert done.returncode != 0
  assert calls == []
  assert fragment in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_the_dockerfile_copies_what_is_there_and_has_a_target_for_each_kind():
  text = (LAUNCH / "Dockerfile").read_text()
  assert set(re.findall(r"^FROM base AS (\w+)$", text, re.MULTILINE)) == {"cpu", "cuda", "tpu"}
  for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
    for name in line.split():
      assert (REPOSITORY / name).exists(), name
  extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  installed = re.findall(r"-e '\.\[(.*)\]'$", text, re.MULTILINE)
  assert len(installed) == 3
  assert {extra for line in installed for extra in line.split(",")} <= set(extras)


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
