"""Makes the moving picture of the live page: a session with a change of prompt, as a browser shows it.

PYTHONPATH=. python docs/make_live_gif.py docs/live.gif

Needs chromium and the extra `browser`.
"""

import io
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from streamt1_jax.io.moving_picture import write_gif

_PROMPTS = (
  "a large red circle moves left and a small blue square moves up over a black background",
  "a large red circle moves left and a small green square moves up over a dark blue background",
)
_SIZE = {"width": 1120, "height": 640}
_FPS, _SECONDS, _SWITCH = 5, 9.0, 2.5
_SHRINK = 0.6


def _ask(page: Page, prompt: str) -> None:
  page.fill("#prompt", prompt)
  page.click("#send")


def _picture(page: Page) -> np.ndarray:
  shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
  return np.asarray(shot.resize((int(shot.width * _SHRINK), int(shot.height * _SHRINK)), Image.Resampling.LANCZOS))


def _watch(page: Page) -> list[np.ndarray]:
  """Pictures of the page at `_FPS`: the one that was there at each moment."""
  begin, asked, taken = time.monotonic(), False, []
  while (now := time.monotonic() - begin) < _SECONDS:
    if now > _SWITCH and not asked:
      _ask(page, _PROMPTS[1])
      asked = True
    taken.append((now, _picture(page)))
  moments = np.array([moment for moment, _ in taken])
  return [taken[int(np.searchsorted(moments, at, "right")) - 1][1] for at in np.arange(0, _SECONDS, 1 / _FPS)]


def main(target: str) -> None:
  program = [sys.executable, "-m", "streamt1_jax", "serve", "--port=0"]
  with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
    try:
      assert server.stdout is not None
      address = server.stdout.readline().strip()
      browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
      page = browser.new_page(viewport=_SIZE)
      page.set_default_timeout(120_000)
      page.goto(address)
      page.wait_for_selector("#search option", state="attached")
      _ask(page, _PROMPTS[0])
      while page.evaluate("document.getElementById('video').currentTime") < 1.5:
        page.wait_for_timeout(100)
      pictures = _watch(page)
      browser.close()
    finally:
      server.terminate()
  write_gif(target, np.stack(pictures), _FPS)


if __name__ == "__main__":
  main(*sys.argv[1:])
