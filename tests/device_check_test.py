"""The check of a device: what becomes of parts that fail, hang or have no time, and the parts themselves on a CPU."""

import importlib.util
import json
import pathlib
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.config import preset
from streamt1_jax.measuring import device_check, device_numerics, device_speed, random_search
from streamt1_jax.measuring.device_check import FAILED, NO_TIME, OK, PARTS, SKIPPED, Outcome, Part
from streamt1_jax.measuring.device_sizes import SIZES, NotHere
from streamt1_jax.rewards.table import LEARNED_REWARDS
from tests.command_line import REPOSITORY, call

_GOOD = 'print("noise"); print(\'{"status": "ok", "found": {"rate": 2.5}, "environment": {"platform": "cpu"}}\')'
_SKIPPED = 'print(\'{"status": "not here", "reason": "no GPU", "environment": {}}\')'


def _unused(sizes):
  raise AssertionError("parts run in processes of their own")


def _run(scripts: dict[str, str], limit: float = 60.0, seconds: float = 120.0) -> list[Outcome]:
  """Parts that are small scripts."""
  parts = [Part(name, limit, _unused) for name in scripts]
  return list(device_check.run(parts, lambda part: ["-c", scripts[part.name]], seconds))


def test_a_part_that_fails_does_not_hurt_the_others():
  scripts = {
    "raises": "import sys; print('half', file=sys.stderr); raise ValueError('no such kernel')",
    "dies": "import os; os.abort()",
    "good": _GOOD,
    "elsewhere": _SKIPPED,
    "silent": "",
  }
  outcomes = {outcome.name: outcome for outcome in _run(scripts)}
  assert list(outcomes) == list(scripts)
  assert [outcome.status for outcome in outcomes.values()] == [FAILED, FAILED, OK, SKIPPED, FAILED]
  assert outcomes["raises"].reason == "exit code 1: ValueError: no such kernel"
  assert outcomes["dies"].reason == "exit code -6: it said nothing"
  assert outcomes["good"].found == {"rate": 2.5}
  assert outcomes["elsewhere"].reason == "no GPU"
  assert all("\n" not in outcome.reason for outcome in outcomes.values())


def test_a_limit_ends_a_part_and_what_it_started(tmp_path):
  """The part and a process of its own write on and on; afterwards nothing is written any more."""
  file = tmp_path / "alive"
  loop = f"import time\nwhile True: open({str(file)!r}, 'a').write('x'); time.sleep(0.05)"
  script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {loop!r}])"
  hanging, good = _run({"hangs": script, "good": _GOOD}, limit=2.0)
  assert (hanging.status, hanging.reason) == (FAILED, "it took more than its 2 s")
  assert 2 <= hanging.seconds < 60
  assert good.status == OK
  size = file.stat().st_size if file.exists() else 0
  time.sleep(0.5)
  assert (file.stat().st_size if file.exists() else 0) == size


def test_no_part_begins_when_the_time_is_over(monkeypatch):
  monkeypatch.setattr(device_check, "_LEAST", 0.5)
  first, second = _run({"hangs": "import time; time.sleep(60)", "late": _GOOD}, limit=30.0, seconds=1.2)
  assert (first.status, second.status) == (FAILED, NO_TIME)
  assert second.seconds == 0


def test_parts_that_compile_share_an_empty_folder():
  """And no other part sees it."""
  script = (
    "import json, os, pathlib; cache = os.environ.get('JAX_COMPILATION_CACHE_DIR'); "
    "found = sorted(os.listdir(cache)) if cache else None; "
    "cache and (pathlib.Path(cache) / 'program').touch(); "
    "print(json.dumps({'status': 'ok', 'found': {'cache': cache, 'holds': found}, 'environment': {}}))"
  )
  names = ("machine", "compilation_cold", "compilation_warm")
  machine, cold, warm = (outcome.found for outcome in _run(dict.fromkeys(names, script)))
  assert machine["cache"] != cold["cache"] == warm["cache"]
  assert (cold["holds"], warm["holds"]) == ([], ["program"])


def test_file_is_evidence(tmp_path):
  """What the documentation's program renders, with a value of every kind and a reason."""
  outcomes = [
    Outcome("a", OK, 3.2, {"peak_bytes": 2_500_000_000, "equal": True, "rate": 0.12345}, "", {"platform": "gpu"}),
    Outcome("b", FAILED, 9.0, {}, "exit code 1: no memory"),
    Outcome("c", OK, 1.0, {"error": float("inf")}),
  ]
  document = device_check.document("python -m x", "full", outcomes)
  device_check.write(tmp_path / "check.json", document)
  read = json.loads((tmp_path / "check.json").read_text())
  assert read["rows"] == [
    ["a", "ok", "3", "peak bytes 2.50 GB; equal yes; rate 0.123"],
    ["b", "failed", "9", "exit code 1: no memory"],
    ["c", "ok", "1", "error inf"],
  ]
  assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", read["date"])
  assert re.fullmatch(r"[0-9a-f]{7,40}", read["commit"])
  assert read["machine"] == "unknown device (gpu)"
  assert read["outcomes"][0]["found"]["rate"] == 0.12345
  rendered = _evidence_program().render(read)
  assert "| b | failed | 9 | exit code 1: no memory |" in rendered


