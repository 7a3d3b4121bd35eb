"""The live page in a real browser: it plays across a switch, shows what the search decides, and trusts no text."""

import asyncio
import contextlib
import json
import shutil
import threading

import pytest
from aiohttp import web

from streamt1_jax.cli import command, serve
from streamt1_jax.serve.app import Server
from tests.command_line import generate, save_model
from tests.live_server import PATIENCE, studio

pytestmark = pytest.mark.browser

EVIL = "<script>alert(1)</script> <img src=x onerror=alert(2)>"
TIME = "document.getElementById('video').currentTime"


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


@contextlib.contextmanager
def serving(chosen=None):
  """The address of a live server, whose loop has a thread of its own: the browser's driver blocks this one."""
  loop, addresses, over = asyncio.new_event_loop(), [], asyncio.Event()
  ready = threading.Event()

  async def run():
    runner = web.AppRunner(Server(chosen or studio()).app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    addresses.append(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    ready.set()
    await over.wait()
    await runner.cleanup()

  thread = threading.Thread(target=loop.run_until_complete, args=[run()])
  thread.start()
  ready.wait()
  try:
    yield addresses[0]
  finally:
    loop.call_soon_threadsafe(over.set)
    thread.join()
    loop.close()


@contextlib.contextmanager
def visit(browser, address):
  """A page, and what it complained about."""
  page, faults = browser.new_page(viewport={"width": 1360, "height": 900}), []
  page.on("console", lambda message: faults.append(message.text))
  page.on("pageerror", lambda error: faults.append(str(error)))
  page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
  page.set_default_timeout(60_000)
  page.goto(address)
  page.wait_for_selector("#search option", state="attached")
  try:
    yield page, faults
  finally:
    page.close()


def ask(page, prompt):
  page.fill("#prompt", prompt)
  page.click("#send")


def test_a_video_is_steered(browser):
  with serving() as address, visit(browser, address) as (page, faults), visit(browser, address) as (other, more):
    ask(page, EVIL)
    page.wait_for_function(f"() => {TIME} > 0.5")
    # All of one chunk's candidates, with their scores, and a frame around one.
    page.wait_for_function(
      "() => [...document.querySelectorAll('#candidates .hybrid')].some(each => each.textContent != '…')"
    )
    assert page.locator("#candidates li").count() == 2
    assert page.inner_text("#prompt-now") == EVIL
    # Somebody who only looks sees it too, and waits for a session of their own.
    other.wait_for_function(f"() => {TIME} > 0.5")
    ask(other, "mine")
    other.wait_for_function("() => document.getElementById('notice').textContent.includes('line: 1')")
    before = page.evaluate(TIME)
    ask(page, "b")
    page.wait_for_function("() => document.getElementById('prompt-now').textContent == 'b'")
    page.wait_for_function(f"() => {TIME} > {before} + 2")
    page.click("#pause")
    page.wait_for_function("() => document.getElementById('video').paused")
    stands = page.evaluate(TIME)
    page.wait_for_timeout(500)
    assert page.evaluate(TIME) == stands
    page.click("#pause")
    page.wait_for_function(f"() => {TIME} > {stands} + 0.5")
    page.click("#save")
    page.wait_for_function("() => document.getElementById('notice').textContent.includes('saves nothing')")
    page.click("#stop")
    other.wait_for_function("() => document.getElementById('state').textContent == 'running'")
    assert faults == more == []


def test_what_is_saved_on_the_page_can_be_made_again(browser, tmp_path):
  """Save makes the folder that the page names, and the command in it makes the same frames and latents."""
  checkpoint = save_model(tmp_path / "model")
  flags = [f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / 'out'}", "--mesh=data:1"]
  values = command.parse(serve.define_flags, flags)
  pipeline, searches = serve.load(values)
  with serving(serve.make_studio(pipeline, searches, values)) as address, visit(browser, address) as (page, faults):
    page.set_default_timeout(1000 * PATIENCE)
    ask(page, "a red circle moves left over a dark blue background")
    page.wait_for_function(f"() => {TIME} > 0.2")
    page.click("#save")
    page.wait_for_function("() => document.getElementById('notice').textContent.startsWith('Saved in ')")
    notice = page.inner_text("#notice")
    page.click("#stop")
    page.wait_for_function("() => document.getElementById('state').textContent == 'idle'")
    assert faults == []
  (folder,) = (tmp_path / "out").iterdir()
  manifest = json.loads((folder / "manifest.json").read_text())
  assert notice == f"Saved in {folder}: {manifest['length']['chunks']} chunks."
  assert (folder / "report.html").is_file()
  done = generate(tmp_path, f"--flagfile={folder / 'replay.flags'}", one_device=False)
  assert done.code == 0, done.stderr
  (again,) = (folder / "replay").iterdir()
  assert json.loads((again / "manifest.json").read_text())["sha256"] == manifest["sha256"]


def test_a_browser_that_cannot_play_shows_pictures(browser):
  with serving() as address, visit(browser, address) as (page, faults):
    page.evaluate("delete window.MediaSource")
    ask(page, "a")
    page.wait_for_function("() => document.getElementById('still').naturalWidth > 0")
    assert "MediaSource" in page.inner_text("#notice")
    assert faults == []


def test_a_picture_that_is_too_large_is_not_sent(browser):
  with serving() as address, visit(browser, address) as (page, faults):
    too_large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(5 << 20)}
    page.set_input_files("#image", too_large)
    ask(page, "a")
    page.wait_for_function("() => document.getElementById('notice').textContent.startsWith('A picture may have 4 MB')")
    assert page.inner_text("#state") == "idle"
    page.set_input_files("#image", [])
    ask(page, "a")
    page.wait_for_function("() => document.getElementById('state').textContent == 'running'")
    assert faults == []
