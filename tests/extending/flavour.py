"""A checkpoint flavour from outside the package: a training program that has other names for the backbone's tensors.

Its file is `torch.save({"student": {"net.layers.0.self_attn.q.weight": ..., ...}})`. The flavour is recognised by these
names, compared with the model tensor by tensor, and converted like the flavours that the package knows.
"""

import pathlib

from streamt1_jax.config import ModelConfig
from streamt1_jax.convert import execute, plan
from streamt1_jax.convert.base import Flavour
from streamt1_jax.convert.engine import Rule
from streamt1_jax.convert.flavours import FLAVOURS
from streamt1_jax.convert.tables import wan_dit


def student_flavour(model: ModelConfig) -> Flavour:
  """Wan's table under other names; `{layer}` in a name stands for 0, 1, ... up to the last layer of the model.

  A rule says which tensor becomes which parameter, and how its layout changes on the way.
  """
  rules = tuple(
    Rule("net." + rule.source.replace("blocks.", "layers."), rule.path, rule.transform)
    for rule in wan_dit.wan_rules(model.backbone)
  )
  return Flavour("backbone", "Student", rules, wan_dit.abstract_params(model), entries=("student",))


WITH_STUDENT = {**FLAVOURS, "backbone": (*FLAVOURS["backbone"], student_flavour)}


def convert(
  model: ModelConfig, sources: plan.Sources, tokenizer: pathlib.Path | None, folder: pathlib.Path
) -> list[str]:
  """Converts published files into the checkpoint folder `folder`; returns what it still lacks."""
  plans = plan.make_plans(model, sources, WITH_STUDENT)
  return execute.execute(model, plans, tokenizer, folder, dtype="float32")
