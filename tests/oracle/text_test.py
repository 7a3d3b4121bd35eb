"""The text encoder against transformers, and the tokenizer against T5Tokenizer."""

import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# ruff: noqa: E402
from streamt1_jax.config import TextConfig
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.tables import umt5
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.text.umt5 import UMT5Encoder, relative_buckets
from streamt1_jax.training import tokenizer as train_tokenizer
from tests.oracle import libraries

MODEL = pathlib.Path(__file__).parents[2] / "checkpoints" / "tiny" / "tokenizer.model"
CONFIG = TextConfig(
  vocab_size=50, dim=24, attn_dim=32, ffn_dim=40, num_heads=4, num_layers=3, num_buckets=16, max_distance=24
)
LENGTH = 70  # well past max_distance


@pytest.fixture(scope="module")
def oracle():
  return libraries.umt5_encoder(CONFIG)


@pytest.fixture(scope="module")
def params(oracle):
  tensors = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
  flavour = Flavour("text", "Hugging Face", umt5.HF_RULES, umt5.abstract_params(CONFIG), umt5.HF_ALIASES)
  return flavour.convert(tensors)


@pytest.mark.parametrize("length", [LENGTH, 41, 1])
def test_matches_transformers_under_a_padding_mask(oracle, params, length):
  ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, LENGTH).astype(np.int32)
  mask = np.arange(LENGTH) < length
  with torch.no_grad():
    expected = oracle(
      input_ids=torch.from_numpy(ids[None].astype(np.int64)), attention_mask=torch.from_numpy(mask[None])
    ).last_hidden_state[0]
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(CONFIG, nnx.Rngs(0))), nnx.Param)
  encode = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
  found = encode(params, jnp.asarray(ids), jnp.asarray(mask))
  np.testing.assert_allclose(found[:length], expected.numpy()[:length], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 32), (16, 24)])
def test_buckets_match_transformers(num_buckets, max_distance):
  attention = transformers.models.umt5.modeling_umt5.UMT5Attention(
    transformers.UMT5Config(relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance)
  )
  position = torch.arange(601)
  expected = attention._relative_position_bucket(position[None, :] - position[:, None])
  np.testing.assert_array_equal(relative_buckets(601, num_buckets, max_distance), expected.numpy())


@pytest.fixture(scope="module")
def stock_model() -> bytes:
  """A unigram model as T5's: the trainer's own subwords and normalisation."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(train_tokenizer.captions()),
    model_writer=model,
    vocab_size=45,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return model.getvalue()


@pytest.mark.parametrize("stock", [True, False])
def test_tokenizer_matches_t5(stock, stock_model, tmp_path):
  model = stock_model if stock else MODEL.read_bytes()
  (tmp_path / "spiece.model").write_bytes(model)
  theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
  ours = Tokenizer(model, 16)
  for prompt in (
    "a red circle",
    "A small red circle moves quickly left.",
    "",
    "zebra " * 20,
    "naïve ½ 漢字 over a lawn",
    "red, green; blue",
  ):
    expected = theirs(prompt, max_length=16, padding="max_length", truncation=True)
    assert ours(prompt).ids.tolist() == expected["input_ids"]
    assert ours(prompt).mask.tolist() == [bool(value) for value in expected["attention_mask"]]