def _evidence_program():
  spec = importlib.util.spec_from_file_location("make_evidence", REPOSITORY / "docs" / "make_evidence.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_page_without_a_file_says_so():
  program, page = _evidence_program(), "# T\n\n<!-- evidence: device_check -->\n\n<!-- end of evidence -->\n"
  if not (program.EVIDENCE / "device_check.json").exists():
    assert "No device has run this yet." in program.fill(page)
  with pytest.raises(FileNotFoundError):
    program.fill(page.replace("device_check", "no_such_file"))


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (["--only=machine,warp"], ["--only", "'warp'", "machine, attention_fold"]),
    (["--minutes=0"], ["--minutes=0"]),
    (["--sizes=huge"], ["--sizes=huge", "full|small"]),
    (["--output=s3://bucket/file"], ["--output=s3://bucket/file", "a path of this machine or gs://"]),
  ],
)
def test_bad_input(tmp_path, arguments, fragments):
  result = call("measure.device_check", tmp_path, *arguments)
  assert result.code == 2, result
  (line,) = result.stderr.splitlines()
  for fragment in fragments:
    assert fragment in line
  assert list(tmp_path.iterdir()) == []


def test_names_and_order():
  names = [part.name for part in PARTS]
  assert len(set(names)) == len(names)
  assert names.index("attention_fold") < names.index("streaming") < names.index("search_2x2") < names.index("decoder")
  assert all(part.limit > 0 for part in PARTS)


@pytest.mark.parametrize("implementation", ["flash", "triton"])
def test_kernels_are_not_interpreted(implementation):
  with pytest.raises(NotHere, match=f"{implementation} is not compiled for a cpu"):
    device_numerics.attention(SIZES["small"](), implementation)


def _asks_for_nothing():
  """Whether a TPU would round the factors of a product that leaves its precision to the settings."""
  x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
  text = jax.export.export(jax.jit(lambda x: x @ x), platforms=["tpu"])(x).mlir_module()
  assert "stablehlo.dot_general" in text
  return "HIGHEST" not in text


class TestProducts:
  """Those of the host are exact. A device has the products of users: a head that lost its own HIGHEST is not hidden."""

  def test_rewards(self, monkeypatch):
    rounded = []
    monkeypatch.setattr(device_numerics, "_scores", lambda *_: rounded.append(_asks_for_nothing()) or np.ones(4))
    found = device_numerics.rewards(SIZES["small"]())
    # The host in float32; then the device and the host in either dtype.
    assert rounded == [False, True, False, True, False] * len(LEARNED_REWARDS)
    assert found["equal"]

  @pytest.mark.parametrize(("of_device", "equal"), [(1.07, True), (1.09, False)])
  def test_a_device_may_lose_twice_what_the_host_loses(self, monkeypatch, of_device, equal):
    losses = {(np.dtype(jnp.bfloat16), True): 1.04, (np.dtype(jnp.bfloat16), False): of_device}
    judged = lambda name, dtype, device, precision: np.ones(4) * losses.get((np.dtype(dtype), device is not None), 1.0)
    monkeypatch.setattr(device_numerics, "_judged", judged)
    assert device_numerics.rewards(SIZES["small"]())["equal"] == equal

  def test_attention(self, monkeypatch):
    rounded = []
    chunk = types.SimpleNamespace(latents=np.ones(4))
    monkeypatch.setattr(drivers, "stream", lambda *_, **__: rounded.append(_asks_for_nothing()) or [chunk])
    monkeypatch.setattr(random_search, "build", lambda *_: types.SimpleNamespace(**_BUILT))
    found = device_numerics.attention(SIZES["small"](), "fold")
    assert rounded == [False, True, True]
    assert found["equal"]


_BUILT = {"params": {}, "condition": {}, "models": None, "model": preset("tiny")}


def test_relative_error():
  assert device_numerics.relative_error([3.0, 4.0], [3.0, 4.5]) == pytest.approx(0.5 / np.hypot(3, 4.5))
  assert device_numerics.relative_error([np.nan], [1.0]) == np.inf


@pytest.mark.slow
def test_one_call_of_a_large_reward():
  """Slow: it compiles a reward. As many bytes as the shapes say, and a score."""
  found = device_speed.reward(SIZES["small"](), "hpsv3", "int8")
  assert found["finite"]
  assert found["seconds"] > 0
  assert 0 < found["weight_bytes"] < 4e6


@pytest.mark.slow
def test_the_decoder_alone():
  """Slow: it compiles the decoder twice."""
  found = device_speed.decoder(SIZES["small"]())
  for way in ("frame_by_frame", "at_once"):
    assert found[f"{way}_frames_per_second"] == pytest.approx(12 / found[f"{way}_seconds_per_chunk"])


@pytest.mark.slow
def test_streaming_small():
  """Slow: it compiles both programs of a video. 12 frames a chunk, and nothing is compiled while chunks are timed."""
  found = device_speed.streaming(SIZES["small"]())
  assert found["frames"] == "12x32x32x3"
  assert found["frames_per_second"] == pytest.approx(12 / found["seconds_per_chunk"])
  assert found["seconds_per_chunk"] < found["compile_seconds"] < found["seconds_of_the_video"]


def test_the_program_runs_a_part(tmp_path):
  """From the command to the file, with the one part that compiles least."""
  output = tmp_path / "deep" / "check.json"
  result = call("measure.device_check", REPOSITORY, "--only=machine", "--sizes=small", f"--output={output}")
  assert result.code == 0, result
  head, _, row = result.stdout.splitlines()
  assert head == "| part | status | seconds | found |"
  assert row.startswith("| machine | ok |")
  (read,) = json.loads(output.read_text())["outcomes"]
  assert read["found"]["float32_tflops"] > 0
  assert [path.name for path in pathlib.Path(output.parent).iterdir()] == ["check.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention_fold", "golden_search", "small_rewards", "search_2x2", "compilation_cold"])
def test_the_other_parts(name):
  """Slow: each compiles a search or two."""
  (part,) = [part for part in PARTS if part.name == name]
  found = part.check(SIZES["small"]())
  assert found.get("equal", True), found
