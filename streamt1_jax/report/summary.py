"""What a page says of a search as a whole: sentences, facts, what it cost, and its settings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from streamt1_jax.report import story
from streamt1_jax.report.account import Account
from streamt1_jax.report.story import Story

_COUNTS = {
  "denoise": "denoising forwards",
  "look_ahead": "look-ahead forwards",
  "commit": "clean passes",
  "decoded": "latent frames decoded",
  "previewed": "latent frames decoded for an early look",
  "image_calls": "calls of the image reward",
  "image_frames": "frames given to the image reward",
  "video_calls": "calls of the video reward",
  "video_frames": "frames given to the video reward",
  "forwards": "forwards in all",
  "plain_tflop": "TFLOP of plain streaming",
  "times_plain": "times plain streaming",
  "search_seconds": "seconds of the search",
}
"""What a search counts, in words; what else a result counts has its own name."""
_PARTS = {
  "load": "load",
  "text": "read the prompt",
  "first_chunk": "first chunk and compilation",
  "search": "search",
  "assemble": "judge whole videos",
  "write": "write",
  "save": "save",
  "forwards": "forwards of the generator",
}
"""Phases of a run, and what FLOP are spent on, in words."""


@dataclasses.dataclass(frozen=True)
class Share:
  """A part of a whole: name, value in words, percent of the whole, and whether it is what the whole is there for."""

  name: str
  text: str
  width: float
  main: bool


def plain(value: Any) -> str:
  """A value from JSON as text."""
  if value is None:
    return "not set"
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def lead(account: Account, told: Story) -> list[str]:
  """Sentences that sum a search up."""
  everybody = [candidate for chunk in told.chunks for candidate in chunk.values()]
  words = {
    story.SURVIVOR: "survived in beams that are not shown",
    story.LOSER: "were dropped",
    story.REJECTED: "were never finished",
    story.UNUSABLE: "were NaN or Inf",
  }
  made, sentences = len(told.chunks), []
  if told.hidden:
    sentences.append(f"The video has {told.end} chunks; this page is of the last {told.end - told.hidden}.")
  if told.failed:
    error = account.run.get("error")
    sentences.append(f"The search failed{f': {error}' if isinstance(error, str) else ''}.")
  if told.given > told.hidden:
    sentences.append(f"The video begins with {_many(told.given, 'chunk')} that {_was(told.given)} given.")
  if len(everybody) == made:
    drawn = f"{_many(made, 'chunk')} {_was(made)} made, one candidate each"
    sentences.append(f"{drawn}." if told.judged else f"{drawn}; nothing was judged.")
    return sentences
  sentences.append(f"{_many(len(everybody), 'candidate')} {_was(len(everybody))} drawn for {_many(made, 'chunk')}.")
  parts = [f"{made} {'led to the best beam' if told.failed else 'are in the video'}"]
  for kind, meaning in words.items():
    count = sum(each.kind == kind for each in everybody)
    parts += [f"{count} {meaning}"] if count else []
  sentences.append(f"{', '.join(parts[:-1])} and {parts[-1]}." if len(parts) > 1 else f"{parts[0]}.")
  return sentences


def _many(count: int, noun: str) -> str:
  return f"{count} {noun}{'' if count == 1 else 's'}"


def _was(count: int) -> str:
  return "was" if count == 1 else "were"


def facts(account: Account, told: Story) -> list[tuple[str, str]]:
  """Labels and texts; what the result does not say is left out."""
  trace, run, length = account.trace, account.run, account.section("length")
  environment, settings = account.section("environment"), account.settings
  final = trace["final"]
  found = [("Search", _search_name(account)), ("Beams \N{MULTIPLICATION SIGN} candidates", _sizes(account))]
  if final is not None and told.judged:
    found.append(("Score of the video", score(final["scores"][final["best"]])))
  if isinstance(length.get("seconds"), (int, float)):
    found.append(("Length", f"{length['seconds']:.2f} s, {_many(told.end, 'chunk')}"))
  total = sum(value for value in account.section("wall_seconds").values() if isinstance(value, (int, float)))
  if total:
    found.append(("Took", f"{total:.1f} s"))
  rewards = [plain_names(trace.get(name)) for name in ("image_rewards", "video_rewards")]
  if told.judged and any(rewards):
    found.append(("Rewards", ", ".join(filter(None, rewards))))
  if settings.get("seed") is not None:
    found.append(("Seed", plain(settings["seed"])))
  if environment.get("device_kind") is not None:
    found.append(("Device", f"{environment['device_kind']}, {settings.get('dtype', 'unknown dtype')}"))
  if run.get("prompt_truncated") is True:
    found.append(("Prompt", "cut: longer than the model reads"))
  return found


def _search_name(account: Account) -> str:
  method = account.trace.get("method")
  name = method.get("name") if isinstance(method, Mapping) else method or account.section("flags").get("search")
  return name.replace("_", " ") if isinstance(name, str) else "not recorded"


def _sizes(account: Account) -> str:
  return f"{account.trace['top_k']} \N{MULTIPLICATION SIGN} {account.trace['beam_size']}"


def plain_names(weights: Any) -> str:
  """Names of rewards, with weights that are not one."""
  if not isinstance(weights, Mapping):
    return weights if isinstance(weights, str) else ""
  return " + ".join(name if weight == 1 else f"{weight} {name}" for name, weight in weights.items())


def score(value: float | None, digits: int = 4) -> str:
  """A score as text; what nothing judged has none."""
  return "not judged" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def shares(parts: Mapping[str, Any], main: str, unit: str) -> list[Share]:
  """Each part with its percent of the whole; parts that are no numbers above 0 are left out.

  Args:
    parts: values by name.
    main: name of the part that the whole is there for.
    unit: of the values.
  """
  values = {name: value for name, value in parts.items() if isinstance(value, (int, float)) and value > 0}
  total = sum(values.values())
  return [
    Share(_PARTS.get(name, name.replace("_", " ")), f"{amount(value)} {unit}", 100.0 * value / total, name == main)
    for name, value in values.items()
  ]


def amount(value: float) -> str:
  """A number of things, whole; or a measured number by its first three digits."""
  if value == int(value) or value >= 100:
    return f"{value:,.0f}"
  return f"{value:.3g}"


def work(account: Account) -> list[Share]:
  """The TFLOP of a search by what they were spent on."""
  flop = account.section("cost").get("tflop")
  parts = {name: value for name, value in flop.items() if name != "total"} if isinstance(flop, Mapping) else {}
  return shares(parts, "forwards", "TFLOP")


def tries(account: Account) -> list[list[str]]:
  """What a driver tried from the host, a row each: chunks, seed, score, frames that were judged, whether it is kept."""
  rows = []
  # Older results have them in the manifest alone.
  listed = account.trace.get("tries", account.run.get("tries"))
  for each in listed if isinstance(listed, list) else ():
    begin, chunks = (each.get(name) if isinstance(each, Mapping) else None for name in ("begin", "chunks"))
    if not (isinstance(begin, int) and isinstance(chunks, int)):
      continue
    value = each.get("score")
    told = score(value) if isinstance(value, (int, float)) and math.isfinite(value) else "NaN or Inf"
    span = str(begin) if chunks <= 1 else f"{begin} to {begin + chunks - 1}"
    seen = plain(each.get("judged_frames"))
    rows.append([span, plain(each.get("seed")), told, seen, "in the video" if each.get("kept") is True else "let go"])
  return rows


def counts(account: Account) -> list[tuple[str, str]]:
  """What the search counted: the account of the whole, or the sum of the chunks' own."""
  whole = account.section("cost")
  counted = [whole] if whole else [chunk.get("cost") for chunk in account.trace["chunks"]]
  sums: dict[str, float] = {}
  for name, value in (item for owner in counted if isinstance(owner, Mapping) for item in owner.items()):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      sums[name] = sums.get(name, 0) + value
  return [(_COUNTS.get(name, name.replace("_", " ")), amount(value)) for name, value in sums.items() if value]
