"""`experiments.convert` as a user runs it: every flavour, second runs, kills, and every mistake in one line.

Against the libraries that publish weights: tests/oracle/convert_command_test.py.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import signal
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from streamt1_jax.convert import engine, flavours, wan_dit
from streamt1_jax.io import checkpoint
from streamt1_jax.text.tokenizer import Tokenizer
from tests.command_line import REPOSITORY, convert, generate, quick_compilation, result_of, small_model, start
from tests.published_files import write_safetensors, write_sharded, write_torch

MODEL = small_model()
TOKENIZER = REPOSITORY / "checkpoints/tiny/tokenizer.model"
FLAVOURS = {(flavour.part, flavour.names): flavour for flavour in flavours.flavours(MODEL)}
RANK, ALPHA = 3, 4.5
COMPLETE = ["backbone", "codec", "config.json", "text", "tokenizer.model"]


@functools.cache
def _params(part: str):
  """Random parameters, float32, at a scale at which the model stays finite."""
  generator = np.random.default_rng(len(part))
  fill = lambda leaf: (0.2 * generator.standard_normal(leaf.shape)).astype(np.float32)
  return jax.tree.map(fill, FLAVOURS[part, "Wan"].abstract_params)


def _tensors(part: str, names: str = "Wan") -> dict[str, np.ndarray]:
  return engine.invert(_params(part), FLAVOURS[part, names].rules)


@functools.cache
def _adapter() -> dict[str, np.ndarray]:
  generator, tensors = np.random.default_rng(9), {}
  for layer in range(MODEL.backbone.num_layers):
    for target in wan_dit.lora_targets().values():
      outputs, inputs = FLAVOURS["backbone", "Wan"].specs[f"blocks.{layer}.{target}.weight"].shape
      name = f"base_model.model.blocks.{layer}.{target}"
      tensors[f"{name}.lora_A.weight"] = generator.standard_normal((RANK, inputs)).astype(np.float32)
      tensors[f"{name}.lora_B.weight"] = generator.standard_normal((outputs, RANK)).astype(np.float32)
  return tensors


def _adapted() -> dict[str, np.ndarray]:
  """The backbone's tensors with the adapter merged, in float64."""
  merged = dict(_tensors("backbone"))
  for name, down in _adapter().items():
    if name.endswith("lora_A.weight"):
      up = _adapter()[name.replace("lora_A", "lora_B")]
      weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
      merged[weight] = merged[weight].astype(np.float64) + ALPHA / RANK * up.astype(np.float64) @ down
  return merged


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
  """A folder of small published files."""
  folder = tmp_path_factory.mktemp("published")
  write_safetensors(folder / "wan.safetensors", _tensors("backbone"))
  write_sharded(folder / "transformer", _tensors("backbone", "diffusers"))
  write_torch(folder / "vae.pth", _tensors("codec"))
  write_torch(folder / "t5.pth", _tensors("text"))
  write_torch(folder / "lora.pt", {"generator_lora": _adapter(), "critic_lora": _adapter(), "step": 9})
  shutil.copy(TOKENIZER, folder / "spiece.model")
  (folder / "small.json").write_text(json.dumps(checkpoint.model_config_to_dict(MODEL)))
  return folder


def _flags(published: pathlib.Path, **changes: str | None) -> list[str]:
  """The flags of a complete conversion, some of them changed or (None) left out."""
  flags = {
    "model": published / "small.json",
    "backbone": published / "wan.safetensors",
    "vae": published / "vae.pth",
    "text_encoder": published / "t5.pth",
    "tokenizer": published / "spiece.model",
    "output": "out",
    "dtype": "float32",
  }
  return [f"--{name}={value}" for name, value in (flags | changes).items() if value is not None]


def _converted(folder: pathlib.Path, *arguments: str) -> str:
  result = convert(folder, *arguments)
  assert result.code == 0, result
  return result.stdout


def _loaded(folder: pathlib.Path, part: str):
  return checkpoint.load_params(folder / part, FLAVOURS[part, "Wan"].abstract_params)


def _assert_equal(found, expected, **tolerances):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=0, **tolerances), found, expected)


def _names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def _only_backbone(published, **changes):
  return _flags(published, vae=None, text_encoder=None, tokenizer=None, **changes)


