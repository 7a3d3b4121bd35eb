"""Names videos as VBench wants them, checks a folder for what VBench passes over in silence, and reads its results.

  streamt1 export_vbench --videos=seed0,seed1,seed2,seed3,seed4 --prompts=all_dimension.txt --output=for_vbench
  streamt1 export_vbench --check --output=for_vbench --results=evaluation_results
  streamt1 export_vbench --import=evaluation_results --against=other_results

Videos are what `streamt1 generate` made; samples of one prompt are videos of different seeds. VBench itself is not part
of this: it needs an environment of its own, with CUDA. Videos go to `OUTPUT/videos`, and beside it are a manifest and,
with --layout=custom, the prompts for VBench's `--prompt_file`.

Exit codes: 0; 2 for bad input; 3 when --check finds a fault; 130 when interrupted, 143 by SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm
from absl import flags
from etils import epath

from streamt1_jax.cli import command, flag_types, results, score_inputs
from streamt1_jax.config import ConfigError
from streamt1_jax.evaluation.vbench import check, export, prompts, scores
from streamt1_jax.io import part_files
from streamt1_jax.messages import shortened

_LENGTHS = ("all", "79", "80", "81")
_RESULTS = "*_eval_results.json"


def define_flags(values: flags.FlagValues) -> None:
  """Defines every flag of the command."""
  flag_types.define_list(
    values, "videos", None, "Folders of results of `streamt1 generate`, such as one for each seed."
  )
  flag_types.define_path(values, "prompts", None, "VBench's prompts: all_dimension.txt, or VBench_full_info.json.")
  flag_types.define_path(
    values, "model_prompts", None, "What the model was given, a line for each of --prompts; the same by default."
  )
  flag_types.define_choice(values, "layout", "standard", list(export.LAYOUTS), "Names: VBench's prompts, or lines.")
  flag_types.define_choice(
    values, "frames", "all", list(_LENGTHS), "Frames of every video, cut at the end. 80 are 5.0 s, for VBench-Long."
  )
  flag_types.define_integer(values, "samples", 5, "Videos of each prompt.", 1)
  flag_types.define_integer(
    values, "flicker_samples", None, "Videos of prompts of temporal flickering; VBench advises 25 or more.", 1
  )
  flag_types.define_path(values, "output", None, "Folder of the export.")
  flag_types.define_switch(values, "overwrite", False, "Replaces an earlier export.")
  flag_types.define_switch(values, "check", False, "Checks the export in --output instead of making it.")
  flag_types.define_path(values, "results", None, "With --check: VBench's --output_path, to see what it found.")
  flag_types.define_list(values, "import", None, "Result files of VBench, or folders of them, to make tables of.")
  flag_types.define_list(values, "against", None, "With --import: results of other videos of the same prompts.")


def run(values: flags.FlagValues) -> None:
  """Exports, checks, or reads results."""
  imported = values["import"].value
  if values.check and imported:
    raise ConfigError("--check and --import are different things; give one")
  for name, needed in (("results", values.check), ("against", imported)):
    if values[name].value and not needed:
      raise ConfigError(f"--{name} belongs to --{'check' if name == 'results' else 'import'}")
  if imported:
    _import(imported, values.against)
  elif values.check:
    _check(epath.Path(_required(values, "output")), values.results)
  else:
    _export(values)


def _required(values: flags.FlagValues, name: str) -> Any:
  if not values[name].value:
    raise ConfigError(f"--{name} is needed")
  return values[name].value


def _export(values: flags.FlagValues) -> None:
  folders, wanted, output = (_required(values, name) for name in ("videos", "prompts", "output"))
  target = epath.Path(output)
  if target.exists() and not values.overwrite and (not target.is_dir() or any(target.iterdir())):
    raise ConfigError(f"--output={output} is there already; VBench-Long reads what an earlier run left: --overwrite")
  if target.exists() and values.overwrite and any(target.iterdir()) and not (target / export.MANIFEST).is_file():
    raise ConfigError(f"--output={output} is no earlier export, and is not replaced")
  asked = prompts.read(wanted, values.model_prompts)
  if values.flicker_samples and not any(prompts.FLICKER in prompt.dimensions for prompt in asked):
    raise ConfigError(
      f"--flicker_samples needs --prompts=VBench_full_info.json; {wanted} does not say what prompts are for"
    )
  sources = [source for folder in folders for source in _sources(folder)]
  found = export.entries(asked, sources, values.layout, values.samples, values.flicker_samples)
  frames = None if values.frames == "all" else int(values.frames)
  with results.staged_folder(target, keep_on=lambda error: False) as staging:
    made = export.write(staging, found, values.layout, frames)
    for _ in tqdm.tqdm(made, total=len(found), unit="video", disable=None):
      command.raise_if_interrupted()
  print(f"{target / export.VIDEOS}: {len(found)} videos of {len(asked)} prompts")
  names = [entry.name for entry in found]
  _tell(check.findings(target / export.VIDEOS, names))
  _tell(check.notes(target / export.VIDEOS, names), "note")


def _sources(folder: str) -> list[export.Source]:
  """Videos below a folder with what their manifests say."""
  found = []
  for path in score_inputs.find_videos(folder):
    where = path.parent / results.MANIFEST
    settings = part_files.read_json_object(path.parent, results.MANIFEST, "a generated video").get("settings")
    if not isinstance(settings, dict):
      settings = {}
    prompt, seed = settings.get("prompt"), settings.get("seed")
    if not isinstance(prompt, str) or type(seed) is not int:
      raise ConfigError(f"{where} needs settings with a prompt and a seed, got {shortened(settings)}")
    found.append(export.Source(path, prompt, seed, settings))
  return found


def _check(folder: epath.Path, result_folder: str | None) -> None:
  document = part_files.read_json_object(folder, export.MANIFEST, "an export for VBench")
  videos = document.get("videos")
  if not isinstance(videos, list) or not all(isinstance(v, dict) and isinstance(v.get("name"), str) for v in videos):
    raise ConfigError(f"{folder / export.MANIFEST} needs videos, a list of objects with a name")
  names = [entry["name"] for entry in videos]
  found = list(check.findings(folder / export.VIDEOS, names))
  if result_folder is not None:
    found += check.findings_of_results(epath.Path(result_folder))
  _tell(found)
  _tell(check.notes(folder / export.VIDEOS, names), "note")
  if found:
    raise command.RunFailed(f"{len(found)} faults in {folder}")
  print(f"{len(videos)} videos for {document.get('tool')}: no fault found")


def _tell(found: Iterable[str], kind: str = "warning") -> None:
  for line in found:
    print(f"{kind}: {line}", file=sys.stderr)


def _import(paths: Sequence[str], against: Sequence[str] | None) -> None:
  first = scores.read(_result_files("import", paths))
  print(scores.table(first))
  if against:
    print("\n" + scores.paired(first, scores.read(_result_files("against", against))))


def _result_files(flag: str, paths: Sequence[str]) -> list[epath.Path]:
  files = []
  for path in map(epath.Path, paths):
    inside = sorted(path.glob(_RESULTS)) if path.is_dir() else [path]
    if not inside or not all(file.is_file() for file in inside):
      raise ConfigError(f"--{flag}={path}: no file there, or no {_RESULTS} in the folder")
    files += inside
  return files


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
