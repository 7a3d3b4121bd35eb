"""What happens between two denoising steps: from a prediction of the noiseless chunk to the next step's input.

Another sampler is a function with this signature and a line in `SAMPLERS`; `ScheduleConfig.sampler` names it.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from streamt1_jax.typing import FloatLike, FloatScalar, Latents


@runtime_checkable
class Sampler(Protocol):
  """From one denoising step to the next. Pure and hashable: it is static under `jit`."""

  def __call__(self, x: Latents, x0: Latents, noise: Latents, sigma: FloatScalar, next_sigma: FloatScalar) -> Latents:
    """The next step's input.

    Args:
      x: input of this step, at noise level `sigma`.
      x0: what this step predicted.
      noise: fresh standard normal noise; zeros after the last step.
      sigma: noise level of this step.
      next_sigma: noise level of the next step; 0 after the last step, whose result nobody reads.

    Returns:
      A chunk at noise level `next_sigma`.
    """
    ...


def renoise(x: Latents, x0: Latents, noise: Latents, sigma: FloatLike, next_sigma: FloatLike) -> Latents:
  """x' = (1 - sigma') x0 + sigma' noise: the few-step sampler of the released model, which forgets `x`."""
  del x, sigma
  return (1.0 - next_sigma) * x0 + next_sigma * noise


SAMPLERS: Mapping[str, Sampler] = {"renoise": renoise}
"""Name to sampler."""
