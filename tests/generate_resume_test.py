"""The command line, stopped and started again: it goes on in the middle of a video, or says why it does not."""

import json
import os
import pathlib
import resource
import signal

import pytest
from etils import epath

from streamt1_jax import save_folder
from streamt1_jax.cli import results, stopped_searches
from streamt1_jax.config import ConfigError
from streamt1_jax.drivers import SearchError
from streamt1_jax.io import atomic, manifest
from streamt1_jax.saved_search import SavedSearch
from tests.command_line import (
  generate,
  result_of,
  run_generate,
  save_model,
  start_function,
)

PROMPT = "a red circle moves left over a dark blue background"
FOLDER = results.result_folder("outputs", PROMPT).name
NUM_CHUNKS = 4
# Flags that a search on one device cannot go on with, and what is told.
OTHER_FLAGS = [
  (("--mesh=data:1", "--seed=8", "--noise_sigma=0.5"), "seed 0, not 8"),
  (("--mesh=data:1", "--decoding=in_turn"), "decoding together, not in_turn"),
  (("--mesh=data:1", "--attention=fold"), "attention None, not fold"),
  (("--mesh=candidate:2",), "mesh None, not {'data': 1, 'beam': 2, 'sibling': 1, 'model': 1, 'seq': 1}"),
]


class Runs:
  """Runs the command in one folder."""

  def __init__(self, folder, checkpoint):
    self.folder = folder
    self.arguments = [f"--checkpoint={checkpoint}", f"--num_latent_frames={3 * NUM_CHUNKS}", f"--prompt={PROMPT}"]
    self.saved = folder / "outputs" / f".{FOLDER}.saved"

  def run(self, *arguments):
    return generate(self.folder, *self.arguments, "--save_every=1", *arguments)

  def read(self, name):
    return (self.folder / "outputs" / FOLDER / name).read_bytes()


def _in_a_process(folder, function, arguments, devices=1):
  """Runs `function` on the arguments in a process of its own, with the settings of this one."""
  settings = {"jax_num_cpu_devices": devices, "jax_default_matmul_precision": "highest"}
  process = start_function(folder, function, arguments, jax_settings=settings)
  process.join()
  return result_of(process.exitcode, folder)


def _generate_until_the_disk_is_full(arguments):
  """The disk is full once the first chunk is saved: from then on no file grows beyond what every save needs.

  The files of the result, which grow too, are still smaller; pictures for the report would not be.
  """
  save_if_due = stopped_searches.save_if_due

  def fill_after(saved, *chunk):
    save_if_due(saved, *chunk)
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY:
      saved.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

  stopped_searches.save_if_due = fill_after
  run_generate(arguments)


def _after_sigterm(function):
  """`function`, as it runs when SIGTERM has just come."""

  def called(*arguments):
    signal.raise_signal(signal.SIGTERM)
    function(*arguments)

  return called


def _generate_killed_between_results(arguments):
  """Every save is whole before the search goes on: else a slow disk decides where the next process begins."""
  replace_folder, published, save = atomic.replace_folder, [], SavedSearch.save

  def save_and_wait(saved, *chunk):
    save(saved, *chunk)
    saved.wait()

  def kill_after_one(target, *rest):
    if published:
      os.kill(os.getpid(), signal.SIGKILL)
    published.append(target)
    replace_folder(target, *rest)

  SavedSearch.save = save_and_wait
  atomic.replace_folder = kill_after_one
  run_generate(arguments)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, checkpoint):
  runs = Runs(tmp_path_factory.mktemp("undisturbed"), checkpoint)
  result = generate(runs.folder, *runs.arguments, "--save_every=0")
  assert result.code == 0, result
  return runs


