"""The same search on one device and on many, and what lies where."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from streamt1_jax import drivers
from streamt1_jax.backbone.dit import CausalWanDiT
from streamt1_jax.config import ConfigError, SearchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.measuring import hlo_collectives
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel import sharding
from streamt1_jax.rewards.hpsv3 import HPSv3Config
from streamt1_jax.rewards.hpsv3 import abstract_params as hpsv3_params
from streamt1_jax.rewards.qwen2_vl.layout import LAYOUT
from streamt1_jax.state import init_state
from tests import small_codec
from tests import small_search as small

P = PartitionSpec
NUM_CHUNKS = 6
SEEDS = (0, 5)


def _mesh(text, search=small.SEARCH):
  return device_mesh.make_mesh(device_mesh.parse_sizes(text), small.MODEL, search)


class TestSizes:
  def test_parse(self):
    assert device_mesh.parse_sizes("candidate:4,data:2") == {"data": 2, "candidate": 4, "model": 1, "seq": 1}

  @pytest.mark.parametrize("text", ["", "data", "data:0", "data:-1", "data:two", "beam:2", "data:2,data:2", "data:2,"])
  def test_anything_else_is_refused(self, text):
    with pytest.raises(ConfigError, match="axes data, candidate, model, seq"):
      device_mesh.parse_sizes(text)

  @pytest.mark.parametrize(
    ("devices", "prompts", "beam_size", "top_k", "expected"),
    [
      (1, 5, 2, 2, (1, 1, 1)),
      (8, 1, 2, 2, (1, 4, 2)),
      (8, 6, 2, 2, (2, 4, 1)),
      (64, 16, 2, 2, (16, 4, 1)),
      (64, 4, 2, 2, (4, 4, 4)),
      (4, 1, 1, 1, (1, 1, 4)),
      (8, 3, 1, 1, (1, 1, 4)),
      (8, 1, 8, 1, (1, 8, 1)),
    ],
  )
  def test_default(self, devices, prompts, beam_size, top_k, expected):
    """12 heads: at most 4 shards of 8 devices."""
    search = SearchConfig(beam_size=beam_size, top_k=top_k)
    sizes = device_mesh.default_sizes(devices, preset("wan_1_3b"), search, prompts)
    assert tuple(sizes[axis] for axis in device_mesh.AXES) == (*expected, 1)

  def test_candidates_that_are_drawn_in_rounds(self):
    """4 of 16 candidates are drawn at one time: 8 devices would have half a candidate each."""
    search = SearchConfig(beam_size=16, top_k=1, round_size=4)
    assert device_mesh.default_sizes(8, small.MODEL, search)["candidate"] == 4
    assert _mesh("candidate:4", search).shape["sibling"] == 4
    message = r"candidate:8 does not divide 1 beams of 4 candidates in a round; allowed: 1, 2, 4$"
    with pytest.raises(ConfigError, match=message):
      _mesh("candidate:8", search)

  def test_one_device_needs_no_mesh(self):
    assert _mesh("data:1,candidate:1") is None

  @pytest.mark.parametrize(
    ("text", "beam_size", "top_k", "beam", "sibling"),
    [
      ("candidate:4", 2, 2, 2, 2),
      ("candidate:2", 2, 2, 2, 1),
      ("candidate:4", 8, 1, 1, 4),
      ("candidate:8", 4, 4, 4, 2),
    ],
  )
  def test_beams_first(self, text, beam_size, top_k, beam, sibling):
    mesh = _mesh(text, SearchConfig(beam_size=beam_size, top_k=top_k))
    assert dict(mesh.shape) == {"data": 1, "beam": beam, "sibling": sibling, "model": 1, "seq": 1}

  @pytest.mark.parametrize(
    ("text", "message"),
    [
      ("data:3", "takes 3 devices, which does not divide the 8"),
      ("data:16", "takes 16 devices, which does not divide the 8"),
      ("model:4", r"model:4 does not divide the 2 heads and 32 feed-forward channels; allowed: 1, 2$"),
      ("seq:4", r"seq:4 must divide the 4 tokens of a latent frame, and with model:1 the 2 heads$"),
      ("model:2,seq:2", r"seq:2 must divide the 4 tokens of a latent frame, and with model:2 the 2 heads$"),
      ("candidate:8", r"candidate:8 does not divide 2 beams of 2 candidates; allowed: 1, 2, 4$"),
    ],
  )
  def test_what_cannot_be_divided(self, text, message):
    with pytest.raises(ConfigError, match=message):
      _mesh(text)


class TestTable:
  TOKENS = functools.cached_property(lambda self: _mesh("candidate:2,seq:2"))
  MESH = functools.cached_property(lambda self: _mesh("data:2,candidate:2,model:2"))

  def test_an_axis_of_the_mesh_is_used_once(self):
    with pytest.raises(ValueError, match="twice"):
      sharding.partition_spec(self.MESH, ("head", "token", "hidden"), (4, 3, 4))

  def test_unknown_axis(self):
    with pytest.raises(KeyError, match="heads"):
      sharding.partition_spec(self.MESH, ("heads",), (4,))

  def test_what_does_not_divide_stays_whole(self):
    spec = sharding.partition_spec(self.MESH, ("beam", "head", "channel"), (1, 6, 8))
    assert spec == P(None, "model", None)

  def test_what_lies_on_two_axes_of_the_mesh(self):
    """Heads are divided by both, and the specification names those of more than one device."""
    both = Mesh(np.array(jax.devices()[:4]).reshape(1, 1, 1, 2, 2), device_mesh.MESH_AXES)
    spec = lambda mesh, *axes: sharding.partition_spec(mesh, axes, (8,) * len(axes))
    assert spec(both, "beam", "head") == P("beam", ("model", "seq"))
    assert spec(both, "patch", "projected") == P("seq", "model")
    assert spec(self.TOKENS, "patch", "projected", "beam") == P("seq", "model", "beam")
    assert spec(self.TOKENS, "head") == P("seq")
    assert spec(self.MESH, "head") == P("model")
    assert sharding.partition_spec(both, ("head", "beam"), (6, 8)) == P("model", "beam")
    assert sharding.partition_spec(both, ("head", "beam"), (7, 8)) == P(None, "beam")
    with pytest.raises(ValueError, match="twice"):
      spec(both, "patch", "head")

  def test_rules_name_axes_of_the_mesh(self):
    named = [(rule,) if isinstance(rule, str) else rule for rule in sharding.RULES.values() if rule]
    assert set(itertools.chain(*named)) == set(device_mesh.MESH_AXES)

  def test_every_pattern_means_something(self):
    """A misspelt path would silently replicate what it should shard."""
    from flax import nnx

    model = preset("wan_1_3b")
    models, params = small.models(), small.params()
    search = dataclasses.replace(small.SEARCH, sink_ema_dtype="float32")
    half = {"backbone": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), params["backbone"])}
    state = jax.eval_shape(lambda p: init_state(params | p, models, search, 0), half)
    state = state._replace(beams=state.beams._replace(codec=(np.zeros((2, 2, 4, 4, 8)),)))
    trees = {
      "backbone": nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: CausalWanDiT(model, nnx.Rngs(0))), nnx.Param)),
      LAYOUT: {dtype: hpsv3_params(HPSv3Config(), dtype) for dtype in ("bfloat16", "int8")},
      "condition": small.condition(1),
      "state": state,
      "memory": state.beams.memory,
    }
    for name, tree in trees.items():
      axes_of = {}
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        axes_of[path] = sharding.axes_of(name, path.removeprefix("bfloat16/").removeprefix("int8/"))
        assert len(axes_of[path]) <= len(leaf.shape), path
      layout = sharding.LAYOUTS[name] if isinstance(name, str) else name
      missing = {axes for _, axes in layout} - set(axes_of.values())
      assert not missing, (name, missing)

  def test_a_layout_from_outside(self):
    """A reward with layers of its own names says how they are divided; the package's table knows none of them."""
    tree = {"mine": {"wide": np.zeros((8, 6)), "bias": np.zeros(6)}}
    layout = (("mine/wide", ("channel", "hidden")),)
    found = sharding.placed(self.MESH, layout, tree)["mine"]
    assert found["wide"].sharding.spec == P(None, "model")
    assert found["bias"].sharding.is_fully_replicated
    unknown = jax.tree.leaves(sharding.placed(self.MESH, "video_reward", tree))
    assert all(x.sharding.is_fully_replicated for x in unknown)

  def test_most_weights_are_sharded(self):
    """At full size little more than embeddings of time and text is on every shard."""
    from flax import nnx

    model = preset("wan_1_3b")
    tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: CausalWanDiT(model, nnx.Rngs(0))), nnx.Param))
    shardings = jax.tree.leaves(sharding.tree_shardings(self.MESH, "backbone", tree))
    whole = sum(x.size for x, s in zip(jax.tree.leaves(tree), shardings, strict=True) if s.is_fully_replicated)
    assert whole < 0.03 * sum(x.size for x in jax.tree.leaves(tree))


