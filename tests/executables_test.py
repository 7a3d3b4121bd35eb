"""Compiled steps kept in a folder: used when they are the right ones, refused with the reason when they are not."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from streamt1_jax import drivers, executables
from streamt1_jax.executables import StoredSteps
from streamt1_jax.execution import Execution
from streamt1_jax.io.manifest import CompileCounter
from streamt1_jax.parallel import mesh as device_mesh
from tests import small_search as small

NUM_CHUNKS = 3


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def _search(step=drivers.jitted_chunk_step, search=small.SEARCH, models=None):
  # As in another process; else JAX would hand out a program that has run, and CPUs cannot write those.
  jax.clear_caches()
  return list(
    drivers.stream(
      small.params(),
      small.condition(NUM_CHUNKS),
      models or small.models(),
      search,
      num_chunks=NUM_CHUNKS,
      seed=0,
      step=step,
    )
  )


@pytest.fixture(scope="module")
def expected():
  return _search()


@pytest.fixture(scope="module")
def kept(tmp_path_factory, expected):
  """A folder with both steps of the small search; the lines that were reported on the way."""
  folder, lines = tmp_path_factory.mktemp("steps"), []
  _assert_equal(_search(StoredSteps(folder, lines.append)), expected)
  return {path.name: path.read_bytes() for path in folder.iterdir()}, lines


@pytest.fixture
def folder(tmp_path, kept):
  for name, content in kept[0].items():
    (tmp_path / name).write_bytes(content)
  return tmp_path


def _assert_equal(traces, others):
  for trace, other in zip(traces, others, strict=True):
    jax.tree.map(np.testing.assert_array_equal, trace, other)


def _change(folder, change):
  """Lets `change` alter what the files say they are for."""
  for path in folder.iterdir():
    header, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(header)
    change(header["identity"])
    path.write_bytes(json.dumps(header).encode() + b"\n" + payload)


def test_one_file_per_step(kept):
  files, lines = kept
  assert sorted(name.rsplit("-", 1)[0] for name in files) == ["small-1-first", "small-1-later"]
  assert len(lines) == 2
  assert all("none of this model" in line for line in lines)


def test_a_second_process_compiles_no_step(folder, expected, monkeypatch):
  """A new object stands for it: it knows nothing but the folder."""
  lines = []
  monkeypatch.setattr(drivers, "jitted_chunk_step", types.SimpleNamespace(lower=pytest.fail))
  _assert_equal(_search(StoredSteps(folder, lines.append)), expected)
  assert not lines


def test_nothing_is_compiled_after_the_second_chunk(folder):
  traces = drivers.stream(
    small.params(),
    small.condition(6),
    small.models(),
    small.SEARCH,
    num_chunks=6,
    seed=0,
    step=StoredSteps(folder, pytest.fail),
  )
  next(traces), next(traces)
  with CompileCounter() as compilations:
    assert len(list(traces)) == 4
  assert compilations.count == 0


@pytest.mark.parametrize(
  ("section", "entry", "value"),
  [
    ("versions", "jaxlib", "0.0.1"),
    ("environment", "XLA_FLAGS", "--xla_other=true"),
    (None, "device_kind", "TPU v9"),
  ],
)
def test_of_another_compiler(folder, expected, section, entry, value):
  """Refused with the reason, compiled anew, and in its place from then on."""

  def change(identity):
    inner = identity["compiler"] if section is None else identity["compiler"][section]
    inner[entry] = value

  _change(folder, change)
  lines = []
  _assert_equal(_search(StoredSteps(folder, lines.append)), expected)
  assert len(lines) == 2
  for line in lines:
    assert f"{entry} was {value} and is" in line
  _search(StoredSteps(folder, pytest.fail))


@pytest.mark.parametrize("damage", [lambda x: x[:-100], lambda x: x[:-1] + b"?"])
def test_damaged(folder, damage):
  for path in folder.iterdir():
    path.write_bytes(damage(path.read_bytes()))
  lines = []
  _search(StoredSteps(folder, lines.append))
  assert len(lines) == 2
  assert all("it is damaged" in line for line in lines)


def test_cannot_be_read(folder, expected):
  """A folder in its place, which cannot be replaced either; the search goes on."""
  for path in folder.iterdir():
    path.unlink()
    path.mkdir()
  lines = []
  _assert_equal(_search(StoredSteps(folder, lines.append)), expected)
  assert len(lines) == 4
  assert all("it cannot be read: IsADirectoryError: " in line for line in lines[::2])
  assert all("is not kept: " in line for line in lines[1::2])


def test_errors_without_text(folder, expected, monkeypatch):
  """Whatever runtimes and object stores raise is one line, and the search goes on."""

  def fail(*arguments, **options):
    raise RuntimeError

  monkeypatch.setattr(executables.serialize_executable, "deserialize_and_load", fail)
  monkeypatch.setattr(executables.atomic, "replace_bytes", fail)
  lines = []
  _assert_equal(_search(StoredSteps(folder, lines.append)), expected)
  assert len(lines) == 4
  assert all("the runtime refuses it: RuntimeError: ;" in line for line in lines[::2])
  assert all(line.endswith("is not kept: RuntimeError: ") for line in lines[1::2])


@pytest.mark.parametrize("content", [b"", b"no JSON\n", b"[]\n", None])
def test_a_neighbour_that_cannot_be_read_is_none(folder, content):
  for path in folder.iterdir():
    path.unlink()
    if content is None:
      path.mkdir()
    else:
      path.write_bytes(content)
  assert "none of this model" in StoredSteps(folder, pytest.fail)._nearest({}, small.models(), first=True)


def test_of_another_search(folder, kept):
  """It gets files of its own, and is told what the nearest one differs in."""
  search, lines = dataclasses.replace(small.SEARCH, noise_sigma=0.25), []
  _search(StoredSteps(folder, lines.append), search)
  assert len(lines) == 2
  assert all("program.search.noise_sigma was -0.1 and is 0.25" in line for line in lines)
  assert len(list(folder.iterdir())) == 4
  for name, content in kept[0].items():
    assert (folder / name).read_bytes() == content


def test_on_a_mesh(folder):
  """Other devices are another program; what is kept of it gives the same search."""
  sizes = {"data": 1, "candidate": 4, "model": 1}
  mesh = device_mesh.make_mesh(sizes, small.MODEL, small.SEARCH, jax.devices()[:4])
  models, lines = dataclasses.replace(small.models(), execution=Execution(mesh=mesh)), []
  first = _search(StoredSteps(folder, lines.append), models=models)
  assert len(lines) == 2
  _assert_equal(_search(StoredSteps(folder, pytest.fail), models=models), first)
  names = {path.name.rsplit("-", 1)[0] for path in folder.iterdir()}
  assert names >= {"small-1x2x2x1x1-first", "small-1x2x2x1x1-later"}


def test_everything_static_is_in_the_identity():
  """Two searches that compile differently never share a file."""
  identity = lambda models, **options: executables.program_identity(models, small.SEARCH, **options)
  base = identity(small.models(), first=True, record=False)
  others = [
    identity(small.models(), first=False, record=False),
    identity(small.models(), first=True, record=True),
    identity(dataclasses.replace(small.models(), image_reward=small.ImageMatch(7)), first=True, record=False),
    identity(dataclasses.replace(small.models(), execution=Execution(attention="flash")), first=True, record=False),
    identity(
      dataclasses.replace(small.models(), config=dataclasses.replace(small.MODEL, fps=8)), first=True, record=False
    ),
  ]
  assert all(other != base for other in others)


def test_a_restored_state_lies_where_the_first_one_did():
  """Only what really divides an array counts: saved and restored states spell their shardings out."""
  sizes = {"data": 1, "candidate": 2, "model": 2}
  mesh = device_mesh.make_mesh(sizes, small.MODEL, small.SEARCH, jax.devices()[:4])
  layout = lambda *axes: executables._layout(NamedSharding(mesh, PartitionSpec(*axes)))
  assert layout("beam") == layout("beam", None, None) == layout("beam", "sibling") == layout(("beam", "data"))
  assert layout() == layout("data") == "whole"
  assert len({layout("beam"), layout(None, "beam"), layout("model"), layout("beam", "model"), layout()}) == 5