def test_stopped_in_every_way(tmp_path, monkeypatch, checkpoint, undisturbed):
  runs = Runs(tmp_path, checkpoint)

  result = _in_a_process(
    tmp_path, _generate_until_the_disk_is_full, [*runs.arguments, "--save_every=1", "--report=false"]
  )
  assert result.code == 3, result
  message = result.stderr.splitlines()[-1]
  reason = "(the save after chunk 1 is kept): File too large"
  assert message == f"error: cannot save the search to {runs.saved.resolve()} {reason}"
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "outputs" / FOLDER).exists()

  for chunk in (2, 3):
    with monkeypatch.context() as patched:
      patched.setattr(stopped_searches, "save_if_due", _after_sigterm(stopped_searches.save_if_due))
      result = runs.run()
    assert result.code == 143, result
    where = f"saved after chunk {chunk} of {NUM_CHUNKS}: the same command goes on from there"
    assert result.stderr.splitlines()[-1] == f"error: terminated, {where}"
    assert (runs.saved / f"00000{chunk}/state/part.json").is_file()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [runs.saved.name]

  before = _files(runs.saved)
  for flags, difference in OTHER_FLAGS:
    result = runs.run(*flags)
    assert result.code == 2, result
    assert result.stderr.startswith("error: ")
    assert f"{runs.saved.name} holds a stopped search with {difference}; " in result.stderr
    assert "--overwrite" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert _files(runs.saved) == before

  damaged = max((runs.saved / "000003/state").rglob("*"), key=lambda path: path.stat().st_size)
  damaged.write_bytes(damaged.read_bytes()[:-100])
  result = runs.run()
  assert result.code == 0, result
  (warning,) = [line for line in result.stderr.splitlines() if "warning: " in line]
  assert "the save after chunk 3 does not count" in warning
  assert "is truncated" in warning
  # Nothing else is left, and the video is the one that was never stopped.
  assert [path.name for path in (tmp_path / "outputs").iterdir()] == [FOLDER]
  for name in ("video.mp4", "trace.json", "contact_sheet.png"):
    assert runs.read(name) == undisturbed.read(name)
  made, expected = (json.loads(each.read("manifest.json")) for each in (runs, undisturbed))
  assert made["sha256"] == expected["sha256"]
  assert made["settings"] == expected["settings"]
  assert (made["resumed_at_chunks"], expected["resumed_at_chunks"]) == ([1, 2, 2], [])


def test_what_was_tried_before_a_stop_counts(tmp_path, monkeypatch, checkpoint):
  """Backtracking, with a chunk that is never good enough; stopped after the second of three."""
  flags = ("--search=backtracking", "--policy=motion:9,attempts:1", "--num_latent_frames=9", "--report=false")
  whole, stopped = (Runs(tmp_path / name, checkpoint) for name in ("whole", "stopped"))
  for runs in (whole, stopped):
    runs.folder.mkdir()
    runs.arguments[1:2] = flags
  assert whole.run().code == 0
  with monkeypatch.context() as patched:
    second = lambda *given: (_after_sigterm(save) if given[0].begun + len(given[2][0]) == 2 else save)(*given)
    save = stopped_searches.save_if_due
    patched.setattr(stopped_searches, "save_if_due", second)
    assert stopped.run().code == 143
  last = stopped.run()
  assert last.code == 0
  made, expected = (json.loads(each.read("manifest.json")) for each in (stopped, whole))
  # Work counts as if nothing had stopped; seconds are those of the last start, which the line says.
  assert f"; {made['cost'].pop('search_seconds'):,.1f} s of search from chunk 2 on\n" in last.stderr
  assert expected["cost"].pop("search_seconds") > 0
  assert (made["resumed_at_chunks"], expected["resumed_at_chunks"]) == ([2], [])
  assert [each["begin"] for each in expected["tries"]] == [1, 1, 2, 2]
  for name in ("tries", "cost", "sha256"):
    assert made[name] == expected[name]
  for runs in (stopped, whole):
    assert json.loads(runs.read("trace.json"))["tries"] == expected["tries"]