def _models(mesh, model=small.MODEL, **execution):
  return dataclasses.replace(small.models(model), execution=Execution(mesh=mesh, **execution))


def _params(mesh, model=small.MODEL):
  params = small.params(model)
  return {name: jax.device_put(part, sharding.tree_shardings(mesh, name, part)) for name, part in params.items()}


def _conditions(mesh, model=small.MODEL):
  """Both prompts, as the mesh takes them: one after the other, or together."""
  conditions = [small.condition(NUM_CHUNKS, prompt, model) for prompt in range(2)]
  if mesh is None or mesh.shape["data"] == 1:
    return conditions, list(SEEDS)
  return [drivers.stack_conditions(conditions, mesh)], [SEEDS]


def _search(mesh, **execution):
  """Traces of both prompts."""
  params = small.params() if mesh is None else _params(mesh)
  models, traces = _models(mesh, **execution), []
  for condition, seed in zip(*_conditions(mesh), strict=True):
    stream = drivers.stream(params, condition, models, small.SEARCH, num_chunks=NUM_CHUNKS, seed=seed)
    traces.append([jax.device_get(trace) for trace in stream])
  if len(traces) == 2:
    return traces
  return [[drivers.of_prompt(trace, prompt) for trace in traces[0]] for prompt in range(2)]


