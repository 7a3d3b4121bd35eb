"""Puts trained parts together into a checkpoint folder that `experiments.generate` takes.

python -m experiments.train.export_checkpoint --codec_dir=runs/vae_decoder/params --dit_dir=runs/dit/params \
  --output=checkpoints/tiny
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax import shipped
from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.cli import command, flag_types, training_flags
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError
from streamt1_jax.convert.engine import abstract_params
from streamt1_jax.io import atomic, paths
from streamt1_jax.io.checkpoint import TOKENIZER_FILE, load_params, save_config, save_params
from streamt1_jax.text.umt5 import UMT5Encoder
from streamt1_jax.training.trainer import count_parameters


def define_flags(values: flags.FlagValues) -> None:
  """Where the parts are, and where they go."""
  flag_types.define_string(values, "preset", "tiny", "Model preset of all parts.")
  flag_types.define_path(values, "codec_dir", None, "What experiments.train.vae wrote to params/.", required=True)
  flag_types.define_path(values, "dit_dir", None, "What experiments.train.dit wrote to params/.", required=True)
  flag_types.define_path(values, "tokenizer", None, "Sentencepiece model; the small model's by default.")
  flag_types.define_path(values, "output", None, "Checkpoint folder.", required=True)
  dtypes = ("float16", "bfloat16", "float32")
  flag_types.define_choice(values, "dtype", "float16", dtypes, "Dtype of the stored weights.")


def run(values: flags.FlagValues) -> None:
  """Reads everything, then writes."""
  model, output = training_flags.trainable_preset(values.preset), epath.Path(values.output)
  tokenizer = epath.Path(values.tokenizer or shipped.checkpoint() / TOKENIZER_FILE)
  if not tokenizer.is_file():
    raise ConfigError(f"--tokenizer={tokenizer} is not a file")
  dit, codec = epath.Path(values.dit_dir), lambda: VideoCodec(model.required_codec, rngs=nnx.Rngs(0))
  parts = {"codec": load_params(values.codec_dir, abstract_params(codec))}
  parts["backbone"] = load_params(dit / "backbone", abstract_params(lambda: CausalWanDiT(model, nnx.Rngs(0))))
  parts["text"] = load_params(dit / "text", abstract_params(lambda: UMT5Encoder(model.required_text, nnx.Rngs(0))))
  for name, params in parts.items():
    save_params(output / name, params, dtype=values.dtype)
    print(f"{name}: {count_parameters(params)} parameters")
  if paths.absolute(tokenizer) != paths.absolute(output / TOKENIZER_FILE):
    atomic.replace_bytes(output / TOKENIZER_FILE, tokenizer.read_bytes())
  made_by = "experiments.train.vae, experiments.train.dit"
  save_config(output, model, {"trained_by": made_by, "data": "shapes world, train split"})


def main(argv: Sequence[str] | None = None) -> int:
  return command.main(__doc__, define_flags, run, argv)


if __name__ == "__main__":
  sys.exit(main())
