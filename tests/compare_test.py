"""Comparisons of searches: who takes part, the folder that goes on, the numbers by hand, and the command."""

import ast
import base64
import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import streamt1_jax
from streamt1_jax import shipped
from streamt1_jax.cli import command, compare, search_flags
from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.data import shapes, world
from streamt1_jax.evaluation.compare import contenders, held_out, plots, pool, report, scenes, summary
from streamt1_jax.evaluation.compare.pool import Folder, Key, Plan
from streamt1_jax.evaluation.compare.scenes import Scene
from streamt1_jax.io.timeline import ChunkClock
from streamt1_jax.measuring import random_model
from streamt1_jax.noise_propagation import candidate_seeds
from streamt1_jax.report import comparison
from streamt1_jax.rewards import scoring
from tests import compared_rows
from tests.command_line import small_model
from tests.compared_rows import row

_MODEL = preset("tiny")
_PACKAGE = pathlib.Path(streamt1_jax.__file__).parent
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CAPTION = "a small red circle moves quickly left over a dark blue background"
_OTHER = "a large blue square moves slowly up over a gray background"


def test_those_who_judge_are_imported_by_no_reward_search_or_training():
  judges = {"verify", "verify_timeline", "closeness", "sight"}
  found = set()
  texts = {path: path.read_text() for path in _PACKAGE.rglob("*.py")}
  for path in (path for path, text in texts.items() if any(name in text for name in judges)):
    nodes = [node for node in ast.walk(ast.parse(texts[path])) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [f"{getattr(node, 'module', '')}.{alias.name}" for node in nodes for alias in node.names]
    if any(judges & set(name.split(".")) and "data" in name for name in names):
      found.add(path.relative_to(_PACKAGE).parts[0])
  assert found == {"data", "evaluation"}


# Contenders.


def _read(*entries, **options):
  return contenders.read(entries, _MODEL, **options)


def test_sizes_and_picks():
  """Sizes are candidates x beams; plain videos serve a method that judges nothing and keeps its beams apart."""
  found = {each.label: each for each in _read("none", "best_of_n", "best_of_n:8", "stream_t1:4x1", "greedy:3", "beam")}
  # Those of plain videos are made with the search of a pool, whatever N is.
  sizes = {label: (each.search.beam_size, each.search.top_k, each.picks) for label, each in found.items()}
  assert sizes == {
    "none": (1, 1, 1),
    "best_of_n:4": (1, 4, 4),
    "best_of_n:8": (1, 4, 8),
    "stream_t1:4x1": (4, 1, None),
    "greedy:3": (3, 1, None),
    "beam:2x2": (2, 2, None),
  }
  assert found["stream_t1:4x1"].search == SearchConfig.released(beam_size=4, top_k=1)


def test_numbers_and_fields_go_to_the_methods_that_have_them():
  order, other = _read("zero_order", "stream_t1", numbers={"rounds": 3.0}, fields={"fusion_cap": 0.25})
  assert order.settings["numbers"] == {"rounds": 3.0}
  assert order.picks is None
  assert order.run is not None
  assert other.search == SearchConfig.released(fusion_cap=0.25)
  assert other.run is None
  (long,) = _read("best_of_n:32", fields={"sink_distance": 12})
  # More than one batch may have, because the videos are made one at a time.
  assert (long.label, long.picks, long.search.sink_distance) == ("best_of_n:32", 32, 12)


def test_an_entry_has_numbers_and_fields_of_its_own():
  found = _read("per_beam:2x1:epsilon=0.5", "per_beam:2x1", "every_j:judge_every=5", numbers={"epsilon": 0.25})
  assert [each.label for each in found] == [
    "per_beam:2x1:epsilon=0.5",
    "per_beam:2x1",
    "every_j:2x2:judge_every=5",
  ]
  assert [each.search.policy.epsilon for each in found[:2]] == [0.5, 0.25]
  assert found[2].search.judge_every == 5
  (paper,) = _read("stream_t1:semantics=paper:fusion_cap=0.25")
  assert paper.search == SearchConfig.paper(fusion_cap=0.25)
  # Neither fits the 16 candidates that the method has by itself.
  some, most = _read("rounds:6x1:round_size=3", "rounds:32x1:round_budget=8")
  assert (some.search.most_rounds, most.search.round_budget) == (2, 8)


@pytest.mark.parametrize(
  ("entries", "options", "fragments"),
  [
    (["beam:2x2:noise"], {}, ["beam:2x2:noise", "name=value"]),
    (["beam:beam_size=3"], {}, ["beam_size=3", "name=value"]),
    (["every_j:judge_every=often"], {}, ["judge_every", "int", "often"]),
    (["particles"], {}, ["particles", "alpha"]),
    ([], {}, ["at least one", "stream_t1"]),
    (["beams"], {}, ["no search", "beams", "best_of_n"]),
    (["beam:4"], {}, ["beam:4", "candidates x beams"]),
    (["none:2"], {}, ["none:2", "no size"]),
    (["best_of_n:2x2"], {}, ["best_of_n:2x2", "one number", "top_k"]),
    (["best_of_n:1"], {}, ["at least 2, got 1"]),
    (["best_of_n:many"], {}, ["best_of_n:many", "a size is N"]),
    (["stream_t1:2x2x2"], {}, ["stream_t1:2x2x2", "a size is N"]),
    (["stream_t1:0x2"], {}, ["beam_size", "1..100"]),
    (["stream_t1", "stream_t1:2x2"], {}, ["stream_t1:2x2 is given twice"]),
    (["none"], {"numbers": {"alpha": 1.0}}, ["no", "alpha"]),
    (["none"], {"fields": {"fusion_cap": 0.5}}, ["takes fusion_cap"]),
    (["zero_order"], {"numbers": {"rounds": 0.5}}, ["rounds", "whole", "0.5"]),
    (["zero_order"], {"numbers": {"rounds": float("nan")}}, ["rounds", "whole", "nan"]),
    (["zero_order:rounds=inf"], {}, ["zero_order:rounds=inf", "finite"]),
    (["particles:1x8:alpha=inf"], {}, ["particles:1x8:alpha=inf", "finite"]),
    # All of them take their videos from one pool.
    (["none:sink_distance=12"], {}, ["none", "pool", "--sink_distance"]),
    (["best_of_n:4:reward_codec=h264"], {}, ["best_of_n", "pool", "--reward_codec"]),
  ],
)
def test_impossible_contenders(entries, options, fragments):
  with pytest.raises(ConfigError) as error:
    _read(*entries, **options)
  for fragment in fragments:
    assert fragment in str(error.value)


# Scenes and judges.


def test_plain_videos_begin_with_the_noises_of_a_search():
  (case,) = scenes.cases(1, 1, 7)
  drawn = candidate_seeds(case.seed, jnp.zeros(2, jnp.int32), 0, beam_size=3, first_candidate="reuse")
  plan = Plan({}, [Scene((_CAPTION,))], [case], 6, "quality")
  places = [key.place for key, _, _ in pool.wanted(plan, [])]
  assert [case.seed + place for place in places] == np.asarray(drawn).ravel().tolist()


def test_cases_have_seeds_of_their_own():
  found = scenes.cases(3, 2, 5)
  assert [case[:2] for case in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
  assert np.diff([case.seed for case in found]).min() >= 100_000


def test_scenes_of_the_world_and_of_a_list():
  timelines = scenes.of_world("tune", 2, 40, 30.0, 1, True, 0)
  assert [scene.begins for scene in timelines] == [(0, 8, 16, 24, 32)] * 2
  assert all(len(scene.captions) == 5 for scene in timelines)
  assert scenes.of_world("tune", 3, 7, 5.0, 2, False, 0) == scenes.of_world("tune", 3, 7, 5.0, 2, False, 0)
  with pytest.raises(ConfigError, match="needs 2 segments|needs 2 chunks"):
    scenes.of_world("tune", 1, 1, 0.5, 1, True, 0)
  assert [scene.text for scene in scenes.of_prompts(["a", "b", "a", "c"], 3)] == ["a", "b", "c"]
  with pytest.raises(ConfigError, match="4 prompts are asked for, and there are 3"):
    scenes.of_prompts(["a", "b", "a", "c"], 4)


def _clip(frames=45, freeze=False):
  times = np.zeros(frames, int) if freeze else np.arange(frames)
  states = world.play([world.parse(_CAPTION)], [0], world.starts_of(np.array([20, 30])), times)
  return np.uint8(np.round(255 * np.asarray(world.draw(states))))


def test_verifiers_judge_the_whole_and_its_parts():
  clock = ChunkClock(16.0, 9, 12)
  good = held_out.Verifiers()(_clip(), Scene((_CAPTION,)), clock)
  assert set(good.held_out) == set(held_out.Verifiers.metrics)
  assert good.held_out["all_at_once"] is True
  assert good.held_out["psnr"] > 50
  assert good.windows == [1.0, 1.0]
  frozen = held_out.Verifiers()(_clip(freeze=True), Scene((_CAPTION,)), clock)
  assert (frozen.held_out["all_at_once"], frozen.held_out["motion"], frozen.held_out["color"]) == (False, False, True)
  assert frozen.windows == [0.0, 0.0]
  wrong = Scene((_CAPTION, _OTHER), (0, 2))
  assert held_out.Verifiers()(_clip(), wrong, clock).windows == [1.0, 0.0]


def test_a_reward_judges_by_its_last_single_score(tmp_path):
  judge = held_out.RewardJudge(scoring.make_scorer("quality", tmp_path / "none"), 45, shapes.FPS)
  assert judge.metrics == ("quality",)
  found = judge(_clip(), Scene(("anything",)), ChunkClock(16.0, 9, 12))
  assert np.isfinite(found.held_out["quality"])
  assert found.windows == []


def test_signatures_tell_videos_apart():
  dark, light = np.zeros((9, 20, 24, 3), np.uint8), np.full((5, 64, 64, 3), 30, np.uint8)
  assert held_out.distance(held_out.signature(dark), held_out.signature(light)) == 30
  half = np.where(np.arange(64)[:, None, None] < 32, 0, light).astype(np.uint8)
  for other in (dark, light):
    distance = held_out.distance(held_out.signature(half), held_out.signature(other))
    assert distance == pytest.approx(30 / np.sqrt(2))


# Numbers.


def _summary():
  return summary.summarise(compared_rows.results(compared_rows.rows()), compared_rows.ENTRIES, compared_rows.METRICS)


def test_methods_by_hand():
  methods = _summary()["methods"]
  means = {label: of["held_out"]["all_at_once"]["mean"] for label, of in methods.items()}
  assert means == {"none": 0.5, "best_of_n:2": 0.5, "greedy:4": 1.0}
  assert methods["greedy:4"]["held_out"]["psnr"]["mean"] == 30.0
  assert [found["mean"] for found in methods["none"]["windows"]] == [1.0, 0.5]
  versus = methods["greedy:4"]["minus_plain"]
  assert versus["simultaneous"]["mean"] == 0.5
  # Against a random plain video; half of these pass in both cases.
  assert (versus["wins"], versus["ties"], versus["losses"]) == (1.0, 1.0, 0.0)
  versus = methods["best_of_n:2"]["minus_plain"]
  assert (versus["wins"], versus["ties"], versus["losses"]) == (0.5, 1.0, 0.5)
  assert "minus_plain" not in methods["none"]


def test_costs_by_hand():
  """Only who chooses pays for the last verdict; the seconds are those of videos without compilation."""
  found = {label: of["cost"] for label, of in _summary()["methods"].items()}
  pick = lambda label: tuple(found[label][name] for name in ("forwards", "tflop", "seconds", "depth"))
  assert pick("none") == (10, 2, 1, 10)
  assert pick("best_of_n:2") == (20, 6, 3, 10)
  assert pick("greedy:4") == (15, 7.5, 1, 10)
  assert found["best_of_n:2"]["tflop_video_reward"] == 2
  assert _summary()["methods"]["greedy:4"]["times_plain"] == 3.75


def test_the_pool_by_hand():
  one, two = _summary()["pool"]
  means = lambda found: {name: found[name]["mean"] for name in ("score", "chosen", "oracle", "regret")}
  assert means(one) == {"score": 1.5, "chosen": 0.5, "oracle": 0.5, "regret": 0.0}
  assert means(two) == {"score": 2.0, "chosen": 0.5, "oracle": 1.0, "regret": 0.5}
  # As bad as a random choice.
  assert two["normalised_regret"]["mean"] == 1.0
  assert one["normalised_regret"] is None


def test_alpha_by_hand():
  """Scores 1 and 2 of either prompt: from 1.1 to 1.9. Seeds of a prompt are one pool; no scale, no alpha."""
  alpha = lambda rows, **takes: summary.summarise(compared_rows.results(rows, **takes), [], ["psnr"])["alpha"]
  rows = compared_rows.rows()
  assert alpha(rows) == pytest.approx(0.8 / np.log(1000), rel=1e-3)
  page = report.markdown_of(compared_rows.PLAN, _summary())
  assert "`--policy=alpha:0.1158`" in page
  twice = [each | {"take": take, "score": each["score"] + take} for each in rows for take in (0, 1)]
  # The percentiles of 1, 2, 2 and 3 are 1.3 and 2.7.
  assert alpha(twice, takes=2) == pytest.approx(1.4 / np.log(1000), rel=1e-3)
  # The first prompt has a video without a score.
  assert alpha([rows[0] | {"score": None}, *rows[1:]]) == alpha(rows)
  assert alpha([each | {"score": None} for each in rows]) is None
  assert alpha([each | {"score": 1.0} for each in rows]) is None


def test_equal_cost_by_hand():
  rows = {row["axis"]: row for row in _summary()["equal_cost"]}
  # 15 forwards are 1.5 plain videos: between a random one and the best of two, .75 and .25.
  assert (rows["forwards"]["n"], rows["forwards"]["beyond_pool"]) == (1.5, False)
  assert rows["forwards"]["difference"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
  assert (rows["forwards"]["wins"], rows["forwards"]["ties"]) == (1.0, 1.0)
  # 7.5 TFLOP are 2.5 plain videos with their verdicts, and the pool has two.
  assert (rows["tflop"]["n"], rows["tflop"]["beyond_pool"]) == (2.5, True)
  assert rows["tflop"]["difference"]["mean"] == 0.5


def test_a_video_without_a_verdict_is_left_out(tmp_path):
  """A reward may give no number: its case then counts for nobody, and the others for everybody."""
  rows = compared_rows.rows()
  rows[-1]["held_out"]["all_at_once"] = None
  found = summary.summarise(compared_rows.results(rows), compared_rows.ENTRIES, compared_rows.METRICS)
  # The first case alone, in which the reward picks the video that passes.
  together = {label: of["minus_plain"]["simultaneous"] for label, of in found["methods"].items() if label != "none"}
  assert {label: each["mean"] for label, each in together.items()} == {"best_of_n:2": 0.5, "greedy:4": 0.5}
  assert {row["axis"]: row["difference"]["mean"] for row in found["equal_cost"]}["tflop"] == 0.0
  assert "nan" not in report.markdown_of(compared_rows.PLAN, found)
  for row_of_pool in rows[:4]:
    row_of_pool["held_out"]["all_at_once"] = None
  nothing = summary.summarise(compared_rows.results(rows), compared_rows.ENTRIES, compared_rows.METRICS)
  assert nothing["pool"][1]["regret"] is None
  assert nothing["methods"]["greedy:4"]["minus_plain"]["simultaneous"] is None
  assert "nan" not in report.markdown_of(compared_rows.PLAN, nothing)
  assert [path.stem for path in plots.write(epath.Path(tmp_path), nothing).values()] == ["drift", "cost_split"]


def test_other_methods_at_no_more_than_the_cost():
  """The size of another method is the dearest that the reference can afford."""
  sizes = {"beam:2x1": 14, "beam:2x2": 15, "beam:4x2": 30}
  beams = [row(label, p, passed=True, score=1, forwards=forwards) for label, forwards in sizes.items() for p in (0, 1)]
  results = compared_rows.results(compared_rows.rows() + beams)
  rows = summary.summarise(results, _read("greedy:4", *sizes), ("all_at_once",))["equal_cost"]
  against = [(found["method"], found["against"]) for found in rows if found["axis"] == "forwards" and "n" not in found]
  assert against == [("greedy:4", "beam:2x2"), ("beam:2x2", "greedy:4"), ("beam:4x2", "greedy:4")]


def test_diversity_is_between_seeds_of_one_prompt():
  rows = [
    row("plain", prompt, place, passed=True, score=place, take=take)
    | {"signature": compared_rows.signature(10 * take + (1 + 2 * take) * place)}
    for prompt in (0, 1)
    for take in (0, 1)
    for place in (0, 1)
  ]
  results = compared_rows.results(rows, takes=2)
  # 0 or 1 against 10 or 13; the best are 1 and 13.
  assert results.diversity(results.best_of(1)) == pytest.approx(11)
  assert results.diversity(results.best_of(2)) == pytest.approx(12)
  alone = compared_rows.results(compared_rows.rows())
  assert alone.diversity(alone.best_of(1)) is None


def test_the_page_has_every_method():
  page = report.markdown_of(compared_rows.PLAN, _summary(), ["A note."])
  assert "| none | 0.500 [0.500, 0.500] |" in page
  assert "| greedy:4 | tflop | best of 2.5, beyond the pool | 0.500 " in page
  assert "A note." in page
  assert "Added after" not in page
  later = {**compared_rows.PLAN["methods"], "greedy:4": {"videos_before": 8}}
  assert "Added after the first videos: greedy:4." in report.markdown_of(
    {**compared_rows.PLAN, "methods": later}, _summary()
  )


def test_tables_of_the_documentation(tmp_path):
  """What pages cite is what the comparison says: its date, its command, and rows of the same tables."""
  spec = importlib.util.spec_from_file_location("make_comparison", _ROOT / "docs" / "make_comparison.py")
  program = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(program)
  folder = tmp_path / "comparison"
  folder.mkdir()
  plan, results = compared_rows.PLAN | {"begun": "2026-11-30T10:00:00"}, _summary()
  results["pool"].append(results["pool"][1] | {"n": 3})
  comparison = {"plan": plan, "results": results, "notes": ["Motion is not measured."]}
  (folder / "comparison.json").write_text(json.dumps(comparison))
  command = ["streamt1", "compare", "--methods=none,greedy:4"]
  flags = ["--title=Two", "--name=two", "--commit=0123abc", "--machine=a laptop", f"--output={tmp_path}"]
  assert program.main([*flags, str(folder), "--", *command]) == 0
  found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
  assert set(found) == {"two_methods", "two_equal_cost", "two_pool"}
  methods = found["two_methods"]
  assert (methods["title"], methods["date"], methods["command"]) == ("Two: methods", "2026-11-30", [" ".join(command)])
  assert [row[0] for row in methods["rows"]] == ["none", "best_of_n:2", "greedy:4"]
  assert (methods["commit"], methods["machine"]) == ("0123abc", "a laptop")
  assert "Primary metric: `all_at_once`. Cases: 2; different captions: 2; split test." in methods["note"]
  assert "Motion is not measured." in methods["note"]
  assert methods["rows"][2][1] == "1.000 [1.000, 1.000]"
  assert [row[0] for row in found["two_pool"]["rows"]] == ["1", "2"]
  assert all(len(row) == len(each["columns"]) for each in found.values() for row in each["rows"])


def test_the_page_as_html(tmp_path):
  """One file that holds its tables and plots; what a prompt or a name says is text."""
  plan = {**compared_rows.PLAN, "fixed": {"split": "<script>alert(1)</script>"}}
  (tmp_path / "a.svg").write_text("<svg/>")
  parts = report.sections(plan, _summary(), ["A note with `code`."])
  comparison.write_comparison(epath.Path(tmp_path / "c.html"), parts, {"A plot": epath.Path(tmp_path / "a.svg")})
  page = (tmp_path / "c.html").read_text()
  assert "<td>0.500 [0.500, 0.500]</td>" in page
  assert "A note with <code>code</code>." in page
  assert base64.b64encode(b"<svg/>").decode() in page
  assert "split &lt;script&gt;alert(1)" in page
  assert not re.findall(r"(?:src|href)=.(?!data:|#)", page)


# The folder.


def _plan(**settings):
  return Plan({"seconds": 5.0, **settings}, [Scene((_CAPTION,))], scenes.cases(1, 1, 0), 2, "all_at_once")


def _folder(path, plan=None, entries=("none",), now="today"):
  found = Folder(epath.Path(path), plan or _plan(), _read(*entries), now)
  found.begin()
  return found


def _append(path, row):
  with (path / pool.VIDEOS).open("a") as file:
    file.write(json.dumps(row) + "\n")


def test_a_folder_goes_on_and_says_what_came_later(tmp_path):
  _folder(tmp_path)
  plan = json.loads((tmp_path / pool.PLAN).read_text())
  assert plan["scenes"] == [{"captions": [_CAPTION], "begins": [0]}]
  assert (plan["fixed"]["primary_metric"], plan["fixed"]["num_prompts"]) == ("all_at_once", 1)
  _append(tmp_path, row("plain", 0, 0, passed=True, score=1.0))
  found = _folder(tmp_path, entries=("none", "greedy"), now="tomorrow")
  assert list(found.rows) == [Key("plain", 0, 0, 0)]
  plan = json.loads((tmp_path / pool.PLAN).read_text())
  assert plan["begun"] == "today"
  before = {label: told["videos_before"] for label, told in plan["methods"].items()}
  assert before == {"none": 0, "greedy:4": 1}


@pytest.mark.parametrize(
  ("plan", "entries", "fragments"),
  [
    (_plan(seconds=30.0), ("none",), ["seconds 5.0, not 30.0"]),
    (_plan()._replace(scenes=[Scene((_OTHER,))]), ("none",), ["prompts_sha256"]),
    (_plan()._replace(primary="psnr"), ("none",), ["primary_metric all_at_once, not psnr"]),
    (_plan()._replace(pool=3), ("none",), ["pool 2, not 3"]),
  ],
)
def test_a_pool_of_other_settings_is_refused(tmp_path, plan, entries, fragments):
  _folder(tmp_path)
  kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(ConfigError) as error:
    _folder(tmp_path, plan, entries)
  for fragment in (str(tmp_path), *fragments):
    assert fragment in str(error.value)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_method_of_other_settings_is_refused(tmp_path):
  _folder(tmp_path, entries=("greedy",))
  (greedy,) = _read("greedy", fields={"fusion_cap": 0.5})
  with pytest.raises(ConfigError, match=r"greedy:4 was made with fusion_cap 0\.4, not 0\.5"):
    Folder(epath.Path(tmp_path), _plan(), [greedy], "now")


def test_a_plan_without_a_methods_settings_is_refused(tmp_path):
  plan = _folder(tmp_path).plan
  (tmp_path / pool.PLAN).write_text(json.dumps(plan | {"methods": {"none": {}}}))
  with pytest.raises(ConfigError, match=r"plan\.json is not the plan of a comparison"):
    _folder(tmp_path)


@pytest.mark.parametrize(
  "change",
  [
    {"prompt": "0"},
    {"score": float("1e300")},
    {"held_out": []},
    {"held_out": {"all_at_once": "yes"}},
    {"windows": [None]},
    {"made": {"cost": {}}},
    {"verdict": None},
    {"signature": "AAAA"},
    {"signature": "?"},
    {"motion": None},
    {"depth": 1.5},
  ],
)
def test_what_is_no_row_is_refused(change):
  whole = row("plain", 0, passed=True, score=None)
  assert pool.is_row(whole)
  assert pool.is_row(whole | {"motion": {"dynamic": 1.0}, "held_out": {"chunks_until": None}})
  assert not pool.is_row(whole | change)


# The command.


def _call(folder, *arguments):
  stdout, stderr = io.StringIO(), io.StringIO()
  with contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    code = compare.main(arguments)
  return code, stdout.getvalue(), stderr.getvalue()


@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    ([], ["--output"]),
    (["--output=file"], ["--output=file", "cannot be made"]),
    (["--output=o", "--methods=beams"], ["--methods", "no search 'beams'", "best_of_n"]),
    (["--output=o", "--methods=best_of_n:32"], ["best_of_n:32", "--pool=16"]),
    (["--output=o", "--methods=best_of_n:1"], ["--methods", "at least 2"]),
    (["--output=o", "--pool=1"], ["--pool=1", "[2, 100]"]),
    (["--output=o", "--search=beam"], ["--search", "--methods"]),
    (["--output=o", "--top_k=3"], ["--top_k", "--methods"]),
    (["--output=o", "--policy=alpha:1"], ["--methods", "alpha"]),
    (["--output=o", "--methods=particles", "--policy=alpha:inf"], ["--policy", "alpha:inf", "finite"]),
    (["--output=o", "--methods=stream_t1:sliding_window=400"], ["stream_t1:2x2:sliding_window=400", "at most 341"]),
    (["--output=o", "--methods=stream_t1:reward_codec=vp9"], ["--methods", "vp9", "h264"]),
    (["--output=o", "--methods=every_j", "--judge_every=30"], ["every_j:2x2", "judge_every", "1..7", "got 30"]),
    (["--output=o", "--methods=look_ahead", "--look_ahead=7"], ["look_ahead:2x2", "look_ahead", "0..6", "got 7"]),
    (
      ["--output=o", "--methods=none,backtracking:back=500", "--device_memory=2", "--mesh=data:1"],
      ["--methods: backtracking:back=500: this search takes about 6.5"],
    ),
    (["--output=o", "--seconds=1000"], ["--seconds=1000.0", "1..341"]),
    (["--output=o", "--timelines", "--seconds=0.5"], ["--timelines", "--seconds=0.5"]),
    (["--output=o", "--timelines", "--objects=2"], ["--timelines takes no --objects"]),
    (["--output=o", "--num_prompts=1000", "--num_seeds=11"], ["--num_prompts times --num_seeds", "10000"]),
    (["--output=o", "--judge=quality"], ["--prompts_file and --judge"]),
    (["--output=o", "--prompts_file=file"], ["--prompts_file and --judge"]),
    (["--output=o", "--prompts_file=file", "--judge=videoalign"], ["--judge=videoalign", "--judge_selects"]),
    (["--output=o", "--prompts_file=file", "--judge=vqascore"], ["--judge=vqascore", "no such reward"]),
    (["--output=o", "--prompts_file=file", "--judge=./videoalign"], ["--judge=./videoalign", "no such reward"]),
    (["--output=o", "--prompts_file=file", "--judge="], ["--judge=", "no such reward"]),
    (["--output=o", "--prompts_file=file", "--judge=quality", "--split=test"], ["--prompts_file takes no --split"]),
    (["--output=o", "--prompts_file=file", "--judge=quality"], ["64 prompts", "1 different"]),
  ],
)
def test_bad_input(tmp_path, arguments, fragments):
  (tmp_path / "file").write_text("in the way")
  code, stdout, stderr = _call(tmp_path, *arguments)
  assert code == 2, stderr
  assert stdout == ""
  (line,) = stderr.splitlines()
  for fragment in fragments:
    assert fragment in line
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_refusal_names_flags_of_this_command(tmp_path):
  # Between what the search takes in bfloat16 and in float32.
  given = ["--output=o", "--methods=stream_t1", "--mesh=data:1", "--device_memory=0.03"]
  code, _, stderr = _call(tmp_path, *given)
  assert code == 2, stderr
  remedy = re.search(r"((?:--\S+ )+)would fit", stderr)[1].split()
  assert "--dtype=bfloat16" in remedy
  values = command.parse(compare.define_flags, [*given, *remedy])
  assert values.dtype == "bfloat16"
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--dtype=bfloat16"], "bfloat16")])
def test_one_dtype_for_plan_memory_and_model(tmp_path, monkeypatch, flags, dtype):
  """Without the flag it is what users get on this platform, and a folder of float32 is as it was."""
  planned, asked = [], []

  def load(*arguments, **_):
    raise ConfigError(f"loaded in {arguments[2]}")

  monkeypatch.setattr(compare, "Folder", lambda _, plan, *__: planned.append(plan.settings))
  monkeypatch.setattr(compare.memory_plans, "decide", lambda _, searches: asked.extend(searches.values()))
  monkeypatch.setattr(search_flags, "load_pipeline", load)
  _, _, stderr = _call(tmp_path, "--output=o", "--methods=none,stream_t1", "--mesh=data:1", *flags)
  assert f"loaded in {dtype}" in stderr
  assert {str(each.dtype) for each in asked} == {str(each.reward_dtype) for each in asked} == {dtype}
  (settings,) = planned
  assert settings["reward_dtype"] == dtype
  assert settings["dtype"] == dtype


def test_flags_of_methods_do_not_reach_the_default_search():
  """What loads the model asks for the default search, which has no --judge_every."""
  values = command.parse(compare.define_flags, ["--output=o", "--methods=every_j,none", "--judge_every=5"])
  every, _ = compare._contenders(values, _MODEL)
  assert every.search.judge_every == 5
  assert search_flags.search_config(values, _MODEL) == SearchConfig.released()


def _small_world(folder):
  """A checkpoint of random weights whose videos have the size of the shapes world's."""
  model = dataclasses.replace(small_model(), latent_height=8, latent_width=8)
  random_model.save(folder / "model", model, shipped.checkpoint() / "tokenizer.model")
  return ["--checkpoint=model", "--mesh=data:1", "--num_prompts=1", "--seconds=0.5", "--pool=2"]


def _rows(path):
  """The rows without what depends on the machine."""
  rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
  clock = ("seconds", "verdict_seconds", "compilations")
  return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def test_a_comparison_goes_on_where_it_stopped(tmp_path):
  """Every video is made once, a row that was cut again and the same; further methods come in, another plan does not."""
  world_flags, policy = [*_small_world(tmp_path), "--output=o"], "--policy=rounds:1,neighbours:1,chunks:1"
  code, stdout, stderr = _call(tmp_path, *world_flags, "--methods=none,best_of_n:2")
  assert code == 0, stderr
  assert "device: cpu, float32\n" in stderr
  assert "| best_of_n:2 | " in stdout
  videos = tmp_path / "o" / pool.VIDEOS
  plain = _rows(videos)
  assert [row["place"] for row in plain] == [0, 1]
  videos.write_text(videos.read_text()[:-5])
  methods = "--methods=none,best_of_n:2,zero_order"
  code, _, stderr = _call(tmp_path, *world_flags, methods, policy)
  assert code == 0, stderr
  rows = _rows(videos)
  assert rows[:2] == plain
  assert [row["method"] for row in rows[2:]] == ["zero_order"]
  whole = json.loads((tmp_path / "o/comparison.json").read_text())
  found = whole["results"]["methods"]
  assert found["none"]["cost"]["forwards"] == 5
  # The pivot and its neighbour; one of both is in the video.
  assert found["zero_order"]["cost"]["forwards"] == found["zero_order"]["cost"]["depth"] == 5 + 5
  assert whole["plan"]["methods"]["zero_order"]["videos_before"] == 1
  assert "zero_order" in (tmp_path / "o/comparison.html").read_text()
  best = max(row["score"] for row in plain)
  assert whole["results"]["pool"][1]["score"]["mean"] == pytest.approx(best, abs=1e-4)
  for other, told in (("--seed=1", "seed 0, not 1"), ("--policy=rounds:2", "zero_order was made with numbers")):
    code, _, stderr = _call(tmp_path, *world_flags, methods, policy, other)
    assert code == 2
    assert told in stderr
  assert _rows(videos) == rows


def test_prompts_of_another_world_are_judged_by_a_reward(tmp_path):
  (tmp_path / "prompts.txt").write_text("a cat\n")
  judged = ["--prompts_file=prompts.txt", "--judge=quality", "--judge_selects", "--output=o"]
  code, stdout, stderr = _call(tmp_path, *_small_world(tmp_path), *judged, "--methods=none")
  assert code == 0, stderr
  assert "Primary metric: `quality`" in stdout
  assert all(
    row["held_out"].keys() == {"quality"} and row["windows"] == [] for row in _rows(tmp_path / "o" / pool.VIDEOS)
  )
