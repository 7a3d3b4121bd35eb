"""The memory plan: its arithmetic by hand, against recorded compilations, and as the command tells it."""

import dataclasses
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.io import checkpoint
from streamt1_jax.measuring import plan_check
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.planning import memory, programs, request
from streamt1_jax.planning.memory import GIB, Sizes
from streamt1_jax.planning.request import Request
from streamt1_jax.rewards.folder import config_json_bytes
from streamt1_jax.rewards.table import LEARNED_REWARDS, REWARDS
from tests.command_line import call, generate, save_model

EVIDENCE = pathlib.Path(__file__).parents[1] / "docs" / "evidence"
PROMPT = "a red circle moves left over a dark blue background"

# Two beams of two on one device. Decoding takes more than generating: the numbers are made so.
SIZES = Sizes(
  weights={"the backbone": 1000, "hpsv3": 3000},
  memory=5000,
  decoder_state=700,
  rest=90,
  prompt=10,
  results=1,
  beams=2,
  candidates=4,
  decoded_frames=3,
  window=0,
  chunk_memory=20,
  block=5,
  generated=30,
  decoded=100,
  rows_divided=False,
  large_frames=True,
  keeps_candidates=True,
  beams_in_all=2,
)


def test_arithmetic_by_hand():
  arguments = 1000 + 3000 + 5000 + 2 * 700 + 90 + 10
  # Candidates' states, or the winners' alone, and those of beams that move; then 7.4 activations of one frame, or of
  # the three frames of each of four candidates.
  temporaries = {"together": (4 + 2) * 700 + 740 * 12, "in_turn": (4 + 2) * 700 + 740, "twice": (2 + 2) * 700 + 740}
  errors = {"together": 190 * 12, "in_turn": 190, "twice": 190}
  for way in memory.WAYS:
    one = memory.estimate(SIZES, way)
    assert (one.argument_bytes, one.temporary_bytes, one.error) == (arguments, temporaries[way], errors[way])

    assert one.total == arguments + temporaries[way] + 1
  assert memory.estimate(SIZES, "twice").largest == ("memory of the beams", 5000)


def test_what_is_kept_and_carried_on_by_hand():
  """A copy of the state is memories, decoder states and the rest of both beams; what is carried on has half of it.

  All candidates at once have it twice: `bench_mid` compiled for a CPU takes 323 MB for 1 x 4 candidates that are
  carried on together. The rest of the chunk is 57 MB of that, and a beam's part of the state 33 MB.
  """
  state = 5000 + 90 + 2 * 700
  several = dataclasses.replace(SIZES, kept_states=3, looks_ahead=True)
  for way, carried in (("together", 8), ("in_turn", 2), ("twice", 2)):
    one, usual = memory.estimate(several, way), memory.estimate(SIZES, way)
    assert one.argument_bytes - usual.argument_bytes == 3 * state
    assert one.temporary_bytes - usual.temporary_bytes == carried * state // 2


def test_windows_decoded_from_scratch():
  """Each candidate that is decoded has a state of its own, its window's frames and, all at once, their activations."""
  sizes = dataclasses.replace(SIZES, keeps_candidates=False, decoded_frames=30, window=250)
  assert memory.estimate(sizes, "in_turn").temporary_bytes == (2 + 2) * 700 + 250 + 740
  together = (4 * 700) + 4 * 250 + 740 * 4 * 30
  assert memory.estimate(sizes, "together").temporary_bytes == together
  one_beam = dataclasses.replace(sizes, beams=1, beams_in_all=1)
  assert memory.estimate(one_beam, "together").temporary_bytes == together
  model = preset("wan_1_3b")
  for way, window in (("streamed", 0), ("scratch", 1 + 4 * 29)):
    search = SearchConfig.released(reward_decode=way)
    found = request.sizes(Request(model, search, {}, jnp.bfloat16, jnp.bfloat16, Execution(), kernel=True))
    assert (found.window, found.decoded_frames) == (window * 480 * 832 * 3, 30 if window else 3)


def test_generating_may_take_more_than_decoding():
  """Keys and values of two winners three times, one block, four candidates; 10 % of it is the error."""
  one = memory.estimate(dataclasses.replace(SIZES, generated=2000), "twice")
  assert one.temporary_bytes == 3 * 2 * 20 + 5 + 4 * 2000
  assert one.error == round(0.1 * (3 * 2 * 20 + 5 + 4 * 2000))


def test_where_candidates_are_alone_or_not_kept():
  alone = dataclasses.replace(SIZES, beams=1, candidates=1)
  assert memory.estimate(alone, "in_turn").temporary_bytes == 700 + 740
  one_beam = dataclasses.replace(SIZES, beams=1, candidates=4, beams_in_all=1)
  assert memory.estimate(one_beam, "in_turn").temporary_bytes == 4 * 700 + 740
  from_scratch = dataclasses.replace(SIZES, keeps_candidates=False)
  assert memory.estimate(from_scratch, "in_turn").temporary_bytes == (2 + 2) * 700 + 740
  divided = dataclasses.replace(SIZES, rows_divided=True)
  assert memory.estimate(divided, "twice").temporary_bytes == (2 + 2) * 700 + 1500


