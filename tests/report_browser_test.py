"""The page of a search in a real browser: it opens without an error, plays, and says what its files say."""

import io
import json
import shutil
import types

import pytest
from etils import epath
from PIL import Image

from streamt1_jax.report import account, comparison, write
from tests.searched_results import Searched

pytestmark = pytest.mark.browser

EVIL = "<script>alert(1)</script> <img src=x onerror=alert(2)>"
PLAYS = "video => video.error === null && video.currentTime > 0.4"


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'streamt1_jax[browser]'")
  chromium = shutil.which("chromium")
  if chromium is None:
    pytest.skip("there is no chromium: apt-get install chromium")
  with playwright.sync_playwright() as driver:
    # Nobody but the tests' own pages is shown, and a container has no sandbox to give.
    started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    yield started
    started.close()


class Visit:
  """A page of the browser. Whatever it complains about, or asks for beyond files of this machine, is in `faults`."""

  def __init__(self, browser, path):
    self.page, self.faults = browser.new_page(viewport={"width": 1360, "height": 900}), []
    self.page.on("console", lambda message: self.faults.append(message.text))
    self.page.on("pageerror", lambda error: self.faults.append(str(error)))
    self.page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
    self.page.on("request", self._watch)
    self.page.goto(path.as_uri())

  def _watch(self, request):
    if not request.url.startswith(("file:", "data:")):
      self.faults.append(request.url)

  def chosen(self):
    """Ids of the candidates whose details are seen."""
    return self.page.eval_on_selector_all(
      ".candidate", "all => all.filter(each => each.offsetParent !== null).map(each => each.id)"
    )

  def play(self, selector):
    """Plays a video until it has moved on."""
    video = self.page.locator(selector)
    video.evaluate("video => video.play()")
    self.page.wait_for_function(PLAYS, arg=video.element_handle(), timeout=20_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = Searched(chunks=6, segments=((0, EVIL), (3, EVIL))).write(tmp_path_factory.mktemp("results") / "result")
  write.write_report([made], made / "report.html")
  return made


@pytest.fixture
def visit(browser, folder):
  opened = Visit(browser, folder / "report.html")
  yield opened
  opened.page.close()
  assert opened.faults == []


def test_the_video_plays_and_the_ruler_follows(visit):
  visit.play(".report video")
  visit.page.wait_for_function("document.querySelector('.playhead').getAttribute('visibility') === 'visible'")
  visit.page.locator("video").evaluate("video => video.pause()")
  # The fourth chunk begins after 9 and two times 12 frames, at 16 a second.
  visit.page.get_by_role("button", name="chunk 3").click()
  visit.page.wait_for_function("document.querySelector('.ruler .now').dataset.chunk === '3'")
  time = visit.page.locator("video").evaluate("video => video.currentTime")
  assert time == pytest.approx((9 + 2 * 12) / 16, abs=1 / 16)


def test_the_newest_chunks_of_a_long_search_are_found_in_the_video(browser, tmp_path, monkeypatch):
  monkeypatch.setattr(account, "MOST_CHUNKS", 4)
  made = Searched(chunks=6).write(tmp_path / "long")
  write.write_report([made], made / "report.html")
  visit = Visit(browser, made / "report.html")
  visit.play(".report video")
  visit.page.locator("video").evaluate("video => video.pause()")
  visit.page.get_by_role("button", name="chunk 3").click()
  visit.page.wait_for_function("() => document.querySelector('.playhead').getAttribute('visibility') === 'visible'")
  assert visit.page.locator(".ruler .now").get_attribute("data-chunk") == "3"
  assert visit.page.locator("video").evaluate("video => video.currentTime") == pytest.approx(33 / 16, abs=1 / 16)
  # The first two are left out: while the player shows them no line stands in the charts.
  visit.page.locator("video").evaluate("video => { video.currentTime = 0.5; }")
  visit.page.wait_for_function("() => document.querySelector('.playhead').getAttribute('visibility') === 'hidden'")
  visit.page.close()
  assert visit.faults == []


def test_plots_of_a_comparison_lie_on_the_ground_of_a_dark_page(browser, tmp_path):
  """A plot is black and blue on white, as matplotlib draws it: its ground is the page's, and its lines are light."""
  shapes = '<rect width="200" height="100" fill="#fff"/><rect x="50" width="50" height="100"/>'
  blue = '<rect x="150" width="50" height="100" fill="#1f77b4"/>'
  svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 100" width="200" height="100">{shapes}{blue}</svg>'
  (tmp_path / "a.svg").write_text(svg)
  part = types.SimpleNamespace(title="A", before=[], head=[], rows=[], after=[])
  comparison.write_comparison(epath.Path(tmp_path / "page.html"), [part], {"A plot": epath.Path(tmp_path / "a.svg")})
  page = browser.new_page(color_scheme="dark")
  page.goto((tmp_path / "page.html").as_uri())
  seen = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
  ground, box = seen.getpixel((2, 2)), page.locator(".compared img").bounding_box()
  at = lambda share: seen.getpixel((int(box["x"] + share * box["width"]), int(box["y"] + box["height"] / 2)))
  page.close()
  assert max(ground) < 40
  assert at(0.125) == ground
  assert min(at(0.375)) > 240
  red, green, blue = at(0.875)
  assert red < green < blue
  assert blue > 160


def test_a_click_shows_the_scores_of_the_trace(visit, folder):
  trace = json.loads((folder / "trace.json").read_text())
  for chunk in trace["chunks"][::2]:
    for candidate in chunk["candidates"]:
      name = f"r0-c{chunk['chunk']}-{candidate['candidate']}"
      visit.page.locator(f"[data-for={name}]").click()
      assert visit.chosen() == [name]
      shown = visit.page.locator(f"#{name} dd[data-score] data")
      values = [float(shown.nth(index).get_attribute("value")) for index in range(shown.count())]
      assert values == [candidate[score] for score in ("short", "long", "hybrid")]


def test_arrow_keys_move_and_stop_at_the_edges(visit):
  visit.page.locator("[data-for=r0-c1-1]").click()
  path = []
  for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft"):
    visit.page.keyboard.press(key)
    path += visit.chosen()
  assert path == [f"r0-c{place}" for place in ("2-1", "2-2", "1-2", "1-1", "1-0", "1-0", "0-0", "0-0")]


def test_a_link_to_a_candidate_opens_it_and_so_does_its_parent(browser, folder, visit):
  visit.page.goto((folder / "report.html").as_uri() + "#r0-c4-2")
  visit.page.reload()
  assert visit.chosen() == ["r0-c4-2"]
  parent = visit.page.locator("#r0-c4-2 a")
  target = parent.get_attribute("href")
  parent.click()
  assert visit.chosen() == [target.removeprefix("#")]


def test_without_scripts_links_still_show_candidates(browser, folder):
  context = browser.new_context(java_script_enabled=False)
  page = context.new_page()
  page.goto((folder / "report.html").as_uri())
  page.locator("[data-for=r0-c2-3]").click(force=True)
  assert page.locator("#r0-c2-3").is_visible()
  assert not page.locator("#r0-c2-2").is_visible()
  context.close()


def test_two_searches_play_together_from_files_beside_the_page(browser, tmp_path):
  folders = [Searched(chunks=3).write(tmp_path / name) for name in ("one", "two")]
  write.write_report(folders, tmp_path / "page.html", tmp_path / "films")
  visit = Visit(browser, tmp_path / "page.html")
  visit.page.get_by_role("button", name="Play together").click()
  for index in range(2):
    video = visit.page.locator(".comparison video").nth(index).element_handle()
    visit.page.wait_for_function(PLAYS, arg=video, timeout=20_000)
  visit.page.close()
  assert visit.faults == []


def test_what_is_folded_away_is_printed(visit):
  visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
  visit.page.emulate_media(media="print")
  assert visit.page.locator(".numbers").is_visible()
  assert not visit.page.locator("aside").is_visible()
  visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
  visit.page.emulate_media(media="screen")
  assert not visit.page.locator(".numbers").is_visible()
