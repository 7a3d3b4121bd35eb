"""Draws the figures of `docs/concepts.md`: `python docs/figures/make_figures.py`. Needs nothing but Python.

Every figure lies on a card of its own and has colours for light and for dark pages.
"""

import pathlib
from typing import NamedTuple
from xml.sax.saxutils import escape

_HERE = pathlib.Path(__file__).parent
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1c2430; }
  .small { font-size: 11.5px; fill: #51606f; }
  .head { font-weight: 600; }
  .mono { font-family: ui-monospace, monospace; font-size: 11.5px; fill: #51606f; }
  .middle { text-anchor: middle; }
  .card { fill: #fbfbf9; stroke: #d8dbd6; }
  .line { stroke: #7a8794; stroke-width: 1.4; fill: none; }
  .tip { fill: #7a8794; }
  .plain { fill: #eceff2; stroke: #b4bdc6; }
  .sink { fill: #f6c26b; stroke: #b27a14; }
  .window { fill: #9cc9ef; stroke: #3b7db5; }
  .own { fill: #a8dcae; stroke: #3f8f4c; }
  .empty { fill: none; stroke: #b4bdc6; stroke-dasharray: 3 3; }
  .slot { fill: #12202e; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e9ec; }
    .small, .mono { fill: #a9b4bf; }
    .card { fill: #1b1f24; stroke: #363d45; }
    .line { stroke: #8b98a5; }
    .tip { fill: #8b98a5; }
    .plain { fill: #2a3139; stroke: #56616c; }
    .empty { stroke: #56616c; }
    .slot { fill: #12202e; }
  }
"""


class Canvas:
  """SVG elements, in drawing order."""

  def __init__(self, width: int, height: int, title: str):
    self._size = width, height
    self._title = title
    self._items = [f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>']

  def box(self, x: float, y: float, width: float, height: float, kind: str = "plain") -> None:
    self._items.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>')

  def text(self, x: float, y: float, words: str, kind: str = "") -> None:
    self._items.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

  def arrow(self, *points: tuple[float, float]) -> None:
    path = " L ".join(f"{x} {y}" for x, y in points)
    self._items.append(f'<path class="line" d="M {path}" marker-end="url(#tip)"/>')

  def svg(self) -> str:
    width, height = self._size
    tip = '<path class="tip" d="M 0 0 L 9 4.5 L 0 9 z"/>'
    marker = f'<marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">{tip}</marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    title = f"<title>{escape(self._title)}</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", f"<defs>{marker}</defs>", *self._items, "</svg>", ""])


_STAGES = (
  (
    "evict and route",
    ("The oldest chunk of the window leaves:", "forgotten, averaged into the last sink,", "or kept as a new sink."),
    "memory_sinking.py",
  ),
  ("propose", ("Every beam draws candidates: the", "parent's noise, fused with fresh noise."), "noise_propagation.py"),
  ("denoise", ("Four steps for every candidate.", "The memory is only read."), "step.py, backbone/"),
  ("decode and judge", ("Image reward on the chunk, video reward", "on a window of frames."), "codec/, rewards/"),
  (
    "select",
    ("The best of all candidates survive.", "Scores decide how a chunk will leave."),
    "reward_pruning.py, policies/",
  ),
  ("clean pass and commit", ("Survivors alone write keys and values", "into their beam's memory."), "step.py"),
)


def one_chunk() -> str:
  """The six stages of a chunk, from beams to beams."""
  left, top, width, height, gap = 40, 64, 400, 84, 22
  canvas = Canvas(760, 64 + 6 * (height + gap) + 48, "One chunk of the search")
  center = left + width / 2
  canvas.text(center, 34, "K beams: memory, parent's noise, scores, decoder state", "head middle")
  canvas.arrow((center, 42), (center, top - 2))
  for index, (name, words, file) in enumerate(_STAGES):
    y = top + index * (height + gap)
    canvas.box(left, y, width, height)
    canvas.text(left + 14, y + 22, name, "head")
    for line, text in enumerate(words):
      canvas.text(left + 14, y + 41 + 16 * line, text, "small")
    canvas.text(left + width + 22, y + 46, file, "mono")
    canvas.arrow((center, y + height), (center, y + height + gap - 2))
  canvas.text(center, top + 6 * (height + gap) + 18, "K beams for the next chunk", "head middle")
  # What the prompt gives, and how many there are of what.
  for index, words in ((1, "K × B candidates"), (4, "K survivors")):
    canvas.text(left + width + 22, top + index * (height + gap) + 26, words, "small head")
  canvas.text(left + width + 22, top + 2 * (height + gap) + 66, "reads the prompt's keys and values,", "small")
  canvas.text(left + width + 22, top + 2 * (height + gap) + 80, "which are computed once", "small")
  return canvas.svg()


class Slot(NamedTuple):
  """What a slot of the memory holds: the number of a chunk, and whether it is a sink."""

  chunk: int
  sink: bool


# What the scores said about the chunks that leave, and what the row says about it.
_ROUTES = {1: "discard", 2: "append", 3: "merge", 4: "append", 5: "discard"}
_WORDS = {
  "discard": "chunk {} is forgotten",
  "append": "chunk {} stays, as a new sink",
  "merge": "chunk {} is averaged into sink {}",
}
_WINDOW = 3  # chunks, the newest included
_SLOTS = 6


def advance(slots: list[Slot], chunk: int) -> tuple[list[Slot], str]:
  """The memory while `chunk` is made, and what happened before: the rule of `memory_sinking.evict`."""
  slots, event = list(slots), "room is left"
  window = [slot for slot in slots if not slot.sink]
  if len(window) == _WINDOW:
    leaving = slots.index(min(window))
    last_sink = max(slot.chunk for slot in slots if slot.sink)
    route = _ROUTES[slots[leaving].chunk]
    event = _WORDS[route].format(slots[leaving].chunk, last_sink)
    if route == "append":
      slots[leaving] = slots[leaving]._replace(sink=True)
    else:
      # The last valid slot fills the hole, so that valid slots stay in front.
      moved = slots.pop()
      if leaving < len(slots):
        slots[leaving] = moved
  return slots, event


def memory() -> str:
  """Slots of one beam's memory, chunk by chunk."""
  left, top, side, step = 120, 92, 46, 58
  rows = 9
  canvas = Canvas(760, top + rows * step + 58, "Memory slots over time")
  canvas.text(24, 34, "One beam's memory while a chunk is made; numbers are chunks", "head")
  for index in range(_SLOTS):
    canvas.text(left + index * step + side / 2, top - 14, f"slot {index}", "small middle")
  slots: list[Slot] = []
  for chunk in range(rows):
    y = top + chunk * step
    slots, event = advance(slots, chunk)
    canvas.text(24, y + 28, f"chunk {chunk}", "head")
    for index in range(_SLOTS):
      x = left + index * step
      if index < len(slots):
        canvas.box(x, y, side, side, "sink" if slots[index].sink else "window")
        canvas.text(x + side / 2, y + 28, str(slots[index].chunk), "slot middle")
      elif index == len(slots):
        canvas.box(x, y, side, side, "own")
        canvas.text(x + side / 2, y + 28, str(chunk), "slot middle")
      else:
        canvas.box(x, y, side, side, "empty")
    canvas.text(left + _SLOTS * step + 14, y + 28, event, "small")
    slots.append(Slot(chunk, sink=chunk == 0))
  legend = (("sink", "sink"), ("window", "window"), ("own", "written at the end of this row"), ("empty", "empty"))
  x = 24
  for kind, words in legend:
    canvas.box(x, top + rows * step + 16, 16, 16, kind)
    canvas.text(x + 24, top + rows * step + 29, words, "small")
    x += 60 + 7 * len(words)
  return canvas.svg()


def main() -> None:
  for name, draw in (("one_chunk", one_chunk), ("memory", memory)):
    (_HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
  main()
