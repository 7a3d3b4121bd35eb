"""Both kinds of tokenizer files: where they agree, where they do not, and which one a checkpoint has."""

import json
import shutil

import pytest

from streamt1_jax.config import ConfigError, preset
from streamt1_jax.convert import execute
from streamt1_jax.io import checkpoint
from streamt1_jax.pipeline import Pipeline
from streamt1_jax.text.tokenizer import Tokenizer
from streamt1_jax.training import tokenizer as train_tokenizer
from tests import tokenizer_files
from tests.command_line import REPOSITORY, generate, save_model

CAPTION = "a small red circle moves quickly left over a dark blue background"
SHIPPED = REPOSITORY / "checkpoints/tiny/tokenizer.model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One vocabulary as both files; the sentencepiece model takes byte pieces where it knows no better."""
  path = tmp_path_factory.mktemp("tokenizers")
  model = tokenizer_files.sentencepiece_model(byte_fallback=True, vocab_size=302)
  (path / "spiece.model").write_bytes(model)
  (path / "tokenizer.json").write_text(tokenizer_files.tokenizer_json(model))
  return path


@pytest.fixture(scope="module")
def model(folder):
  return Tokenizer(folder / "spiece.model", 64)


@pytest.fixture(scope="module")
def library(folder):
  return Tokenizer(folder / "tokenizer.json", 64)


def _ids(tokenizer, prompt):
  """Without the end token."""
  tokens = tokenizer(prompt)
  assert tokens.ids[tokens.length - 1] == 1
  return tokens.ids[: tokens.length - 1].tolist()


def test_captions_have_the_same_ids(library, model):
  for caption in train_tokenizer.captions()[::97]:
    assert _ids(library, caption) == _ids(model, caption)


def test_the_file_neither_cuts_nor_pads(library):
  tokens = library(CAPTION)
  # Four pieces, and an end token, are what the file would leave.
  assert tokens.length > 5
  assert not tokens.truncated
  assert 0 not in _ids(library, "a")
  assert (tokens.ids[tokens.length :] == 0).all()


def test_characters_outside_the_vocabulary(library, model):
  """The library has one <unk>, whose id is 3; sentencepiece spells the UTF-8 bytes e6 bc a2, if the model has them."""
  prompt = "a \u6f22"
  assert _ids(library, prompt)[-1] == 3
  assert _ids(library, prompt).count(3) == 1
  assert model.pieces(prompt)[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]
  assert 3 not in _ids(model, prompt)
  assert _ids(Tokenizer(tokenizer_files.sentencepiece_model(), 64), prompt)[-1] == 3


@pytest.mark.parametrize(("text", "token"), [("</s>", 1), ("<s>", 2), ("<unk>", 3), ("<extra_id_0>", 302)])
def test_texts_of_special_tokens(library, model, text, token):
  """To the library they are tokens, to sentencepiece text of several pieces."""
  prompt = f"a red {text} circle"
  assert _ids(library, prompt).count(token) == 1
  assert token not in _ids(model, prompt)
  assert len(_ids(model, prompt)) > len(_ids(library, prompt))


def test_size_of_the_vocabulary(library, model):
  assert (model.vocab_size, library.vocab_size) == (302, 303)


def test_a_model_without_the_word_mark_is_refused(tmp_path):
  (tmp_path / "spiece.model").write_bytes(tokenizer_files.sentencepiece_model(add_dummy_prefix=False))
  with pytest.raises(ConfigError, match="--tokenizer: .*spiece.model .*add_dummy_prefix .* give the tokenizer.json"):
    execute.read_tokenizer(tmp_path, preset("tiny"))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "tokenizer.json is not a tokenizer.json of the tokenizers library"),
    ('{"model": {}}', "is not a tokenizer.json of the tokenizers library"),
    (None, r"must have pad id 0 and end id 1, found \(0, 2\)"),
  ],
)
def test_other_files_are_refused(tmp_path, content, message):
  if content is None:
    content = tokenizer_files.tokenizer_json(tokenizer_files.sentencepiece_model(eos_id=2, bos_id=1))
  (tmp_path / "tokenizer.json").write_text(content)
  with pytest.raises(ConfigError, match=message):
    execute.read_tokenizer(tmp_path / "tokenizer.json", preset("tiny"))


def test_a_folder_with_both_gives_what_wan_reads(folder):
  content = (folder / "tokenizer.json").read_bytes()
  assert execute.read_tokenizer(folder, preset("wan_1_3b")) == ("tokenizer.json", content, "tokenizer.json")
  assert execute.read_tokenizer(folder / "spiece.model", preset("wan_1_3b")).name == "tokenizer.model"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A checkpoint with the shipped tokenizer, and the same with its pieces as a tokenizer.json."""
  path = tmp_path_factory.mktemp("models")
  save_model(path / "plain")
  shutil.copytree(path / "plain", path / "json")
  (path / "json/tokenizer.model").unlink()
  (path / "json/tokenizer.json").write_text(tokenizer_files.tokenizer_json(SHIPPED.read_bytes()))
  return path


class TestCheckpoint:
  def test_what_is_stored_tells_what_reads_it(self, models):
    plain, of_library = (Pipeline.load(models / name).text.tokenizer for name in ("plain", "json"))
    assert _ids(plain, CAPTION) == _ids(of_library, CAPTION)
    assert [_ids(tokenizer, f"{CAPTION} </s>").count(1) for tokenizer in (plain, of_library)] == [0, 1]

  def test_results_tell_them_apart(self, models, tmp_path):
    arguments = ("--prompt=a red circle", "--num_latent_frames=3", "--search=none")
    assert generate(tmp_path, f"--checkpoint={models / 'json'}", *arguments).code == 0
    result = generate(tmp_path, f"--checkpoint={models / 'plain'}", *arguments)
    assert result.code == 2
    assert "was made with checkpoint_sha256" in result.stderr

  def test_two_tokenizers_are_refused(self, models, tmp_path):
    both = shutil.copytree(models / "plain", tmp_path / "model")
    shutil.copy(models / "json/tokenizer.json", both)
    result = generate(tmp_path, "--checkpoint=model", "--prompt=a red circle")
    assert result.code == 2
    assert "model has both tokenizer.model and tokenizer.json; remove one" in result.stderr

  def test_conversion_keeps_the_kind(self, tmp_path, folder):
    """Nothing but the tokenizer is given; another one is never put beside it."""
    wan, told = preset("wan_1_3b"), []
    assert execute.execute(wan, [], folder, tmp_path / "out", "bfloat16", told.append) == ["backbone", "codec", "text"]
    # The file that was read, not its folder.
    assert told == ["tokenizer.json: not a file I know"]
    assert checkpoint.tokenizer_file(tmp_path / "out").name == "tokenizer.json"
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["type"] == "Unigram"
    with pytest.raises(ConfigError, match="tokenizer.json exists and differs from --tokenizer .*spiece.model"):
      execute.execute(wan, [], folder / "spiece.model", tmp_path / "out", "bfloat16")
