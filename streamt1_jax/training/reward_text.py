"""What the small rewards of the shapes world read: instruction texts, a tokenizer, and the tokens of captions.

  captions, instruction texts ── byte-level BPE ── tokenizer ── `RewardPrompt` ── CaptionTokens

The tokenizer is of Qwen2's kind, so any prompt can be read; words of the world are single tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from streamt1_jax.data import shapes, world
from streamt1_jax.data.world import Description, Thing
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.model import PromptTokens
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate
from streamt1_jax.rewards.table import REWARDS
from streamt1_jax.typing import HostArray

TEMPLATES = {
  name: PromptTemplate(f"shapes_{name}", spec.training.text, spec.required_text.reward_tokens)
  for name, spec in REWARDS.items()
  if spec.training is not None
}
"""Instruction texts by reward. The models they name are not the published ones: these texts are ours."""

_CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
_CHAT_WORDS = ("system\nYou are a helpful assistant.", "user\n")
_LONGEST = Description((Thing(0, 0, 0, 0, 0), Thing(0, 1, 0, 0, 0)), list(shapes.BACKGROUNDS).index("dark blue"))


class CaptionTokens(NamedTuple):
  """Tokens of captions.

  Attributes:
    before: the text before the frames, the same for all.
    after: the text after them, padded to the length of the longest caption of the world.
    reward_index: places of the reward tokens in `after`.
  """

  before: Int32[HostArray, " X"]
  after: Int32[HostArray, "*captions Y"]
  reward_index: Int32[HostArray, "*captions R"]


def make_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
  """Byte-level BPE of at most `vocab_size` tokens, trained on captions and the texts around them.

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
  captions += world.held_out_captions("train", len(captions), seed=0)
  corpus = [text.replace(prompts.PLACEHOLDER, caption) for text in texts for caption in captions]
  tokenizer.train_from_iterator([*corpus, *_CHAT_WORDS], trainer)
  tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in special])
  return tokenizer


def caption_tokens(prompt: Callable[[str], PromptTokens], captions: Sequence[Description]) -> CaptionTokens:
  """Tokens of captions, complete or not."""
  length = int(prompt(world.caption(_LONGEST)).reward_index[-1]) + 1
  found = [prompt(world.caption(description)) for description in captions]
  after = np.stack([_fitted(tokens.after, length) for tokens in found])
  return CaptionTokens(
    np.asarray(found[0].before, np.int32),
    after.astype(np.int32),
    np.stack([tokens.reward_index for tokens in found]).astype(np.int32),
  )


def said_at(tokenizer: tokenizers.Tokenizer, tokens: CaptionTokens) -> Int32[np.ndarray, "captions 3"]:
  """Where everything about the first object, the second one and the background is said.

  Places in `tokens.after`: of the words that name directions, and of "background". Where there is no second object, its
  place is that of the first one.
  """
  ids = lambda words: [tokenizer.encode(f" {word}").ids[-1] for word in words]
  directions, (background,) = ids(shapes.DIRECTIONS), ids(["background"])
  places = []
  for after in np.asarray(tokens.after):
    movers = np.flatnonzero(np.isin(after, directions))
    places.append((movers[0], movers[-1], np.flatnonzero(after == background)[0]))
  return np.array(places, np.int32)


def _fitted(after: HostArray, length: int) -> np.ndarray:
  """A text that is padded already, longer or shorter; nothing behind the last reward token counts."""
  return np.pad(after[:length], (0, max(length - len(after), 0)), mode="edge")
