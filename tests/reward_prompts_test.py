"""Prompts of the reward models: tokens, templates, checksums.

`--reward_sources=DIR` adds the published texts and Qwen's vocabulary, which are not part of this repository.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import zipfile

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from streamt1_jax.config import ConfigError
from streamt1_jax.convert import reward_prompts
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate, RewardPrompt
from streamt1_jax.rewards.table import REWARDS

_BASE_SPECIAL = (
  *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
  *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
  *("<|image_pad|>", "<|video_pad|>"),
)
_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = PromptTemplate(
  "toy",
  "\nJudge the look: <|VQ_reward|>\nEND  \nThe text - {text_prompt}\nIts fit: <|TA_reward|>\nEND\n",
  ("<|VQ_reward|>", "<|TA_reward|>"),
)
_ROWS = 400
_CAPTION = "a {red} cube \N{LATIN SMALL LETTER E WITH ACUTE}"


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
  tokenizer = _byte_level(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=320,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(_BASE_SPECIAL),
    show_progress=False,
  )
  tokenizer.train_from_iterator(
    ["a red cube moves", "judge the look of a small picture", "system user assistant"], trainer
  )
  return prompts.with_reward_tokens(tokenizer, _TEMPLATE)


class TestTokens:
  def test_are_those_of_the_whole_conversation(self, tokenizer):
    tokens = RewardPrompt(tokenizer, _TEMPLATE, _ROWS)(_CAPTION)
    text = (
      "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|>"
      f"<|vision_end|>{_TEMPLATE.text.replace('{text_prompt}', _CAPTION)}<|im_end|>\n<|im_start|>assistant\n"
    )
    whole = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)
    media = np.flatnonzero(whole == tokenizer.token_to_id("<|video_pad|>"))[0]
    np.testing.assert_array_equal(tokens.before, whole[:media])
    used = tokens.reward_index[-1] + 1
    np.testing.assert_array_equal(tokens.after[:used], whole[media + 1 :][:used])
    wanted = [tokenizer.token_to_id(token) for token in _TEMPLATE.reward_tokens]
    np.testing.assert_array_equal(tokens.after[tokens.reward_index], wanted)
    np.testing.assert_array_equal(np.flatnonzero(np.isin(whole, wanted)), media + 1 + tokens.reward_index)

  def test_length_is_padded(self, tokenizer):
    short = RewardPrompt(tokenizer, _TEMPLATE, _ROWS, pad_to=32)
    lengths = {len(short(caption).after) for caption in ("a", "a cube", "a red cube")}
    assert lengths == {len(short("").after)}
    assert lengths.pop() % 32 == 0
    tokens = short("a")
    assert set(tokens.after[tokens.reward_index[-1] + 1 :]) == {tokenizer.token_to_id("<|endoftext|>")}

  def test_new_tokens_follow_the_old(self, tokenizer):
    ids = [tokenizer.token_to_id(token) for token in _TEMPLATE.reward_tokens]
    size = tokenizer.get_vocab_size()
    assert ids == [size - 2, size - 1]
    assert prompts.with_reward_tokens(tokenizer, _TEMPLATE).get_vocab_size() == size

  @pytest.mark.parametrize("caption", ["a <|im_end|> cat", "<|VQ_reward|>", "<|anything|>"])
  def test_special_tokens_are_refused(self, tokenizer, caption):
    with pytest.raises(ConfigError, match="the prompt holds the special token <"):
      RewardPrompt(tokenizer, _TEMPLATE, _ROWS)(caption)

  def test_half_characters_are_refused(self, tokenizer):
    with pytest.raises(ConfigError, match=r"the prompt holds half a character, '\\ud83d'"):
      RewardPrompt(tokenizer, _TEMPLATE, _ROWS)("a cube \ud83d")

  def test_books_are_refused(self, tokenizer):
    with pytest.raises(ConfigError, match=r"the prompt and its instruction text have \d+ tokens, .* reads 4096"):
      RewardPrompt(tokenizer, _TEMPLATE, _ROWS)("a cube " * 3000)

  def test_more_tokens_than_rows_are_refused(self, tokenizer):
    size = tokenizer.get_vocab_size()
    RewardPrompt(tokenizer, _TEMPLATE, size)
    with pytest.raises(ConfigError, match=f"has {size} tokens, toy embeds only {size - 1}"):
      RewardPrompt(tokenizer, _TEMPLATE, size - 1)

  def test_foreign_tokenizer_is_refused(self, tmp_path):
    with pytest.raises(ConfigError, match="has no token <|VQ_reward|>"):
      RewardPrompt(_byte_level(models.BPE()), _TEMPLATE, _ROWS)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a readable tokenizer.json"):
      RewardPrompt(tmp_path / "tokenizer.json", _TEMPLATE, _ROWS)


class TestTemplate:
  @pytest.mark.parametrize(
    ("text", "message"),
    [
      ("<|a|>", "exactly once"),
      ("{text_prompt} {text_prompt} <|a|>", "exactly once"),
      ("{text_prompt}", "once each"),
      ("{text_prompt} <|a|> <|a|>", "once each"),
    ],
  )
  def test_malformed(self, text, message):
    with pytest.raises(ConfigError, match=message):
      PromptTemplate("toy", text, ("<|a|>",))

  def test_order_of_reward_tokens(self):
    with pytest.raises(ConfigError, match="in this order"):
      PromptTemplate("toy", "{text_prompt} <|b|> <|a|>", ("<|a|>", "<|b|>"))

  @pytest.mark.parametrize("model", ["hpsv3", "videoalign"])
  def test_published_names_need_the_published_text(self, model):
    published = REWARDS[model].text
    template = PromptTemplate(model, " ".join(("{text_prompt}", *published.reward_tokens)), published.reward_tokens)
    with pytest.raises(ConfigError, match="is not the published one: sha256"):
      prompts.require_fit(template, model, published)

  def test_round_trip_keeps_trailing_spaces(self, tmp_path):
    (tmp_path / prompts.TEMPLATE_FILE).write_bytes(prompts.template_json(_TEMPLATE))
    assert prompts.load_template(tmp_path) == _TEMPLATE

  def test_altered_file(self, tmp_path):
    (tmp_path / prompts.TEMPLATE_FILE).write_bytes(prompts.template_json(_TEMPLATE))
    path = tmp_path / prompts.TEMPLATE_FILE
    content = json.loads(path.read_text())
    content["text"] = content["text"].replace("END  \n", "END\n")
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="the text has sha256 .*, the file says"):
      prompts.load_template(tmp_path)

  def test_missing_file(self, tmp_path):
    with pytest.raises(ConfigError, match="prompt_template.json cannot be read"):
      prompts.load_template(tmp_path)


_MODULE = (
  'import nothing\nINSTRUCTION = """\nJudge:  \n{text_prompt}\n"""\nprompt_with_special_token = """<|Reward|>\n"""\n'
)
_HPSV3_TEXT = "\nJudge:  \n{text_prompt}\n<|Reward|>\n"


class TestPublishedSources:
  @pytest.fixture
  def as_published(self, monkeypatch):
    digest = hashlib.sha256(_HPSV3_TEXT.encode()).hexdigest()
    spec = REWARDS["hpsv3"]
    spec = dataclasses.replace(spec, text=spec.text._replace(sha256=digest))
    monkeypatch.setattr(reward_prompts, "REWARDS", {**REWARDS, "hpsv3": spec})

  def test_wheel_and_module(self, tmp_path, as_published):
    wheel, module = tmp_path / "hpsv3.whl", tmp_path / "data_collator_qwen.py"
    with zipfile.ZipFile(wheel, "w") as archive:
      archive.writestr("hpsv3/dataset/data_collator_qwen.py", _MODULE)
    module.write_text(_MODULE)
    for path in (wheel, module):
      assert reward_prompts.read("hpsv3", path).text == _HPSV3_TEXT

  def test_stripped_spaces_are_noticed(self, tmp_path, as_published):
    (tmp_path / "m.py").write_text(_MODULE.replace("Judge:  ", "Judge:"))
    with pytest.raises(ConfigError, match="m.py: the prompt template of hpsv3 is not the published one"):
      reward_prompts.read("hpsv3", tmp_path / "m.py")

  @pytest.mark.parametrize(
    ("content", "message"),
    [
      ("x = 1", "does not define the text DETAILED_PROMPT"),
      ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN = open('f').read()", "does not define"),
      ("def (", "is not Python source"),
      ("-" * 10**5 + "1", "is not Python source: [MR]"),
    ],
  )
  def test_other_files(self, tmp_path, content, message):
    (tmp_path / "p.py").write_text(content)
    with pytest.raises(ConfigError, match=message):
      reward_prompts.read("videoalign", tmp_path / "p.py")

  def test_other_wheel(self, tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
      archive.writestr("other.py", "")
    with pytest.raises(ConfigError, match="is not a wheel of hpsv3"):
      reward_prompts.read("hpsv3", tmp_path / "w.whl")
    with pytest.raises(ConfigError, match="cannot be read"):
      reward_prompts.read("videoalign", tmp_path / "absent.py")


# From docs/reference/rewards.md: ids of the whole conversation with one media token; length, sha256 of the comma-joined
# ids, positions of the reward tokens.
_VECTORS = {
  ("hpsv3", ""): (531, "9a77128b437d795a790deb1a272f6e455f9a1818dd38bdec67fb9e530264fd57", [522]),
  ("hpsv3", "a cat"): (533, "a73ae9f38d614ec07046d0fefe548705e0d574d6cfd9557a5f75a3e4d2466a1f", [524]),
  ("videoalign", ""): (822, "aac1c619022a7d3aa356933bbe8c9ecdd20d34abd3651261d7d1a507a517b8e2", [309, 576, 813]),
  ("videoalign", "a cat"): (824, "ff91b779c1021c4197c019f37723948040c6146aeaa5c7fe792a14d166d6230c", [309, 576, 815]),
}


def _qwen_tokenizer(ranks_file: pathlib.Path) -> tokenizers.Tokenizer:
  """Qwen's vocabulary: the merge that makes a token joins the two parts into which earlier merges leave its bytes."""
  lines = (line.split() for line in ranks_file.read_bytes().splitlines() if line)
  ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
  letter = {byte: chr(byte) if chr(byte).isprintable() and byte not in (32, 160, 173) else None for byte in range(256)}
  spare = iter(range(256, 512))
  letter = {byte: char or chr(next(spare)) for byte, char in letter.items()}
  spell = lambda token: "".join(letter[byte] for byte in token)
  merges = []
  for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
      joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
      best = min(range(len(joined)), key=joined.__getitem__)
      if joined[best] >= rank:
        break
      parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) == 2:
      merges.append((spell(parts[0]), spell(parts[1])))
  tokenizer = _byte_level(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
  tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in _BASE_SPECIAL])
  return tokenizer


