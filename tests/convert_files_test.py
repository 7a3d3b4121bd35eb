"""From published files to a checkpoint: every flavour, adapters, second runs, and every file that must be refused.

The program around it: convert_command_test.py. Against the libraries that publish: oracle/convert_command_test.py.
"""

import dataclasses
import hashlib
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from streamt1_jax.config import preset
from streamt1_jax.convert.tables import wan_dit
from streamt1_jax.io import checkpoint
from streamt1_jax.text.tokenizer import Tokenizer
from tests.published_files import write_safetensors, write_sharded, write_torch
from tests.published_model import (
  ALPHA,
  FLAVOURS,
  MODEL,
  PARTS,
  RANK,
  TOKENIZER,
  adapted,
  adapter,
  assert_equal,
  convert_here,
  everything,
  loaded,
  params,
  refused_here,
  tensors,
  write,
)

PATHS = ("backbone", "lora", "vae", "text_encoder", "tokenizer")
COMPLETE = ["backbone", "codec", "config.json", "text", "tokenizer.model"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  return write(tmp_path_factory.mktemp("published"))


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


class TestWholeCheckpoint:
  def test_all_parts_at_once(self, tmp_path, published):
    assert convert_here(tmp_path, published, **everything(published)) == []
    assert _names(tmp_path / "out") == COMPLETE
    for part in PARTS:
      assert_equal(loaded(tmp_path / "out", part), params(part))
    info = checkpoint.load_info(tmp_path / "out")
    assert info.model == MODEL
    assert {part.dtype for part in info.parts.values()} == {"float32"}
    Tokenizer(tmp_path / "out" / "tokenizer.model", 32)

  def test_parts_one_by_one(self, tmp_path, published):
    assert convert_here(tmp_path, published) == ["codec", "text", "tokenizer.model"]
    assert _names(tmp_path / "out") == ["backbone"]
    rest = everything(published)
    assert convert_here(tmp_path, published, backbone=None, vae=rest["vae"]) == ["text", "tokenizer.model"]
    assert convert_here(tmp_path, published, backbone=None, tokenizer=rest["tokenizer"]) == ["text"]
    assert not (tmp_path / "out" / "config.json").exists()
    assert convert_here(tmp_path, published, backbone=None, text_encoder=rest["text_encoder"]) == []
    assert checkpoint.load_config(tmp_path / "out") == MODEL

  def test_provenance(self, tmp_path, published):
    convert_here(tmp_path, published, **everything(published) | {"backbone": published / "transformer"})
    provenance = checkpoint.load_info(tmp_path / "out").provenance
    assert provenance["backbone"]["names"] == "diffusers"
    assert provenance["backbone"]["converter"]["version"] == 1
    files = [source["file"] for source in provenance["backbone"]["sources"]]
    assert files == ["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))]
    (source,) = provenance["codec"]["sources"]
    content = (published / "vae.pth").read_bytes()
    assert source == {"file": "vae.pth", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert provenance["tokenizer"]["sha256"] == hashlib.sha256(TOKENIZER.read_bytes()).hexdigest()


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
    weights = tensors("backbone")
    write_torch(tmp_path / "weights.pt", content(weights))
    convert_here(tmp_path, published, backbone="weights.pt")
    expected = params("backbone")
    if name == "bfloat16":
      expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), expected)
    assert_equal(loaded(tmp_path / "out", "backbone"), expected)

  def test_diffusers_shards_by_index_or_folder(self, tmp_path, published):
    for output, path in (("a", "transformer"), ("b", "transformer/model.safetensors.index.json")):
      convert_here(tmp_path, published, backbone=published / path, output=output)
      assert_equal(loaded(tmp_path / output, "backbone"), params("backbone"))

  def test_other_names_of_vae_and_text_encoder(self, tmp_path, published):
    write_safetensors(tmp_path / "vae.safetensors", tensors("codec", "diffusers"))
    text = tensors("text", "Hugging Face")
    both = text | {"encoder.embed_tokens.weight": text["shared.weight"]}
    index = write_sharded(tmp_path / "text_encoder", both, 3)
    convert_here(tmp_path, published, backbone=None, vae="vae.safetensors", text_encoder=index)
    for part in ("codec", "text"):
      assert_equal(loaded(tmp_path / "out", part), params(part))
    described = json.loads((tmp_path / "out" / "text" / "source.json").read_text())
    assert described["skipped"] == ["encoder.embed_tokens.weight (a second name)"]

  def test_entry_is_chosen_by_the_flag(self, tmp_path, published):
    weights = tensors("backbone")
    other = {name: x + 1 for name, x in weights.items()}
    write_torch(tmp_path / "weights.pt", {"generator_ema": other, "generator": weights, "generator_optimizer": {}})
    convert_here(tmp_path, published, backbone="weights.pt")
    assert_equal(loaded(tmp_path / "out", "backbone"), params("backbone"))
    convert_here(tmp_path, published, backbone="weights.pt", backbone_entry="generator_ema", output="ema")
    source = json.loads((tmp_path / "ema" / "backbone" / "source.json").read_text())
    assert source["entry"] == "generator_ema"
    assert source["skipped"] == [f"generator ({len(weights)} tensors)", "generator_optimizer"]
    expected = FLAVOURS["backbone", "Wan"].convert(other)
    assert_equal(loaded(tmp_path / "ema", "backbone"), expected)

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  def test_dtypes(self, tmp_path, published, dtype):
    convert_here(tmp_path, published, dtype=dtype)
    narrow = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params("backbone"))
    assert_equal(loaded(tmp_path / "out", "backbone"), narrow)


