"""Text encoder, tokenizer and prompt embeddings."""

import dataclasses
import html
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx

from streamt1_jax.config import ConfigError, TextConfig, preset
from streamt1_jax.io import checkpoint
from streamt1_jax.text import encode as encode_module
from streamt1_jax.text.encode import PromptEncoder, padded_length
from streamt1_jax.text.tokenizer import END_ID, PAD_ID, Tokenizer, clean
from streamt1_jax.text.umt5 import UMT5Encoder, relative_buckets
from streamt1_jax.training import tokenizer as train_tokenizer

MODEL = pathlib.Path(__file__).parents[1] / "checkpoints" / "tiny" / "tokenizer.model"
CAPTION = "a small red circle moves quickly left over a dark blue background"
CONFIG = TextConfig(
  vocab_size=65, dim=16, attn_dim=24, ffn_dim=32, num_heads=3, num_layers=2, max_distance=16, max_len=32
)


@pytest.fixture(scope="module")
def encoder():
  """Graph definition and random parameters, norms included."""
  return random_encoder(CONFIG)


@pytest.fixture(scope="module")
def encode(encoder):
  """The encoder as a compiled function of token ids and mask."""
  graphdef, params = encoder
  compiled = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
  return lambda ids, mask, params=params: compiled(params, ids, mask)


def random_encoder(config: TextConfig):
  graphdef, params = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, nnx.Rngs(0))), nnx.Param)
  generator = np.random.default_rng(0)
  return graphdef, jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0.0, 0.5, leaf.shape), leaf.dtype), params)


def make_tokenizer(max_len: int = 32) -> Tokenizer:
  return Tokenizer(MODEL, max_len)


class TestRelativeBuckets:
  @pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 32), (8, 16)])
  def test_agree_with_exact_integer_arithmetic(self, num_buckets, max_distance):
    length = 200
    half, exact = num_buckets // 2, num_buckets // 4

    def expected(relative):
      offset, distance = half * (relative > 0), abs(relative)
      if distance < exact:
        return offset + distance
      # exact + k begins at the distance exact * (max_distance / exact)^(k / (half - exact)); no roots here.
      k = max(
        k for k in range(half - exact) if distance ** (half - exact) >= exact ** (half - exact - k) * max_distance**k
      )
      return offset + exact + k

    table = relative_buckets(length, num_buckets, max_distance)
    by_hand = [[expected(key - query) for key in range(length)] for query in range(length)]
    np.testing.assert_array_equal(table, by_hand)

  def test_known_values(self):
    row = relative_buckets(300, 32, 128)[0]
    assert [row[i] for i in (0, 1, 7, 8, 16, 32, 64, 127, 128, 299)] == [
      0,
      17,
      23,
      24,
      26,
      28,
      30,
      31,
      31,
      31,
    ]


