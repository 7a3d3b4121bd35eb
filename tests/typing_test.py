"""The checks of types: that the tests make them, and that nothing else does."""

import ast
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from streamt1_jax import noise_propagation, reward_pruning
from streamt1_jax.backbone import attention
from streamt1_jax.training.trainer import count_parameters

PACKAGE = pathlib.Path(noise_propagation.__file__).parent


class TestChecked:
  def test_a_wrong_number_of_axes(self):
    with pytest.raises(TypeCheckError, match="scores"):
      reward_pruning.prune(jnp.zeros((2, 2)), jnp.ones((2, 2), bool), 2)

  def test_a_wrong_dtype(self):
    with pytest.raises(TypeCheckError, match="usable"):
      reward_pruning.prune(jnp.zeros(4), jnp.ones(4), 2)

  def test_sizes_that_do_not_match(self):
    """Keys and values of 5 tokens, one of 6: each is well formed, together they are not."""
    query, key = jnp.zeros((3, 2, 4)), jnp.zeros((2, 5, 4))
    with pytest.raises(TypeCheckError, match="'v'"):
      attention.attend(query, key, jnp.zeros((2, 6, 4)))

  def test_inside_transformations(self):
    """A function is written for one candidate: under `vmap` it sees no more axes than that."""
    fuse = lambda noise: noise_propagation.fuse_noise(noise, noise, 0.5)
    assert jax.jit(jax.vmap(fuse))(jnp.ones((2, 3))).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="chunk_index"):
      jax.jit(lambda index: reward_pruning.fusion_weight(index, 4, 0.4))(jnp.zeros(2, jnp.int32))

  def test_the_leaves_of_parameters(self):
    assert count_parameters({"a": {"b": np.zeros((2, 3))}, "c": jnp.zeros(4)}) == 10
    with pytest.raises(TypeCheckError, match="params"):
      count_parameters({"a": {"b": "not an array"}})


def test_the_package_does_not_name_beartype():
  """`package_test` sees that a process of its own does without it."""
  imported = {
    name.partition(".")[0]
    for path in PACKAGE.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, (ast.Import, ast.ImportFrom))
    for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
  }
  assert "jaxtyping" in imported
  assert "beartype" not in imported
  required = importlib.metadata.requires("streamt1_jax") or []
  assert not any(line.startswith("beartype") and "extra" not in line for line in required)