class TestWholeCheckpoint:
  def test_all_parts_at_once(self, tmp_path, published):
    assert "out is a checkpoint" in _converted(tmp_path, *_flags(published))
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
      "backbone",
      "codec",
      "config.json",
      "text",
      "tokenizer.model",
    ]
    for part in ("backbone", "codec", "text"):
      _assert_equal(_loaded(out, part), _params(part))
    info = checkpoint.load_info(out)
    assert info.model == MODEL
    assert {part.dtype for part in info.parts.values()} == {"float32"}
    Tokenizer(out / "tokenizer.model", 32)

  def test_provenance(self, tmp_path, published):
    _converted(tmp_path, *_flags(published, backbone=None), f"--backbone={published / 'transformer'}")
    provenance = checkpoint.load_info(tmp_path / "out").provenance
    backbone = provenance["backbone"]
    assert backbone["names"] == "diffusers"
    assert backbone["converter"]["version"] == 1
    files = [source["file"] for source in backbone["sources"]]
    assert files == ["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))]
    for source in provenance["codec"]["sources"]:
      content = (published / source["file"]).read_bytes()
      assert source["bytes"] == len(content)
      assert source["sha256"] == hashlib.sha256(content).hexdigest()
    assert provenance["tokenizer"]["bytes"] == TOKENIZER.stat().st_size

  def test_parts_in_several_runs(self, tmp_path, published):
    out = tmp_path / "out"
    printed = _converted(tmp_path, *_only_backbone(published))
    assert "missing: codec, from --vae (Wan2.1_VAE.pth" in printed
    assert "missing: tokenizer.model" in printed
    assert "not complete" in printed
    assert [path.name for path in out.iterdir()] == ["backbone"]
    result = generate(tmp_path, "--prompt=a red circle", "--checkpoint=out")
    assert (result.code, "no config.json" in result.stderr) == (2, True)
    _converted(tmp_path, *_flags(published, backbone=None, vae=None))
    assert not (out / "config.json").exists()
    assert "is a checkpoint" in _converted(
      tmp_path, *_flags(published, backbone=None, text_encoder=None, tokenizer=None)
    )
    assert checkpoint.load_config(out) == MODEL

  def test_it_makes_a_video(self, tmp_path, published):
    _converted(tmp_path, *_flags(published))
    arguments = ["--prompt=a red circle", "--checkpoint=out", "--num_latent_frames=3", "--search=none"]
    result = generate(tmp_path, *arguments, jax_settings=quick_compilation(tmp_path / "cache"))
    assert result.code == 0, result
    assert list((tmp_path / "outputs").rglob("video.mp4"))


class TestFlavours:
  """All read the same weights, so all must write the same part."""

  @pytest.mark.parametrize(
    ("name", "content"),
    [
      ("generator", lambda w: {"generator": w}),
      ("generator_ema", lambda w: {"generator_ema": w, "critic": {"x": w["head.head.bias"]}, "step": 3}),
      ("model", lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": w["head.head.bias"]}}}}),
      ("bare", lambda w: w),
      ("model prefix", lambda w: {"generator": {f"model.{name}": x for name, x in w.items()}}),
      ("fsdp", lambda w: {"generator_ema": {f"model._fsdp_wrapped_module.{name}": x for name, x in w.items()}}),
      (
        "nested wrappers",
        lambda w: {
          "generator": {
            f"model._fsdp_wrapped_module._orig_mod.{name}".replace(
              "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
            ): x
            for name, x in w.items()
          }
        },
      ),
      ("bfloat16", lambda w: {"generator": {name: x.astype(ml_dtypes.bfloat16) for name, x in w.items()}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
  )
  def test_training_programs(self, tmp_path, published, name, content):
    weights = _tensors("backbone")
    write_torch(tmp_path / "weights.pt", content(weights))
    _converted(tmp_path, *_only_backbone(published, backbone="weights.pt"))
    expected = _params("backbone")
    if name == "bfloat16":
      expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), expected)
    _assert_equal(_loaded(tmp_path / "out", "backbone"), expected)

  def test_diffusers_shards_by_index_or_folder(self, tmp_path, published):
    for output, path in (("a", "transformer"), ("b", "transformer/model.safetensors.index.json")):
      _converted(tmp_path, *_only_backbone(published, backbone=published / path, output=output))
      _assert_equal(_loaded(tmp_path / output, "backbone"), _params("backbone"))

  def test_other_names_of_vae_and_text_encoder(self, tmp_path, published):
    write_safetensors(tmp_path / "vae.safetensors", _tensors("codec", "diffusers"))
    text = _tensors("text", "Hugging Face")
    both = text | {"encoder.embed_tokens.weight": text["shared.weight"]}
    index = write_sharded(tmp_path / "text_encoder", both, 3)
    _converted(tmp_path, *_flags(published, backbone=None, vae="vae.safetensors", text_encoder=index))
    for part in ("codec", "text"):
      _assert_equal(_loaded(tmp_path / "out", part), _params(part))
    described = json.loads((tmp_path / "out" / "text" / "source.json").read_text())
    assert described["skipped"] == ["encoder.embed_tokens.weight (a second name)"]

  def test_entry_is_chosen_by_the_flag(self, tmp_path, published):
    weights = _tensors("backbone")
    other = {name: x + 1 for name, x in weights.items()}
    write_torch(tmp_path / "weights.pt", {"generator_ema": other, "generator": weights, "generator_optimizer": {}})
    _converted(tmp_path, *_only_backbone(published, backbone="weights.pt"))
    _assert_equal(_loaded(tmp_path / "out", "backbone"), _params("backbone"))
    flags = _only_backbone(published, backbone="weights.pt", backbone_entry="generator_ema", output="ema")
    _converted(tmp_path, *flags)
    source = json.loads((tmp_path / "ema" / "backbone" / "source.json").read_text())
    assert source["entry"] == "generator_ema"
    assert source["skipped"] == [f"generator ({len(weights)} tensors)", "generator_optimizer"]
    expected = engine.convert(other, FLAVOURS["backbone", "Wan"].rules, _params("backbone"))
    _assert_equal(_loaded(tmp_path / "ema", "backbone"), expected)

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  def test_dtypes(self, tmp_path, published, dtype):
    _converted(tmp_path, *_only_backbone(published, dtype=dtype))
    narrow = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), _params("backbone"))
    _assert_equal(_loaded(tmp_path / "out", "backbone"), narrow)


class TestLora:
  def _merged(self, tmp_path, published, **changes):
    flags = {"lora": published / "lora.pt", "lora_alpha": ALPHA} | changes
    _converted(tmp_path, *_only_backbone(published, **flags))
    expected = engine.convert(_adapted(), FLAVOURS["backbone", "Wan"].rules, _params("backbone"))
    # float32 against float64: three products of numbers around one.
    _assert_equal(_loaded(tmp_path / "out", "backbone"), expected, atol=2e-6)
    return json.loads((tmp_path / "out" / "backbone" / "source.json").read_text())["lora"]

  def test_entry_of_a_training_program(self, tmp_path, published):
    lora = self._merged(tmp_path, published)
    layers = 10 * MODEL.backbone.num_layers
    assert {key: lora[key] for key in ("layers", "rank", "alpha", "scale")} == {
      "layers": layers,
      "rank": RANK,
      "alpha": ALPHA,
      "scale": ALPHA / RANK,
    }
    assert lora["skipped"] == [f"critic_lora ({2 * layers} tensors)", "step"]

  @pytest.mark.parametrize(
    "rename",
    [
      lambda name: name,
      lambda name: name.removeprefix("base_model.model."),
      lambda name: name.replace("base_model.model.", "base_model.model.model."),
      lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
      lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
      lambda name: (
        "transformer."
        + wan_dit.diffusers_name(name.removeprefix("base_model.model.").rsplit(".", 2)[0])
        + "."
        + ".".join(name.rsplit(".", 2)[1:])
      ),
    ],
    ids=["peft", "bare", "model", "default", "fsdp", "diffusers"],
  )
  def test_names(self, tmp_path, published, rename):
    path = write_safetensors(tmp_path / "lora.safetensors", {rename(name): x for name, x in _adapter().items()})
    self._merged(tmp_path, published, lora=path)

  def test_onto_diffusers_names(self, tmp_path, published):
    self._merged(tmp_path, published, backbone=published / "transformer")

  def test_alpha_from_pefts_configuration(self, tmp_path, published):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", _adapter())
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "use_rslora": False}))
    lora = self._merged(tmp_path, published, lora=folder, lora_alpha=None)
    assert [source["file"] for source in lora["sources"]] == ["adapter_model.safetensors", "adapter_config.json"]

  def test_layers_that_are_not_adapted_stay(self, tmp_path, published):
    partial = {name: x for name, x in _adapter().items() if ".self_attn.q." in name}
    write_safetensors(tmp_path / "q.safetensors", partial)
    _converted(tmp_path, *_only_backbone(published, lora="q.safetensors", lora_alpha=1))
    found, base = _loaded(tmp_path / "out", "backbone"), _params("backbone")
    changed = jax.tree_util.tree_map_with_path(
      lambda path, a, b: jax.tree_util.keystr(path) if np.any(a != b) else "", found, base
    )
    assert [name for name in jax.tree.leaves(changed) if name] == ["['blocks']['self_attention']['query']['kernel']"]

  @pytest.mark.parametrize(
    ("change", "fragments"),
    [
      (lambda t: {}, ["needs one rank", "no lora_A"]),
      (lambda t: {name.replace("blocks.", "layers."): x for name, x in t.items()}, ["--lora", "unknown", "nearest"]),
      (lambda t: {name: np.concatenate([x, x], axis=1) for name, x in t.items()}, ["--lora", "misshapen"]),
      (lambda t: {name: x for name, x in t.items() if "blocks.1.ffn.0.lora_B" not in name}, ["1 missing", "ffn.0"]),
      (lambda t: t | {"extra.lora_A.weight": np.zeros((RANK, 4), np.float32)}, ["1 unknown", "extra"]),
    ],
    ids=["empty", "names", "shapes", "half", "extra"],
  )
  def test_adapter_of_another_model(self, tmp_path, published, change, fragments):
    write_safetensors(tmp_path / "lora.safetensors", change(_adapter()))
    line = _refused(tmp_path, *_only_backbone(published, lora="lora.safetensors", lora_alpha=1))
    for fragment in fragments:
      assert fragment in line

  def test_alpha_must_be_known(self, tmp_path, published):
    line = _refused(tmp_path, *_only_backbone(published, lora=published / "lora.pt"))
    assert "give --lora_alpha" in line
    assert "positive" in _refused(tmp_path, *_only_backbone(published, lora=published / "lora.pt", lora_alpha=0))


