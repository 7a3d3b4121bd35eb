"""Text side of the model: tokenizer, UMT5 encoder, and the prompt's embeddings."""

from streamt1_jax.text.encode import PromptEncoder as PromptEncoder
