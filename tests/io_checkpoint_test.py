"""Checkpoints load as they were saved, and every way a folder can be wrong is one clear line."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from streamt1_jax.config import PRESETS, ConfigError, preset
from streamt1_jax.io import checkpoint


class Part(nnx.Module):
  """Both kinds of container found in the models: a list of layers, and stacked parameters."""

  def __init__(self, rngs: nnx.Rngs):
    self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs) for _ in range(11)])
    self.stacked = nnx.Param(jax.random.normal(rngs.params(), (2, 5)))


def _abstract(params):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


@pytest.fixture
def params():
  key = jax.random.key(0)
  return {
    "blocks": {"kernel": jax.random.normal(key, (2, 8, 16)), "bias": jnp.linspace(-1.0, 1.0, 8)},
    "scale": jnp.float32(3.0),
    "steps": np.arange(4, dtype=np.int32),
  }


@pytest.fixture
def saved(tmp_path, params):
  checkpoint.save_params(tmp_path / "backbone", params)
  return tmp_path / "backbone"


def _files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def test_round_trip_is_exact(saved, params):
  loaded = checkpoint.load_params(saved, _abstract(params))
  chex.assert_trees_all_equal(loaded, params)
  chex.assert_trees_all_equal_dtypes(loaded, params)


def test_nnx_state_and_its_pure_dict_are_the_same_part(tmp_path):
  state = nnx.state(Part(nnx.Rngs(0)), nnx.Param)
  abstract = nnx.state(nnx.eval_shape(lambda: Part(nnx.Rngs(1))), nnx.Param)
  checkpoint.save_params(tmp_path / "state", state)
  checkpoint.save_params(tmp_path / "pure", nnx.to_pure_dict(state))
  for name in ("state", "pure"):
    loaded = checkpoint.load_params(tmp_path / name, abstract)
    assert isinstance(loaded, nnx.State)
    chex.assert_trees_all_equal(nnx.to_pure_dict(loaded), nnx.to_pure_dict(state))
    pure = checkpoint.load_params(tmp_path / name, nnx.to_pure_dict(abstract))
    chex.assert_trees_all_equal(pure, nnx.to_pure_dict(state))


@pytest.mark.parametrize("stored", [jnp.float16, jnp.bfloat16])
def test_floating_leaves_are_stored_narrow_and_loaded_in_the_dtype_asked_for(tmp_path, params, stored):
  checkpoint.save_params(tmp_path / "part", params, dtype=stored)
  narrow = jax.tree.map(lambda leaf: leaf.astype(stored) if leaf.dtype == jnp.float32 else leaf, params)
  as_model = checkpoint.load_params(tmp_path / "part", _abstract(params))
  chex.assert_trees_all_equal(as_model, jax.tree.map(lambda x, like: x.astype(like.dtype), narrow, params))
  as_stored = checkpoint.load_params(tmp_path / "part", _abstract(params), dtype=stored)
  chex.assert_trees_all_equal(as_stored, narrow)
  chex.assert_trees_all_equal_dtypes(as_stored, narrow)


def test_leaves_are_restored_to_their_sharding(saved, params):
  mesh = jax.make_mesh((8,), ("model",))
  sharding = jax.NamedSharding(mesh, jax.P(None, "model", None))
  abstract = _abstract(params)
  abstract["blocks"]["kernel"] = jax.ShapeDtypeStruct((2, 8, 16), jnp.bfloat16, sharding=sharding)
  loaded = checkpoint.load_params(saved, abstract)
  assert loaded["blocks"]["kernel"].sharding == sharding
  chex.assert_trees_all_equal(loaded["blocks"]["kernel"], params["blocks"]["kernel"].astype(jnp.bfloat16))


def test_paths_may_be_relative(tmp_path, params, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoint.save_params("tiny/backbone", params)
  chex.assert_trees_all_equal(checkpoint.load_params("tiny/backbone", _abstract(params)), params)


def test_sharded_arrays_can_be_saved(tmp_path):
  mesh = jax.make_mesh((8,), ("model",))
  values = jax.device_put(jnp.arange(16.0), jax.NamedSharding(mesh, jax.P("model")))
  checkpoint.save_params(tmp_path / "part", {"w": values})
  loaded = checkpoint.load_params(tmp_path / "part", {"w": jax.ShapeDtypeStruct((16,), jnp.float32)})
  np.testing.assert_array_equal(loaded["w"], np.arange(16.0))


def test_three_million_halves_take_about_six_megabytes(tmp_path):
  key = jax.random.key(0)
  weights = {f"layer_{i}": jax.random.normal(jax.random.fold_in(key, i), (10, 300, 50)) for i in range(20)}
  checkpoint.save_params(tmp_path / "part", weights, dtype=jnp.float16)
  files = _files(tmp_path)
  assert 5.0e6 < sum(path.stat().st_size for path in files) < 6.1e6
  assert len(files) < 20


def test_nothing_is_printed(tmp_path, params, capfd):
  checkpoint.save_params(tmp_path / "part", params)
  checkpoint.save_params(tmp_path / "part", params)
  checkpoint.load_params(tmp_path / "part", _abstract(params))
  with pytest.raises(ConfigError):
    checkpoint.load_params(tmp_path / "part", {"other": jax.ShapeDtypeStruct((1,), jnp.float32)})
  captured = capfd.readouterr()
  assert captured.out == captured.err == ""


def test_no_file_tells_where_it_was_written(saved, tmp_path):
  assert not [path.name for path in _files(saved) if str(tmp_path).encode() in path.read_bytes()]


def test_a_second_save_replaces_the_first_and_leaves_nothing_else(saved, params):
  checkpoint.save_params(saved, {"w": jnp.ones(3)})
  loaded = checkpoint.load_params(saved, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
  np.testing.assert_array_equal(loaded["w"], np.ones(3))
  assert [path.name for path in saved.parent.iterdir()] == ["backbone"]


def test_a_failed_save_leaves_the_earlier_version(saved, params, monkeypatch):
  def full(*args, **kwargs):
    raise OSError("No space left on device")

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", full)
  with pytest.raises(ConfigError, match="No space left on device"):
    checkpoint.save_params(saved, {"w": jnp.ones(3)})
  monkeypatch.undo()
  chex.assert_trees_all_equal(checkpoint.load_params(saved, _abstract(params)), params)
  assert [path.name for path in saved.parent.iterdir()] == ["backbone"]


@pytest.mark.parametrize(
  ("weights", "dtype", "message"),
  [
    ({"w": jnp.array([1.0, jnp.nan])}, None, "NaN or Inf in .*: w"),
    ({"w": jnp.array([1.0, 1e6])}, jnp.float16, "NaN or Inf in .*: w"),
    ({"w": jnp.zeros((0, 3))}, None, "w has size 0"),
    ({}, None, "no weights"),
  ],
)
def test_weights_that_could_not_be_loaded_are_not_saved(tmp_path, weights, dtype, message):
  with pytest.raises(ConfigError, match=message):
    checkpoint.save_params(tmp_path / "part", weights, dtype=dtype)
  assert list(tmp_path.iterdir()) == []


def test_foreign_folders_are_not_replaced(tmp_path):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
  with pytest.raises(ConfigError, match="will not be replaced"):
    checkpoint.save_params(tmp_path / "photos", {"w": jnp.ones(3)})
  assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def _drop(path):
  path.unlink()


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


@pytest.mark.parametrize("damage", [_drop, _truncate, _flip])
def test_damage_to_any_file_is_reported(saved, params, damage, tmp_path):
  names = [path.relative_to(saved) for path in _files(saved)]
  assert len(names) > 3
  for name in names:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    damage(copy / name)
    with pytest.raises(ConfigError, match=name.name) as error:
      checkpoint.load_params(copy, _abstract(params))
    assert "\n" not in str(error.value)
    shutil.rmtree(copy)


def test_folders_that_are_no_parts(tmp_path, params):
  (tmp_path / "file").write_text("not a folder")
  (tmp_path / "empty").mkdir()
  (tmp_path / "foreign").mkdir()
  (tmp_path / "foreign" / "model.safetensors").write_bytes(b"\0" * 64)
  for name, message in (
    ("absent", "does not exist"),
    ("file", "is a file"),
    ("empty", "found: nothing"),
    ("foreign", "is not a saved model part.*model.safetensors"),
  ):
    with pytest.raises(ConfigError, match=message):
      checkpoint.load_params(tmp_path / name, _abstract(params))


def test_files_orbax_cannot_read_become_one_line(saved, params):
  """A part.json that vouches for files which are no orbax checkpoint."""
  for path in _files(saved):
    if path.name != "part.json":
      path.unlink()
  part = json.loads((saved / "part.json").read_text())
  (saved / "part.json").write_text(json.dumps(part | {"files": {}}))
  with pytest.raises(ConfigError, match="cannot be read") as error:
    checkpoint.load_params(saved, _abstract(params))
  assert "\n" not in str(error.value)


def test_another_tree_is_refused_and_its_leaves_named(saved, params):
  abstract = _abstract(params)
  abstract["blocks"]["kernel"] = jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)
  abstract["blocks"]["extra"] = abstract.pop("scale")
  with pytest.raises(ConfigError) as error:
    checkpoint.load_params(saved, abstract)
  for expected in (
    "blocks/extra is missing",
    "scale is not in the model",
    "blocks/kernel is [2, 8, 16], the model has [4, 8, 16]",
  ):
    assert expected in str(error.value)


def test_only_the_first_few_leaves_are_named(saved):
  abstract = {f"layer_{i}": jax.ShapeDtypeStruct((2,), jnp.float32) for i in range(30)}
  with pytest.raises(ConfigError, match="and 31 more"):
    checkpoint.load_params(saved, abstract)


def test_integers_are_not_weights(saved, params):
  abstract = _abstract(params) | {"steps": jax.ShapeDtypeStruct((4,), jnp.float32)}
  with pytest.raises(ConfigError, match="steps is int32, the model has float32"):
    checkpoint.load_params(saved, abstract)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_not_finite_in_the_dtype_asked_for(tmp_path, sharded):
  checkpoint.save_params(tmp_path / "part", {"fine": jnp.ones(8), "large": jnp.full(8, 1e6)})
  sharding = jax.NamedSharding(jax.make_mesh((8,), ("model",)), jax.P("model")) if sharded else None
  leaf = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
  with pytest.raises(ConfigError, match="NaN or Inf in .*part: large$"):
    checkpoint.load_params(tmp_path / "part", {"fine": leaf, "large": leaf}, dtype=jnp.float16)


def test_not_a_number_on_disk_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "check_finite", lambda *args: None)
  checkpoint.save_params(tmp_path / "part", {"w": jnp.array([1.0, jnp.nan])})
  monkeypatch.undo()
  with pytest.raises(ConfigError, match="NaN or Inf in .*part: w"):
    checkpoint.load_params(tmp_path / "part", {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json(name):
  model = preset(name)
  through_json = json.loads(json.dumps(checkpoint.model_config_to_dict(model)))
  assert checkpoint.model_config_from_dict(through_json) == model


def test_config_lists_the_parts_on_disk(tmp_path):
  checkpoint.save_params(tmp_path / "backbone", {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, dtype=jnp.float16)
  checkpoint.save_params(tmp_path / "codec", {"w": jnp.ones(5)})
  (tmp_path / "notes").mkdir()
  checkpoint.save_config(tmp_path, preset("tiny"), {"recipe": "train_backbone", "steps": 100})
  info = checkpoint.load_info(tmp_path)
  assert info.model == checkpoint.load_config(tmp_path) == preset("tiny")
  assert info.parts == {
    "backbone": checkpoint.PartInfo(16, "float16"),
    "codec": checkpoint.PartInfo(5, "float32"),
  }
  assert info.provenance == {"recipe": "train_backbone", "steps": 100}


def _edit(document, keys, value):
  *parents, last = keys
  for key in parents:
    document = document[key]
  if value is None:
    del document[last]
  else:
    document[last] = value


@pytest.mark.parametrize(
  ("keys", "value", "message"),
  [
    (["format_version"], 2, "format_version is 2"),
    (["format_version"], None, "format_version is None"),
    (["format_version"], True, "format_version is True"),
    (["provenance"], None, "must have exactly the fields"),
    (["author"], "me", "must have exactly the fields"),
    (["preset"], "golden", "preset is 'golden' but model.name is 'tiny'"),
    (["parts"], [], "parts must be an object"),
    (
      ["parts", "codec"],
      {"parameters": "5", "dtype": "float32"},
      "parts.codec.parameters must be an integer, got '5'",
    ),
    (["model", "chunk_frames"], None, "model lacks chunk_frames"),
    (["model", "backbone", "depth"], 3, "model.backbone has unknown 'depth'"),
    (["model", "backbone", "dim"], 12.5, "model.backbone.dim must be an integer, got 12.5"),
    (["model", "backbone", "dim"], True, "model.backbone.dim must be an integer, got True"),
    (["model", "backbone", "dim"], 7, "model.backbone: dim 7 must be a multiple"),
    (["model", "codec", "dim_mult"], [1, "2", 4], r"model.codec.dim_mult\[1\] must be an integer"),
    (["model", "codec", "dim_mult"], 3, "model.codec.dim_mult must be a list"),
    (["model", "text"], "t5", "model.text must be an object"),
    (["model", "schedule", "shift"], "5", "model.schedule.shift must be a number"),
    (["model", "latent_height"], 9, "model: latent 9x8 is not a whole number"),
  ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, keys, value, message):
  checkpoint.save_config(tmp_path, preset("tiny"))
  document = json.loads((tmp_path / "config.json").read_text())
  _edit(document, keys, value)
  (tmp_path / "config.json").write_text(json.dumps(document))
  with pytest.raises(ConfigError, match=message) as error:
    checkpoint.load_config(tmp_path)
  assert "config.json" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "text", ["", "{", "[1]", '{"format_version": NaN}', '{"format_version": 1e999}', "[" * 100_000]
)
def test_a_config_that_is_no_json_object(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ConfigError, match="config.json"):
    checkpoint.load_config(tmp_path)


def test_whole_numbers_are_floats_where_floats_are_wanted(tmp_path):
  data = checkpoint.model_config_to_dict(preset("golden"))
  data["schedule"]["shift"] = 5
  model = checkpoint.model_config_from_dict(data)
  assert isinstance(model.schedule.shift, float)
  assert model == dataclasses.replace(preset("golden"))


def test_a_folder_without_config(tmp_path):
  with pytest.raises(ConfigError, match="is not a model checkpoint: it has no config.json"):
    checkpoint.load_config(tmp_path)
  with pytest.raises(ConfigError, match="does not exist"):
    checkpoint.load_config(tmp_path / "absent")
