"""Our own files with one thing wrong in them: the line names the field, and nothing is opened or computed by it."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from streamt1_jax.config import ConfigError, preset
from streamt1_jax.io import checkpoint, config_json, part_files, part_writer, stored_part
from streamt1_jax.rewards import folder as reward_folder
from streamt1_jax.rewards.table import REWARDS
from tests import small_rewards


def _config(folder: pathlib.Path) -> dict:
  checkpoint.save_config(folder, preset("tiny"))
  return json.loads((folder / "config.json").read_text())


def _refused(folder: pathlib.Path, document, read=checkpoint.load_config, name="config.json") -> str:
  (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))
  with pytest.raises(ConfigError) as caught:
    read(folder)
  line = str(caught.value)
  assert len(line) <= 500
  assert line.isprintable()
  return line


def _numbers(value, path=()):
  """Every number in a JSON value, and where it is."""
  for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
    if type(item) in (int, float):
      yield (*path, key)
    yield from _numbers(item, (*path, key))


def _put(document, path, value) -> None:
  for key in path[:-1]:
    document = document[key]
  document[path[-1]] = value


class TestConfig:
  MAY_BE_ZERO = {"num_res_blocks", "latent_mean", "context_timestep"}

  def test_no_number_may_be_zero_or_huge_unless_it_means_something(self, tmp_path):
    original = _config(tmp_path)
    paths = list(_numbers(original["model"]))
    assert len(paths) > 60
    for path in paths:
      field = next(key for key in reversed(path) if isinstance(key, str))
      for value in (0, -1, 2**24 + 1, 10**400, 2**63):
        document = json.loads(json.dumps(original))
        _put(document["model"], path, value)
        if value in (0, -1) and field == "latent_mean" or value == 0 and field in self.MAY_BE_ZERO:
          continue
        line = _refused(tmp_path, document)
        assert field in line
        assert str(tmp_path / "config.json") in line

  @pytest.mark.parametrize(
    ("path", "value", "fragment"),
    [
      (("text", "num_heads"), 5, "attn_dim 128 must be a multiple of num_heads 5"),
      (("text", "num_buckets"), 2, "num_buckets must be a multiple of 4"),
      (("text", "max_distance"), 8, "num_buckets"),
      (("codec", "dim_mult"), [1] * 40, "dim_mult must have 1 to 16 entries"),
      (("codec", "num_res_blocks"), 10**6, "num_res_blocks must be at most 64"),
      (("codec", "latent_std"), [1e-9, *[1.0] * 14, -1.0], "latent_std must be above 0"),
      (("fps",), True, "fps must be an integer"),
    ],
  )
  def test_numbers_that_contradict_each_other(self, tmp_path, path, value, fragment):
    document = _config(tmp_path)
    _put(document["model"], path, value)
    assert fragment in _refused(tmp_path, document)

  def test_a_name_that_stands_twice(self, tmp_path):
    text = json.dumps(_config(tmp_path))
    assert "the name 'model' stands twice" in _refused(tmp_path, text[:-1] + ', "model": 3}')

  @pytest.mark.parametrize("value", ["[" * 10**6, '{"a":' * 10**5, "[]," * 10**6, '"' + "x" * 2**26 + '"', "\ufeff{}"])
  def test_texts_that_are_large_or_deep(self, tmp_path, value):
    _refused(tmp_path, value)

  def test_names_that_are_long(self, tmp_path):
    document = _config(tmp_path)
    assert "format_version is 'xxx" in _refused(tmp_path, document | {"format_version": "x" * 10**6})
    assert "must have exactly the fields" in _refused(tmp_path, document | {"\x1b[2J" * 10**5: 0})
    document["model"]["name"] = "y\n" * 10**5
    assert "preset is 'tiny'" in _refused(tmp_path, document)


class TestReward:
  @pytest.mark.parametrize("model", small_rewards.CONFIGS)
  def test_no_number_may_be_zero_or_huge(self, tmp_path, model):
    config = small_rewards.CONFIGS[model]
    original = json.loads(reward_folder.config_json_bytes(REWARDS[model], config))
    for path in _numbers(original["config"]):
      field = next(key for key in reversed(path) if isinstance(key, str))
      for value in (2**24 + 1, 10**400) if field == "mean" else (0, -1, 2**24 + 1, 10**400):
        document = json.loads(json.dumps(original))
        _put(document["config"], path, value)
        assert field in _refused(tmp_path, document, reward_folder.load_config, "reward.json")

  @pytest.mark.parametrize("found", [{}, [], None, 0, "", "x" * 10**6, "quality"])
  def test_a_reward_that_is_none(self, tmp_path, found):
    document = {"format_version": 1, "reward": found, "config": {}}
    assert "reward must be one of" in _refused(tmp_path, document, reward_folder.load_config, "reward.json")

  @pytest.mark.parametrize("config", [None, [], 3, "", {"backbone": []}])
  def test_a_configuration_that_is_none(self, tmp_path, config):
    document = {"format_version": 1, "reward": "hpsv3", "config": config}
    assert "config" in _refused(tmp_path, document, reward_folder.load_config, "reward.json")

  @pytest.mark.parametrize("dims", [[4], [4, 4, 4], []])
  def test_pairs_have_two_entries(self, tmp_path, dims):
    document = json.loads(reward_folder.config_json_bytes(REWARDS["hpsv3"], small_rewards.CONFIGS["hpsv3"]))
    document["config"]["head_dims"] = dims
    line = _refused(tmp_path, document, reward_folder.load_config, "reward.json")
    assert f"head_dims must have 2 entries, got {len(dims)}" in line


WEIGHTS = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones(4, np.float32)}


@pytest.fixture
def part(tmp_path) -> pathlib.Path:
  part_writer.write_part(tmp_path / "part", WEIGHTS, [part_writer.Piece(*item) for item in WEIGHTS.items()])
  return tmp_path / "part"


def _sealed(part: pathlib.Path) -> pathlib.Path:
  """`part` with a part.json that vouches for whatever is in it."""
  (part / "part.json").unlink()
  part_files.write_part_file(epath.Path(part), WEIGHTS)
  return part


class TestPart:
  @pytest.mark.parametrize(
    "name", ["../outside", "/dev/zero", "a/../../outside", "", "a//b", ".", "a\0b", "x" * 2000, "\n"]
  )
  def test_files_outside_the_folder_are_not_opened(self, part, name):
    document = json.loads((part / "part.json").read_text())
    document["files"][name] = {"bytes": 0, "sha256": "0"}
    (part / "part.json").write_text(json.dumps(document))
    with pytest.raises(part_files.Damaged) as caught:
      part_files.verify_files(epath.Path(part))
    assert str(caught.value).isprintable()

  def test_a_device_in_the_place_of_a_file(self, part):
    """It has 0 bytes and no end."""
    os.symlink("/dev/zero", part / "zero")
    document = json.loads((part / "part.json").read_text())
    document["files"]["zero"] = {"bytes": 0, "sha256": "0"}
    (part / "part.json").write_text(json.dumps(document))
    with pytest.raises(part_files.Damaged, match="zero is not a file"):
      part_files.verify_files(epath.Path(part))

  @pytest.mark.parametrize(
    ("changes", "fragment"),
    [
      ({"shape": [2**62]}, "2^59"),
      ({"shape": [2**59, 2**4], "chunks": [1, 1]}, "2^59"),
      ({"shape": [1] * 33, "chunks": [1] * 33}, "cannot be read"),
      ({"shape": [-1]}, "cannot be read"),
      ({"dtype": ["<f4"]}, "cannot be read"),
    ],
  )
  def test_shapes_beyond_any_model(self, part, changes, fragment):
    path = part / "c" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
      stored_part.open_part(_sealed(part), None)
    assert fragment in str(caught.value)
    assert str(caught.value).isprintable()

  @pytest.mark.parametrize(
    "tree",
    [
      {"tree_metadata": {str(index): {} for index in range(70_000)}},
      {"tree_metadata": []},
      {"tree_metadata": {"a": {"key_metadata": [], "value_metadata": {"skip_deserialize": False}}}},
      {"tree_metadata": {"a": {"key_metadata": [{"key": "x" * 2000}], "value_metadata": {"skip_deserialize": False}}}},
      {"tree_metadata": {"a": {"key_metadata": [{"key": ".."}], "value_metadata": {"skip_deserialize": False}}}},
      {},
      [],
    ],
  )
  def test_trees_that_are_none(self, part, tree, capfd):
    (part / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as caught:
      stored_part.open_part(_sealed(part), None)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")

  def test_damage_that_part_json_vouches_for_is_one_line_on_its_own(self, part, capfd):
    for path in (part / "a.b" / ".zarray", part / "c" / ".zarray"):
      path.write_bytes(b"{")
    with pytest.raises(ConfigError, match="cannot be read"):
      checkpoint.load_params(_sealed(part), jax.tree.map(lambda x: x, {"a": {"b": WEIGHTS["a/b"]}, "c": WEIGHTS["c"]}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
  ("text", "fragment"),
  [
    ('{"a": 1, "a": 2}', "the name 'a' stands twice"),
    ('[{"b": {"a\\n": 1, "a\\n": 1}}]', "stands twice"),
    ("1" * 10**5, "not valid JSON"),
    ("1e999", "not JSON"),
    (b"\xff", "cannot be read"),
    ("[" * 2**21, "too many lists and objects"),
    (" " * 2**27, "too large"),
  ],
)
def test_json_that_is_not_read(text, fragment):
  with pytest.raises(ConfigError, match="where") as caught:
    config_json.parse_strict_json(text, "where")
  assert fragment in str(caught.value)
