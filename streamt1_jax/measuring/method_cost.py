"""What a chunk of every named search costs at full size, with the published rewards; from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator

from streamt1_jax import cost
from streamt1_jax.config import ModelConfig
from streamt1_jax.measuring import search_flop
from streamt1_jax.methods import METHODS

COLUMNS = (
  "search",
  "beams x candidates",
  "forwards",
  "latent frames decoded",
  "frames of the image reward",
  "windows of the video reward",
  "TFLOP",
  "times plain",
  "times plain, all sinks",
)


def rows(model: ModelConfig, num_chunks: int, short_frames: int | None = None) -> Iterator[list[str]]:
  """A row for every method at its own size: the mean of the chunks of one video.

  Args:
    model: sizes.
    num_chunks: of the video. What judging whole videos at the end takes is shared out over its chunks.
    short_frames: frames of a chunk that the image reward sees; all by default.
  """
  models = search_flop.published(model)
  prices = search_flop.published_prices(model)
  plain = search_flop.plain_flop(prices, num_chunks).tflop / num_chunks
  mean = lambda count: f"{count / num_chunks:.1f}".removesuffix(".0")
  # What a method with a driver of its own costs depends on the video.
  for name, method in ((name, method) for name, method in METHODS.items() if method.run is None):
    # What a policy cannot do without decides nothing about the cost.
    search = method.settings(model, numbers={each: 1.0 for each, value in method.numbers.items() if value is None})
    chunks = [
      cost.chunk_cost(models, search, index, num_chunks, short_frames=short_frames) for index in range(num_chunks)
    ]
    begun = [cost.streams_begun(models, search, index, num_chunks) for index in range(num_chunks)]
    last = cost.whole_video_cost(models, search, num_chunks)
    counted = cost.total([*chunks, last])
    tflop = []
    for most in (search_flop.most_seen(model) + 1, search.max_sink_frames // model.chunk_frames + model.window_chunks):
      seen = (min(index + 1, most) for index in range(num_chunks))
      parts = [prices.of(*chunk) for chunk in zip(chunks, begun, seen, strict=True)]
      tflop.append(search_flop.add([*parts, prices.of(last)]).tflop / num_chunks)
    yield [
      f"`{name}`",
      f"{search.top_k} x {search.beam_size}",
      mean(counted.forwards),
      mean(counted.decoded),
      mean(counted.image_frames),
      mean(counted.video_calls),
      f"{tflop[0]:.0f}",
      *(f"{each / plain:.2f}" for each in tflop),
    ]