# All of it: 10,501 between two chunks and handed to the host, then 4,940 in turn or 3,540 twice, each 190 off.
@pytest.mark.parametrize(
  ("limit", "choice", "fits"),
  [
    (None, "in_turn", True),
    (15_631, "in_turn", True),
    (15_630, "twice", True),
    (14_231, "twice", True),
    (13_851, "twice", True),
    (13_850, "twice", False),
  ],
)
def test_choice(limit, choice, fits):
  """A way is taken if its error does not matter; nothing is refused that the error might make fit."""
  plan = memory.make_plan(SIZES, limit)
  assert (plan.chosen.decoding, plan.fits) == (choice, fits)


def test_a_remedy_is_of_flags_that_there_are():
  """A program without --dtype names what else takes memory from a search, or nothing."""
  model = preset("wan_1_3b")
  asked = Request(model, SearchConfig.released(), {}, jnp.float32, jnp.float32, Execution(), kernel=True)
  half = request.plan(dataclasses.replace(asked, dtype=jnp.bfloat16), None).estimates[-1].total
  assert request.remedy(asked, half, {"dtype", "max_sink_frames"}) == "--dtype=bfloat16 would fit"
  assert request.remedy(asked, half, {"max_sink_frames", "mesh"}) is None
  less = request.plan(dataclasses.replace(asked, search=SearchConfig.released(max_sink_frames=3)), None)
  assert request.remedy(asked, less.estimates[-1].total, {"max_sink_frames"}) == "--max_sink_frames=3 would fit"


def _device(limit: int | None, process: int = 0):
  """A GPU that gives `limit` bytes; one without a limit reports no statistics at all."""
  stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": 1}
  return types.SimpleNamespace(platform="gpu", process_index=process, memory_stats=lambda: stats)


