"""What a search costs, counted: forwards, decoded latent frames, and what the rewards are shown.

A chunk's cost follows from the models, the search and the chunk's index. With K beams of B candidates, N = K * B, S
denoising steps and F latent frames in a chunk:

  denoise   N * S                            every candidate
  commit    K                                the clean pass of the survivors
  decoded   N * F streamed, and K * F more if winners are decoded again ("twice"); K * F if nothing is judged;
            N * (F + window) + K * F from scratch
  judged    N calls of either reward         K calls of the video reward on the whole videos at the end

A chunk that is not judged costs what it costs in plain streaming, for every beam. Where candidates are rejected after
step e, w of each beam begin: K * (w * (e + 1) + B * (S - e - 1)) forwards, and K * w previews for the image reward.
A search that looks ahead by L chunks makes L * N * (S + 1) more forwards, and decodes and judges L * N more chunks.
A search with rounds draws K * R candidates in each, and its winners are decoded again. How many rounds a chunk had, its
trace says: it is the only thing that is decided on the device.

A search that goes on after a stop is counted as one that was never stopped: chunks that were lost and made again count
once. What is not counted: the text encoder, what a video begins with, and memories that a new prompt makes anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from streamt1_jax.config import SearchConfig
from streamt1_jax.drivers import PART_CHUNKS, scores_whole_videos
from streamt1_jax.generator import Models
from streamt1_jax.policies import inside_event
from streamt1_jax.state import past_capacity


class Cost(NamedTuple):
  """Whole numbers, which add up over chunks and videos.

  Attributes:
    denoise: forwards of denoising steps, one candidate each.
    look_ahead: forwards whose result is judged and thrown away.
    commit: forwards of clean passes, one beam each.
    decoded: latent frames decoded for good, or to be judged with the whole chunk.
    previewed: latent frames decoded for a look at what is not finished.
    image_calls: calls of the image reward, one candidate each.
    image_frames: frames that it saw.
    video_calls: calls of the video reward, one window or whole video each.
    video_frames: frames that it was given. A reward may look at fewer of them.
  """

  denoise: int = 0
  look_ahead: int = 0
  commit: int = 0
  decoded: int = 0
  previewed: int = 0
  image_calls: int = 0
  image_frames: int = 0
  video_calls: int = 0
  video_frames: int = 0

  @property
  def forwards(self) -> int:
    """Forwards of the generator."""
    return self.denoise + self.look_ahead + self.commit


def total(costs: Iterable[Cost]) -> Cost:
  """The sum; of nothing, no cost."""
  return Cost(*map(sum, zip(*(Cost(), *costs), strict=True)))


def chunk_cost(
  models: Models,
  search: SearchConfig,
  chunk_index: int,
  num_chunks: int | None,
  *,
  short_frames: int | None = None,
  rounds: int | None = None,
  length: int | None = None,
) -> Cost:
  """What one chunk of one video costs.

  Args:
    models: static half of the chunk step.
    search: static.
    chunk_index: counted from 0, with the chunks that the video begins with.
    num_chunks: chunks of the whole video, or those that the state was made for; None for a video without an end.
    short_frames: frames of a chunk that the image reward sees; all by default.
    rounds: how many a search with rounds drew; by default those that every chunk is given.
    length: what the search takes for the video's length, as `Condition.num_chunks`; by default `num_chunks`.
  """
  search = in_chunk(search, chunk_index)
  beams, candidates = search.top_k, drawn(search, rounds)
  frames, steps = models.generator.latent_shape[0], len(models.generator.sigmas)
  made = Cost(denoise=candidates * steps, commit=beams)
  event = inside_event(search)
  if event is not None:
    early = beams * event.start
    looked = models.codec.num_frames(event.latent_frames, first=chunk_index == 0)
    made = Cost(
      denoise=early * (event.step + 1) + candidates * (steps - event.step - 1),
      commit=beams,
      previewed=early * event.latent_frames,
      image_calls=early,
      image_frames=early * min(looked, event.frames, short_frames or looked),
    )
  if not search.judges:
    return made._replace(decoded=beams * frames)
  shown, seen, decoded = _judged(models, search, chunk_index, num_chunks)
  again = search.reward_decode == "scratch" or models.execution.decoding == "twice" or search.round_size > 0
  judged = Cost(
    decoded=candidates * decoded + (beams * frames if again else 0),
    image_calls=candidates,
    image_frames=candidates * min(shown, short_frames or shown),
    video_calls=candidates,
    video_frames=candidates * seen,
  )
  followed = (
    _followed(models, search, chunk_index + 1 + ahead, num_chunks, short_frames)
    for ahead in range(chunks_ahead(models, search, chunk_index, length or num_chunks))
  )
  return total([made, judged, *followed])


def rounds_of(search: SearchConfig, rounds: int | None = None) -> int:
  """Rounds that a chunk draws: `rounds` if that is known, or those that it is given; 1 for a search without."""
  return rounds or search.round_budget or search.most_rounds


def drawn(search: SearchConfig, rounds: int | None = None) -> int:
  """Candidates that a judged chunk finishes: all, or those of its rounds."""
  return search.top_k * (search.round_size or search.beam_size) * rounds_of(search, rounds)


def chunk_depth(
  models: Models, search: SearchConfig, chunk_index: int, num_chunks: int | None, rounds: int | None = None
) -> int:
  """Forwards of a chunk that follow one another, if all candidates of a round run at once."""
  one, ahead = len(models.generator.sigmas), chunks_ahead(models, search, chunk_index, num_chunks)
  return one * rounds_of(in_chunk(search, chunk_index), rounds) + 1 + ahead * (one + 1)


def chunks_ahead(models: Models, search: SearchConfig, chunk_index: int, length: int | None) -> int:
  """Chunks by which a search carries on the candidates of one chunk, to judge what follows; none behind the last.

  The length is what the search takes for it. A video that is longer has no end that the search knows.
  """
  ahead, longest = in_chunk(search, chunk_index).look_ahead, models.generator.max_chunks(search)
  end = longest if length is None or chunk_index >= length else min(length, longest)
  return min(ahead, end - 1 - chunk_index)


def _followed(
  models: Models, search: SearchConfig, chunk_index: int, num_chunks: int | None, short_frames: int | None
) -> Cost:
  """What it costs to carry every candidate on by one chunk: the clean pass before it, and the chunk."""
  one_each = dataclasses.replace(search, beam_size=1, policy=None, look_ahead=0, judge_every=1)
  siblings = chunk_cost(models, one_each, chunk_index, num_chunks, short_frames=short_frames)
  made = Cost(*(count * search.beam_size for count in siblings))
  return made._replace(denoise=0, look_ahead=made.denoise + made.commit, commit=0)


def in_chunk(search: SearchConfig, chunk_index: int) -> SearchConfig:
  """The search's settings in this chunk: `search`, or `search.unjudged()` in a chunk that `judge_every` skips."""
  return search if chunk_index % search.judge_every == 0 else search.unjudged()


