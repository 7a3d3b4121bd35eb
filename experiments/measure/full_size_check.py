"""From published files to a searched video, at full size, with random weights: seconds, memory and disk of every stage.

  python -m experiments.measure.full_size_check --work_dir=/scratch/check
  python -m experiments.measure.full_size_check --work_dir=/scratch/check --latent_height=60 --latent_width=104

No real checkpoint is needed: every file has the names, shapes, dtypes and format of a published one, and values of
N(0, 0.02). Each is written, converted by `experiments.convert` and deleted; of two flavours of one part the converted
files must be the same, byte for byte. Then the parts are restored, a prompt is encoded, and chunks are searched.

  backbone  Wan safetensors | diffusers shards | training .pt with generator_ema, and a LoRA .pt to merge into it
  codec     Wan2.1_VAE.pth  | diffusers safetensors
  text      UMT5-XXL .pth   | Hugging Face shards in float32
  rewards   HPSv3.safetensors (16.6 GB), VideoAlign's model.pth with unmerged adapters

Every conversion and check runs in a process of its own, so that its peak memory is its own. Prints a table, then one
line of JSON.
Disk: 51 GB at the worst moment, all of it in `work_dir`, which must be empty and is left so unless --keep is given.
Memory: the search needs most; 10.4 GB on a CPU at the default size. `--model=tiny` does the same in a minute or two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.cli import common
from streamt1_jax.config import ConfigError, ModelConfig, SearchConfig, preset
from streamt1_jax.convert import flavours
from streamt1_jax.io import checkpoint, manifest, part_files
from streamt1_jax.measuring import random_rewards, random_weights
from streamt1_jax.measuring.random_weights import Tensor
from streamt1_jax.pipeline import TOKENIZER_FILE, Pipeline
from streamt1_jax.rewards.folder import REWARDS_FOLDER
from streamt1_jax.text import PromptEncoder
from streamt1_jax.text.tokenizer import Tokenizer

PROMPT = "a small red circle moves quickly left over a dark blue background"
CHECKPOINT = "checkpoint"
_SHARD_BYTES = 5 << 30
_LORA_RANKS = {"wan_1_3b": 256, "tiny": 4}

_MODEL = flags.DEFINE_enum("model", "wan_1_3b", sorted(_LORA_RANKS), "Whose sizes.")
_WORK_DIR = common.define_path(
  "work_dir", None, "Folder for all files; must be empty or missing.", required=True, url=False
)
_HEIGHT = common.define_integer("latent_height", 6, "Rows of the latent (60 for 480 pixels).", 2)
_WIDTH = common.define_integer("latent_width", 8, "Columns of the latent (104 for 832 pixels).", 2)
_CHUNKS = common.define_integer("chunks", 1, "Chunks to search.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and activations.")
_KEEP = flags.DEFINE_bool("keep", False, "Leave the converted checkpoint.")
_SOURCES = flags.DEFINE_list("sources", None, "Names of files to convert; all by default, and then all is checked.")
_CHECK = flags.DEFINE_string("check", None, "Used by the program itself: run one check on what is in work_dir.")


@dataclasses.dataclass(frozen=True)
class Source:
  """A published file, or folder of files, that is written and converted.

  Attributes:
    name: of the stage, and of the file.
    part: folder of the checkpoint its conversion makes.
    arguments: of `experiments.convert`; `{path}` stands for the file.
    final: whether its conversion is the one that is restored.
    write: writes it.
    with_adapter: whether an adapter is merged into it: then it holds other weights than the part's other sources.
  """

  name: str
  part: str
  arguments: tuple[str, ...]
  final: bool
  write: Callable[[pathlib.Path], None]
  with_adapter: bool = False


def tensors_of(model: ModelConfig, part: str, names: str, dtype: str, prefix: str = "") -> dict[str, Tensor]:
  """Every tensor of a flavour; the i-th holds the same values in each flavour of the part."""
  flavour = next(f for f in flavours.of_model(model) if (f.part, f.names) == (part, names))
  return {
    prefix + name: Tensor(tuple(spec.shape), dtype, seed) for seed, (name, spec) in enumerate(flavour.specs.items())
  }


def lora_tensors(model: ModelConfig, seed: int) -> dict[str, Tensor]:
  """A peft adapter on the ten linear layers of every block."""
  rank, adapter = _LORA_RANKS[model.name], {}
  for name, kernel in tensors_of(model, "backbone", "Wan", "float32").items():
    if name.startswith("blocks.") and len(kernel.shape) == 2:
      outputs, inputs = kernel.shape
      module = "base_model.model." + name.removesuffix(".weight")
      adapter[f"{module}.lora_A.weight"] = Tensor((rank, inputs), "float32", seed + len(adapter))
      adapter[f"{module}.lora_B.weight"] = Tensor((outputs, rank), "float32", seed + len(adapter))
  return adapter


def write_training_backbone(model: ModelConfig, path: pathlib.Path) -> None:
  """What a training leaves: averaged weights under the names of its wrapper, and adapters of generator and critic."""
  path.mkdir()
  averaged = tensors_of(model, "backbone", "Wan", "float32", prefix="model._fsdp_wrapped_module.")
  random_weights.write_torch(path / "model.pt", {"generator_ema": averaged})
  adapters = {"generator_lora": lora_tensors(model, 1000), "critic_lora": lora_tensors(model, 5000), "step": 3000}
  random_weights.write_torch(path / "lora.pt", adapters)


def sources(model: ModelConfig) -> list[Source]:
  """All files, in the order in which they are converted."""
  of = lambda *which: tensors_of(model, *which)
  safetensors = lambda *which: lambda path: random_weights.write_safetensors(path, of(*which))
  sharded = lambda stem, *which: lambda path: random_weights.write_sharded(path, stem, of(*which), _SHARD_BYTES)
  torch = lambda *which: lambda path: random_weights.write_torch(path, of(*which))
  lora = ("--backbone={path}/model.pt", "--lora={path}/lora.pt", f"--lora_alpha={_LORA_RANKS[model.name]}")
  diffusion = "diffusion_pytorch_model"
  tokenizer = common.find_folder("checkpoints/tiny") / TOKENIZER_FILE
  float32, backbone, text = "float32", ("--backbone={path}",), ("--text_encoder={path}",)
  vae = ("--vae={path}", f"--tokenizer={tokenizer}")
  return [
    Source("wan_backbone", "backbone", backbone, False, safetensors("backbone", "Wan", float32)),
    Source("diffusers_backbone", "backbone", backbone, False, sharded(diffusion, "backbone", "diffusers", float32)),
    Source("training_backbone_lora", "backbone", lora, True, lambda path: write_training_backbone(model, path), True),
    Source("wan_vae", "codec", vae, True, torch("codec", "Wan", float32)),
    Source("diffusers_vae", "codec", vae, False, safetensors("codec", "diffusers", float32)),
    Source("wan_umt5", "text", text, True, torch("text", "Wan", "bfloat16")),
    Source("hugging_face_umt5", "text", text, False, sharded("model", "text", "Hugging Face", float32)),
    *(reward_source(name, model) for name in random_rewards.WEIGHTS),
  ]


def reward_source(name: str, model: ModelConfig) -> Source:
  """A reward model. Not of the final checkpoint: the search is to run without 20 GB of judges."""
  write = lambda path: random_rewards.write(path, name, model)
  return Source(name, f"{REWARDS_FOLDER}/{name}", random_rewards.convert_arguments(name), False, write)


def restore_backbone(model: ModelConfig, folder: pathlib.Path) -> dict[str, Any]:
  """Loads the backbone; what it took beside the weights themselves, in units of the largest of them."""
  abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: CausalWanDiT(model, nnx.Rngs(0))), nnx.Param))
  jax.block_until_ready(jnp.zeros(1))
  before, start, work = manifest.peak_rss_bytes(), time.perf_counter(), time.process_time()
  params = jax.block_until_ready(checkpoint.load_params(folder / "backbone", abstract, _DTYPE.value))
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  on_host = sum(sizes) if jax.default_backend() == "cpu" else 0
  extra = manifest.peak_rss_bytes() - before - on_host
  return {
    "load_seconds": time.perf_counter() - start,
    "load_cpu_seconds": time.process_time() - work,
    "weight_bytes": sum(sizes),
    "host_bytes_beside_weights": extra,
    "in_largest_weights": extra / max(sizes),
  }


def encode_prompt(model: ModelConfig, folder: pathlib.Path) -> dict[str, Any]:
  """Sends a prompt through the text encoder, layer by layer from disk."""
  start = time.perf_counter()
  tokenizer = Tokenizer(folder / TOKENIZER_FILE, model.text.max_len)
  encoder = PromptEncoder(folder / "text", model.text, tokenizer, model.backbone.text_len, jnp.dtype(_DTYPE.value))
  opened = time.perf_counter()
  embeddings = np.asarray(encoder(PROMPT))
  _require_finite("embeddings", embeddings)
  return {"check_seconds": opened - start, "encode_seconds": time.perf_counter() - opened}


def search(model: ModelConfig, folder: pathlib.Path) -> dict[str, Any]:
  """Searches a video as the paper does, 2 beams of 2 candidates."""
  del model  # The checkpoint says.
  timer, settings, traces = manifest.PhaseTimer(), SearchConfig.released(), []
  with manifest.CompileCounter() as compilations:
    with timer.phase("load"):
      latent_size = (_HEIGHT.value, _WIDTH.value)
      pipeline = Pipeline.load(folder, dtype=jnp.dtype(_DTYPE.value), latent_size=latent_size)
    with timer.phase("text"):
      condition = jax.block_until_ready(pipeline.condition(PROMPT, _CHUNKS.value))
    chunks = pipeline.stream(condition, settings, num_chunks=_CHUNKS.value, seed=42)
    for index in range(_CHUNKS.value):
      with timer.phase(f"chunk_{index}"):
        traces.append(jax.device_get(next(chunks)))
    with timer.phase("assemble"):
      video = pipeline.assemble(condition, settings, traces)
  _require_finite("latents", video.latents)
  return {
    **{f"{name}_seconds": seconds for name, seconds in timer.seconds.items()},
    "compile_seconds": compilations.seconds,
    "usable_candidates": [int(trace.candidates.usable.sum()) for trace in traces],
    "frames": list(video.frames.shape),
    "peak_device_bytes": manifest.peak_device_bytes(),
  }


def _require_finite(what: str, values: np.ndarray) -> None:
  if not np.isfinite(values).all():
    raise ConfigError(f"the {what} are not finite")


CHECKS = {"restore_backbone": restore_backbone, "encode_prompt": encode_prompt, "search": search}


def run_check(name: str) -> None:
  """One check, in this process; the last line on stdout is its result in JSON."""
  if name not in CHECKS:
    raise ConfigError(f"--check={name} is none of {', '.join(CHECKS)}")
  result = CHECKS[name](preset(_MODEL.value), pathlib.Path(_WORK_DIR.value) / CHECKPOINT)
  print(json.dumps({**result, "environment": manifest.environment()}))


def measure(stage: str, command: Sequence[str], output: pathlib.Path | None = None) -> dict[str, Any]:
  """Runs a process to its end.

  Args:
    stage: its name in the report.
    command: arguments of the Python interpreter.
    output: what it makes, to report its size.

  Returns:
    "stage", "seconds", "cpu_seconds" (of all its threads), "peak_rss_bytes", "disk_bytes", and the fields of the JSON
    line it prints, if it prints one.

  Raises:
    ConfigError: it failed; the message has its last line.
  """
  print(f"{stage} ...", file=sys.stderr, flush=True)
  start = time.perf_counter()
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=errors)
    try:
      printed = process.stdout.read().decode().splitlines()
      # `wait4` tells the memory of this one process; `getrusage` only of the largest of all so far.
      _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
      process.kill()
      raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      errors.seek(0)
      said = errors.read().decode(errors="replace").strip().splitlines()
      raise ConfigError(f"stage {stage} failed ({process.returncode}): {said[-1] if said else 'it said nothing'}")
  seconds = time.perf_counter() - start
  result = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
  disk = disk_bytes(output) if output else 0
  measured = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
  return {"stage": stage, **measured, "peak_rss_bytes": usage.ru_maxrss * 1024, "disk_bytes": disk, **result}


def disk_bytes(path: pathlib.Path) -> int:
  """Size of a file, or of all files below a folder."""
  return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def convert_source(model: ModelConfig, source: Source, path: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
  """Writes a source to `path`, converts it into the folder `output`, and deletes it."""
  start = time.perf_counter()
  try:
    source.write(path)
  except OSError as error:
    raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
  written = {"written_bytes": disk_bytes(path), "write_seconds": time.perf_counter() - start}
  arguments = [argument.format(path=path) for argument in source.arguments]
  command = ["-m", "experiments.convert", f"--model={model.name}", f"--output={output}", *arguments]
  result = measure(f"convert {source.name}", [*command, f"--dtype={_DTYPE.value}"], output / source.part)
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  return result | written


def weight_checksums(part: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file with weights in a converted part."""
  files = part_files.read_part_file(epath.Path(part))["files"]
  return {name: entry["sha256"] for name, entry in files.items() if "/" in name}


