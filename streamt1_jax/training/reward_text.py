"""What the small rewards of the shapes world read: instruction texts, a tokenizer, and the tokens of every caption.

  all captions, instruction texts ── byte-level BPE ── tokenizer ── `RewardPrompt` ── CaptionTokens

The tokenizer is of Qwen2's kind, so any prompt can be read; words of the world are single tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from streamt1_jax.data import shapes
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate
from streamt1_jax.rewards.table import REWARDS

TEMPLATES = {
  name: PromptTemplate(f"shapes_{name}", spec.training.text, spec.required_text.reward_tokens)
  for name, spec in REWARDS.items()
  if spec.training is not None
}
"""Instruction texts by reward. The models they name are not the published ones: these texts are ours."""

_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_CHAT_WORDS = ("system\nYou are a helpful assistant.", "user\n")


class CaptionTokens(NamedTuple):
  """Tokens of the four captions of every scene: complete, without size, without speed, without both.

  Attributes:
    before: the text before the frames, the same for all.
    after: the text after them, padded.
    reward_index: places of the reward tokens in `after`.
  """

  before: Int32[Array, " X"]
  after: Int32[Array, "1152 4 Y"]
  reward_index: Int32[Array, "1152 4 R"]

  def of(self, scene: jax.Array, omit_size: jax.Array, omit_speed: jax.Array) -> PromptTokens:
    """Tokens of one caption of the scene in row `scene` of `shapes.all_scenes()`."""
    which = omit_size.astype(jnp.int32) + 2 * omit_speed.astype(jnp.int32)
    return PromptTokens(self.before, self.after[scene, which], self.reward_index[scene, which])


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
  """Byte-level BPE of at most `vocab_size` tokens, trained on all captions and the texts around them.

  The same for all rewards, so that one can go on from the backbone of another.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  reward_tokens = [token for template in TEMPLATES.values() for token in template.reward_tokens]
  special = (*_CHAT_TOKENS, *reward_tokens)
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - len(special),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  texts = [template.text for template in TEMPLATES.values()]
  texts = [functools.reduce(lambda text, token: text.replace(token, ""), reward_tokens, text) for text in texts]
  captions = [shapes.caption(*scene) for scene in shapes.all_scenes()]
  corpus = [text.replace(prompts.PLACEHOLDER, caption) for text in texts for caption in captions]
  tokenizer.train_from_iterator([*corpus, *_CHAT_WORDS], trainer)
  tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
  return tokenizer


def caption_tokens(prompt: Callable[[str], PromptTokens]) -> CaptionTokens:
  """Tokens of every caption of the world; padded no further than the longest."""
  omissions = [(size, speed) for speed in (False, True) for size in (False, True)]
  encoded = [[prompt(shapes.caption(*scene, *omit)) for omit in omissions] for scene in shapes.all_scenes()]
  index = np.array([[tokens.reward_index for tokens in row] for row in encoded], np.int32)
  used = int(index.max()) + 1
  after = np.array([[tokens.after[:used] for tokens in row] for row in encoded], np.int32)
  return CaptionTokens(jnp.asarray(encoded[0][0].before), jnp.asarray(after), jnp.asarray(index))
