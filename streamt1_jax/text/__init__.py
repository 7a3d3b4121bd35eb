"""Prompts: files of them, their tokens, and their embeddings by a UMT5 encoder."""

from streamt1_jax.text.encode import PromptEncoder as PromptEncoder