@pytest.mark.parametrize(
  ("devices", "on_mesh", "limit"),
  [
    ([_device(700), _device(300)], False, 700),
    ([_device(None)], False, None),
    ([_device(700), _device(600)], True, 600),
    ([_device(None), _device(600)], True, 600),
    # What another process has is for it to say.
    ([_device(700), _device(600), _device(500, process=1)], True, 600),
  ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_what_devices_give(monkeypatch, devices, on_mesh, limit):
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  mesh = types.SimpleNamespace(devices=np.array(devices)) if on_mesh else None
  assert request.device_limit(mesh) == limit


def test_small_frames_may_be_decoded_together():
  small = dataclasses.replace(SIZES, large_frames=False)
  assert memory.make_plan(small, 100_000).chosen.decoding == "together"
  assert memory.make_plan(SIZES, 100_000).chosen.decoding == "in_turn"
  assert memory.make_plan(SIZES, 100_000, "together").chosen.decoding == "together"


def test_refusal_is_one_line():
  plan = memory.make_plan(SIZES, 10_000, "in_turn")
  with pytest.raises(ConfigError, match="the largest part is memory of the beams") as caught:
    memory.require_fit(plan, "--top_k=1 would fit")
  assert "\n" not in str(caught.value)
  assert "--top_k=1 would fit" in str(caught.value)


def _evidence(name):
  return json.loads((EVIDENCE / f"{name}.json").read_text())


def test_every_recorded_compilation():
  """Temporaries are as close as the plan says. Arguments are by shapes; a program leaves out what it does not read."""
  slices = list(plan_check.of_slices(_evidence("compiled_slices")))
  candidates = list(plan_check.of_candidates(_evidence("memory_of_candidates")))
  assert len(slices) >= 12
  assert len(candidates) == 3
  for one in (*slices, *candidates):
    assert one.is_within, one
    assert -0.01 * GIB <= one.planned[0] - one.recorded[0] <= 0.3 * GIB, one


def test_bytes_of_the_published_search():
  """By hand: 287,539,200 bytes of keys and values a latent frame, 12 frames and 12 that sinks may add, two beams."""
  model = preset("wan_1_3b")
  asked = Request(model, SearchConfig.released(), {}, jnp.bfloat16, jnp.bfloat16, Execution(), kernel=True)
  whole = request.sizes(asked)
  assert whole.weights["the backbone"] == 2 * 1_418_996_800
  # The 1x1x1 convolution before the decoder, of 16 channels, is counted apart in the documentation.
  assert whole.weights["the decoder"] == 2 * (73_295_331 + 16 * 16 + 16)
  assert 0 <= whole.memory - 2 * 24 * 287_539_200 < 100e6
  assert whole.decoder_state == 2 * 944_286_720
  assert whole.chunk_memory == 3 * 287_539_200
  assert whole.decoded == 2 * 96 * 4 * 480 * 832
  mesh = device_mesh.make_mesh({"candidate": 2, "model": 4}, model, asked.search)
  shared = request.sizes(dataclasses.replace(asked, execution=Execution(mesh)))
  assert (shared.beams, shared.candidates, shared.rows_divided) == (1, 2, True)
  assert shared.memory == pytest.approx(whole.memory / 8, rel=0.02)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> pathlib.Path:
  """What a converted checkpoint says of itself, and not one weight."""
  folder = tmp_path_factory.mktemp("model") / "wan"
  folder.mkdir()
  checkpoint.save_config(epath.Path(folder), preset("wan_1_3b"), {"source": "test"})
  for name in LEARNED_REWARDS:
    spec = REWARDS[name]
    (folder / "rewards" / name).mkdir(parents=True)
    (folder / "rewards" / name / "reward.json").write_bytes(config_json_bytes(spec, spec.make_config()))
  return folder


_CHIP = ("--plan", "--dtype=bfloat16", "--attention=flash", "--device_memory=31.24")


def test_one_v6e_chip_with_both_rewards(tmp_path, full_size):
  """The one way that is known to fit, from files that hold no weight."""
  result = generate(
    tmp_path, f"--checkpoint={full_size}", *_CHIP, "--reward_dtype=int8", "--max_sink_frames=3", "--seconds=5"
  )
  assert result.code == 0, result
  assert "choice: --decoding=twice" in result.stdout
  assert "a device gives: 31.24 GiB" in result.stdout
  assert re.search(r"\| in_turn \|.*\| no \|", result.stdout)
  assert result.stdout.count("jit(_chunk_step)") == 2
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ("arguments", "choice"),
  [
    (("--reward=quality+coherence",), "twice"),
    (("--search=none",), "in_turn"),
    (("--device_memory=94.74",), "in_turn"),
  ],
)
def test_other_choices(tmp_path, full_size, arguments, choice):
  result = generate(tmp_path, f"--checkpoint={full_size}", *_CHIP, *arguments)
  assert result.code == 0, result
  assert f"choice: --decoding={choice}" in result.stdout


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    ((), ["--decoding=twice", "31.24 GiB", "weights of hpsv3", "--reward_dtype=int8 --max_sink_frames=3 would fit"]),
    (("--decoding=in_turn", "--reward=quality+coherence"), ["memory of the beams", "--decoding=twice would fit"]),
    (("--device_memory=8",), ["8.00 GiB", "no single device", "--mesh"]),
  ],
)
def test_a_plan_that_does_not_fit(tmp_path, full_size, arguments, fragments):
  result = generate(tmp_path, f"--checkpoint={full_size}", *_CHIP, *arguments)
  assert result.code == 2, result
  (line,) = result.stderr.splitlines()
  for fragment in fragments:
    assert fragment in line
  # A run is refused in the same words, before it looks for a weight.
  assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_is_refused(tmp_path):
  small = save_model(tmp_path / "small")
  result = generate(tmp_path, f"--checkpoint={small}", f"--prompt={PROMPT}", "--device_memory=0.0001")
  assert result.code == 2, result
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: this search takes about")
  assert not (tmp_path / "outputs").exists()


def test_a_search_still_needs_a_prompt(tmp_path):
  result = generate(tmp_path)
  assert result.code == 2
  assert "--prompt" in result.stderr
  assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("value", ["0", "nan", "1e300", "much"])
def test_bad_device_memory(tmp_path, value):
  result = generate(tmp_path, "--plan", f"--device_memory={value}")
  assert result.code == 2
  assert f"--device_memory={value}" in result.stderr


@pytest.mark.slow
def test_programs_are_those_that_are_compiled(tmp_path, caplog):
  """By what JAX itself says that it compiles, for a video longer than its window."""
  pipeline = Pipeline.load(save_model(tmp_path / "small"))
  search = SearchConfig.released(sliding_window=2)
  jax.clear_caches()
  with jax.log_compiles(), caplog.at_level("WARNING"):
    pipeline.generate(PROMPT, num_latent_frames=9, search=search)
  compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
  planned = [program.name for program in programs.of_search(pipeline.config, search, 3)]
  assert planned.count("_chunk_step") == 2
  assert sorted(name for name in compiled if name in planned) == sorted(planned)
  assert "_whole_video_scores" not in [p.name for p in programs.of_search(pipeline.config, search, 2)]


def test_program_that_checks_the_plan(tmp_path):
  """One row of each file, and a row that no plan meets."""
  for name, of_row in (("compiled_slices", ("9.09", "90.9")), ("memory_of_candidates", ("", ""))):
    evidence = _evidence(name)
    evidence["rows"] = [[cell.replace(*of_row) for cell in evidence["rows"][0]]]
    (tmp_path / f"{name}.json").write_text(json.dumps(evidence))
  result = call("measure.plan_check", tmp_path, "--evidence_dir=.")
  assert result.code == 0, result
  _, _, one, other = result.stdout.splitlines()
  assert one.startswith("| v6e:1x1 | candidate:1 | twice |")
  assert one.endswith("| no |")
  assert other.endswith("| yes |")