class _Saves:
  """Counts what a `SavedSearch` is told to save."""

  begun = 0

  def __init__(self, seconds):
    self._seconds, self.count = seconds, 0

  def seconds_since_save(self):
    return self._seconds

  def save(self, state, traces):
    self.count += 1


@pytest.mark.parametrize(
  ("every", "seconds", "chunks", "saves"),
  [(None, 59.0, 5, 0), (None, 61.0, 3, 1), (None, 61.0, 9, 0), (3, 1.0, 6, 1), (3, 99.0, 5, 0), (0, 99.0, 3, 0)],
)
def test_when_a_search_is_saved(every, seconds, chunks, saves):
  """A video of 9 chunks is saved by number, or once a minute, and never after the last chunk."""
  saved = _Saves(seconds)
  stopped_searches.save_if_due(saved, None, [[None] * chunks], 9, manifest.PhaseTimer(), every)
  assert saved.count == saves


@pytest.mark.slow
def test_killed_between_two_results(tmp_path, checkpoint):
  """The one that is there stays; the other is what it would have been, made from the last save of both."""
  prompts, outputs = (PROMPT, "a blue square stays"), tmp_path / "outputs"
  (tmp_path / "list.txt").write_text("\n".join(prompts))
  arguments = [f"--checkpoint={checkpoint}", "--num_latent_frames=6", "--prompts_file=list.txt", "--save_every=1"]
  arguments += ["--mesh=data:2"]
  killed = _in_a_process(tmp_path, _generate_killed_between_results, arguments, devices=2)
  assert killed.code == -signal.SIGKILL, killed
  folders = [results.result_folder(outputs, prompt) for prompt in prompts]
  (there,) = (folder for folder in folders if folder.exists())
  (missing,) = (folder for folder in folders if not folder.exists())
  before = _files(pathlib.Path(there))
  expected = json.loads((outputs / f".{missing.name}.partial/manifest.json").read_text())
  result = generate(tmp_path, *arguments)
  assert result.code == 0, result
  assert result.stdout.count("video.mp4") == 2
  assert sorted(path.name for path in outputs.iterdir()) == sorted(folder.name for folder in folders)
  assert _files(pathlib.Path(there)) == before
  made = json.loads((missing / "manifest.json").read_text())
  assert made["sha256"] == expected["sha256"]
  assert (made["resumed_at_chunks"], expected["resumed_at_chunks"]) == ([1], [])