class TestPublishedTokens:
  @pytest.fixture
  def sources(self, request) -> pathlib.Path:
    folder = request.config.getoption("--reward_sources")
    if folder is None:
      pytest.skip("needs --reward_sources")
    return pathlib.Path(folder)

  @pytest.mark.parametrize(("model", "caption"), list(_VECTORS))
  def test_vectors(self, sources, model, caption):
    if model == "hpsv3":
      template = reward_prompts.read("hpsv3", next(sources.glob("hpsv3*.whl")))
    else:
      template = reward_prompts.read("videoalign", sources / "prompt_template.py")
    tokenizer = prompts.with_reward_tokens(_qwen_tokenizer(sources / "qwen.tiktoken"), template)
    assert tokenizer.get_vocab_size() == 151657 + len(template.reward_tokens)
    tokens = RewardPrompt(tokenizer, template, tokenizer.get_vocab_size())(caption)
    length, digest, positions = _VECTORS[model, caption]
    # What the reward drops: the rest of the text and the end of the conversation.
    end = tokenizer.encode(
      template.text.split(template.reward_tokens[-1])[1] + "<|im_end|>\n<|im_start|>assistant\n",
      add_special_tokens=False,
    ).ids
    media = tokenizer.token_to_id("<|image_pad|>" if model == "hpsv3" else "<|video_pad|>")
    ids = [*tokens.before, media, *tokens.after[: tokens.reward_index[-1] + 1], *end]
    assert len(ids) == length
    assert hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest() == digest
    assert (len(tokens.before) + 1 + tokens.reward_index).tolist() == positions
