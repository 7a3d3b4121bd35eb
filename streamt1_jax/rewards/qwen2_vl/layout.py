"""Axes of the arrays of a reward with a Qwen2-VL backbone; `parallel.sharding.RULES` says which are divided."""

from streamt1_jax.parallel.sharding import Layout

_KERNELS = (
  ("backbone/vision/blocks/qkv/kernel", ("layer", "channel", "head")),
  ("backbone/vision/blocks/out/kernel", ("layer", "head", "channel")),
  ("backbone/vision/blocks/ffn_in/kernel", ("layer", "channel", "hidden")),
  ("backbone/vision/blocks/ffn_out/kernel", ("layer", "hidden", "channel")),
  ("backbone/vision/merger/hidden/kernel", ("channel", "hidden")),
  ("backbone/vision/merger/out/kernel", ("hidden", "channel")),
  # Keys and values have few heads: they are small, and no mesh divides them all.
  ("backbone/decoder/blocks/query/kernel", ("layer", "channel", "head")),
  ("backbone/decoder/blocks/out/kernel", ("layer", "head", "channel")),
  ("backbone/decoder/blocks/(gate|up)/kernel", ("layer", "channel", "hidden")),
  ("backbone/decoder/blocks/down/kernel", ("layer", "hidden", "channel")),
)
LAYOUT: Layout = (
  *_KERNELS,
  # In int8 the scale belongs to the output channels.
  *((f"{kernel}/values", axes) for kernel, axes in _KERNELS),
  *((f"{kernel}/scale", (*axes[:-2], axes[-1])) for kernel, axes in _KERNELS),
  ("backbone/vision/blocks/qkv/bias", ("layer", "head")),
  ("backbone/vision/blocks/ffn_in/bias", ("layer", "hidden")),
  ("backbone/vision/merger/hidden/bias", ("hidden",)),
  ("backbone/decoder/token_embedding", ("word", "channel")),
  ("backbone/decoder/blocks/query/bias", ("layer", "head")),
)
