"""What a killed program left, against the run that nobody disturbed."""

import json

import pytest
from etils import epath

from streamt1_jax.io.result_files import CONTACT_SHEET, MANIFEST, TRACE, VIDEO
from streamt1_jax.measuring.kill_trials import PROMPTS, Setting, Trial


def _main(arguments):
  raise AssertionError(f"started with {arguments}")


def _result_folder(outputs, prompt):
  return epath.Path(outputs) / prompt.replace(" ", "-")


def _trial(folder):
  """A trial that has come to its end, with a result for every prompt."""
  trial = Trial(folder, Setting(_main, _result_folder, folder, folder, 3, True))
  for prompt in PROMPTS:
    result = folder / _result_folder("outputs", prompt)
    result.mkdir(parents=True)
    for name in (VIDEO, CONTACT_SHEET, TRACE):
      (result / name).write_text(f"{name} of {prompt}")
    (result / MANIFEST).write_text(json.dumps({"sha256": {"latents": prompt}, "seconds": len(str(folder))}))
  (folder / ".stdout").write_text("".join(f"{_result_folder('outputs', prompt)}/{VIDEO}\n" for prompt in PROMPTS))
  return trial


def _one_byte(outputs):
  next(outputs.iterdir()).joinpath(VIDEO).write_text("another")


def _other_latents(outputs):
  next(outputs.iterdir()).joinpath(MANIFEST).write_text(json.dumps({"sha256": {"latents": "others"}}))


def _hidden_folder(outputs):
  (outputs / ".half-written").mkdir()


def _unknown_folder(outputs):
  (outputs / "what").mkdir()


def _missing(outputs):
  next(outputs.iterdir()).rename(outputs.parent / "elsewhere")


def _named_twice(outputs):
  stdout = outputs.parent / ".stdout"
  stdout.write_text("".join(2 * stdout.read_text().splitlines(keepends=True)[:1]))


def test_equal_results_have_no_problems(tmp_path):
  reference, trial = _trial(tmp_path / "reference"), _trial(tmp_path / "0")
  assert trial.problems(reference, ended=True) == trial.problems(reference, ended=False) == []


@pytest.mark.parametrize(
  ("harm", "told", "always"),
  [
    (_one_byte, "video.mp4 differs", True),
    (_other_latents, "latents or frames differ", True),
    (_unknown_folder, "what is no result", True),
    (_hidden_folder, ".half-written is left", False),
    (_missing, "is missing", False),
    (_named_twice, "the program names", False),
  ],
)
def test_problems(tmp_path, harm, told, always):
  """What is not finished yet is a problem only where the program says that it is through."""
  reference, trial = _trial(tmp_path / "reference"), _trial(tmp_path / "0")
  harm(tmp_path / "0" / "outputs")
  (problem,) = trial.problems(reference, ended=True)
  assert told in problem
  assert trial.problems(reference, ended=False) == ([problem] if always else [])
