"""The searches that a client may choose: a new one is a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.methods import METHODS


class Preset(NamedTuple):
  """A search with a name and settings.

  Attributes:
    method: its name in `METHODS`.
    fields: of `SearchConfig`.
    numbers: of its policy.
  """

  method: str
  fields: Mapping[str, Any] = {}
  numbers: Mapping[str, float] = {}

  def search(self, model: ModelConfig) -> SearchConfig:
    """The search over `model`. Raises ConfigError if it cannot run."""
    return METHODS[self.method].settings(model, numbers=self.numbers, **self.fields)

  @property
  def flags(self) -> list[str]:
    """What tells `streamt1 generate` to search in the same way."""
    numbers = ",".join(f"{name}:{value}" for name, value in self.numbers.items())
    fields = (f"--{name}={value}" for name, value in self.fields.items())
    return [f"--search={self.method}", *fields, *([f"--policy={numbers}"] if numbers else [])]


PRESETS: Mapping[str, Preset] = {
  "1x4": Preset("stream_t1", {"beam_size": 4, "top_k": 1}),
  "2x2": Preset("stream_t1", {"beam_size": 2, "top_k": 2, "settle_within": 1}),
  "particles": Preset("particles_sum", {"settle_within": 2}, {"alpha": 0.11}),
  "plain": Preset("none"),
}
"""By name: beams x candidates of each; four particles; and plain streaming, without a search.

Two beams share a chunk after the next one, and particles after two more at the latest, so that it is shown and a new
prompt is soon seen.

alpha is in units of the small model's rewards: what `policies.alpha_of` makes of the mean hybrid scores of eight plain
videos of each of twelve captions of two objects, of the split "tune".
"""