_on_one_device = functools.cache(lambda: _search(None))


def _assert_same_search(found, expected):
  for traces, others in zip(found, expected, strict=True):
    for trace, other in zip(traces, others, strict=True):
      for exact in ("survivor", "eviction"):
        np.testing.assert_array_equal(getattr(trace, exact), getattr(other, exact))
      np.testing.assert_array_equal(trace.candidates.seed, other.candidates.seed)
      np.testing.assert_array_equal(trace.candidates.flags, other.candidates.flags)
      for close in (lambda t: t.latents, lambda t: t.frames, lambda t: t.candidates.hybrid):
        np.testing.assert_allclose(close(trace), close(other), rtol=0, atol=1e-5)


# Every axis with others: two meshes here, and two with another way to decode. By itself an axis adds no program of
# another kind. So meshes of one axis run with the slow tests, and those two with the usual way to decode, too.
MESHES = ["data:2,candidate:2,model:2", "candidate:4,model:2"]
WITH_OTHER_DECODING = ["data:2,candidate:4", "data:2,candidate:2,seq:2"]
ONE_AXIS = ["data:2", "candidate:2", "candidate:4", "model:2", "seq:2"]
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("text", [*MESHES, *map(_slow, [*WITH_OTHER_DECODING, *ONE_AXIS])])
def test_same_winners_and_latents(text):
  _assert_same_search(_search(_mesh(text)), _on_one_device())


@pytest.mark.parametrize(
  ("text", "decoding"),
  [
    (None, "in_turn"),
    _slow(None, "twice"),
    ("data:2,candidate:4", "twice"),
    _slow("data:2,candidate:2,seq:2", "in_turn"),
    _slow("data:2,candidate:4", "in_turn"),
    _slow("data:2,candidate:2,seq:2", "twice"),
  ],
)
def test_decoding_changes_nothing(text, decoding):
  mesh = None if text is None else _mesh(text)
  _assert_same_search(_search(mesh, decoding=decoding), _on_one_device())


