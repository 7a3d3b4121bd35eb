"""Traces of chosen chunks and metrics of every chunk: written by a run as flags say, and true."""

import json
import struct
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from streamt1_jax import memory_sinking
from streamt1_jax.cli import command, monitoring, results
from streamt1_jax.config import ConfigError
from streamt1_jax.memory_sinking import Eviction
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.state import CandidateTrace, ChunkTrace
from tests.command_line import generate, save_model

PROMPT = "a red circle moves left over a dark blue background"


def _scalars(path) -> dict[str, list[tuple[int, float]]]:
  """Steps and values by name."""
  scalars = {}
  for event in _events(path):
    for value in event.summary.value:
      scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
  return scalars


def _events(path) -> Iterator[event_pb2.Event]:
  """The events of a file, whose records are length, checksum, event, checksum."""
  content = path.read_bytes()
  while content:
    (length,) = struct.unpack("<Q", content[:8])
    yield event_pb2.Event.FromString(content[12 : 12 + length])
    content = content[16 + length :]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  result = generate(
    folder,
    f"--checkpoint={save_model(tmp_path_factory.mktemp('model') / 'tiny')}",
    f"--prompt={PROMPT}",
    "--num_latent_frames=12",
    "--profile_chunks=2,3",
    "--profile_dir=traces",
    "--tensorboard_dir=metrics",
  )
  assert result.code == 0, result
  return folder, results.result_folder("", PROMPT).name


def test_chosen_chunks_are_traced(watched):
  folder, name = watched
  runs = folder / "traces/plugins/profile"
  assert {path.name for path in runs.iterdir()} == {f"{name}_chunk_2", f"{name}_chunk_3"}
  for run in runs.iterdir():
    (file,) = run.glob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = {event.name for plane in planes for line in plane.lines for event in line.events}
    # The step is on the trace as the program that XLA made of it.
    assert any("chunk_step" in event for event in events), sorted(events)[:20]


def test_metrics_are_those_of_the_trace(watched):
  folder, name = watched
  (file,) = (folder / "metrics" / name).iterdir()
  scalars = _scalars(file)
  trace = json.loads((folder / "outputs" / name / "trace.json").read_text())
  manifest = json.loads((folder / "outputs" / name / "manifest.json").read_text())
  assert all([step for step, _ in values] == [0, 1, 2, 3] for values in scalars.values())
  for score in ("short", "long", "hybrid"):
    table = np.array([[candidate[score] for candidate in chunk["candidates"]] for chunk in trace["chunks"]])
    np.testing.assert_allclose([value for _, value in scalars[f"{score}/best"]], table.max(axis=1), rtol=1e-6)
    np.testing.assert_allclose([value for _, value in scalars[f"{score}/mean"]], table.mean(axis=1), rtol=1e-6)
  for route in ("nothing", "discard", "ema", "append", "append_at_maximum"):
    counts = [sum(entry["route"] == route for entry in chunk["evictions"]) for chunk in trace["chunks"]]
    assert [value for _, value in scalars[f"route/{route}"]] == counts
  seconds = [value for _, value in scalars["chunk/seconds"]]
  phases = manifest["wall_seconds"]
  assert 0 < sum(seconds) < phases["first_chunk"] + phases["search"]
  assert scalars["memory/host_peak_gib"][-1][1] * 2**30 <= 1.0001 * manifest["peak_memory_bytes"]["host"]


def test_chunks_that_are_searched_again_are_shown_once(tmp_path):
  """TensorBoard drops what earlier files have of the steps from the start of a session on."""
  monitoring.Monitor(_flags(tensorboard_dir=tmp_path), [PROMPT], 4, start=2).close()
  (file,) = (tmp_path / results.result_folder("", PROMPT).name).iterdir()
  sessions = [event for event in _events(file) if event.HasField("session_log")]
  assert [(event.step, event.session_log.status) for event in sessions] == [(2, event_pb2.SessionLog.START)]


def test_scores_that_are_not_finite_are_left_out():
  table = np.array([[1.0, np.nan], [np.inf, 3.0]])
  candidates = CandidateTrace(None, table, np.full((2, 2), np.nan), table, None, Flags(None, None))
  eviction = Eviction(np.array([memory_sinking.APPEND, memory_sinking.EMA]), None, None)
  trace = ChunkTrace(candidates, eviction, None, None, None, None, None)
  metrics = monitoring.chunk_metrics(trace, 2.5, judged=True)
  assert (metrics["short/best"], metrics["short/mean"]) == (3.0, 2.0)
  assert "long/best" not in metrics
  assert metrics["chunk/seconds"] == 2.5
  assert {name: value for name, value in metrics.items() if name.startswith("route/") and value} == {
    "route/append": 1.0, "route/ema": 1.0
  }  # fmt: skip
  assert not [name for name in monitoring.chunk_metrics(trace, 2.5, judged=False) if "/best" in name or "/mean" in name]


def _flags(**given):
  return command.parse(monitoring.define, [f"--{name}={value}" for name, value in given.items()])


@pytest.mark.parametrize(
  ("given", "fragment"),
  [
    ({"profile_chunks": "1"}, "need each other"),
    ({"profile_dir": "traces"}, "need each other"),
    ({"profile_chunks": "", "profile_dir": "traces"}, "names no chunk; those of this video are 0..6"),
    ({"profile_chunks": "1,7", "profile_dir": "traces"}, "'7' is not a chunk of this video; they are 0..6"),
    ({"profile_chunks": "-1", "profile_dir": "traces"}, "'-1' is not a chunk"),
    ({"profile_chunks": "first", "profile_dir": "traces"}, "'first' is not a chunk"),
  ],
)
def test_bad_flags(given, fragment):
  with pytest.raises(ConfigError, match=fragment):
    monitoring.check_flags(_flags(**given), 7)


def test_missing_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  monitoring.check_flags(_flags(), 7)
  with pytest.raises(ConfigError, match=r"pip install tensorboardX"):
    monitoring.check_flags(_flags(tensorboard_dir="metrics"), 7)