def _refused(folder: pathlib.Path, *arguments: str, **settings) -> str:
  """The one line of a run that must be refused, and that must leave everything as it was."""
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  result = convert(folder, *arguments, **settings)
  assert result.code == 2, result
  # A progress bar may come before it.
  line = result.stderr.splitlines()[-1]
  assert line.startswith("error: "), result.stderr
  after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  streams = {folder / ".stdout", folder / ".stderr"}
  assert {path: x for path, x in after.items() if path not in streams} == {
    path: x for path, x in before.items() if path not in streams
  }
  return line


class TestBadInput:
  @pytest.mark.parametrize(
    ("changes", "fragments"),
    [
      ({"output": None}, ["--output is missing"]),
      ({"backbone": "nowhere.pt"}, ["nowhere.pt", "does not exist"]),
      ({"model": "wan_14b"}, ["--model", "wan_14b", "wan_1_3b"]),
      ({"model": "nowhere.json"}, ["nowhere.json"]),
      ({"dtype": "int8"}, ["dtype", "bfloat16"]),
      ({"backbone_entry": "ema"}, ["no entry 'ema'"]),
      ({"lora_alpha": "nan"}, ["lora_alpha", "finite"]),
      ({"lora_alpha": "3"}, ["--lora_alpha needs --lora"]),
      ({"backbone": None, "lora": "lora.pt"}, ["--lora needs --backbone"]),
      ({"backbone": "{}/vae.pth"}, ["--backbone", "holds a video VAE (Wan names", "not a video backbone"]),
      ({"vae": "{}/wan.safetensors"}, ["--vae", "holds a video backbone", "not a video VAE"]),
      ({"text_encoder": "{}/transformer"}, ["--text_encoder", "holds a video backbone (diffusers names"]),
      ({"backbone": "{}/lora.pt"}, ["no entry generator or generator_ema or model", "generator_lora"]),
      ({"backbone": "{}/spiece.model"}, ["spiece.model", "neither a file of torch.save nor safetensors"]),
      ({"tokenizer": "{}/vae.pth"}, ["--tokenizer", "not a sentencepiece model"]),
      ({"tokenizer": "{}/transformer"}, ["--tokenizer", "holds no spiece.model"]),
      ({"model": "golden"}, ["--vae", "golden", "no codec"]),
      ({"model": "tiny", "vae": None, "text_encoder": None}, ["backbone", "misshapen", "missing"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
  )
  def test_one_line(self, tmp_path, published, changes, fragments):
    changes = {name: value and value.format(published) for name, value in changes.items()}
    if changes.get("model") == "golden":
      changes["backbone"] = None
    line = _refused(tmp_path, *_flags(published, **changes))
    for fragment in fragments:
      assert fragment in line

  def test_nothing_given(self, tmp_path, published):
    assert "nothing to convert" in _refused(tmp_path, "--output=out")
    assert "'wan.pt'" in _refused(tmp_path, "--output=out", "wan.pt")

  def test_adapter_in_the_place_of_the_backbone(self, tmp_path, published):
    path = write_safetensors(tmp_path / "lora.safetensors", _adapter())
    assert "holds a LoRA adapter" in _refused(tmp_path, *_only_backbone(published, backbone=path))

  def test_half_a_sharded_checkpoint(self, tmp_path, published):
    folder = tmp_path / "transformer"
    shutil.copytree(published / "transformer", folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    line = _refused(tmp_path, *_only_backbone(published, backbone="transformer"))
    assert "model-00002-of-00002.safetensors of 2 files" in line
    shard = _refused(tmp_path, *_only_backbone(published, backbone=folder / "model-00001-of-00002.safetensors"))
    assert "give model.safetensors.index.json" in shard

  def test_a_misspelt_tensor(self, tmp_path, published):
    tensors = _tensors("backbone")
    tensors["blocks.1.norm3.wieght"] = tensors.pop("blocks.1.norm3.weight")
    write_safetensors(tmp_path / "wan.safetensors", tensors)
    line = _refused(tmp_path, *_only_backbone(published, backbone="wan.safetensors"))
    assert "1 unknown, 1 missing; unknown: blocks.1.norm3.wieght (nearest: blocks.1.norm3.weight)" in line

  def test_entries_that_cannot_be_left_out(self, tmp_path, published):
    weights = _tensors("backbone")
    write_torch(tmp_path / "weights.pt", {"generator": weights, "motion_module": {"a": np.zeros(2, np.float32)}})
    line = _refused(tmp_path, *_only_backbone(published, backbone="weights.pt"))
    assert "'motion_module' of 1 tensors" in line

  def test_damaged_weights(self, tmp_path, published):
    content = bytearray((published / "vae.pth").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "vae.pth").write_bytes(content)
    line = _refused(tmp_path, *_flags(published, backbone=None, text_encoder=None, tokenizer=None, vae="vae.pth"))
    assert "vae.pth is corrupt" in line

  def test_not_a_number(self, tmp_path, published):
    tensors = _tensors("backbone")
    tensors["head.head.bias"] = np.full_like(tensors["head.head.bias"], np.nan)
    write_safetensors(tmp_path / "wan.safetensors", tensors)
    line = _refused(tmp_path, *_only_backbone(published, backbone="wan.safetensors"))
    assert "NaN or Inf: head/bias" in line

  def test_no_space_left(self, tmp_path, published):
    line = _refused(tmp_path, *_only_backbone(published), file_bytes=3000)
    assert "cannot write out/backbone" in line

  def test_a_part_of_an_older_format(self, tmp_path, published):
    _converted(tmp_path, *_only_backbone(published))
    path = tmp_path / "out" / "backbone" / "part.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"format_version": 0}))
    line = _refused(tmp_path, *_flags(published))
    assert "format_version is 0; this program reads 1" in line

  def test_a_checkpoint_of_an_older_format(self, tmp_path, published):
    _converted(tmp_path, *_flags(published))
    path = tmp_path / "out" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"format_version": 0}))
    for line in (
      _refused(tmp_path, *_flags(published)),
      generate(tmp_path, "--prompt=a red circle", "--checkpoint=out").stderr,
    ):
      assert "config.json: format_version is 0; this program reads 1" in line


class TestSecondRun:
  def _modified(self, folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

  def test_what_is_done_is_skipped(self, tmp_path, published):
    _converted(tmp_path, *_only_backbone(published))
    before = self._modified(tmp_path / "out" / "backbone")
    _converted(tmp_path, *_flags(published))
    assert self._modified(tmp_path / "out" / "backbone") == before
    before = self._modified(tmp_path / "out")
    assert "is a checkpoint" in _converted(tmp_path, *_flags(published))
    assert self._modified(tmp_path / "out") == before

  @pytest.mark.parametrize(
    ("changes", "what"),
    [({"dtype": "bfloat16"}, "dtype"), ({"backbone": "other.safetensors"}, "sources"), ({"lora": 1}, "lora")],
  )
  def test_what_was_made_otherwise_is_kept(self, tmp_path, published, changes, what):
    other = {name: x + 1 for name, x in _tensors("backbone").items()}
    write_safetensors(tmp_path / "other.safetensors", other)
    _converted(tmp_path, *_only_backbone(published))
    if "lora" in changes:
      changes = {"lora": published / "lora.pt", "lora_alpha": 1}
    line = _refused(tmp_path, *_only_backbone(published, **changes))
    assert "out/backbone exists and was made otherwise" in line
    assert f"({what} differ" in line

  def test_folders_of_others_are_kept(self, tmp_path, published):
    (tmp_path / "out" / "backbone").mkdir(parents=True)
    (tmp_path / "out" / "backbone" / "thesis.txt").write_text("ten years")
    assert "has no part.json" in _refused(tmp_path, *_only_backbone(published))
    (tmp_path / "file").write_text("in its place")
    assert "is a file" in _refused(tmp_path, *_only_backbone(published, output="file"))

  def test_a_checkpoint_of_another_model_is_kept(self, tmp_path, published):
    _converted(tmp_path, *_flags(published))
    wider = dataclasses.replace(MODEL, latent_width=8)
    (tmp_path / "wider.json").write_text(json.dumps(checkpoint.model_config_to_dict(wider)))
    line = _refused(tmp_path, *_flags(published, model="wider.json"))
    assert "checkpoint of another model (latent_width differ)" in line

  def test_a_different_tokenizer_is_kept(self, tmp_path, published):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.model").write_bytes(b"another")
    assert "tokenizer.model exists and differs" in _refused(tmp_path, *_flags(published))

  def test_killed_at_any_time(self, tmp_path, published):
    """SIGKILL after 0, 1, ... parts: no folder is half a part, and the next run completes it."""
    for delay in (0.4, 0.7, 1.0, 1.3):
      process = start(tmp_path, *_flags(published), program="convert")
      time.sleep(delay)
      process.kill()
      process.join()
      for part in ("backbone", "codec", "text"):
        if (tmp_path / "out" / part).exists():
          _assert_equal(_loaded(tmp_path / "out", part), _params(part))
    _converted(tmp_path, *_flags(published))
    assert _names(tmp_path / "out") == COMPLETE

  def test_interrupted_while_writing(self, tmp_path, published):
    process = start(tmp_path, *_flags(published), program="convert")
    while process.is_alive() and not list(tmp_path.glob("out/.*.partial")):
      time.sleep(0.001)
    process.terminate()
    process.join()
    if process.exitcode == 0:
      pytest.skip("it was faster than the signal")
    assert process.exitcode in (130, -signal.SIGTERM)
    assert "interrupted" in result_of(130, tmp_path).stderr
    assert not list(tmp_path.glob("out/.*"))
    assert not (tmp_path / "out" / "config.json").exists()


class TestDryRun:
  def test_says_everything_and_writes_nothing(self, tmp_path, published):
    lora = {"lora": published / "lora.pt", "lora_alpha": ALPHA}
    printed = _converted(tmp_path, *_flags(published, vae=None, **lora), "--dry_run")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    count = sum(leaf.size for leaf in jax.tree.leaves(_params("backbone")))
    for fragment in (
      f"backbone/ from --backbone, Wan names: {len(_tensors('backbone'))} tensors, {count:,} parameters",
      f"{4 * count:,} bytes to write",
      "blocks.{layer}.self_attn.q.weight -> blocks.self_attention.query.kernel [2, 24, 24] float32",
      "rank 3, alpha 4.5",
      "skips critic_lora",
      "missing: codec, from --vae",
      "text/ from --text_encoder",
    ):
      assert fragment in printed
    assert "missing: text" not in printed

  def test_lists_every_problem(self, tmp_path, published):
    tensors = {name: x for name, x in _tensors("backbone").items() if not name.startswith("blocks.1.ffn")}
    write_safetensors(tmp_path / "wan.safetensors", tensors)
    result = convert(tmp_path, *_only_backbone(published, backbone="wan.safetensors"), "--dry_run")
    assert result.code == 2
    assert "4 missing" in result.stderr
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
      assert f"missing: blocks.1.ffn.{name}" in result.stdout

  def test_everything_is_missing(self, tmp_path):
    printed = _converted(tmp_path, "--dry_run")
    assert [line.split(",")[0] for line in printed.splitlines() if line.startswith("missing")] == [
      "missing: backbone",
      "missing: codec",
      "missing: text",
      "missing: tokenizer.model",
    ]
