"""Searches that go on where they were saved: bit for bit, from the newest save that is whole."""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import resource
import signal

import jax
import numpy as np
import pytest
from etils import epath

from streamt1_jax import drivers, save_folder, saved_search
from streamt1_jax.config import ConfigError
from streamt1_jax.execution import Execution
from streamt1_jax.io import checkpoint, manifest, part_files, paths, stored_part
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel.sharding import tree_shardings
from streamt1_jax.saved_search import SavedSearch, SaveError
from tests import memory_store
from tests import small_search as small

NUM_CHUNKS = 8
SETTINGS = {"prompts": ["a red circle"], "seed": 3}
# Every chunk is worth remembering, so that sinks change too.
SEARCH = dataclasses.replace(small.SEARCH, short_threshold=-10.0)


@functools.cache
def _inputs(sizes=()):
  """Params, condition and models. There are two prompts if the mesh divides them."""
  mesh = device_mesh.make_mesh(dict(sizes), small.MODEL, SEARCH) if sizes else None
  models = dataclasses.replace(small.models(), execution=Execution(mesh=mesh))
  params, condition = small.params(), small.condition(NUM_CHUNKS)
  if mesh is not None:
    params = {name: jax.device_put(part, tree_shardings(mesh, name, part)) for name, part in params.items()}
    condition = drivers.stack_conditions([condition, small.condition(NUM_CHUNKS, prompt=1)], mesh)
  return params, condition, models


def _seed(sizes):
  return (3, 4) if sizes else 3


def _states(sizes=(), state=None):
  options = {"num_chunks": NUM_CHUNKS, "seed": _seed(sizes), "state": state}
  for state, trace in drivers.stream_states(*_inputs(sizes), SEARCH, **options):
    yield state, jax.device_get(trace)


def _by_prompt(traces, sizes=()):
  return [[drivers.of_prompt(trace, i) for trace in traces] for i in range(2)] if sizes else [traces]


@functools.cache
def _undisturbed(sizes=()):
  return [trace for _, trace in _states(sizes)]


def _run(folder, *, until, save_at, sizes=(), warn=pytest.fail):
  """Goes on from the newest save, up to `until`, and stops as if killed. Returns where it began, and all chunks."""
  params, _, models = _inputs(sizes)
  with SavedSearch(folder, SETTINGS) as saved:
    progress = saved.restore(drivers.abstract_state(params, models, SEARCH, _seed(sizes), num_chunks=NUM_CHUNKS), warn)
    start, first = progress or (None, 0)
    traces = [list(chunks) for chunks in zip(*saved.traces(), strict=True)] or [[] for _ in range(2 if sizes else 1)]
    assert len(traces[0]) == first
    for state, trace in itertools.islice(_states(sizes, start), until - first):
      for chunks, made in zip(traces, _by_prompt([trace], sizes), strict=True):
        chunks.extend(made)
      if len(traces[0]) in save_at:
        saved.save(state, [chunks[saved.begun :] for chunks in traces])
  return first, traces


def _assert_same(traces, sizes=()):
  jax.tree.map(np.testing.assert_array_equal, traces, _by_prompt(_undisturbed(sizes), sizes))


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
  """Where saves go. In a bucket nothing is renamed, so a save has its name while it is written."""
  if request.param == "disk":
    yield epath.Path(tmp_path)
    return
  memory_store.install()
  folder = epath.Path("gs://bucket/videos/.one.saved")
  yield folder
  saved_search.discard(folder)
  assert not [name for name in memory_store.objects() if "saved" in name]


@pytest.mark.parametrize("folder", ["disk"], indirect=True)
def test_resumed_twice_is_the_undisturbed_search(folder):
  """Each save begins while the next chunk already takes the buffers of what is saved."""
  assert _run(folder, until=4, save_at=(1, 3))[0] == 0
  assert _run(folder, until=7, save_at=(4, 6))[0] == 3
  first, traces = _run(folder, until=8, save_at=())
  assert first == 6
  _assert_same(traces)
  assert saved_search.read_description(folder) == (SETTINGS, [3, 6], [])