@pytest.mark.slow
def test_the_state_of_a_real_decoder_is_divided_by_rows():
  """Both devices hold half of the rows of every history [K, frames, rows, columns, channels], and beams move.

  Frames are those of one device, but for the last digit before they are cut to bytes.
  """
  (decoder, weights), reward, found = small_codec.decoder(), small_codec.Brightness(), []
  search = dataclasses.replace(small.SEARCH, first_candidate="fresh")
  for mesh in (None, _mesh("model:2")):
    models = dataclasses.replace(_models(mesh), codec=decoder, image_reward=reward, video_reward=reward)
    params = (small.params() if mesh is None else _params(mesh)) | {"codec": weights}
    states = drivers.stream_states(params, small.condition(3), models, search, num_chunks=3, seed=0)
    # Only their shapes are read: the next chunk takes the buffers of a state.
    found.append([(jax.tree.leaves(state.beams.codec), jax.device_get(trace)) for state, trace in states])
  assert any(list(trace.survivor // 2) != [0, 1] for _, trace in found[0][1:])
  for (_, expected), (histories, trace) in zip(*found, strict=True):
    assert histories
    for x in histories:
      beams, frames, rows, *rest = x.shape
      assert x.sharding.shard_shape(x.shape) == (beams, frames, rows // 2, *rest)
    np.testing.assert_array_equal(trace.survivor, expected.survivor)
    assert np.abs(trace.frames.astype(int) - expected.frames).max() <= 1


def test_prompts_are_apart():
  """The two searches differ, so that mixing them up would show."""
  first, second = _on_one_device()
  assert any(list(a.survivor) != list(b.survivor) for a, b in zip(first, second, strict=True))


def test_prompts_divide_by_the_mesh():
  condition = drivers.stack_conditions([small.condition(2)] * 3)
  stream = drivers.stream(
    small.params(), condition, _models(_mesh("data:2")), small.SEARCH, num_chunks=2, seed=[1, 2, 3]
  )
  with pytest.raises(ConfigError, match="3 prompts do not divide by data:2"):
    next(stream)


def test_several_prompts_on_one_device():
  conditions = [small.condition(NUM_CHUNKS, prompt) for prompt in range(2)]
  stream = drivers.stream(
    small.params(),
    drivers.stack_conditions(conditions),
    small.models(),
    small.SEARCH,
    num_chunks=NUM_CHUNKS,
    seed=SEEDS,
  )
  traces = [jax.device_get(trace) for trace in stream]
  found = [[drivers.of_prompt(trace, prompt) for trace in traces] for prompt in range(2)]
  _assert_same_search(found, _on_one_device())


# Memories and weights grow with the number of blocks, activations do not: a copy of either cannot hide among them.
_MANY_BLOCKS = dataclasses.replace(
  small.MODEL, name="many_blocks", backbone=dataclasses.replace(small.MODEL.backbone, num_layers=64)
)


_BY_MODEL, _BY_TOKENS = "data:2,candidate:2,model:2", "data:2,candidate:2,seq:2"


@functools.cache
def _step(text):
  """Mesh, weights, prompts, shardings of the first state, the next state, its trace, and the compiled step."""
  mesh = _mesh(text)
  (condition,), (seeds,) = _conditions(mesh, _MANY_BLOCKS)
  params, models = _params(mesh, _MANY_BLOCKS), _models(mesh, _MANY_BLOCKS)
  state = drivers.jitted_init_state(params, np.asarray(seeds, np.int32), models, small.SEARCH)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  lowered = drivers.jitted_chunk_step.lower(params, state, condition, models, small.SEARCH, first=False)
  compiled = lowered.compile()
  after, trace = compiled(params, state, condition)
  return mesh, params, condition, shardings, after, trace, compiled


class TestWhatLiesWhere:
  def test_specs(self):
    mesh, params, condition, before, after, trace, _ = _step(_BY_MODEL)
    block = params["backbone"]["blocks"]
    expected = [
      (block["self_attention"]["query"]["kernel"], P(None, None, "model")),
      (block["cross_attention"]["key_norm"]["scale"], P(None, "model")),
      (block["self_attention"]["out"]["kernel"], P(None, "model", None)),
      (block["ffn_in"]["kernel"], P(None, None, "model")),
      (block["ffn_out"]["kernel"], P(None, "model", None)),
      (block["ffn_out"]["bias"], P()),
      (condition.text.k, P("data", None, "model", None, None)),
      (after.beams.memory.k, P("data", "beam", None, None, "model", None, None)),
      (after.beams.memory.v, P("data", "beam", None, None, "model", None, None)),
      (after.beams.memory.frame, P("data", "beam", None)),
      (after.beams.noise, P("data", "beam", None, None, None, None)),
      (after.beams.past, P("data", "beam", None, None, None, None)),
      (after.base_seed, P("data")),
      (trace.latents, P("data")),
    ]
    for array, spec in expected:
      assert array.sharding.spec == spec or array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim)
    same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), after, before)
    assert all(jax.tree.leaves(same))

  def test_shards_are_parts(self):
    """Heads, beams and prompts: an eighth of the memory, half of the weights of blocks."""
    _, params, _, _, after, _, _ = _step(_BY_MODEL)
    for array, parts in ((after.beams.memory.k, 8), (params["backbone"]["blocks"]["ffn_in"]["kernel"], 2)):
      sizes = {shard.data.size for shard in array.addressable_shards}
      assert sizes == {array.size // parts}
      assert len({str(shard.index) for shard in array.addressable_shards}) == parts

  @pytest.mark.parametrize("text", [_BY_MODEL, _BY_TOKENS])
  def test_memory_moves_block_by_block(self, text):
    """Pruning may move a beam to another device: keys and values of one block after the other, then the rest."""
    mesh, _, _, _, after, _, compiled = _step(text)
    shard = after.beams.memory.k.addressable_shards[0].data
    one_block = small.SEARCH.top_k * shard.nbytes // _MANY_BLOCKS.backbone.num_layers
    found = hlo_collectives.find(compiled.as_text(), dict(mesh.shape))
    assert {one.axes for one in found if one.bytes == one_block} == {"beam"}
    # What is not keys or values is next to nothing at full size, and is sent together.
    rest = after.beams._replace(memory=after.beams.memory._replace(k=None, v=None))
    most = small.SEARCH.top_k * sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(rest))
    assert max(one.bytes for one in found) <= max(one_block, most)

  @pytest.mark.parametrize("text", [_BY_MODEL, _BY_TOKENS])
  def test_nothing_is_gathered(self, text):
    """No array of the compiled program is larger than the shards that it is given."""
    _, params, _, _, after, _, compiled = _step(text)
    memory = after.beams.memory.k.addressable_shards[0].data.nbytes
    kernels = [
      params["backbone"]["blocks"][name]["kernel"].addressable_shards[0].data for name in ("ffn_in", "ffn_out")
    ]
    # What stands behind "name =" and before the operation; all arrays are of 4 bytes an entry or fewer.
    results = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) [a-z][\w-]*\(", compiled.as_text(), re.MULTILINE)
    shapes = [shape for result in results for shape in re.findall(r"\b[fsu]32\[([\d,]*)\]", result)]
    sizes = [4 * math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
    assert memory in sizes
    assert max(sizes) == max(memory, *(kernel.nbytes for kernel in kernels))

  def test_candidates_denoise_alone(self):
    """Between candidates nothing is sent while they are denoised; between shards of the model three sums per block."""
    mesh, *_, compiled = _step(_BY_MODEL)
    found = hlo_collectives.find(compiled.as_text(), dict(mesh.shape), ("denoise", "prune"))
    denoising = [one for one in found if one.phase == "denoise"]
    assert {one.axes for one in denoising} == {"model"}
    candidates = small.SEARCH.beam_size  # Each device has one beam of one prompt.
    activation = candidates * small.MODEL.chunk_tokens * small.MODEL.backbone.dim * 4
    large = [one for one in denoising if one.bytes >= activation // 2]
    assert {(one.kind, one.bytes) for one in large} == {("all-reduce", activation)}
    assert sum(one.executions for one in large) == 3 * 2 * _MANY_BLOCKS.backbone.num_layers  # Two denoising steps.
    assert any("beam" in one.axes for one in found if one.phase == "prune")


class TestTokens:
  """A mesh that divides a chunk's tokens: weights whole, memory by heads."""

  def test_specs(self):
    _, params, condition, before, after, _, _ = _step(_BY_TOKENS)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(params["backbone"]))
    assert condition.text.k.sharding.is_equivalent_to(NamedSharding(_mesh(_BY_TOKENS), P("data")), 5)
    assert after.beams.memory.k.sharding.spec == P("data", "beam", None, None, "seq")
    same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), after, before)
    assert all(jax.tree.leaves(same))

  def test_four_exchanges_of_a_part_per_block(self):
    """Queries, keys, values and the result, each by its part of the tokens, and nothing else but the latents."""
    mesh, *_, compiled = _step(_BY_TOKENS)
    found = hlo_collectives.find(compiled.as_text(), dict(mesh.shape), ("denoise", "commit"))
    activation = small.SEARCH.beam_size * small.MODEL.chunk_tokens * small.MODEL.backbone.dim * 4
    blocks = _MANY_BLOCKS.backbone.num_layers
    denoising = [one for one in found if one.phase == "denoise"]
    assert {one.axes for one in denoising} == {"seq"}
    in_blocks = [(one.kind, one.bytes, one.executions) for one in denoising if one.executions >= blocks]
    assert in_blocks == [("all-to-all", activation // 2, 4 * 2 * blocks)]  # Two denoising steps.
    latents = small.SEARCH.beam_size * 4 * np.prod(small.MODEL.latent_shape) * 2  # The trace holds both steps.
    assert all(one.bytes <= latents for one in denoising if one.executions < blocks)
    assert {(one.kind, one.axes) for one in found if one.phase == "commit"} == {("all-to-all", "seq")}
