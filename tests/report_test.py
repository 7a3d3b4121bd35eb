"""The page of a search says what its files say, shows whose frames it says it shows, and lets no prompt become HTML."""

import base64
import hashlib
import html.parser
import io
import json
import zipfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from streamt1_jax.config import ConfigError, SearchConfig
from streamt1_jax.io import growing_video
from streamt1_jax.memory_sinking import APPEND, EMA
from streamt1_jax.report import account, memory, pictures, story, svg, write
from streamt1_jax.report.memory import APPENDED, DISCARDED, MERGED, Event, Stay
from tests import command_line
from tests.searched_results import PROMPT, Searched

VOID = {"br", "img", "input", "link", "meta"}
LONG = Searched(chunks=8)
PLAIN = SearchConfig(beam_size=1, top_k=1, judges=False, noise_sigma=0.0)


class Page(html.parser.HTMLParser):
  """A page as a list of elements; each is its tag, its attributes, and all text inside it."""

  def __init__(self, path):
    super().__init__()
    self.elements, self._open = [], []
    self.source = path.read_text()
    self.feed(self.source)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    element = {"tag": tag, "text": "", "inside": list(self._open), **dict(attrs)}
    self.elements.append(element)
    if tag not in VOID:
      self._open.append(element)

  def handle_startendtag(self, tag, attrs):
    self.elements.append({"tag": tag, "text": "", "inside": list(self._open), **dict(attrs)})

  def handle_endtag(self, tag):
    assert self._open.pop()["tag"] == tag

  def handle_data(self, data):
    for element in self._open:
      element["text"] += data

  def of(self, tag, inside=None, **attributes):
    named = {name.replace("_", "-"): value for name, value in attributes.items()}
    return [
      each
      for each in self.elements
      if each["tag"] == tag
      and (inside is None or any(owner is inside for owner in each["inside"]))
      and all(each.get(name) == value for name, value in named.items())
    ]

  def one(self, tag, inside=None, **attributes):
    (found,) = self.of(tag, inside, **attributes)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """A result with merges, a new sink and two prompts, and its page."""
  folder = LONG.write(tmp_path_factory.mktemp("results") / "long")
  write.write_report([folder], folder / "page.html")
  return folder


@pytest.fixture(scope="module")
def page(results):
  return Page(results / "page.html")


def _page(folder):
  write.write_report([folder], folder / "page.html")
  return Page(folder / "page.html")


def _trace(folder):
  return json.loads((folder / "trace.json").read_text())