def test_only_two_states_are_kept_and_every_trace_once(folder):
  _run(folder, until=7, save_at=(1, 2, 4, 7))
  assert sorted(path.name for path in folder.iterdir()) == ["000001", "000002", "000004", "000007", "search.json"]
  saves = [path for path in sorted(folder.iterdir()) if path.is_dir()]
  assert [path.name for path in saves if (path / "state").exists()] == ["000004", "000007"]
  assert all((path / "trace/part.json").exists() for path in saves)
  last = stored_part.open_part(folder / "000007/trace", None)
  assert {name.split("/")[0] for name in last.stores} == {"000004", "000005", "000006"}


def test_on_a_mesh(tmp_path):
  """Two prompts are searched in lockstep, and the state goes back to the shards it came from."""
  sizes = (("data", 2), ("candidate", 2), ("model", 2))
  _run(tmp_path, until=5, save_at=(4,), sizes=sizes)
  first, traces = _run(tmp_path, until=8, save_at=(), sizes=sizes)
  assert first == 4
  _assert_same(traces, sizes)
  params, _, models = _inputs(sizes)
  abstract = drivers.abstract_state(params, models, SEARCH, _seed(sizes), num_chunks=NUM_CHUNKS)
  state, _ = next(_states(sizes))
  same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, len(x.shape))
  assert jax.tree.all(jax.tree.map(same, abstract, state))
  assert "data" in abstract.beams.memory.k.sharding.spec


def _largest_file(folder):
  return max(paths.files_below(epath.Path(folder)), key=lambda path: path.stat().length)


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
  ("folder", "damage", "item", "message"),
  [
    ("disk", _flip, "state", "is corrupt"),
    ("disk", _truncate, "state", "is truncated"),
    ("disk", _flip, "trace", "is corrupt"),
    ("bucket", _flip, "state", "is corrupt"),
  ],
  indirect=["folder"],
)
def test_damaged_newest_save_falls_back(folder, damage, item, message):
  _run(folder, until=6, save_at=(3, 5))
  damage(_largest_file(folder / "000005" / item))
  warnings = []
  first, traces = _run(folder, until=8, save_at=(5, 7), warn=warnings.append)
  assert first == 3
  _assert_same(traces)
  (warning,) = warnings
  assert warning.startswith("the save after chunk 5 does not count: ")
  assert message in warning
  assert "\n" not in warning
  # What was damaged has been written again.
  assert _run(folder, until=8, save_at=())[0] == 7


def test_unfinished_and_wholly_damaged_saves(tmp_path):
  """A save that was being written has no name yet. If no whole save is left, the search begins anew."""
  _run(tmp_path, until=3, save_at=(2,))
  (tmp_path / "000002").rename(tmp_path / "000002.orbax-checkpoint-tmp")
  first, traces = _run(tmp_path, until=8, save_at=(2, 4))
  assert first == 0
  _assert_same(traces)
  assert not list(tmp_path.glob("*tmp*"))
  warnings = []
  # Every save needs the traces of the first chunks.
  _flip(_largest_file(tmp_path / "000002/trace"))
  assert _run(tmp_path, until=1, save_at=(), warn=warnings.append)[0] == 0
  assert len(warnings) == 2


def test_save_that_cannot_be_read_is_kept(tmp_path, monkeypatch):
  """It may be whole, and a file system may refuse only for a while."""
  _run(tmp_path, until=6, save_at=(3, 5))
  verify_files, before = part_files.verify_files, sorted(tmp_path.rglob("*"))

  def refuse_once(folder):
    monkeypatch.setattr(part_files, "verify_files", verify_files)
    raise PermissionError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(part_files, "verify_files", refuse_once)
  with pytest.raises(ConfigError, match="cannot go on after chunk 5; .* Permission denied") as refusal:
    _run(tmp_path, until=8, save_at=())
  assert "\n" not in str(refusal.value)
  assert sorted(tmp_path.rglob("*")) == before
  assert _run(tmp_path, until=5, save_at=())[0] == 5


