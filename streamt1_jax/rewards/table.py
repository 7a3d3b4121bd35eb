"""The rewards of this package: a new one is a file and a line here."""

from streamt1_jax.rewards import coherence, hpsv3, quality, videoalign
from streamt1_jax.rewards.spec import RewardTable

REWARDS: RewardTable = {spec.name: spec for spec in (quality.SPEC, hpsv3.SPEC, coherence.SPEC, videoalign.SPEC)}

PUBLISHED_REWARDS = tuple(name for name, spec in REWARDS.items() if spec.text is not None)
"""Those of published models, whose weights and instruction texts can be converted."""

LEARNED_REWARDS = ("videoalign", "hpsv3")
"""What judges by default where a checkpoint has both. One alone would be mixed with a score of another scale."""

DEFAULT_REWARDS = ("quality", "coherence")
"""What judges by default elsewhere: they need neither weights nor prompts."""
