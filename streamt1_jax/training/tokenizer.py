"""The sentencepiece model of the shapes world, trained on all of its captions.

Every word of the world is one piece. Single letters and digits are pieces too, so any English prompt has tokens; other
characters become the unknown token. Capitals are folded and punctuation reads as a space: "A red circle moves left,
over a black background." is the caption it looks like. The folding is a table of 40 rules; the stock lower-casing table
of sentencepiece would make the file a hundred times larger.
"""

import io
import itertools
import pathlib
import string
import tempfile
from collections import Counter
from typing import Any, cast

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from streamt1_jax.data import shapes
from streamt1_jax.text.tokenizer import END_ID, PAD_ID

_LETTERS = string.ascii_lowercase + string.digits
_PUNCTUATION = ".,;:!?\"'()-_/"
_UNKNOWN_ID = 2
_LATER_WORDS = ("and",)
"""Words of captions of two objects alone. They are added in the end, so that all other pieces keep their numbers."""
_SPACE = "▁"  # how sentencepiece writes a space inside a piece


def captions() -> list[str]:
  """Every caption of one object, with and without its size and speed words, each once."""
  omissions = itertools.product((False, True), repeat=2)
  texts = (shapes.caption(*scene, *omit) for omit in omissions for scene in shapes.all_scenes())
  return list(dict.fromkeys(texts))


def folding_rules() -> str:
  """Normalisation in sentencepiece's format: hexadecimal code points, source, tab, target."""
  folds = dict(zip(string.ascii_uppercase, string.ascii_lowercase, strict=True))
  folds |= dict.fromkeys(_PUNCTUATION, " ")
  return "".join(f"{ord(source):x}\t{ord(target):x}\n" for source, target in folds.items())


def seed_pieces(texts: list[str]) -> dict[str, int]:
  """Candidate pieces with their counts: the words, a lone space, letters and digits.

  Left to itself the trainer proposes only substrings that two words share, and so never a whole word.
  """
  words = Counter(word for text in texts for word in text.split())
  return {_SPACE + word: count for word, count in words.items()} | dict.fromkeys([_SPACE, *_LETTERS], 1)


def train(texts: list[str]) -> bytes:
  """The serialised unigram model of all seed pieces."""
  seeds = seed_pieces(texts)
  model = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    rules_file = pathlib.Path(folder, "rules.tsv")
    rules_file.write_text(folding_rules())
    seeds_file = pathlib.Path(folder, "seeds.tsv")
    seeds_file.write_text("".join(f"{piece}\t{count}\n" for piece, count in seeds.items()))
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      model_type="unigram",
      vocab_size=len(seeds) + 3,
      required_chars=_LETTERS,
      seed_sentencepieces_file=str(seeds_file),
      normalization_rule_tsv=str(rules_file),
      pad_id=PAD_ID,
      eos_id=END_ID,
      unk_id=_UNKNOWN_ID,
      bos_id=-1,
      num_threads=1,
      minloglevel=2,
    )
  return _finished(model.getvalue())


def _finished(model: bytes) -> bytes:
  """Adds later words, and drops the names of temporary files: equal training gives equal bytes."""
  proto = cast(Any, sentencepiece_model_pb2).ModelProto.FromString(model)
  rarest = min(piece.score for piece in proto.pieces if len(piece.piece) > 2 and piece.piece.startswith(_SPACE))
  for word in _LATER_WORDS:
    proto.pieces.add(piece=_SPACE + word, score=rarest)
    proto.trainer_spec.vocab_size += 1
  proto.trainer_spec.ClearField("seed_sentencepieces_file")
  proto.normalizer_spec.ClearField("normalization_rule_tsv")
  return proto.SerializeToString(deterministic=True)
