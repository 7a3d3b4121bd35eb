"""Both kinds of tokenizer files, of one small vocabulary."""

import io

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from streamt1_jax.training import tokenizer as train_tokenizer


def sentencepiece_model(**options) -> bytes:
  """A unigram model of the captions with the special ids of UMT5."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(train_tokenizer.captions()),
    model_writer=model,
    **({"vocab_size": 46, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2} | options),
  )
  return model.getvalue()


def tokenizer_json(model: bytes) -> str:
  """The file of the tokenizers library with the pieces of a sentencepiece model, laid out as UMT5's.

  It cuts and pads, as a file may that a training program saved.
  """
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  vocabulary = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
  tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, processor.unk_id(), byte_fallback=False))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
  special = [piece for piece in ("<pad>", "</s>", "<s>", "<unk>") if tokenizer.token_to_id(piece) is not None]
  tokenizer.add_special_tokens([*special, "<extra_id_0>"])
  tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", processor.eos_id())])
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=4)
  return tokenizer.to_str()