@pytest.mark.parametrize("name", ["search.json", "000005/state", "000005/trace/part.json", "000005/state/_METADATA"])
def test_refusal_is_not_taken_for_absence(tmp_path, name):
  """A link to itself is there, but the system refuses to look at it."""
  _run(tmp_path, until=6, save_at=(3, 5))
  kept = tmp_path / "kept"
  (tmp_path / name).rename(kept)
  (tmp_path / name).symlink_to(tmp_path / name)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
    _run(tmp_path, until=8, save_at=())
  assert sorted(tmp_path.rglob("*")) == before
  (tmp_path / name).unlink()
  kept.rename(tmp_path / name)
  assert _run(tmp_path, until=5, save_at=())[0] == 5


def test_full_disk(tmp_path):
  """A failure names the folder, keeps the save before and leaves nothing unfinished."""
  states = _states()
  traces = []
  with SavedSearch(tmp_path, SETTINGS) as saved:
    for _ in range(2):
      state, trace = next(states)
      traces.append(trace)
    saved.save(state, [traces])
    saved.wait()
    state, trace = next(states)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
      saved.save(state, [[trace]])
      with pytest.raises(SaveError, match=r"cannot save .* \(the save after chunk 2 is kept\)"):
        saved.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
      signal.signal(signal.SIGXFSZ, handler)
  assert [path.name for path in tmp_path.iterdir() if path.name.isdigit()] == ["000002"]
  first, traces = _run(tmp_path, until=8, save_at=())
  assert first == 2
  _assert_same(traces)


def test_descriptions(tmp_path):
  assert saved_search.read_description(tmp_path / "missing") is None
  (tmp_path / "search.json").write_text('{"format_version": 2}')
  with pytest.raises(ConfigError, match=r"search\.json is corrupt"):
    saved_search.read_description(tmp_path)


def _alter(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def test_every_bit_of_the_description_is_checked(tmp_path):
  """A bit that flips is told, or the description is the one that was written: where names are put apart by layout."""
  expected = save_folder.Description(SETTINGS, [0], [])
  save_folder.write_description(epath.Path(tmp_path), expected)
  path = tmp_path / "search.json"
  content = path.read_bytes()
  assert saved_search.read_description(tmp_path) == expected
  harmless = 0
  for place in range(8 * len(content)):
    flipped = bytearray(content)
    flipped[place // 8] ^= 1 << place % 8
    path.write_bytes(flipped)
    with contextlib.suppress(part_files.Damaged):
      assert saved_search.read_description(tmp_path) == expected
      harmless += 1
  # Spaces become tabs and the like; and the name of the checksum may become another, with 17 letters of 8 bits.
  assert harmless < 8 * 17 + 3 * content.count(b" ") + content.count(b"\n")


@pytest.mark.parametrize("name", ["search.json", "000005/state/part.json", "000005/trace/part.json"])
def test_another_format_version_is_damage(tmp_path, name):
  """One bit makes another number. What is damaged does not count, and what is whole does."""
  _run(tmp_path, until=6, save_at=(3, 5))
  _alter(tmp_path / name, f'"format_version": {2 if name == "search.json" else 1}', '"format_version": 3')
  warnings = []
  first, traces = _run(tmp_path, until=8, save_at=(), warn=warnings.append)
  assert first == (5 if name == "search.json" else 3)
  _assert_same(traces)
  (warning,) = warnings
  assert name.split("/")[-1] in warning


def test_the_first_version_is_refused_and_kept(tmp_path):
  """Its keys were rotated at the frames of the whole video. It had no checksum."""
  path = tmp_path / "search.json"
  path.write_text(json.dumps({"format_version": 1, "settings": SETTINGS, "resumed_at": []}))
  (tmp_path / "000005/state").mkdir(parents=True)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ConfigError, match="format_version is 1, whose keys are rotated at .* this program reads 2"):
    _run(tmp_path, until=8, save_at=())
  assert sorted(tmp_path.rglob("*")) == before


def test_a_later_version_is_refused_and_kept(tmp_path):
  """It is not damaged: its checksum is right."""
  _run(tmp_path, until=4, save_at=(3,))
  description = json.loads((tmp_path / "search.json").read_text())
  del description[manifest.CHECKSUM]
  manifest.write_json(tmp_path / "search.json", description | {"format_version": 3}, checksum=True)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ConfigError, match="format_version is 3; this program reads 2"):
    _run(tmp_path, until=8, save_at=())
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), _flip])
def test_a_description_that_is_lost_is_taken_from_a_save(tmp_path, damage):
  _run(tmp_path, until=6, save_at=(3, 5))
  damage(tmp_path / "search.json")
  warnings = []
  first, traces = _run(tmp_path, until=8, save_at=(), warn=warnings.append)
  assert first == 5
  _assert_same(traces)
  (warning,) = warnings
  assert "search.json" in warning
  assert "the copy in the save after chunk 5 is taken" in warning
  assert saved_search.read_description(tmp_path) == (SETTINGS, [5], [])