class TestLora:
  def _merged(self, tmp_path, published, **changes):
    flags = {"lora": published / "lora.pt", "lora_alpha": ALPHA} | changes
    convert_here(tmp_path, published, **flags)
    expected = FLAVOURS["backbone", "Wan"].convert(adapted())
    # float32 against float64: three products of numbers around one.
    assert_equal(loaded(tmp_path / "out", "backbone"), expected, atol=2e-6)
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
    path = write_safetensors(tmp_path / "lora.safetensors", {rename(name): x for name, x in adapter().items()})
    self._merged(tmp_path, published, lora=path)

  def test_onto_diffusers_names(self, tmp_path, published):
    self._merged(tmp_path, published, backbone=published / "transformer")

  def test_alpha_from_pefts_configuration(self, tmp_path, published):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", adapter())
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "use_rslora": False}))
    lora = self._merged(tmp_path, published, lora=folder, lora_alpha=None)
    assert [source["file"] for source in lora["sources"]] == ["adapter_model.safetensors", "adapter_config.json"]

  def test_layers_that_are_not_adapted_stay(self, tmp_path, published):
    partial = {name: x for name, x in adapter().items() if ".self_attn.q." in name}
    write_safetensors(tmp_path / "q.safetensors", partial)
    convert_here(tmp_path, published, lora="q.safetensors", lora_alpha=1)
    found, base = loaded(tmp_path / "out", "backbone"), params("backbone")
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
      (lambda t: {name: x[:0] if "lora_A" in name else x[:, :0] for name, x in t.items()}, ["needs one rank", "[0]"]),
      (lambda t: {name: x[0, 0] for name, x in t.items()}, ["needs one rank"]),
      (lambda t: {name: x[None] if "lora_A" in name else x for name, x in t.items()}, ["misshapen"]),
      (lambda t: {name: x[:, :-1] if "lora_B" in name else x for name, x in t.items()}, ["20 misshapen", "lora_B"]),
      (
        lambda t: {name: x[:-1] if "blocks.0.ffn.0.lora_A" in name else x for name, x in t.items()},
        ["one rank", "[2, 3]"],
      ),
    ],
    ids=["empty", "names", "shapes", "half", "extra", "no rank", "no axes", "three axes", "rank of B", "rank of one A"],
  )
  def test_adapter_of_another_model(self, tmp_path, published, change, fragments):
    write_safetensors(tmp_path / "lora.safetensors", change(adapter()))
    line = refused_here(tmp_path, published, lora="lora.safetensors", lora_alpha=1)
    for fragment in fragments:
      assert fragment in line

  @pytest.mark.parametrize(
    ("settings", "fragment"),
    [
      ({"lora_alpha": 10**400}, "lora_alpha must be a positive number"),
      ({"lora_alpha": True}, "lora_alpha must be a positive number of at most 1e9, got True"),
      ({"lora_alpha": {}}, "lora_alpha must be a positive number"),
      ({"lora_alpha": 1, "r": {"x": "y" * 10**5}}, "says rank {'x': 'yyy"),
      ({"lora_alpha": 1, "rank_pattern": {"a\n": 3}}, "rank_pattern is not supported"),
      ({"lora_alpha": 1, "use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
      ([], "must hold a JSON object"),
      ('{"r": 3, "r": 3}', "the name 'r' stands twice"),
    ],
    ids=["huge", "true", "object", "rank", "pattern", "rslora", "list", "twice"],
  )
  def test_configurations_of_peft(self, tmp_path, published, settings, fragment):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", adapter())
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "adapter_config.json").write_text(text)
    line = refused_here(tmp_path, published, lora=folder)
    assert fragment in line
    assert line.isprintable()

  def test_alpha_must_be_known(self, tmp_path, published):
    line = refused_here(tmp_path, published, lora=published / "lora.pt")
    assert "give --lora_alpha" in line
    assert "positive" in refused_here(tmp_path, published, lora=published / "lora.pt", lora_alpha=0)


class TestBadInput:
  @pytest.mark.parametrize(
    ("changes", "fragments"),
    [
      ({"backbone": "nowhere.pt"}, ["nowhere.pt", "does not exist"]),
      ({"backbone_entry": "ema"}, ["holds plain tensors, no entry 'ema'"]),
      ({"lora_alpha": 3.0}, ["--lora_alpha needs --lora"]),
      ({"backbone": None, "lora": "lora.pt"}, ["--lora needs --backbone"]),
      ({"backbone": None, "backbone_entry": "model"}, ["--backbone_entry needs --backbone"]),
      ({"backbone": "vae.pth"}, ["--backbone", "vae.pth holds a video VAE (Wan names", "not a video backbone"]),
      ({"vae": "wan.safetensors"}, ["--vae", "holds a video backbone", "not a video VAE"]),
      ({"text_encoder": "transformer"}, ["--text_encoder", "holds a video backbone (diffusers names"]),
      ({"backbone": "lora.pt"}, ["no entry generator or generator_ema or model", "generator_lora"]),
      ({"backbone": "spiece.model"}, ["spiece.model", "neither a file of torch.save nor safetensors"]),
      ({"tokenizer": "vae.pth"}, ["--tokenizer", "not a sentencepiece model"]),
      ({"tokenizer": "transformer"}, ["--tokenizer", "holds no spiece.model"]),
      ({"model": preset("golden"), "backbone": None, "vae": "vae.pth"}, ["--vae", "golden", "no codec"]),
      ({"model": preset("tiny")}, ["--backbone", "as Wan backbone", "misshapen", "missing"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
  )
  def test_one_line(self, tmp_path, published, changes, fragments):
    given = {name: published / x if name in PATHS and x else x for name, x in changes.items()}
    line = refused_here(tmp_path, published, **given)
    for fragment in fragments:
      assert fragment in line

  def test_adapter_in_the_place_of_the_backbone(self, tmp_path, published):
    path = write_safetensors(tmp_path / "lora.safetensors", adapter())
    assert "holds a LoRA adapter" in refused_here(tmp_path, published, backbone=path)

  def test_half_a_sharded_checkpoint(self, tmp_path, published):
    folder = tmp_path / "transformer"
    shutil.copytree(published / "transformer", folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    line = refused_here(tmp_path, published, backbone="transformer")
    assert "model-00002-of-00002.safetensors of 2 files" in line
    shard = refused_here(tmp_path, published, backbone=folder / "model-00001-of-00002.safetensors")
    assert "give model.safetensors.index.json" in shard

  def test_a_misspelt_tensor(self, tmp_path, published):
    weights = tensors("backbone")
    weights["blocks.1.norm3.wieght"] = weights.pop("blocks.1.norm3.weight")
    write_safetensors(tmp_path / "wan.safetensors", weights)
    line = refused_here(tmp_path, published, backbone="wan.safetensors")
    assert "1 unknown, 1 missing; unknown: blocks.1.norm3.wieght (nearest: blocks.1.norm3.weight)" in line

  def test_entries_that_cannot_be_left_out(self, tmp_path, published):
    weights = tensors("backbone")
    write_torch(tmp_path / "weights.pt", {"generator": weights, "motion_module": {"a": np.zeros(2, np.float32)}})
    line = refused_here(tmp_path, published, backbone="weights.pt")
    assert "'motion_module' of 1 tensors" in line

  def test_damaged_weights(self, tmp_path, published):
    content = bytearray((published / "vae.pth").read_bytes())
    content[len(content) // 2] ^= 16
    (tmp_path / "vae.pth").write_bytes(content)
    line = refused_here(tmp_path, published, backbone=None, vae="vae.pth")
    assert "vae.pth is corrupt" in line

  def test_not_a_number(self, tmp_path, published):
    weights = tensors("backbone")
    weights["head.head.bias"] = np.full_like(weights["head.head.bias"], np.nan)
    write_safetensors(tmp_path / "wan.safetensors", weights)
    line = refused_here(tmp_path, published, backbone="wan.safetensors")
    assert "NaN or Inf: head/bias" in line

  def test_no_space_left(self, tmp_path, published, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = refused_here(tmp_path, published)
    assert "--output" in line
    assert "the disk has 1,000 left" in line

  def test_a_part_of_an_older_format(self, tmp_path, published):
    convert_here(tmp_path, published)
    path = tmp_path / "out" / "backbone" / "part.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 0}))
    assert "part.json: format_version is 0; this program reads 1" in refused_here(tmp_path, published)


class TestSecondRun:
  def test_what_is_done_is_skipped(self, tmp_path, published):
    modified = lambda folder: {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    convert_here(tmp_path, published)
    before = modified(tmp_path / "out" / "backbone")
    convert_here(tmp_path, published, **everything(published))
    assert modified(tmp_path / "out" / "backbone") == before
    before = modified(tmp_path / "out")
    assert convert_here(tmp_path, published, **everything(published)) == []
    assert modified(tmp_path / "out") == before

  @pytest.mark.parametrize(
    ("changes", "what"),
    [({"dtype": "bfloat16"}, "dtype"), ({"backbone": "other.safetensors"}, "sources"), ({"lora": 1}, "lora")],
  )
  def test_what_was_made_otherwise_is_kept(self, tmp_path, published, changes, what):
    other = {name: x + 1 for name, x in tensors("backbone").items()}
    write_safetensors(tmp_path / "other.safetensors", other)
    convert_here(tmp_path, published)
    if "lora" in changes:
      changes = {"lora": published / "lora.pt", "lora_alpha": 1}
    line = refused_here(tmp_path, published, **changes)
    assert "out/backbone exists and was made otherwise" in line
    assert f"({what} differ" in line

  def test_folders_of_others_are_kept(self, tmp_path, published):
    (tmp_path / "out" / "backbone").mkdir(parents=True)
    (tmp_path / "out" / "backbone" / "thesis.txt").write_text("ten years")
    assert "has no part.json" in refused_here(tmp_path, published)
    (tmp_path / "file").write_text("in its place")
    assert "is a file" in refused_here(tmp_path, published, output="file")

  def test_a_checkpoint_of_another_model_is_kept(self, tmp_path, published):
    convert_here(tmp_path, published, **everything(published))
    line = refused_here(tmp_path, published, model=dataclasses.replace(MODEL, latent_width=8))
    assert "checkpoint of another model (latent_width differ)" in line

  def test_parts_of_another_model_are_kept(self, tmp_path, published):
    convert_here(tmp_path, published)
    deeper = dataclasses.replace(MODEL, backbone=dataclasses.replace(MODEL.backbone, num_layers=3))
    line = refused_here(tmp_path, published, model=deeper, **everything(published) | {"backbone": None})
    assert "out/backbone exists and was made for another --model" in line

  def test_a_different_tokenizer_is_kept(self, tmp_path, published):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.model").write_bytes(b"another")
    assert "tokenizer.model exists and differs" in refused_here(tmp_path, published, **everything(published))