def _bar(source):
  """The number of the candidate whose frames a strip shows: how far the bar reaches."""
  kind, _, content = source.partition(",")
  assert kind == "data:image/jpeg;base64"
  with Image.open(io.BytesIO(base64.b64decode(content))) as image:
    strip = np.asarray(image.convert("L"))
  frame = strip[:, : strip.shape[1] // 3]
  np.testing.assert_allclose(strip, np.tile(frame, 3), atol=40)
  return round((frame > 127).mean() * (LONG.search.num_candidates + 1)) - 1


def test_every_candidate_has_its_scores_seed_and_place(results, page):
  for chunk in _trace(results)["chunks"]:
    for candidate in chunk["candidates"]:
      article = page.one("article", id=f"r0-c{chunk['chunk']}-{candidate['candidate']}")
      for name in ("short", "long", "hybrid"):
        shown = page.one("data", page.one("dd", article, data_score=name))
        assert float(shown["value"]) == candidate[name]
        assert float(shown["text"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(candidate[name], abs=5.1e-5)
      facts = [each["text"] for each in page.of("dd", article)]
      assert str(candidate["seed"]) in facts
      better = sum(other["hybrid"] > candidate["hybrid"] for other in chunk["candidates"])
      assert f"{better + 1} of 4 by hybrid score" in facts


def test_the_table_has_every_number_as_text(results, page):
  table = page.one("table", **{"class": "numbers"})
  rows = [[cell["text"] for cell in page.of("td", row)] for row in page.of("tr", table)[1:]]
  number = lambda value: f"{value:.4f}".replace("-", "\N{MINUS SIGN}")
  expected = [
    [str(chunk["chunk"]), str(each["candidate"]), str(each["seed"]), *map(number, (each["short"], each["long"]))]
    for chunk in _trace(results)["chunks"]
    for each in chunk["candidates"]
  ]
  assert [[*row[:2], *row[3:6]] for row in rows] == expected


def test_kinds_are_those_of_lineage_and_survivors(results, page):
  trace = _trace(results)
  shown = [step["candidate"] for step in trace["final"]["lineage"]]
  for chunk, winner in zip(trace["chunks"], shown, strict=True):
    for number in range(4):
      kind = "winner" if number == winner else "survivor" if number in chunk["survivors"] else "loser"
      node = page.one("a", data_for=f"r0-c{chunk['chunk']}-{number}")
      assert node["class"] == f"node {kind}"


def test_every_candidate_shows_its_own_frames(results, page):
  for chunk in _trace(results)["chunks"]:
    for number in range(4):
      article = page.one("article", id=f"r0-c{chunk['chunk']}-{number}")
      assert _bar(page.one("img", article)["src"]) == number


def test_where_losers_have_no_frames_survivors_show_theirs(tmp_path):
  folder = Searched(chunks=2, losers=False).write(tmp_path / "survivors")
  page = _page(folder)
  for chunk in _trace(folder)["chunks"]:
    for number in range(4):
      article = page.one("article", id=f"r0-c{chunk['chunk']}-{number}")
      if number in chunk["survivors"]:
        assert _bar(page.one("img", article)["src"]) == number
      else:
        assert "No frames of it were kept." in article["text"]


def test_frames_of_the_video_serve_where_no_pictures_were_kept(tmp_path):
  folder = Searched(chunks=3, pictures=False).write(tmp_path / "bare")
  bare, trace = _page(folder), _trace(folder)
  for step, chunk in zip(trace["final"]["lineage"], trace["chunks"], strict=True):
    for number in range(4):
      article = bare.one("article", id=f"r0-c{chunk['chunk']}-{number}")
      assert [_bar(each["src"]) for each in bare.of("img", article)] == (
        [number] if number == step["candidate"] else []
      )


def test_a_prompt_stays_text(tmp_path):
  evil = '<script>alert(1)</script> "quoted" & <img src=x onerror=alert(2)>'
  folder = Searched(chunks=3, segments=((0, evil), (2, f"</title>{evil}"))).write(tmp_path / "evil")
  made = _page(folder)
  assert made.one("h1")["text"] == evil
  assert made.one("title", made.one("head"))["text"].strip() == evil
  assert [each["text"].split(" ", 4)[-1] for each in made.of("li", made.one("ol", **{"class": "timeline"}))] == [
    evil, f"</title>{evil}"
  ]  # fmt: skip
  assert len(made.of("script")) == 1
  assert not [each for each in made.elements if any(name.startswith("on") for name in each)]


def test_the_page_needs_nothing_else_and_runs_no_other_script(page):
  for element in page.elements:
    for name in ("src", "href"):
      assert element.get(name, "#").startswith(("#", "data:")), element
  policy = page.one("meta", http_equiv="Content-Security-Policy")["content"]
  script = page.one("script")["text"]
  assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
  assert policy.startswith("default-src 'none'")
  assert script.count("\n") < 300
  assert page.one("video")["src"].startswith("data:video/mp4;base64,")


def test_memory_by_hand(results):
  """Chunk 2 is merged and chunk 3 becomes a sink; the window holds three chunks, the one that is made included."""
  made = account.read(results)
  kept = memory.remember(made, story.tell(made).line)
  assert list(kept.events) == [
    Event(4, 1, DISCARDED, None),
    Event(5, 2, MERGED, 0),
    Event(6, 3, APPENDED, None),
    Event(7, 4, DISCARDED, None),
  ]
  assert list(kept.sinks) == [Stay(0, 0, 0, 8, ""), Stay(3, 1, 6, 8, "")]
  assert [(stay.held, stay.begin, stay.end, stay.leaves) for stay in kept.window] == [
    (1, 1, 4, DISCARDED), (2, 2, 5, MERGED), (3, 3, 6, APPENDED), (4, 4, 7, DISCARDED), (5, 5, 8, ""), (6, 6, 8, ""),
    (7, 7, 8, ""),
  ]  # fmt: skip
  assert kept.window_slots == 3


def test_given_chunks_are_in_the_memory_and_not_in_the_tree(tmp_path):
  folder = Searched(chunks=4, given=3, unusable=((4, 1),)).write(tmp_path / "given")
  made = account.read(folder)
  told = story.tell(made)
  assert [chunk[0].chunk for chunk in told.chunks] == [3, 4, 5, 6]
  assert [stay.begin for stay in memory.remember(made, told.line).window] == [1, 2, 3, 4, 5, 6]
  shown = _page(folder)
  assert "The video begins with 3 chunks that were given." in shown.one("p", **{"class": "lead"})["text"]
  assert shown.one("a", data_for="r0-c4-1")["class"] == "node unusable"
  assert "not judged" in shown.one("dd", shown.one("article", id="r0-c4-1"), data_score="hybrid")["text"]


def _chunk(parents, survivors, usable=True):
  candidates = [
    {"candidate": number, "parent": parent, "seed": number, "short": 0.0, "long": 0.0, "hybrid": 0.0, "usable": usable}
    for number, parent in enumerate(parents)
  ]
  return {"candidates": candidates, "survivors": survivors}


def test_where_lines_end_by_hand():
  chunks = [_chunk([0, 0, 1, 1], [3, 0]), _chunk([0, 0, 1, 1], [2, 3]), _chunk([0, 0, 1, 1], [1, 1])]
  # Candidate 1 of the last chunk survives twice; it goes on from beam 0, candidate 2, of beam 1, candidate 0.
  assert story.ancestry(chunks) == [0, 2, 1]
  assert [list(each.values()) for each in story.last_descendants(chunks)] == [
    [2, -1, -1, 0],
    [-1, -1, 2, 1],
    [-1, 2, -1, -1],
  ]


@pytest.mark.parametrize(
  ("sigma", "seed", "parent_seed", "expected"),
  [
    (-0.1, 5, None, "fresh: the search begins here"),
    (0, 5, 5, "fresh"),
    (0.6, 5, 4, "propagated: 0.6 of the parent's noise, 0.800 of a new draw"),
    (0.6, 5, 5, "propagated: 0.6 of the parent's noise, 0.800 of a new draw, the parent's own draw again"),
    (-0.6, 5, 4, "propagated: \N{MINUS SIGN}0.6 of the parent's noise, 0.800 of a new draw"),
    (None, 5, 4, "not recorded"),
  ],
)
def test_noise_in_words(sigma, seed, parent_seed, expected):
  assert story.noise_sentence(sigma, seed, parent_seed, has_parent=parent_seed is not None) == expected


def test_a_failed_search_has_a_page(tmp_path):
  folder = Searched(chunks=3, fails=True).write(tmp_path / "failed")
  made = _page(folder)
  assert not made.of("video")
  assert "every candidate is NaN or Inf" in made.one("p", **{"class": "lead"})["text"]
  best = _trace(folder)["chunks"][-1]["survivors"][0]
  assert made.one("a", data_for=f"r0-c2-{best}")["class"] == "node winner"
  nothing = _page(Searched(chunks=0, fails=True).write(tmp_path / "at_once"))
  assert "0 chunks were made" in nothing.one("p", **{"class": "lead"})["text"]


def test_of_a_long_search_the_page_has_the_newest_chunks(tmp_path, monkeypatch):
  """Eight chunks, and five fit. Chunk 1 became a sink before them, and still is one."""
  monkeypatch.setattr(account, "MOST_CHUNKS", 5)
  folder = Searched(chunks=8, routes={1: APPEND, 5: EMA}, segments=((0, "first"), (2, PROMPT), (6, "rain"))).write(
    tmp_path / "long"
  )
  made, trace = _page(folder), _trace(folder)
  lead = made.one("p", **{"class": "lead"})["text"]
  assert "The video has 8 chunks; this page is of the last 5." in lead
  assert "20 candidates were drawn for 5 chunks." in lead
  assert [each["id"] for each in made.of("article")] == [f"r0-c{chunk}-{n}" for chunk in range(3, 8) for n in range(4)]
  for step in trace["final"]["lineage"][3:]:
    assert made.one("a", data_for=f"r0-c{step['chunk']}-{step['candidate']}")["class"] == "node winner"
    article = made.one("article", id=f"r0-c{step['chunk']}-{step['candidate']}")
    assert _bar(made.one("img", article)["src"]) == step["candidate"]
  buttons = [each["data-chunk"] for each in made.of("button", made.one("ol", **{"class": "ruler"}))]
  assert buttons == ["3", "4", "5", "6", "7"]
  times = [each["text"] for each in made.of("span", **{"class": "when"})]
  assert times == ["1.31 s, chunk 2", "4.31 s, chunk 6"]
  # What is drawn lies right of the labels: nothing stands where chunks are left out.
  chart = next(each for each in made.of("svg", role="group") if each["aria-label"] == "memory of the shown beam")
  bars = [(float(each["x"]), each["text"]) for each in made.of("rect", chart) if "stay" in each.get("class", "")]
  assert min(x for x, _ in bars) >= float(chart["data-gutter"])
  assert sorted(text.split(" while")[0] for _, text in bars if "sink" in text.split(" while")[0]) == [
    "chunk 0 is a sink", "chunk 1 is a sink"
  ]  # fmt: skip
  xs = [float(each["cx"]) for each in made.of("circle") if "point" in each.get("class", "")]
  assert len(xs) == 3 * 5
  assert min(xs) > float(chart["data-gutter"])


def test_a_page_has_no_more_candidates_than_a_browser_scrolls(tmp_path, monkeypatch):
  monkeypatch.setattr(account, "MOST_CANDIDATES", 11)
  made = _page(Searched(chunks=4, given=2, routes={}).write(tmp_path / "wide"))
  assert "The video has 6 chunks; this page is of the last 2." in made.one("p", **{"class": "lead"})["text"]
  assert len(made.of("article")) == 8


def test_given_chunks_may_be_left_out_too(tmp_path, monkeypatch):
  monkeypatch.setattr(account, "MOST_CHUNKS", 4)
  made = _page(Searched(chunks=2, given=3, routes={}).write(tmp_path / "given"))
  assert "this page is of the last 4. The video begins with 3 chunks" in made.one("p", **{"class": "lead"})["text"]
  assert len(made.of("li", made.one("ol", **{"class": "ruler"}), **{"class": "given"})) == 2


def test_plain_streaming_has_a_page_without_scores(tmp_path):
  made = _page(Searched(chunks=3, search=PLAIN, routes={}).write(tmp_path / "plain"))
  assert "3 chunks were made, one candidate each; nothing was judged." in made.one("p", **{"class": "lead"})["text"]
  assert len(made.of("article")) == 3
  assert not made.of("dl", **{"class": "scores"})


def test_fields_of_other_methods_are_told(tmp_path):
  """A chunk that is not judged draws fewer candidates, and some candidates are never finished."""
  folder = Searched(chunks=2, routes={}).write(tmp_path / "policies")
  trace = _trace(folder)
  first, second = trace["chunks"]
  first["rejected"] = [{"parent": 1, "place": 3, "seed": 77, "preview": -0.25, "fate": "rejected", "step": 2}]
  first["events"] = [{"step": "final", "ess": 1.5, "resampled": True}]
  first["candidates"][0]["preview"] = 0.5
  second["candidates"] = [second["candidates"][number] for number in (0, 2)]
  for candidate in second["candidates"]:
    candidate.update(short=None, long=None, hybrid=None, fate="survived", copies=1)
  second["survivors"], trace["final"]["lineage"][1]["candidate"] = [0, 2], 2
  trace["method"] = "best_of_n"
  (folder / "trace.json").write_text(json.dumps(trace))
  made = _page(folder)
  unfinished = made.one("article", id="r0-c0-4")["text"]
  assert all(
    part in unfinished for part in ("unfinished 0", "rejected after denoising step 2", "77", "\N{MINUS SIGN}0.2500")
  )
  assert "effective sample size 1.50, beams drawn anew by weight" in made.one("article", id="r0-c0-1")["text"]
  assert "0.5000" in made.one("article", id="r0-c0-0")["text"]
  nodes = {each["data-for"]: each["class"] for each in made.of("a") if each.get("class", "").startswith("node")}
  assert {name: kind for name, kind in nodes.items() if "c1-" in name or name == "r0-c0-4"} == {
    "r0-c0-4": "node rejected", "r0-c1-0": "node survivor", "r0-c1-2": "node winner"
  }  # fmt: skip
  assert "best of n" in [each["text"] for each in made.of("dd", made.one("dl", **{"class": "summary"}))]


def test_switches_are_marked_and_listed(tmp_path):
  folder = Searched(chunks=4, segments=((0, PROMPT), (2, "rain"))).write(tmp_path / "switched")
  made = _page(folder)
  times = [each["text"] for each in made.of("span", **{"class": "when"})]
  # Nine frames, then twelve, at 16 a second.
  assert times == ["0.00 s, chunk 0", "1.31 s, chunk 2"]
  charts = [each for each in made.of("svg") if "chart" in each.get("class", "")]
  assert len(charts) == 6
  assert all(len(made.of("line", chart, **{"class": "switch"})) == 1 for chart in charts)


def test_two_searches_of_one_prompt_stand_side_by_side(tmp_path):
  small = SearchConfig(top_k=1, beam_size=4)
  folders = [
    Searched(chunks=3).write(tmp_path / "one"),
    Searched(chunks=3, search=small).write(tmp_path / "two"),
    Searched(chunks=3, segments=((0, "rain"),)).write(tmp_path / "three"),
  ]
  write.write_report(folders, tmp_path / "all.html")
  made = Page(tmp_path / "all.html")
  assert [each["href"] for each in made.of("a", made.one("ul", **{"class": "index"}))] == [
    "#r0-report", "#r1-report", "#r2-report"
  ]  # fmt: skip
  section = made.one("section", **{"class": "comparison"})
  rows = {row["text"] for row in made.of("tr", made.of("table", section)[0])}
  assert "top_k21" in rows
  assert not any(row.startswith("noise_sigma") for row in rows)
  assert [each["data-copy-of"] for each in made.of("video", section)] == ["r0-report", "r1-report"]


def test_what_the_search_counted_is_added_up(tmp_path):
  folder = Searched(chunks=3).write(tmp_path / "counted")
  trace = _trace(folder)
  for chunk in trace["chunks"]:
    chunk["cost"] = {"denoise": 1000, "commit": 2, "look_ahead": 0}
  (folder / "trace.json").write_text(json.dumps(trace))
  counted = lambda page: [row["text"] for row in page.of("tr") if "forwards" in row["text"] or "clean" in row["text"]]
  assert counted(_page(folder)) == ["denoising forwards3,000", "clean passes6"]
  manifest = json.loads((folder / "manifest.json").read_text())
  tflop = {"forwards": 7.5, "decoding": 2.5, "total": 10.0}
  manifest["cost"] = {"denoise": 3000, "commit": 8, "tflop": tflop, "uncounted_rewards": []}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  whole = _page(folder)
  assert counted(whole) == ["denoising forwards3,000", "clean passes8"]
  figure = whole.of("figure", whole.one("figure", **{"class": "cost"}))[1]
  assert [each["style"] for each in whole.of("span", figure) if each["class"].startswith("part ")] == [
    "width:75.000%", "width:25.000%"
  ]  # fmt: skip
  assert "forwards of the generator 7.5 TFLOP" in " ".join(figure["text"].split())


def test_a_large_video_lies_beside_the_page(tmp_path):
  folder = Searched(chunks=3).write(tmp_path / "result")
  with open(folder / "video.mp4", "r+b") as file:
    file.truncate(write.MOST_VIDEO_BYTES + 1)
  with pytest.raises(ConfigError, match="--assets=DIR"):
    write.write_report([folder], tmp_path / "page.html")
  write.write_report([folder], tmp_path / "pages" / "page.html", tmp_path / "films and more")
  source = Page(tmp_path / "pages" / "page.html").one("video")["src"]
  assert source == "../films%20and%20more/0-result.mp4"
  assert (tmp_path / "films and more" / "0-result.mp4").stat().st_size == write.MOST_VIDEO_BYTES + 1
  write.write_beside(epath.Path(folder))
  assert Page(folder / "report.html").one("video")["src"] == "video.mp4"


def test_what_was_tried_from_the_host_is_a_table(tmp_path):
  folder = Searched(chunks=2).write(tmp_path / "result")
  assert "What was tried" not in _page(folder).source
  run = json.loads((folder / "manifest.json").read_text())
  tries = [
    {"begin": 0, "chunks": 2, "seed": 7, "score": -1.5, "kept": False, "judged_frames": 9},
    {"begin": 0, "chunks": 2, "seed": 8, "score": 2.25, "kept": True, "judged_frames": 9},
    {"begin": 3, "chunks": 1, "seed": 9, "score": None, "kept": False, "judged_frames": 0},
  ]
  (folder / "manifest.json").write_text(json.dumps(run | {"tries": [*tries, "no try"]}))
  # As an older result has them.
  trace = _trace(folder)
  del trace["tries"]
  (folder / "trace.json").write_text(json.dumps(trace))
  page = _page(folder)
  (table,) = (each for each in page.of("table") if "Seed of the noise" in each["text"])
  for text in ("0 to 1", "7", "\N{MINUS SIGN}1.5000", "2.2500", "let go", "in the video", "NaN or Inf"):
    assert text in table["text"]
  # The trace has them too, and the trace of a search that failed alone.
  _edited(folder, tries=tries[:1])
  (table,) = (each for each in _page(folder).of("table") if "Seed of the noise" in each["text"])
  assert "let go" in table["text"]
  assert "in the video" not in table["text"]


def test_equal_searches_keep_equal_pictures(tmp_path):
  first, second = (Searched(chunks=3).write(tmp_path / name) / "pictures.zip" for name in ("a", "b"))
  assert first.read_bytes() == second.read_bytes()


def _edited(folder, **fields):
  trace = _trace(folder)
  (folder / "trace.json").write_text(json.dumps(trace | fields))


def _with(folder, **fields):
  """The chunks of its trace, each with these fields."""
  return [chunk | fields for chunk in _trace(folder)["chunks"]]


def _zip(folder, name, content):
  with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
    archive.writestr(name, content)


def _jpeg(columns, rows):
  buffer = io.BytesIO()
  Image.effect_noise((columns, rows), 50).save(buffer, "JPEG")
  return buffer.getvalue()


BAD = {
  "no trace": (lambda at: (at / "trace.json").unlink(), "has no trace.json"),
  "not JSON": (lambda at: (at / "trace.json").write_text("{"), "trace.json is not valid JSON"),
  "another version": (lambda at: _edited(at, version=2), "a trace of version 2, and this program reads version 1"),
  "a version that is none": (lambda at: _edited(at, version=True), "a trace of version True, and"),
  "no beam size": (lambda at: (at / "trace.json").write_text("{}"), "beam_size is missing"),
  "chunks of another form": (lambda at: _edited(at, chunks=[3]), "chunks[0] is 3, expected an object"),
  "no lineage": (lambda at: _edited(at, final={"scores": [1.0], "best": 0}), "final.lineage is missing"),
  "too many": (lambda at: _edited(at, chunks=_trace(at)["chunks"][:1] * 1001), "chunks[1].chunk is 0, expected 1"),
  "given without end": (lambda at: _edited(at, given_chunks=10**9, chunks=[]), "1000000000 chunks, of up to 0 candid"),
  "events of another form": (lambda at: _edited(at, chunks=_with(at, events=3)), "chunks[0].events is 3"),
  "a score too large": (lambda at: _edited(at, final={"scores": [10**400]}), "trace.json has the number <an integer"),
  "a length too large": (
    lambda at: (at / "manifest.json").write_text(json.dumps({"length": {"seconds": 10**400}})),
    "manifest.json has the number <an integer",
  ),
  "pictures that are none": (lambda at: (at / "pictures.zip").write_bytes(b"zip"), "pictures.zip cannot be read"),
  "pictures of elsewhere": (lambda at: _zip(at, "../a.jpg", b""), "pictures.zip holds something else"),
  "a picture that is none": (lambda at: _zip(at, "0/0.jpg", b"GIF"), "pictures.zip is damaged: 0/0.jpg is no whole"),
  "half a picture": (
    lambda at: _zip(at, "0/0.jpg", _jpeg(48, 16)[:-60]),
    "pictures.zip is damaged: 0/0.jpg is no whole",
  ),
  "a picture of another size": (lambda at: _zip(at, "0/0.jpg", _jpeg(4800, 16)), "0/0.jpg has 4800x16 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(tmp_path, name):
  folder = Searched(chunks=2, routes={}).write(tmp_path / "result")
  spoil, told = BAD[name]
  spoil(folder)
  (tmp_path / "page.html").write_text("earlier")
  result = command_line.report(tmp_path, "result", "--output=page.html")
  assert (result.code, result.stdout) == (2, "")
  assert len(result.stderr.splitlines()) == 1
  assert told in result.stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "result"]
  assert (tmp_path / "page.html").read_text() == "earlier"


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ([], "name at least one result folder"),
    (["result", "--output=result"], "--output=result cannot be written: it is a folder"),
    (["nowhere"], "nowhere does not exist"),
    (["result", "--assets=result/trace.json"], "trace.json"),
  ],
)
def test_bad_arguments_are_refused_in_one_line(tmp_path, arguments, told):
  Searched(chunks=2, routes={}).write(tmp_path / "result")
  result = command_line.report(tmp_path, *arguments)
  assert (result.code, len(result.stderr.splitlines())) == (2, 1)
  assert told in result.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_the_command_writes_the_page_and_says_where(tmp_path):
  Searched(chunks=2, routes={}).write(tmp_path / "result")
  result = command_line.report(tmp_path, "result", "--output=new/page.html")
  assert (result.code, result.stdout, result.stderr) == (0, "new/page.html\n", "")
  assert Page(tmp_path / "new" / "page.html").one("h1")["text"] == PROMPT


def test_ticks_are_round_and_inside():
  assert svg.ticks(-0.13, 1.31) == pytest.approx([0.0, 0.5, 1.0])
  assert svg.ticks(0.0, 10.0) == pytest.approx([0.0, 5.0, 10.0])
  assert [svg.tick_label(value, [-0.02, 0.0, 0.02]) for value in (-0.02, 0.0)] == ["\N{MINUS SIGN}0.02", "0.00"]
  assert svg.line_path([0, 1, 2], [1.0, None, 2.25]) == "M0 1M2 2.2"


def test_bands_have_gaps_where_nothing_is_known():
  band = svg.band_path([0, 10, 20, 30], [1.0, 2.0, None, 3.0], [5.0, 6.0, None, 7.0])
  assert band == "M0 5L10 6L10 2L0 1ZM26 7L34 7L34 3L26 3Z"


def test_strips_of_large_frames_are_small():
  frames = np.random.default_rng(0).integers(0, 255, (12, 480, 832, 3), dtype=np.uint8)
  with Image.open(io.BytesIO(pictures.strip_of(frames))) as image:
    assert image.size == (480, 92)


def _landscape(die, rows, columns):
  """A picture as rich as a photograph, uint8 `[rows, columns, 3]`.

  Its amplitudes fall with the frequency, and its colours differ less than its brightness.
  """
  frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
  spectrum = np.exp(2j * np.pi * die.random((3, *frequency.shape))) / np.maximum(frequency, 1 / columns)
  picture = np.moveaxis(np.fft.irfft2(spectrum, (rows, columns)), 0, -1)
  picture = picture[..., :1] + 0.3 * picture
  return np.clip(128 + 45 * picture / picture.std(), 0, 255).astype(np.uint8)


# Slow: it encodes half a minute of full size.
@pytest.mark.slow
def test_the_page_of_half_a_minute_at_full_size(tmp_path):
  """What docs/report.md says of its size. Every candidate pans over a landscape; the video over one of them."""
  search = SearchConfig(beam_size=4, top_k=1)
  folder = Searched(chunks=40, search=search, routes={}).write(tmp_path / "half_a_minute")
  die = np.random.default_rng(0)
  landscapes = [_landscape(die, 480, 1800) for _ in range(search.num_candidates)]
  frame = lambda number, time: landscapes[number][:, 2 * time : 2 * time + 832]
  with pictures.StripFile(folder / "pictures.zip") as strips:
    for chunk, begin in enumerate([0, *range(9, 477, 12)]):
      frames = {number: np.stack([frame(number, begin + at) for at in range(9)]) for number in range(4)}
      strips.add(chunk, {number: pictures.strip_of(each) for number, each in frames.items()})
  with growing_video.GrowingVideo(folder / "video.mp4", 16) as video:
    for time in range(477):
      video.add(frame(0, time)[None])
  write.write_report([folder], folder / "page.html")
  page, film = ((folder / name).stat().st_size / 1e6 for name in ("page.html", "video.mp4"))
  # A page holds the video as base64, four bytes for three.
  without_film = page - film * 4 / 3
  assert 4.5 < without_film < 7.5
  assert page < 10