def test_saves_without_any_description_are_removed_with_a_warning(tmp_path):
  _run(tmp_path, until=4, save_at=(3,))
  for path in tmp_path.rglob("search.json"):
    path.unlink()
  warnings = []
  assert _run(tmp_path, until=1, save_at=(), warn=warnings.append)[0] == 0
  (warning,) = warnings
  assert warning == f"{tmp_path} has 1 saves and no search.json that says of what; they are removed"


def test_folders_of_other_names_are_no_saves_and_stay(tmp_path):
  """Some have names that Python takes for digits or numbers."""
  names = ["²", "００００05", "5", "0000005", "000005x", "9" * 200, "notes"]
  _run(tmp_path, until=4, save_at=(3,))
  for name in names:
    (tmp_path / name / "state").mkdir(parents=True)
  assert _run(tmp_path, until=5, save_at=(4,))[0] == 3
  assert all((tmp_path / name / "state").exists() for name in names)
  assert _run(tmp_path, until=5, save_at=())[0] == 4


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_missing_chunk_is_damage(tmp_path, chunk):
  """The files are what their checksums say, but one chunk was never written."""
  _run(tmp_path, until=5, save_at=(2, 4))
  trace = tmp_path / ("000002" if chunk < 2 else "000004") / "trace"
  arrays = stored_part.open_part(trace, None)
  kept = {name: arrays.read(name) for name in arrays.stores if not name.startswith(f"{chunk:06}/")}
  assert 0 < len(kept) < len(arrays.stores)
  checkpoint.save_params(trace, checkpoint.nested(kept))
  warnings = []
  assert _run(tmp_path, until=4, save_at=(), warn=warnings.append)[0] == (2 if chunk > 1 else 0)
  assert "the traces of some of the first 4 chunks are missing" in warnings[0]


def test_the_state_is_what_was_saved(tmp_path):
  """Leaf by leaf: score histories may differ without a later decision that shows it."""
  _run(tmp_path, until=5, save_at=(5,))
  expected = next(state for state, trace in _states() if int(state.chunk_index) == 5)
  params, _, models = _inputs()
  with SavedSearch(tmp_path, SETTINGS) as saved:
    abstract = drivers.abstract_state(params, models, SEARCH, _seed(()), num_chunks=NUM_CHUNKS)
    state, chunks = saved.restore(abstract, pytest.fail)
    traces = [trace for (trace,) in saved.traces()]
  assert chunks == 5
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))
  _assert_same([traces + _undisturbed()[5:]])
  history = jax.device_get(state.beams.history)
  # No two numbers of a history are the same, so none could stand in another's place.
  numbers = [*history.short_sum, *history.recent.ravel(), *history.long]
  assert len({float(number) for number in numbers}) > len(numbers) // 2
  assert not np.array_equal(history.short_sum, history.long)
  assert history.count.tolist() == [5] * SEARCH.top_k


@pytest.mark.usefixtures("unchecked_types")
def test_traces_of_other_fields_are_refused(tmp_path):
  """As a later version of the program would find them, whose format version is the same by mistake."""
  save_folder.write_description(epath.Path(tmp_path), save_folder.Description({}, []))
  (tmp_path / "000001/state").mkdir(parents=True)
  checkpoint.save_params(tmp_path / "000001/trace", {"000000": {"0": {"score": np.ones(2, np.float32)}}})
  with SavedSearch(tmp_path, SETTINGS) as saved, pytest.raises(ConfigError, match="its traces have other fields"):
    saved.restore(None, pytest.fail)
  assert (tmp_path / "000001/trace").exists()