class TestEncoder:
  def test_padding_does_not_change_the_prompt(self, encode):
    ids = jnp.arange(3, 23, dtype=jnp.int32)
    alone = encode(ids[:13], jnp.ones(13, bool))
    padded = encode(ids, jnp.arange(20) < 13)
    chex.assert_trees_all_close(padded[:13], alone, atol=2e-6)

  def test_vmap_equals_one_at_a_time(self, encode):
    ids = jnp.arange(40, dtype=jnp.int32).reshape(2, 20)
    mask = jnp.arange(20)[None, :] < jnp.array([[5], [20]])
    one_by_one = jnp.stack([encode(ids[0], mask[0]), encode(ids[1], mask[1])])
    chex.assert_trees_all_close(jax.vmap(encode)(ids, mask), one_by_one, atol=2e-6)

  def test_bfloat16_weights_compute_in_bfloat16(self, encoder, encode):
    ids, mask = jnp.arange(20, dtype=jnp.int32), jnp.ones(20, bool)
    exact = encode(ids, mask)
    low = encode(ids, mask, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder[1]))
    assert low.dtype == jnp.bfloat16
    error = jnp.linalg.norm(low.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 3e-2

  def test_every_parameter_matters(self, encoder, encode):
    ids, mask = jnp.arange(20, dtype=jnp.int32), jnp.ones(20, bool)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(20, CONFIG.dim)), jnp.float32)
    gradient = jax.grad(lambda params: jnp.sum(encode(ids, mask, params) * weights))(encoder[1])
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))

  def test_full_size_parameter_count(self):
    encoder = nnx.eval_shape(lambda: UMT5Encoder(preset("wan_1_3b").text, nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(encoder, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 5_680_910_336


class TestTokenizer:
  @pytest.mark.parametrize(
    ("prompt", "expected"),
    [
      ("  a \t red\n\ncircle ", "a red circle"),
      ("red &amp;lt;3 &amp; blue", "red <3 & blue"),
      ("left！", "left!"),
      ("schÃ¶n", "schön"),
      ("a&nbsp;red", "a red"),
    ],
  )
  def test_cleaning(self, prompt, expected):
    assert clean(prompt) == expected

  def test_unescapes_exactly_twice(self):
    # ftfy unescapes on its own, but not a text that holds a literal "<".
    thrice = html.escape(html.escape(html.escape("&")))
    assert clean("< " + thrice) == "< &amp;"

  def test_layout_of_a_caption(self):
    tokens = make_tokenizer()(CAPTION)
    assert tokens.length == 13  # twelve words and the end token
    assert tokens.ids[12] == END_ID
    assert (tokens.ids[13:] == PAD_ID).all()
    np.testing.assert_array_equal(tokens.mask, np.arange(32) < 13)
    assert not tokens.truncated
    assert make_tokenizer().pieces(CAPTION) == ["▁" + word for word in CAPTION.split()]

  @pytest.mark.parametrize(
    "prompt",
    [
      CAPTION.upper(),
      CAPTION.capitalize() + ".",
      "A small, red circle moves quickly left over a dark-blue background!",
      f"  “{CAPTION}”  ",
    ],
  )
  def test_case_and_punctuation_do_not_matter(self, prompt):
    tokenizer = make_tokenizer()
    np.testing.assert_array_equal(tokenizer(prompt).ids, tokenizer(CAPTION).ids)

  def test_truncation_keeps_the_end_token(self):
    pieces = len(CAPTION.split())
    exact, short = make_tokenizer(pieces + 1)(CAPTION), make_tokenizer(pieces)(CAPTION)
    assert (exact.truncated, short.truncated) == (False, True)
    assert short.ids[-1] == END_ID
    np.testing.assert_array_equal(short.ids[:-1], exact.ids[: pieces - 1])
    assert make_tokenizer(1)(CAPTION).ids.tolist() == [END_ID]

  @pytest.mark.parametrize("prompt", ["", "   ", "漢字 😀", "An astronaut jogs; 42 zebras watch.", "\x00\ufeff"])
  def test_any_text_is_accepted(self, prompt):
    tokens = make_tokenizer()(prompt)
    assert 1 <= tokens.length <= 32
    assert tokens.ids[tokens.length - 1] == END_ID
    assert tokens.ids.max() < preset("tiny").text.vocab_size

  def test_unreadable_models_are_named(self, tmp_path):
    corrupt = tmp_path / "corrupt.model"
    corrupt.write_bytes(MODEL.read_bytes()[:1000] + b"\xff" * 50)
    empty = tmp_path / "empty.model"
    empty.touch()
    for path in (tmp_path / "absent.model", corrupt, empty, tmp_path):
      with pytest.raises(ConfigError, match=path.name):
        Tokenizer(path, 32)
    with pytest.raises(ConfigError, match="max_len"):
      Tokenizer(MODEL, 0)

  def test_shipped_model_is_what_the_experiment_trains(self):
    captions = train_tokenizer.captions()
    tokenizer = make_tokenizer(preset("tiny").text.max_len)
    trained = Tokenizer(train_tokenizer.train(captions), tokenizer.max_len)
    # Not the bytes: scores may differ in the last digit between machines.
    assert trained.vocab_size == tokenizer.vocab_size <= preset("tiny").text.vocab_size
    for prompt in (*captions[::37], "The quick brown fox jumps over 13 lazy dogs."):
      np.testing.assert_array_equal(trained(prompt).ids, tokenizer(prompt).ids)
    for word in {"and"} | {word for caption in captions for word in caption.split()}:
      assert tokenizer.pieces(word) == ["▁" + word]


@pytest.fixture(scope="module")
def stored(encoder, tmp_path_factory):
  """Folder of the random encoder's weights."""
  folder = tmp_path_factory.mktemp("model") / "text"
  checkpoint.save_params(folder, encoder[1])
  return folder


class TestPromptEncoder:
  def test_zeros_after_the_prompt(self, stored):
    embeddings = PromptEncoder(stored, CONFIG, make_tokenizer(), text_len=40)(CAPTION)
    chex.assert_shape(embeddings, (40, CONFIG.dim))
    assert embeddings.dtype == jnp.float32
    assert (embeddings[13:] == 0).all()
    assert (jnp.abs(embeddings[:13]).max(axis=-1) > 0).all()

  def test_equals_the_encoder_in_memory_on_the_padded_prompts(self, encoder, stored):
    prompts = ["", CAPTION, "zyx " * 30]
    prompt_encoder = PromptEncoder(stored, CONFIG, make_tokenizer(), text_len=32)
    prompt_encoder.prepare(prompts)
    for prompt in prompts:
      tokens = make_tokenizer()(prompt)
      expected = nnx.merge(*encoder)(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask))
      chex.assert_trees_all_close(prompt_encoder(prompt)[: tokens.length], expected[: tokens.length], atol=5e-6)

  def test_prompts_together_are_prompts_one_by_one_and_read_once(self, stored, monkeypatch):
    prompts = [CAPTION, "zyx " * 30]
    together, alone = (PromptEncoder(stored, CONFIG, make_tokenizer(), text_len=32) for _ in range(2))
    expected = [alone(prompt) for prompt in prompts]
    together.prepare([*prompts, CAPTION])
    monkeypatch.setattr(together, "_weights", None)  # Nothing is read any more.
    for prompt, embeddings in zip(prompts, expected, strict=True):
      np.testing.assert_array_equal(together(prompt), embeddings)

  def test_keeps_a_batch_and_the_prompts_that_were_used_last(self, stored, monkeypatch):
    monkeypatch.setattr(encode_module, "_KEPT", 1)
    prompt_encoder = PromptEncoder(stored, CONFIG, make_tokenizer(), text_len=32)
    read = []
    usual = prompt_encoder._encode
    monkeypatch.setattr(prompt_encoder, "_encode", lambda tokens: read.append(len(tokens)) or usual(tokens))
    prompt_encoder.prepare(["a", "b", "c"])
    # One more has room, and the next takes the place of "a", which was not used for the longest time.
    for prompt in ("d", "b", "c", "e", "b", "c", "d"):
      prompt_encoder(prompt)
    assert read == [3, 1, 1]
    prompt_encoder("a")
    assert read == [3, 1, 1, 1]
    assert len(prompt_encoder._embeddings) == 4

  def test_computes_in_the_dtype_asked_for(self, encoder, stored):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder[1])
    tokens = make_tokenizer()(CAPTION)
    expected = nnx.merge(encoder[0], narrow)(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask))[: tokens.length]
    embeddings = PromptEncoder(stored, CONFIG, make_tokenizer(), 32, jnp.bfloat16)(CAPTION)[: tokens.length]
    assert expected.dtype == jnp.bfloat16
    error = jnp.linalg.norm(embeddings - expected.astype(jnp.float32)) / jnp.linalg.norm(embeddings)
    assert error < 1e-2  # Layers compiled alone may round intermediate values elsewhere than layers under scan.
    np.testing.assert_array_equal(embeddings, embeddings.astype(jnp.bfloat16).astype(jnp.float32))

  def test_few_shapes_are_compiled(self):
    assert {padded_length(length, 32) for length in range(1, 33)} == {8, 16, 24, 32}
    assert {padded_length(length, 512) for length in range(1, 513)} == set(range(64, 513, 64))
    assert padded_length(5, 6) == 6

  def test_truncation_is_logged_once(self, stored, caplog):
    logging.use_absl_handler()
    prompt_encoder = PromptEncoder(stored, CONFIG, make_tokenizer(4), text_len=32)
    prompt_encoder.prepare([CAPTION])
    prompt_encoder(CAPTION)
    assert caplog.text.count("first 4 tokens") == 1

  def test_weights_that_are_not_finite_are_named(self, encoder, tmp_path, monkeypatch):
    params = nnx.to_pure_dict(encoder[1])
    params["blocks"]["ffn"]["up"]["kernel"] = params["blocks"]["ffn"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan)
    with monkeypatch.context() as patched:
      patched.setattr(checkpoint, "check_finite", lambda *arguments: None)
      checkpoint.save_params(tmp_path / "text", params)
    with pytest.raises(ConfigError, match="NaN or Inf in .*text: blocks/ffn/up/kernel$"):
      PromptEncoder(tmp_path / "text", CONFIG, make_tokenizer(), 32)(CAPTION)

  def test_mismatched_parts_are_refused(self, stored):
    with pytest.raises(ConfigError, match="max_len 32 exceeds text_len 16"):
      PromptEncoder(stored, CONFIG, make_tokenizer(), text_len=16)
    small = dataclasses.replace(CONFIG, vocab_size=8)
    with pytest.raises(ConfigError, match="65 pieces"):
      PromptEncoder(stored, small, make_tokenizer(), text_len=32)
    with pytest.raises(ConfigError, match="text does not fit the model: blocks/"):
      PromptEncoder(stored, dataclasses.replace(CONFIG, num_layers=3), make_tokenizer(), text_len=32)