def whole_video_cost(
  models: Models, search: SearchConfig, num_chunks: int, *, begins: Sequence[int] = (0,), given_chunks: int = 0
) -> Cost:
  """What `drivers.final_beams` costs: the finished videos are judged as whole ones, part by part where they are long.

  Nothing where the last window was the whole video. A video of several prompts, or one that begins with something, is
  always judged.

  Args:
    models: static half of the chunk step.
    search: static.
    num_chunks: chunks of the whole video.
    begins: first chunk of every prompt.
    given_chunks: chunks that the video begins with.
  """
  if len(begins) == 1 and not given_chunks and not scores_whole_videos(search, num_chunks):
    return Cost()
  frames = models.codec.num_frames(num_chunks * models.generator.latent_shape[0], first=True)
  lengths = (after - begin for begin, after in zip(begins, [*begins[1:], num_chunks], strict=True))
  parts = sum(-(-length // PART_CHUNKS) for length in lengths)
  return Cost(video_calls=search.top_k * parts, video_frames=search.top_k * frames)


def streams_begun(
  models: Models,
  search: SearchConfig,
  chunk_index: int,
  length: int | None = None,
  rounds: int | None = None,
) -> int:
  """How many of a chunk's decodes begin a stream: a stream's first latent frame is cheaper than a later one."""
  ahead = chunks_ahead(models, search, chunk_index, length)
  search, first = in_chunk(search, chunk_index), chunk_index == 0
  event = inside_event(search)
  winners = search.top_k if first else 0
  previews = search.top_k * event.start if first and event is not None else 0
  if not search.judges:
    return winners + previews
  # Those that are carried on are decoded for good before, where only winners are.
  candidates = drawn(search, rounds)
  carried = candidates if first and ahead else 0
  if search.reward_decode == "scratch":
    return 2 * candidates * (1 + ahead) + winners + carried + previews
  if not first:
    return 0
  twice = models.execution.decoding == "twice" or search.round_size > 0
  return candidates + previews + (winners + carried if twice else 0)


def _judged(models: Models, search: SearchConfig, chunk_index: int, num_chunks: int | None) -> tuple[int, int, int]:
  """For one candidate: frames of its chunk, frames of its window, and latent frames that are decoded for both."""
  frames, count = models.generator.latent_shape[0], models.codec.num_frames
  if search.reward_decode == "scratch":
    # The whole array of the window is decoded, also where it is not full yet.
    window = min(search.sliding_window, num_chunks or search.sliding_window)
    seen = count(min(chunk_index + 1, window) * frames, first=True)
    return count(frames, first=True), seen, frames + window * frames
  shown = count(frames, first=chunk_index == 0)
  past = count(chunk_index * frames, first=True) if chunk_index else 0
  return shown, min(past, past_capacity(models, search, num_chunks)) + shown, frames