def test_a_failed_search_is_removed_after_its_account_is_there(tmp_path, monkeypatch, checkpoint):
  """The search fails once its first chunk is saved; what is saved is noted when the account takes its place."""
  save_if_due, replace_folder = stopped_searches.save_if_due, results.atomic.replace_folder

  def fail_after(saved, *chunk):
    save_if_due(saved, *chunk)
    saved.wait()
    raise SearchError("every candidate is NaN or Inf")

  def replace_noted(target, *others):
    (tmp_path / "noted").write_text(" ".join(path.name for path in target.parent.glob(".*.saved/0*")))
    replace_folder(target, *others)

  monkeypatch.setattr(stopped_searches, "save_if_due", fail_after)
  monkeypatch.setattr(results.atomic, "replace_folder", replace_noted)
  runs = Runs(tmp_path, checkpoint)
  result = runs.run()
  assert result.code == 3, result
  assert (tmp_path / "noted").read_text() == "000001"
  assert [path.name for path in (tmp_path / "outputs").iterdir()] == [FOLDER]
  assert json.loads(runs.read("failed.json"))["error"] == "every candidate is NaN or Inf"


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestGroups:
  PROMPTS = ("a", "b", "c", "d", "e")

  def _make(self, output, finished=(), *, seed=0, overwrite=False, prompts=PROMPTS):
    folders = {prompt: epath.Path(output) / prompt for prompt in prompts}
    settings = lambda prompts: {"prompts": list(prompts), "seed": seed}
    return stopped_searches.group_prompts(folders, finished, 2, settings, overwrite=overwrite)

  def _stop(self, output, *prompts, seed=0):
    folder = stopped_searches.saved_folder(epath.Path(output) / prompts[0])
    description = save_folder.Description({"prompts": list(prompts), "seed": seed}, [])
    save_folder.write_description(folder, description)
    return folder

  def test_new_searches_take_what_is_missing(self, tmp_path):
    assert self._make(tmp_path) == [["a", "b"], ["c", "d"], ["e"]]
    assert self._make(tmp_path, ["a", "d"]) == [["b", "c"], ["e"]]

  def test_stopped_search_keeps_its_prompts(self, tmp_path):
    self._stop(tmp_path, "b", "d")
    assert self._make(tmp_path) == [["a", "c"], ["b", "d"], ["e"]]

  def test_stopped_search_whose_results_are_there(self, tmp_path):
    """Killed between the last of them and its end."""
    folder = self._stop(tmp_path, "a", "d")
    assert self._make(tmp_path, ["a", "d"]) == [["b", "c"], ["e"]]
    assert not folder.exists()

  def test_saves_of_results_that_are_all_there_are_removed(self, tmp_path):
    done, half = self._stop(tmp_path, "a", "d"), self._stop(tmp_path, "b", "c")
    folders = [epath.Path(tmp_path) / prompt for prompt in "abd"]
    stopped_searches.discard_finished(folders, ["a", "b", "d"])
    assert not done.exists()
    assert half.exists()

  def test_stopped_search_with_some_results_goes_on(self, tmp_path):
    """Killed between two of them: it needs all its prompts, also those whose results are there."""
    folder = self._stop(tmp_path, "a", "d")
    for finished in (["a"], ["d"], ["c", "d"]):
      assert self._make(tmp_path, finished)[0] == ["a", "d"]
    assert folder.exists()
    batch = stopped_searches.Batch({prompt: epath.Path(prompt) for prompt in "ad"}, {}, ["c", "d"])
    assert batch.missing == {"a": epath.Path("a")}

  def test_stopped_search_whose_other_results_are_not_asked_for_stays(self, tmp_path):
    folder = self._stop(tmp_path, "a", "d")
    assert self._make(tmp_path, ["a"], prompts="abc") == [["b", "c"]]
    assert folder.exists()

  def test_results_of_two_stopped_searches_are_made_by_the_first(self, tmp_path):
    first, second = self._stop(tmp_path, "a", "b"), self._stop(tmp_path, "d", "b")
    assert self._make(tmp_path) == [["a", "b"], ["c", "d"], ["e"]]
    assert first.exists()
    assert not second.exists()

  @pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 1}, "seed 0, not 1"), ({"prompts": "acde"}, r"prompts \['a', 'b'\], not \['a'\]")],
  )
  def test_other_settings_are_refused(self, tmp_path, changes, message):
    folder = self._stop(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match=message):
      self._make(tmp_path, **changes)
    assert folder.exists()
    self._make(tmp_path, overwrite=True, **changes)
    assert not folder.exists()

  @pytest.mark.parametrize("prompts", [0, "a", None, {"a": 1}, [["a"]], [3]])
  def test_prompts_of_another_type_are_refused(self, tmp_path, prompts):
    folder = stopped_searches.saved_folder(epath.Path(tmp_path) / "a")
    save_folder.write_description(folder, save_folder.Description({"prompts": prompts, "seed": 0}, []))
    with pytest.raises(ConfigError, match=r"\.a\.saved does not say which prompts"):
      self._make(tmp_path)
    stopped_searches.discard_finished([epath.Path(tmp_path) / "a"], ["a"])
    assert folder.exists()
    self._make(tmp_path, overwrite=True)
    assert not folder.exists()

  def test_same_settings_go_on_whatever_overwrite_says(self, tmp_path):
    folder = self._stop(tmp_path, "c", "d")
    assert self._make(tmp_path, overwrite=True) == [["a", "b"], ["c", "d"], ["e"]]
    assert folder.exists()
