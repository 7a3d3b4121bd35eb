"""A search with random weights, latents as frames and rewards that cost nothing: denoising, memory, pruning alone."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float64

from streamt1_jax import drivers
from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.execution import Execution
from streamt1_jax.generator import Models
from streamt1_jax.models import abstract_backbone, make_models
from streamt1_jax.parallel.sharding import RULES, tree_shardings
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition
from streamt1_jax.typing import Params


class ConstantReward(Promptless):
  """Scores everything 0, at no cost; ties go to the first candidate."""

  def __call__(self, params, condition, frames, info):
    return jnp.float32(0.0)


class AlternatingReward(ConstantReward):
  """Scores that grow by `slope` a chunk: rising image scores and falling video scores flag each chunk as a sink."""

  def __init__(self, slope: float):
    self.slope = slope

  def __call__(self, params, condition, frames, info):
    return self.slope * info.chunk_index.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class RandomSearch:
  """What a search takes.

  Attributes:
    params: random weights.
    condition: a random prompt, or one for each part of a mesh that divides prompts.
    models: static half of the step.
    model: sizes.
  """

  params: Params
  condition: Condition
  models: Models
  model: ModelConfig

  @property
  def num_prompts(self) -> int:
    """Prompts that are searched together."""
    mesh = self.models.execution.mesh
    return 1 if mesh is None else mesh.shape[RULES["prompt"]]

  def run(self, search: SearchConfig, num_chunks: int) -> list[Float64[np.ndarray, " beams"]]:
    """One search; returns, chunk by chunk, how many chunks every beam of every prompt saw."""
    prompts = self.num_prompts
    seed = 0 if prompts == 1 else np.arange(prompts, dtype=np.int32)
    state = drivers.jitted_init_state(self.params, seed, self.models, search)
    counts = []
    for index in range(num_chunks):
      inputs = self.params, state, self.condition, self.models, search
      state, _ = drivers.jitted_chunk_step(*inputs, first=index == 0)
      # A copy, since the next step takes the state's buffers; waiting keeps one chunk in flight.
      counts.append(np.array(state.beams.memory.count, np.float64).ravel())
    jax.block_until_ready(state)
    return counts


def build(
  model: ModelConfig, execution: Execution, dtype: DTypeLike, num_chunks: int, append_always: bool
) -> RandomSearch:
  """A search of `num_chunks` chunks.

  Args:
    model: sizes; its codec is left out.
    execution: devices, attention and decoding.
    dtype: dtype of weights and activations.
    num_chunks: length of the video.
    append_always: whether rewards flag every chunk as a new sink, which makes the memory as large as it gets.
  """
  image, video = cast(
    Any, (AlternatingReward(1.0), AlternatingReward(-1.0)) if append_always else (ConstantReward(),) * 2
  )
  model = dataclasses.replace(model, codec=None)
  models = make_models(model, image, video, execution=execution)
  weights = nnx.to_pure_dict(nnx.state(CausalWanDiT(model, nnx.Rngs(0)), nnx.Param))
  backbone = jax.tree.map(lambda x: x.astype(dtype), weights)
  embeddings = jax.random.normal(jax.random.key(1), (model.backbone.text_len, model.backbone.text_dim), dtype)
  text = nnx.merge(abstract_backbone(model)[0], backbone).text_memory(embeddings)
  params = {"backbone": backbone, "codec": {}, "image_reward": {}, "video_reward": {}}
  condition, mesh = Condition(text, (), (), jnp.int32(num_chunks)), execution.mesh
  if mesh is None:
    return RandomSearch(params, condition, models, model)
  params = {name: jax.device_put(part, tree_shardings(mesh, name, part)) for name, part in params.items()}
  prompts = mesh.shape[RULES["prompt"]]
  if prompts == 1:
    condition = jax.device_put(condition, tree_shardings(mesh, "condition", condition))
  else:
    condition = drivers.stack_conditions([condition] * prompts, mesh)
  return RandomSearch(params, condition, models, model)
