"""Published files of reward models to folders of a checkpoint, by the command, at tiny size.

Files are written without the libraries that publish them; files of these: oracle/convert_rewards_test.py. A text of
another name stands for the published ones, which are not part of this repository.
"""

import json
import pathlib
import shutil
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax.config import ConfigError
from streamt1_jax.convert import reward_part, reward_prompts
from streamt1_jax.convert.tables import hpsv3, videoalign
from streamt1_jax.io import config_json
from streamt1_jax.measuring import random_rewards
from streamt1_jax.rewards.folder import load_reward
from streamt1_jax.rewards.hpsv3 import HPSv3
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.videoalign import VideoAlign
from tests import small_rewards
from tests.command_line import REPOSITORY, convert
from tests.published_files import write_safetensors, write_torch
from tests.published_model import files

TABLES = {"hpsv3": hpsv3, "videoalign": videoalign}


def tensors(model: str) -> dict[str, np.ndarray]:
  """A random checkpoint; VideoAlign's with adapters on the decoder, as peft leaves them."""
  generator = np.random.default_rng(len(model))
  specs = random_rewards.reward_tensors(model, small_rewards.CONFIGS[model])
  return {name: generator.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
  """Everything to be downloaded, in its published layout."""
  path = tmp_path_factory.mktemp("published")
  write_safetensors(path / "HPSv3.safetensors", tensors("hpsv3"))
  last = path / "VideoReward/checkpoint-11352"
  last.mkdir(parents=True)
  write_torch(last / "model.pth", tensors("videoalign"))
  (path / "VideoReward/checkpoint-9000").mkdir()
  (path / "VideoReward/checkpoint-9000/model.pth").write_text("an earlier one")
  for model, config in small_rewards.CONFIGS.items():
    (path / f"{model}.json").write_text(json.dumps(config_json.to_json_value(config)))
    stored = small_rewards.save_reward(path / "stored" / model, model)
    shutil.copy(stored / prompts.TEMPLATE_FILE, path / f"{model}_prompt.json")
  shutil.copy(path / "stored/hpsv3" / prompts.TOKENIZER_FILE, path)
  return path


def flags(published: pathlib.Path, **changes) -> list[str]:
  """The flags of a conversion of both, some of them changed or (None) left out."""
  given = {"hpsv3": published / "HPSv3.safetensors", "videoalign": published / "VideoReward"}
  for model in ("hpsv3", "videoalign"):
    given |= {f"{model}_prompt": published / f"{model}_prompt.json", f"{model}_config": published / f"{model}.json"}
  given |= {"reward_tokenizer": published, "output": "out", "dtype": "float32"} | changes
  return [f"--{name}={value}" for name, value in given.items() if value is not None]


def template(published: pathlib.Path, model: str) -> prompts.PromptTemplate:
  return prompts.load_template(published / f"{model}_prompt.json")


@pytest.fixture(scope="module")
def converted(tmp_path_factory, published) -> pathlib.Path:
  """A folder in which both were converted."""
  path = tmp_path_factory.mktemp("converted")
  result = convert(path, *flags(published))
  assert result.code == 0, result
  assert "converting rewards/hpsv3" in result.stderr
  return path


@pytest.mark.parametrize("model", ["hpsv3", "videoalign"])
def test_loaded_rewards_are_the_published_ones(converted, model):
  loaded = load_reward(converted / "out/rewards" / model, fps=16.0, dtype=jnp.float32)
  expected = small_rewards.convert(tensors(model), small_rewards.CONFIGS[model])
  jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
  config = small_rewards.CONFIGS[model]
  assert loaded.reward == (HPSv3(config) if model == "hpsv3" else VideoAlign(16.0, config))
  tokens = loaded.prompt("a red circle")
  # The tokenizer has 15 tokens and HPSv3's; VideoAlign's follow these.
  assert tokens.after[tokens.reward_index].tolist() == {"hpsv3": [15], "videoalign": [16, 17, 18]}[model]


def test_half_precision_keeps_the_head(tmp_path, published):
  only_hpsv3 = dict.fromkeys(("videoalign", "videoalign_prompt", "videoalign_config"))
  assert convert(tmp_path, *flags(published, **only_hpsv3, dtype="bfloat16")).code == 0
  part = json.loads((tmp_path / "out/rewards/hpsv3/part.json").read_text())
  assert part["dtype"] == "bfloat16+float32"
  loaded = load_reward(tmp_path / "out/rewards/hpsv3", fps=16.0, dtype=jnp.float32)
  expected = small_rewards.convert(tensors("hpsv3"), small_rewards.CONFIGS["hpsv3"])
  jax.tree.map(np.testing.assert_array_equal, loaded.params["head"], expected["head"])


def test_provenance(converted, published):
  source = json.loads((converted / "out/rewards/videoalign/source.json").read_text())
  assert source["sources"][0]["file"] == "model.pth"
  assert source["lora"]["rank"] == videoalign.CONVERSION.lora[0]
  assert source["lora"]["scale"] == 2.0
  assert source["lora"]["layers"] == 7 * 2
  assert source["skipped"] == ["base_model.model.lm_head.weight (no reward reads it)"]
  assert source["prompt_template"] == {"model": "toy", "sha256": template(published, "videoalign").sha256}


def test_done_parts_are_skipped_and_others_never_replaced(converted, published, tmp_path):
  shutil.copytree(converted / "out", tmp_path / "out")
  before = files(tmp_path)
  again = convert(tmp_path, *flags(published))
  assert again.code == 0, again
  assert "converting" not in again.stderr
  assert files(tmp_path) == before
  other = template(published, "hpsv3").text.replace("Rate", "Judge")
  (tmp_path / "other.json").write_bytes(prompts.template_json(prompts.PromptTemplate("toy", other, ("<|Reward|>",))))
  refused = convert(tmp_path, *flags(published, hpsv3_prompt="other.json"))
  assert refused.code == 2
  assert "out/rewards/hpsv3 exists and was made otherwise (prompt_template differ" in refused.stderr
  (tmp_path / "other.json").unlink()
  assert files(tmp_path) == before


def test_optional_parts_of_a_checkpoint(tmp_path, published):
  """A complete checkpoint gets rewards at any time, and is complete without them."""
  shutil.copytree(REPOSITORY / "checkpoints/tiny", tmp_path / "out", ignore=shutil.ignore_patterns("rewards"))
  before = files(tmp_path)
  result = convert(tmp_path, *flags(published), "--model=tiny")
  assert result.code == 0, result
  *told, last = result.stdout.splitlines()
  names = ["HPSv3.safetensors", "model.pth", "tokenizer.json"]  # One tokenizer for both.
  assert told == [f"{name}: not a file I know" for name in names]
  assert last.startswith("out is a checkpoint")
  after = files(tmp_path)
  assert before.items() <= after.items()
  assert {path.relative_to(tmp_path / "out").parts[:2] for path in after.keys() - before.keys()} == {
    ("rewards", "hpsv3"),
    ("rewards", "videoalign"),
  }


def test_dry_run(tmp_path, published):
  result = convert(tmp_path, *flags(published), "--dry_run")
  assert (result.code, result.stderr) == (0, "")
  assert files(tmp_path) == {}
  for fragment in (
    "rewards/hpsv3/ from --hpsv3, transformers 4.45 names",
    "rewards/videoalign/ from --videoalign",
    f"merges a LoRA into 14 layers: rank {videoalign.CONVERSION.lora[0]}, alpha 128",
    "VideoReward/checkpoint-11352/model.pth",
    "skips lm_head.weight",
    f"instruction text of toy, sha256 {template(published, 'hpsv3').sha256}",
    "model.layers.{layer}.self_attn.q_proj.weight -> backbone.decoder.blocks.query.kernel [2, 16, 16] float32",
  ):
    assert fragment in result.stdout


@pytest.mark.parametrize(
  ("changes", "fragments"),
  [
    ({"hpsv3_prompt": None}, ["--hpsv3 needs --hpsv3_prompt", "the wheel of hpsv3 1.0.0"]),
    ({"hpsv3": None}, ["--hpsv3_prompt needs --hpsv3"]),
    ({"hpsv3_config": None}, ["--hpsv3 ", "as hpsv3: the checkpoint does not fit", "misshapen"]),
  ],
)
def test_refused_by_the_command(tmp_path, published, changes, fragments):
  result = convert(tmp_path, *flags(published, **changes))
  assert result.code == 2, result
  assert files(tmp_path) == {}
  (line,) = result.stderr.splitlines()
  for fragment in fragments:
    assert fragment in line


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tokenizer": None}, "--hpsv3 needs --reward_tokenizer, the tokenizer.json"),
    ({"tokenizer": "nowhere"}, "--reward_tokenizer: .*nowhere is not a readable tokenizer.json"),
    ({"tokenizer": "hpsv3.json"}, "--reward_tokenizer: .*hpsv3.json is not a readable tokenizer.json"),
    ({"weights": "nowhere"}, "nowhere does not exist"),
    (
      {"weights": "VideoReward"},
      "--hpsv3 .*model.pth as hpsv3: it holds adapters of peft, and the published file holds none",
    ),
    ({"config": "nowhere.json"}, "--hpsv3_config .*nowhere.json cannot be read"),
    ({"config": "videoalign.json"}, "--hpsv3_config .*lacks head_dims"),
    ({"prompt": "videoalign_prompt.json"}, "--hpsv3_prompt: .* has 3 reward tokens, hpsv3 reads 1"),
    ({"prompt": "tokenizer.json"}, "--hpsv3_prompt: .*tokenizer.json lacks text"),
    ({"prompt": "text.py"}, "--hpsv3_prompt: .*text.py: the prompt template of hpsv3 is not the published one"),
  ],
)
def test_files_that_do_not_fit(published, changes, message):
  (published / "text.py").write_text('INSTRUCTION = "{text_prompt}"\nprompt_with_special_token = "<|Reward|>"\n')
  given = {"weights": "HPSv3.safetensors", "prompt": "hpsv3_prompt.json", "tokenizer": ".", "config": "hpsv3.json"}
  paths = {name: file and published / file for name, file in (given | changes).items()}
  with pytest.raises(ConfigError, match=message):
    reward_part.make_plan(reward_part.RewardSources("hpsv3", **paths))


