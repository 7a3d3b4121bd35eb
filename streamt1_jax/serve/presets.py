"""The searches that a client may choose: a new one is a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from streamt1_jax.config import ModelConfig, SearchConfig
from streamt1_jax.methods import METHODS

PRESETS: Mapping[str, Callable[[ModelConfig], SearchConfig]] = {
  "1x4": lambda model: METHODS["stream_t1"].settings(model, beam_size=4, top_k=1),
  "2x2": lambda model: METHODS["stream_t1"].settings(model, beam_size=2, top_k=2, settle_within=1),
  "particles": lambda model: METHODS["particles_sum"].settings(model, numbers={"alpha": 0.11}, settle_within=2),
  "plain": lambda model: METHODS["none"].settings(model),
}
"""By name: beams x candidates of each; four particles; and plain streaming, without a search.

Two beams share a chunk after the next one, and particles after two more at the latest, so that it is shown and a new
prompt is soon seen.

alpha is in units of the small model's rewards: what `policies.alpha_of` makes of the mean hybrid scores of eight plain
videos of each of twelve captions of two objects, of the split "tune".
"""

FLAGS: Mapping[str, tuple[str, ...]] = {
  "1x4": ("--search=stream_t1", "--beam_size=4", "--top_k=1"),
  "2x2": ("--search=stream_t1", "--beam_size=2", "--top_k=2", "--settle_within=1"),
  "particles": ("--search=particles_sum", "--policy=alpha:0.11", "--settle_within=2"),
  "plain": ("--search=none",),
}
"""What tells `streamt1 generate` to search in the same way."""
