"""Writes videos under the names that VBench looks for.

  OUTPUT/videos/{prompt}-{sample}.mp4     "standard": what VBench's own prompts are called
  OUTPUT/videos/{line}-{sample}.mp4       "custom": any prompts; OUTPUT/prompts.json says which
  OUTPUT/manifest.json                    where every video comes from

VBench takes the suffix of all videos from the first entry of the folder, so `videos` holds nothing else.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.vbench.prompts import Prompt, samples_needed
from streamt1_jax.io import manifest, part_files, video

VIDEOS, MANIFEST, PROMPTS = "videos", "manifest.json", "prompts.json"
SUFFIX = ".mp4"
FPS = 16
"""Frames per second of all videos. VBench-Long cuts a fraction off the rate, and a clip then has another length."""
LONG_SECONDS = 5.0
"""From this length on VBench-Long judges, by its maintainers' rule."""
_LONGEST_NAME = 255
_CUT_QUALITY = 4


class Source(NamedTuple):
  """A video that `streamt1 generate` made.

  Attributes:
    path: the file.
    prompt: what the model was given.
    seed: of its noise.
    settings: all that decided the video, as its manifest says.
  """

  path: epath.Path
  prompt: str
  seed: int
  settings: Mapping[str, Any]


class Entry(NamedTuple):
  """A video to be judged: the file in `videos`, its prompt, which sample it is, and where it comes from."""

  name: str
  prompt: Prompt
  sample: int
  source: Source


def standard_name(prompt: Prompt, sample: int) -> str:
  """The name by which VBench finds a sample of one of its own prompts.

  Raises ConfigError for a prompt that cannot be a file name.
  """
  name = f"{prompt.text}-{sample}{SUFFIX}"
  if "/" in name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
    raise ConfigError(f"{prompt.text!r:.80} cannot be the name of a file; --layout=custom names videos by line")
  return name


def custom_name(prompt: Prompt, sample: int) -> str:
  """The line of the prompt and the sample; neither is cut by VBench-Long, which ends a name at the first "_"."""
  return f"{prompt.line:04d}-{sample}{SUFFIX}"


LAYOUTS: Mapping[str, Callable[[Prompt, int], str]] = {"standard": standard_name, "custom": custom_name}


def entries(
  prompts: Sequence[Prompt],
  sources: Sequence[Source],
  layout: str,
  samples: int,
  flicker_samples: int | None = None,
) -> list[Entry]:
  """Which video becomes which sample, and for which prompt; samples of one prompt are in the order of their seeds.

  Args:
    prompts: different ones.
    sources: videos; those of other prompts are left out, and so are those beyond `samples`.
    layout: one of `LAYOUTS`.
    samples: videos of each prompt.
    flicker_samples: videos of each prompt of temporal flickering, if more.

  Raises:
    ConfigError: a prompt has too few videos, two of its videos have one seed, or videos were made with different
      settings.
  """
  by_prompt: dict[str, list[Source]] = {}
  for source in sources:
    by_prompt.setdefault(source.prompt, []).append(source)
  found, missing = [], []
  for prompt in prompts:
    made = sorted(by_prompt.get(prompt.model_text, []), key=lambda source: source.seed)
    wanted = samples_needed(prompt, samples, flicker_samples)
    for first, second in zip(made, made[1:], strict=False):
      if first.seed == second.seed:
        raise ConfigError(f"{first.path} and {second.path} are of one prompt and one seed; every sample needs its own")
    if len(made) < wanted:
      missing.append(f"{prompt.model_text!r:.60} ({len(made)} of {wanted})")
    found += [Entry(LAYOUTS[layout](prompt, index), prompt, index, made[index]) for index in range(len(made[:wanted]))]
  if missing:
    raise ConfigError(f"--videos lacks videos of {len(missing)} prompts: {part_files.list_some(missing)}")
  _require_one_model(found)
  return found


def _require_one_model(found: Sequence[Entry]) -> None:
  free = ("prompt", "seed")
  first, *others = [{k: v for k, v in entry.source.settings.items() if k not in free} for entry in found]
  for entry, settings in zip(found[1:], others, strict=True):
    for name in first.keys() | settings.keys():
      if first.get(name) != settings.get(name):
        raise ConfigError(
          f"{entry.source.path} was made with {name} {settings.get(name)}, and {found[0].source.path} with "
          f"{first.get(name)}; one export is of one model and one search"
        )