def test_damaged_text_of_a_converted_reward(converted, tmp_path):
  shutil.copytree(converted / "out/rewards/hpsv3", tmp_path / "hpsv3")
  path = tmp_path / "hpsv3/prompt_template.json"
  path.write_text(path.read_text().replace("Rate:", "Judge:"))
  with pytest.raises(ConfigError, match="the text has sha256"):
    load_reward(tmp_path / "hpsv3", fps=16.0)


def test_foreign_folders(tmp_path):
  with pytest.raises(ConfigError, match="is not a reward model: it has no reward.json"):
    load_reward(tmp_path, fps=16.0)
  (tmp_path / "reward.json").write_text('{"format_version": 1, "reward": "clip", "config": {}}')
  with pytest.raises(ConfigError, match="reward must be one of hpsv3, videoalign, got 'clip'"):
    load_reward(tmp_path, fps=16.0)


class TestHostileTexts:
  """An instruction text comes from a module or a wheel that somebody put on the web."""

  MEMBER = "hpsv3/dataset/data_collator_qwen.py"

  def _refused(self, path: pathlib.Path) -> str:
    tracemalloc.start()
    with pytest.raises(ConfigError) as caught:
      reward_prompts.read("hpsv3", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert str(caught.value).isprintable()
    return str(caught.value)

  def test_a_wheel_that_unpacks_to_a_gigabyte(self, tmp_path):
    with (
      zipfile.ZipFile(tmp_path / "w.whl", "w", zipfile.ZIP_DEFLATED) as archive,
      archive.open(self.MEMBER, "w") as file,
    ):
      for _ in range(2**7):
        file.write(b" " * 2**20)
    assert (tmp_path / "w.whl").stat().st_size < 10**6
    assert "is not a wheel of hpsv3: it is too large" in self._refused(tmp_path / "w.whl")

  @pytest.mark.parametrize(("at", "value"), [(8, 99), (8, 12), (6, 1), (14, 7), (30, 200)])
  def test_a_wheel_that_is_damaged(self, tmp_path, at, value):
    """Its method of compression, encryption, checksum and name; and data that cannot be unpacked."""
    with zipfile.ZipFile(tmp_path / "w.whl", "w", zipfile.ZIP_DEFLATED) as archive:
      archive.writestr(self.MEMBER, "INSTRUCTION = 'text'\n" * 50)
    content = bytearray((tmp_path / "w.whl").read_bytes())
    content[at] = value
    table = content.index(b"PK\x01\x02")
    if at < 30:
      content[table + at + 2] = value
    (tmp_path / "w.whl").write_bytes(content)
    assert "is not a wheel of hpsv3" in self._refused(tmp_path / "w.whl")

  @pytest.mark.parametrize(
    "text",
    [
      "(" * 10**5,
      "x = " + "[" * 150 + "]" * 150,
      "x = " + "-" * 20_000 + "1",
      "x = " + "1+" * 9000 + "1",
      " " * 2**21,
      "\0",
    ],
    ids=["brackets", "nested", "signs", "sums", "long", "zero"],
  )
  def test_modules_that_are_deep_or_long(self, tmp_path, text):
    (tmp_path / "m.py").write_text(text)
    self._refused(tmp_path / "m.py")
