"""Run manifests: strict JSON written whole, and measurements that measure what they say."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.io import manifest


def _refuse(constant):
  raise AssertionError(f"{constant} is not strict JSON")


def _write_and_read(path, data):
  manifest.write_json(path, data)
  return json.loads(path.read_text(), parse_constant=_refuse)


def test_what_json_cannot_hold_becomes_null_or_a_number(tmp_path):
  data = {
    "score": float("nan"),
    "history": [1.5, float("-inf"), np.float32("inf")],
    "array": np.array([[1.0, np.nan], [2.0, 3.0]]),
    "device": jnp.array([1.5, jnp.inf], jnp.bfloat16),
    "count": np.int64(3),
    "flag": np.True_,
    "mask": jnp.array([True, False]),
    "path": pathlib.PurePosixPath("runs/a"),
    "none": None,
    "prompt": "un cercle rouge, à gauche",
  }
  assert _write_and_read(tmp_path / "run" / "manifest.json", data) == {
    "score": None,
    "history": [1.5, None, None],
    "array": [[1.0, None], [2.0, 3.0]],
    "device": [1.5, None],
    "count": 3,
    "flag": True,
    "mask": [True, False],
    "path": "runs/a",
    "none": None,
    "prompt": "un cercle rouge, à gauche",
  }


def test_dataclasses_are_objects(tmp_path):
  search = SearchConfig.paper(beam_size=3)
  assert _write_and_read(tmp_path / "a.json", {"search": search}) == {"search": dataclasses.asdict(search)}


def test_a_checksum_is_that_of_the_other_fields(tmp_path):
  """By hand: SHA-256 of the fields sorted by name, on one line."""
  found = _write_and_read(tmp_path / "a.json", {"seed": 3, "prompt": "ü"})
  assert not manifest.is_whole(found)
  manifest.write_json(tmp_path / "a.json", {"seed": 3, "prompt": "ü"}, checksum=True)
  found = json.loads((tmp_path / "a.json").read_text())
  assert found.pop(manifest.CHECKSUM) == hashlib.sha256(rb'{"prompt": "\u00fc", "seed": 3}').hexdigest()
  assert found == {"seed": 3, "prompt": "ü"}


@pytest.mark.parametrize("change", [{"seed": 4}, {"seed": 3.0}, {"seed": True}, {"prompt": "u"}, {"more": None}])
def test_another_content_is_not_whole(tmp_path, change):
  manifest.write_json(tmp_path / "a.json", {"seed": 3, "prompt": "ü", "scores": [1.5, float("nan")]}, checksum=True)
  found = json.loads((tmp_path / "a.json").read_text())
  assert manifest.is_whole(found)
  assert not manifest.is_whole(found | change)
  assert not manifest.is_whole({name: value for name, value in found.items() if name != "seed"})


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ({"a": [1, {2, 3}]}, r"data.a\[1\] cannot be written as JSON: it is a set"),
    ({"a": {1: 2}}, "key 1 is not a string"),
    ({"a": np.array([1j])}, "it is a complex"),
    ({"a": SearchConfig}, "it is a type"),
  ],
)
def test_other_objects_are_refused_and_nothing_is_written(tmp_path, data, message):
  with pytest.raises(ConfigError, match=message):
    manifest.write_json(tmp_path / "a.json", data)
  assert list(tmp_path.iterdir()) == []


def test_a_failing_write_keeps_the_earlier_file(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  manifest.write_json(path, {"chunk": 1})

  def full(self, content):
    self.touch()
    raise OSError("No space left on device")

  monkeypatch.setattr(type(epath.Path(path)), "write_bytes", full)
  with pytest.raises(OSError, match="No space left"):
    manifest.write_json(path, {"chunk": 2})
  assert json.loads(path.read_text()) == {"chunk": 1}
  assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_environment_is_json_and_names_what_runs(tmp_path):
  found = _write_and_read(tmp_path / "a.json", manifest.environment())
  assert found["versions"]["jax"] == jax.__version__
  assert set(found["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy", "streamt1_jax"}
  assert found["platform"] == "cpu"
  assert found["device_count"] == 8
  assert found["process_count"] == 1


def test_peak_memory_is_in_bytes():
  """More than an array just filled, and less than a terabyte: neither kibibytes nor bits."""
  block = np.ones(2**26, np.uint8)
  assert block.nbytes < manifest.peak_rss_bytes() < 2**40


def test_device_peak_is_bytes_or_unknown():
  peak = manifest.peak_device_bytes()
  assert peak is None or peak >= 0


def test_phases_add_up_in_the_order_entered():
  timer = manifest.PhaseTimer()
  with timer.phase("load"):
    time.sleep(0.01)
  with contextlib.suppress(KeyError), timer.phase("search"):
    time.sleep(0.01)
    raise KeyError
  with timer.phase("load"):
    time.sleep(0.01)
  assert list(timer.seconds) == ["load", "search"]
  assert timer.seconds["load"] >= 0.02
  assert timer.seconds["search"] >= 0.01


def test_compilations_are_counted_once_per_program():
  @jax.jit
  def double(x):
    return x * 2

  small, large = jnp.ones(3), jnp.ones(4)
  with manifest.CompileCounter() as compiles:
    double(small)
    assert compiles.count == 1
    double(small)
    assert compiles.count == 1
    double(large)
    assert compiles.count == 2
    assert compiles.seconds > 0
  jax.jit(lambda x: x + 5)(small)
  assert compiles.count == 2


def test_counters_may_nest_and_follow_each_other():
  x = jnp.ones(5)
  with manifest.CompileCounter() as outer:
    jax.jit(lambda x: x + 1)(x)
    with manifest.CompileCounter() as inner:
      jax.jit(lambda x: x + 2)(x)
    jax.jit(lambda x: x + 3)(x)
  assert (outer.count, inner.count) == (3, 1)