def convert_all(model: ModelConfig, chosen: Sequence[Source], folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Results of all conversions. Raises ConfigError if flavours that hold the same weights become different parts."""
  seen: dict[tuple[str, bool], tuple[str, dict[str, str]]] = {}
  for source in chosen:
    output = folder / (CHECKPOINT if source.final else f"{source.name}_converted")
    result = convert_source(model, source, folder / source.name, output)
    checksums = weight_checksums(output / source.part)
    yield result | {"weights_sha256": hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()}
    first, expected = seen.setdefault((source.part, source.with_adapter), (source.name, checksums))
    if checksums != expected:
      raise ConfigError(f"{source.name} and {first} hold the same weights, but became different {source.part} parts")
    if not source.final:
      shutil.rmtree(output)


def run_checks(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Results of all checks of the converted checkpoint in `folder`."""
  own_flags = [f"--{flag.name}={flag.value}" for flag in (_MODEL, _WORK_DIR, _HEIGHT, _WIDTH, _CHUNKS, _DTYPE)]
  for check in CHECKS:
    yield measure(
      check.replace("_", " "), ["-m", "experiments.measure.full_size_check", *own_flags, f"--check={check}"]
    )


def report(results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
  """Prints a row of the table for each result as soon as it is there."""
  columns = ("source, GB", "write, s", "stage, s", "CPU, s", "peak memory, GB", "result, GB")
  print(f"| {'stage':32} | {' | '.join(columns)} |\n|{'-' * 34}|{'|'.join('-' * (len(c) + 1) + ':' for c in columns)}|")
  for result in results:
    numbers = [
      result.get("written_bytes", 0) / 1e9, result.get("write_seconds", 0), result["seconds"], result["cpu_seconds"],
      result["peak_rss_bytes"] / 1e9, result["disk_bytes"] / 1e9,
    ]  # fmt: skip
    cells = (f"{number:{len(column)}.2f}" for number, column in zip(numbers, columns, strict=True))
    print(f"| {result['stage']:32} | {' | '.join(cells)} |", flush=True)
    yield result


def prepare(model: ModelConfig, folder: pathlib.Path) -> None:
  """Raises ConfigError unless the work can be done in `folder`."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
      raise ConfigError(f"--work_dir {folder} is not empty")
  except OSError as error:
    raise ConfigError(f"--work_dir {folder} cannot be used: {error.strerror}") from error
  # The worst moment: the text encoder in float32, its conversion, and all that is converted.
  text = sum(tensor.nbytes for tensor in tensors_of(model, "text", "Wan", "float32").values())
  backbone = sum(tensor.nbytes for tensor in tensors_of(model, "backbone", "Wan", "float32").values())
  needed, free = 2 * text + backbone, shutil.disk_usage(folder).free
  if free < needed:
    raise ConfigError(f"--work_dir {folder} has {free / 1e9:.0f} GB free, the check needs {needed / 1e9:.0f}")


def choose_sources(model: ModelConfig) -> list[Source]:
  """The sources of the flag, in the order of `sources`; all if it is not given."""
  known = sources(model)
  unknown = sorted(set(_SOURCES.value or ()) - {source.name for source in known})
  if unknown:
    raise ConfigError(f"--sources: {unknown[0]!r} is none of {', '.join(source.name for source in known)}")
  return [source for source in known if not _SOURCES.value or source.name in _SOURCES.value]


def main() -> None:
  if _CHECK.value is not None:
    run_check(_CHECK.value)
    return
  # The accelerator belongs to the processes that this one starts.
  jax.config.update("jax_platforms", "cpu")
  model, folder = preset(_MODEL.value), pathlib.Path(_WORK_DIR.value)
  chosen = choose_sources(model)
  prepare(model, folder)
  try:
    complete = {source.part for source in chosen if source.final} == {"backbone", "codec", "text"}
    results = list(report(itertools.chain(convert_all(model, chosen, folder), run_checks(folder) if complete else ())))
  finally:
    if not _KEEP.value:
      for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
  settings = {flag.name: flag.value for flag in (_MODEL, _HEIGHT, _WIDTH, _CHUNKS, _DTYPE)}
  print(json.dumps({**settings, "stages": results}))


if __name__ == "__main__":
  common.run(main)
