"""A reward with a Qwen2-VL backbone from its folder, and what its folder holds beside the weights.

The table of token embeddings is read by prompts alone. In a search it stays on the host: in bfloat16 that of HPSv3
takes 1.1 GB.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Float

from streamt1_jax.config import required
from streamt1_jax.io import checkpoint
from streamt1_jax.rewards.base import PromptReader
from streamt1_jax.rewards.qwen2_vl import prompts
from streamt1_jax.rewards.qwen2_vl.model import PromptEmbedding, PromptTokens
from streamt1_jax.rewards.qwen2_vl.prompts import PromptTemplate, RewardPrompt
from streamt1_jax.rewards.spec import RewardSpec
from streamt1_jax.typing import Params

_TABLE = "backbone/decoder/token_embedding"


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
  """Turns a caption into embeddings on the host.

  Attributes:
    prompt: turns it into tokens.
    table: a row for each token.
  """

  prompt: Callable[[str], PromptTokens]
  table: Float[np.ndarray, "vocab_size M"]

  def __call__(self, caption: str) -> PromptEmbedding:
    """Raises ConfigError as `RewardPrompt` does."""
    tokens = self.prompt(caption)
    return PromptEmbedding(self.table[tokens.before], self.table[tokens.after], tokens.reward_index)


def with_table(params: Params, table: Any) -> Params:
  """Parameters of a reward with another table of token embeddings."""
  backbone = params["backbone"]
  return params | {"backbone": backbone | {"decoder": backbone["decoder"] | {"token_embedding": table}}}


def without_table(params: Params) -> Params:
  """Shapes of the parameters of a reward whose prompts are embedded on the host: its table has no rows."""
  table = params["backbone"]["decoder"]["token_embedding"]
  return with_table(params, jax.ShapeDtypeStruct((0, *table.shape[1:]), table.dtype, sharding=table.sharding))


def load(
  spec: RewardSpec, folder: epath.Path, config: Any, abstract: Params, embed_on_host: bool
) -> tuple[Params, PromptReader]:
  """`RewardSpec.load`: as `folder.load_weights`, but `embed_on_host` leaves the table of embeddings on the host."""
  prompt = required(spec.read_prompt, f"the prompt reader of {spec.name}")(folder, config)
  if not embed_on_host:
    return checkpoint.load_params(folder, abstract), prompt
  params = checkpoint.load_params(folder, abstract, on_host=[_TABLE])
  prompt = EmbeddedPrompt(prompt, params["backbone"]["decoder"]["token_embedding"])
  # The model has a place for the table; what is put there has no rows.
  empty = without_table(abstract)["backbone"]["decoder"]["token_embedding"]
  return with_table(params, _zeros(empty)), prompt


def files(spec: RewardSpec, config: Any, template: PromptTemplate, tokenizer: tokenizers.Tokenizer) -> dict[str, bytes]:
  """What `folder.save_reward` writes beside the weights: instruction text and tokenizer, reward tokens included.

  Raises ConfigError if text, tokenizer and sizes do not fit each other.
  """
  prompts.require_fit(template, spec.name, spec.required_text)
  RewardPrompt(tokenizer, template, config.backbone.decoder.vocab_size)
  return {
    prompts.TEMPLATE_FILE: prompts.template_json(template),
    prompts.TOKENIZER_FILE: tokenizer.to_str().encode(),
  }


def with_backbone_in(params: Params, dtype: Any = jnp.float16) -> Params:
  """Parameters with the backbone in another dtype; the head keeps its float32."""
  return params | {"backbone": jax.tree.map(lambda leaf: leaf.astype(dtype), params["backbone"])}


def _zeros(wanted: jax.ShapeDtypeStruct) -> jax.Array:
  zeros = np.zeros(wanted.shape, wanted.dtype)
  if wanted.sharding is None:
    return jax.device_put(zeros)
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: zeros[index])
