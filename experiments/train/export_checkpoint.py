"""Puts trained parts together into a checkpoint folder that `experiments.generate` takes.

python -m experiments.train.export_checkpoint --codec_dir=runs/vae_decoder/params --dit_dir=runs/dit/params \
  --output=checkpoints/tiny
"""

import jax
from absl import flags
from etils import epath
from flax import nnx

from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.cli import common
from streamt1_jax.codec.vae import VideoCodec
from streamt1_jax.config import ConfigError
from streamt1_jax.io import atomic, paths
from streamt1_jax.io.checkpoint import load_params, save_config, save_params
from streamt1_jax.pipeline import TOKENIZER_FILE
from streamt1_jax.text.umt5 import UMT5Encoder

FLAGS = flags.FLAGS
flags.DEFINE_string("preset", "tiny", "Model preset of all parts.")
common.define_path("codec_dir", None, "What train_vae wrote to params/.", required=True)
common.define_path("dit_dir", None, "What train_dit wrote to params/.", required=True)
common.define_path("tokenizer", "checkpoints/tiny/tokenizer.model", "Sentencepiece model.")
common.define_path("output", None, "Checkpoint folder.", required=True)
flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16", "float32"], "Dtype of the stored weights.")


def main() -> None:
  model, output = common.trainable_preset(FLAGS.preset), epath.Path(FLAGS.output)
  tokenizer = epath.Path(FLAGS.tokenizer)
  # Everything is read before anything is written.
  if not tokenizer.is_file():
    raise ConfigError(f"--tokenizer={tokenizer} is not a file")
  abstract = lambda build: nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.Param))
  codec = abstract(lambda: VideoCodec(model.codec, rngs=nnx.Rngs(0)))
  parts = {"codec": load_params(FLAGS.codec_dir, codec)}
  dit = epath.Path(FLAGS.dit_dir)
  parts["backbone"] = load_params(dit / "backbone", abstract(lambda: CausalWanDiT(model, nnx.Rngs(0))))
  parts["text"] = load_params(dit / "text", abstract(lambda: UMT5Encoder(model.text, nnx.Rngs(0))))
  for name, params in parts.items():
    save_params(output / name, params, dtype=FLAGS.dtype)
    print(f"{name}: {sum(leaf.size for leaf in jax.tree.leaves(params))} parameters")
  if paths.absolute(tokenizer) != paths.absolute(output / TOKENIZER_FILE):
    atomic.replace_bytes(output / TOKENIZER_FILE, tokenizer.read_bytes())
  save_config(
    output, model, {"trained_by": "experiments.train.vae, experiments.train.dit", "data": "shapes world, train split"}
  )


if __name__ == "__main__":
  common.run(main)
