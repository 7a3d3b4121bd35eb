"""Which programs a search compiles: known by their names before any of them is compiled."""

from __future__ import annotations

from typing import NamedTuple

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.drivers import scores_whole_videos


class Program(NamedTuple):
  """One program that XLA compiles.

  Attributes:
    name: what JAX calls it in its messages.
    purpose: what it is for.
  """

  name: str
  purpose: str


def of_search(model: ModelConfig, search: SearchConfig, num_chunks: int) -> list[Program]:
  """The large programs of a video, in the order in which they run; the text encoder and single operations are not here.

  The chunk step is compiled twice: the first chunk has fewer frames, and its rewards see a window without a past.
  """
  stride = 1 if model.codec is None else model.codec.temporal_stride
  first, later = 1 + stride * (model.chunk_frames - 1), stride * model.chunk_frames
  size = f"{search.top_k} x {search.beam_size} candidates"
  programs = [
    Program("_text_memory", "keys and values of a prompt, for the backbone"),
    Program("_init_state", "the state before the first chunk"),
    Program("_chunk_step", f"the first chunk: {size}, {first} frames"),
  ]
  if num_chunks > search.judge_every:
    programs.append(Program("_chunk_step", f"every later chunk that is judged: {size}, {later} frames"))
  if search.judge_every > 1 and num_chunks > 1:
    programs.append(Program("_chunk_step", f"chunks that are not judged: {search.top_k} candidates, {later} frames"))
  if scores_whole_videos(search, num_chunks):
    programs.append(Program("_whole_video_scores", f"the video reward of {search.top_k} whole videos"))
  return programs