def collisions(names: Sequence[str]) -> list[list[str]]:
  """Names that differ in nothing but the case of letters, in groups. VBench's own list has such a pair."""
  groups = collections.defaultdict(list)
  for name in names:
    groups[name.casefold()].append(name)
  return [group for group in groups.values() if len(group) > 1]


def folds_case(folder: epath.Path) -> bool:
  """Whether two names that differ in nothing but the case of letters are one file in this folder, by trying it."""
  probe = folder / "case"
  probe.touch()
  try:
    return (folder / "CASE").exists()
  finally:
    probe.unlink()


def _place(source: epath.Path, target: epath.Path, frames: int | None) -> int:
  """Writes a video, cut at its end, and returns its number of frames. What need not be cut is linked, not copied."""
  info = video.probe_video(source)
  if info.fps != FPS:
    raise ConfigError(f"{source} has {info.fps:g} frames per second; VBench needs exactly {FPS}")
  if frames is None or info.num_frames == frames:
    _link(source, target)
    return info.num_frames
  if info.num_frames < frames:
    raise ConfigError(f"{source} has {info.num_frames} frames, fewer than --frames={frames}")
  video.write_video(
    target, video.read_frames(source, np.arange(frames), info.num_frames), FPS, constant_rate_factor=_CUT_QUALITY
  )
  return frames


def _link(source: epath.Path, target: epath.Path) -> None:
  try:
    os.link(source, target)
  except OSError:  # Another file system, or one without links.
    target.write_bytes(source.read_bytes())


def write(folder: epath.Path, found: Sequence[Entry], layout: str, frames: int | None = None) -> Iterator[Entry]:
  """Fills an empty folder with the videos and what describes them; yields every entry when its video is there.

  Args:
    folder: an empty one.
    found: what `entries` found.
    layout: one of `LAYOUTS`.
    frames: length of every video, which is cut at its end; None keeps all.

  Raises:
    ConfigError: a video is shorter, its frame rate is not `FPS`, one tool does not judge them all, or the disk keeps
      one of two names that differ in nothing but the case of letters.
  """
  (folder / VIDEOS).mkdir()
  alike = collisions([entry.name for entry in found])
  # A second video of such a name would be written into the first, which may be a link to its source.
  if alike and folds_case(folder / VIDEOS):
    raise ConfigError(
      f"the disk of the output keeps one of {part_files.list_some(alike[0])}: it takes capital letters for small ones; "
      "export to another disk, or with --layout=custom"
    )
  rows = []
  for entry in found:
    num_frames = _place(entry.source.path, folder / VIDEOS / entry.name, frames)
    if rows and tool(num_frames) != tool(rows[0]["frames"]):
      raise ConfigError(
        f"{entry.source.path} has {num_frames} frames and {found[0].source.path} {rows[0]['frames']}: one goes to "
        f"{tool(num_frames)}, the other to {tool(rows[0]['frames'])}"
      )
    rows.append(_row(entry, num_frames))
    yield entry
  if layout == "custom":
    manifest.write_json(folder / PROMPTS, {entry.name: entry.prompt.text for entry in found})
  document = {"layout": layout, "tool": tool(rows[0]["frames"]), "fps": FPS, "settings": _common_settings(found)}
  manifest.write_json(folder / MANIFEST, document | {"videos": rows})


def _row(entry: Entry, num_frames: int) -> dict[str, Any]:
  return {
    "name": entry.name,
    "line": entry.prompt.line,
    "prompt": entry.prompt.text,
    "model_prompt": entry.prompt.model_text,
    "sample": entry.sample,
    "seed": entry.source.seed,
    "frames": num_frames,
    "source": entry.source.path,
    "source_sha256": part_files.file_sha256(entry.source.path),
  }


def _common_settings(found: Sequence[Entry]) -> dict[str, Any]:
  return {name: value for name, value in found[0].source.settings.items() if name not in ("prompt", "seed")}


def tool(num_frames: int) -> str:
  """Which of the two judges a video of this length."""
  return "VBench-Long" if num_frames / FPS >= LONG_SECONDS else "VBench"
