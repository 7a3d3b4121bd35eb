"""Replays recorded searches of the released implementation: `pytest tests/golden_test.py --golden_dir=DIR` for
another folder.

Tolerances are the recording's own (tests/golden/README.md): latents, x0, keys and values 5e-5, scores 1e-4, fused
noise 1e-6, everything discrete exact.
"""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from streamt1_jax import drivers, memory_sinking
from streamt1_jax.backbone import attention
from streamt1_jax.backbone.schedule import denoising_schedule, sigma_of, sigma_table, time_features
from streamt1_jax.convert import adapters
from streamt1_jax.convert.tables import wan_dit
from streamt1_jax.execution import Execution
from streamt1_jax.nn import rotary
from streamt1_jax.parallel import mesh as device_mesh
from streamt1_jax.parallel import sharding
from tests import golden_support as golden

_HERE = pathlib.Path(__file__).parent / "golden"
_LATENTS, _SCORES, _NOISE = 5e-5, 1e-4, 1e-6


def pytest_generate_tests(metafunc):
  folder = pathlib.Path(metafunc.config.getoption("--golden_dir") or _HERE)
  for fixture, pattern in (("case_file", "case_*.npz"), ("units_file", "units.npz"), ("lora_file", "lora.npz")):
    if fixture in metafunc.fixturenames:
      files = sorted(folder.glob(pattern))
      metafunc.parametrize(fixture, files, ids=[file.stem for file in files])


def _close(actual, expected, atol):
  np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), rtol=0, atol=atol)


def _equal(actual, expected):
  np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def _unpadded(row):
  return row[row >= 0]


def _per_candidate(x):
  """[K, B, ...] -> [N, ...]."""
  return np.asarray(x).reshape(-1, *np.shape(x)[2:])


def _ordered_slots(memory, beam):
  """Valid slots of a beam in the recording's order: sinks, then window, each by frame."""
  count = int(memory.count[beam])
  frame, is_sink = np.asarray(memory.frame[beam][:count]), np.asarray(memory.is_sink[beam][:count])
  return sorted(range(count), key=lambda slot: (not is_sink[slot], frame[slot]))


def _check_beam(case, block, beam, memory, survivor):
  """Frames, sinks, capacities, keys and values of one survivor's memory after a block."""
  z, model = case.arrays, case.model
  frame, is_sink = np.asarray(memory.frame[beam]), np.asarray(memory.is_sink[beam])
  order = _ordered_slots(memory, beam)
  chunk, tokens = model.chunk_frames, model.chunk_tokens
  _equal([frame[slot] + i for slot in order for i in range(chunk)], _unpadded(z["key_frames"][block, survivor]))
  sinks = [slot for slot in order if is_sink[slot]]
  assert len(sinks) * chunk == z["surv_sink_size"][block, beam]
  appended = [frame[slot] for slot in sinks if frame[slot] >= model.sink_frames]
  _equal(appended, _unpadded(z["surv_append_start"][block, beam]))
  capacity = model.local_attention_frames + len(appended) * chunk
  assert capacity * model.frame_tokens == z["surv_cache_capacity"][block, beam]
  assert len(order) * tokens == z["surv_local_end"][block, beam]
  assert (block + 1) * tokens == z["surv_global_end"][block, beam]

  recorded = z["kv_pool"][_unpadded(z["surv_cache_layout"][block, beam])]
  for slot, (keys, values) in zip(order, recorded.transpose(0, 2, 1, 3, 4, 5), strict=True):
    _close(golden.raw_keys(np.asarray(memory.k[beam, :, slot]), int(frame[slot]), model), keys, _LATENTS)
    _close(np.asarray(memory.v[beam, :, slot]).transpose(0, 2, 1, 3), values, _LATENTS)


def _check_candidates(case, block, trace):
  z, candidates = case.arrays, trace.candidates
  _equal(_per_candidate(candidates.seed), z["cand_seed"][block])
  _close(_per_candidate(trace.steps["noise"]), z["fused_noise"][block], _NOISE)
  _close(_per_candidate(trace.steps["x0"]), z["x0"][block], _LATENTS)
  for name in ("short", "long", "hybrid"):
    _close(_per_candidate(getattr(candidates, name)), z[name][block], _SCORES)
  # The recording writes -1 for "none" in the first block.
  _equal(_per_candidate(candidates.flags.ema), np.maximum(z["flag_ema"][block], 0))
  _equal(_per_candidate(candidates.flags.append), np.maximum(z["flag_append"][block], 0))
  _equal(trace.survivor, z["surv_cand"][block])
  _close(trace.score, z["surv_score"][block], _SCORES)


def _check_eviction(case, block, trace, memory_before):
  """Routes of every parent, seen from each of its candidates."""
  z, size, chunk = case.arrays, case.search.beam_size, case.model.chunk_frames
  _equal(np.repeat(trace.eviction.route, size), z["route"][block])
  _equal(np.repeat(trace.eviction.frame, size), z["route_evicted_frame"][block])
  for n, (start, end) in enumerate(z["route_sink_tokens"][block]):
    beam, sink_frame = n // size, int(trace.eviction.sink_frame[n // size])
    if start < 0:
      assert sink_frame == -1
      continue
    sinks = [
      memory_before.frame[beam][s] for s in _ordered_slots(memory_before, beam) if memory_before.is_sink[beam][s]
    ]
    first = sinks.index(sink_frame) * case.model.chunk_tokens
    assert (first, first + case.model.chunk_tokens) == (start, end)
  assert (z["query_start_frame"][block] == block * chunk).all()


def _check_visible_frames(case, block, state):
  """Key frames of every candidate, survivors or not: its parent's memory after the eviction, and its own chunk."""
  evict = functools.partial(
    memory_sinking.evict, tables=case.models.generator.rotary, model=case.model, search=case.search
  )
  memory, _ = jax.vmap(evict)(state.beams.memory)
  chunk = case.model.chunk_frames
  for n, recorded in enumerate(case.arrays["key_frames"][block]):
    beam = n // case.search.beam_size
    frames = [int(memory.frame[beam][slot]) for slot in _ordered_slots(memory, beam)] + [block * chunk]
    _equal([frame + i for frame in frames for i in range(chunk)], _unpadded(recorded))


def _host(memory):
  """A copy that survives the donation of the state."""
  return jax.tree.map(lambda x: np.array(x), memory)


def _on_a_mesh(case, sizes=None):
  """The case on a mesh, by default of as many of the eight devices as its candidates and heads can use."""
  sizes = sizes or device_mesh.default_sizes(jax.device_count(), case.model, case.search)
  mesh = device_mesh.make_mesh(sizes, case.model, case.search)
  assert mesh.size >= 4
  place = lambda name, tree: jax.device_put(tree, sharding.tree_shardings(mesh, name, tree))
  return dataclasses.replace(
    case,
    models=dataclasses.replace(case.models, execution=Execution(mesh=mesh)),
    params={name: place(name, part) for name, part in case.params.items()},
    condition=place("condition", case.condition),
  )


@pytest.mark.parametrize("devices", ["one_device", "mesh"])
def test_case(case_file, devices):
  case = golden.load_case(case_file)
  _check_case(_on_a_mesh(case) if devices == "mesh" else case)


def test_heads_and_tokens_on_a_mesh():
  """Of this repository's recordings: a model of another folder may not divide so."""
  case = golden.load_case(_HERE / "case_A.npz")
  _check_case(_on_a_mesh(case, device_mesh.parse_sizes("candidate:2,model:2,seq:2")))


def _check_case(case):
  z, search = case.arrays, case.search
  _close(case.models.generator.schedule.timesteps, z["denoising_timesteps"], 1e-4)
  state = drivers.jitted_init_state(case.params, case.seed, case.models, search)
  traces = []
  for block in range(case.num_chunks):
    before = _host(state.beams.memory)
    _check_visible_frames(case, block, state)
    state, trace = drivers.jitted_chunk_step(
      case.params, state, case.condition, case.models, search, first=block == 0, record=True
    )
    _check_candidates(case, block, trace)
    _check_eviction(case, block, trace, before)
    after = _host(state.beams.memory)
    for beam, survivor in enumerate(z["surv_cand"][block]):
      _check_beam(case, block, beam, after, survivor)
    traces.append(jax.device_get(trace))
  _check_lineages(case, traces)
  _check_final(case, traces)


def _check_lineages(case, traces):
  for block in range(case.num_chunks):
    path = drivers.lineage([t.survivor for t in traces[: block + 1]], case.search.beam_size)
    for beam in range(case.search.top_k):
      seeds = [_per_candidate(t.candidates.seed)[t.survivor[k]] for t, k in zip(traces, path[:, beam], strict=False)]
      _equal(seeds, case.arrays["surv_history_seeds"][block, beam][: block + 1])


def _check_final(case, traces):
  z = case.arrays
  models = dataclasses.replace(case.models, video_reward=case.video_reward)
  final = drivers.final_beams(case.params, case.condition, models, case.search, traces)
  _close(final.latents, z["final_output"], _LATENTS)
  _close(final.scores, z["final_score"], _SCORES)
  assert final.best == int(z["final_best"])


def test_long_window(case_file):
  """The recorded frame ranges of the video reward are those of our sliding window."""
  case = golden.load_case(case_file)
  chunk, window = case.model.chunk_frames, case.search.sliding_window
  for block, ranges in enumerate(case.arrays["long_window"]):
    expected = (max(0, block * chunk - chunk * (window - 1)), (block + 1) * chunk)
    for recorded in ranges:
      assert tuple(recorded) == expected


def _replay(case, search, num_chunks):
  stream = drivers.stream(
    case.params, case.condition, case.models, search, num_chunks=num_chunks, seed=case.seed, record=True
  )
  return [jax.device_get(trace) for trace in stream]


def test_scratch_decoding(case_file):
  """Rewards that decode their window from scratch see the same latents: the codec of the recordings is the identity."""
  case = golden.load_case(case_file)
  search = dataclasses.replace(case.search, reward_decode="scratch")
  for block, trace in enumerate(_replay(case, search, case.num_chunks)):
    _check_candidates(case, block, trace)


def test_missing_sink_update_is_noticed(case_file):
  """The negative control: without the EMA of the last sink, what follows it leaves the tolerance."""
  case = golden.load_case(case_file)
  merged = np.isin(case.arrays["route"], (memory_sinking.EMA, memory_sinking.APPEND_AT_MAXIMUM)).all(axis=1)
  if not merged.any():
    pytest.skip("this recording has no EMA of all beams at once")
  search = dataclasses.replace(case.search, sink_ema_decay=1.0)
  last = min(int(np.argmax(merged)) + 1, case.num_chunks - 1)
  trace = _replay(case, search, case.num_chunks)[last]
  assert np.abs(_per_candidate(trace.steps["x0"]) - case.arrays["x0"][last]).max() > 2 * _LATENTS


class _Units:
  """One model and a growing memory, as the recorded single forwards use it."""

  def __init__(self, folder, arrays):
    self.config = golden.model_config(golden.read_config(arrays))
    self.graphdef, self.params = golden.load_backbone(folder, self.config)
    self.text = nnx.merge(self.graphdef, self.params).text_memory(jnp.asarray(arrays["prompt_embeds"][0]))

  def forward(self, x, t, first_frame, chunks=(), params=None):
    """Velocity, x0 and chunk memory of x [1, F, C, H, W] at t [1, F], with earlier `chunks` in memory."""
    model = nnx.merge(self.graphdef, self.params if params is None else params)
    stack = lambda name: jnp.stack([getattr(c, name) for c in chunks] or [jnp.zeros_like(self._empty())], axis=1)
    memory = attention.MemoryView(stack("k"), stack("v"), jnp.int32(len(chunks)))
    attend = lambda q, k, v, layer: attention.attend_with_memory(q, k, v, memory, layer)
    features = time_features(t[0], self.config.backbone.freq_dim)
    text = self.text if params is None else model.text_memory(self.embeds)
    flow, chunk = jax.jit(lambda x: model(x, features, jnp.int32(first_frame), text, attend))(jnp.asarray(x[0]))
    sigma = sigma_of(t[0], self.config.schedule).astype(np.float32).reshape(-1, 1, 1, 1)
    return flow, x[0] - sigma * np.asarray(flow), chunk

  def _empty(self):
    c = self.config
    return jnp.zeros((c.backbone.num_layers, c.backbone.num_heads, c.chunk_tokens, c.backbone.head_dim))


def _check_cache(config, chunks, keys, values):
  """Recorded caches [L, tokens, A, D] are the chunks in order."""
  size, frames = config.chunk_tokens, config.chunk_frames
  for i, chunk in enumerate(chunks):
    part = slice(i * size, (i + 1) * size)
    _close(golden.raw_keys(np.asarray(chunk.k), i * frames, config), keys[:, part], _LATENTS)
    _close(np.asarray(chunk.v).transpose(0, 2, 1, 3), values[:, part], _LATENTS)


def test_forwards(units_file):
  z = golden.load(units_file)
  units = _Units(units_file.parent, z)
  committed = []
  for index, position in ((1, 0), (2, 0), (3, 1), (4, 1)):
    first_frame = position * units.config.chunk_frames
    assert int(z[f"fwd{index}_current_start"]) == position * units.config.chunk_tokens
    flow, x0, chunk = units.forward(z[f"fwd{index}_x"], z[f"fwd{index}_t"], first_frame, committed[:position])
    committed = [*committed[:position], chunk]
    _close(flow, z[f"fwd{index}_flow"][0], _LATENTS)
    _close(x0, z[f"fwd{index}_x0"][0], _LATENTS)
    _check_cache(units.config, committed, z[f"fwd{index}_cache_k"], z[f"fwd{index}_cache_v"])


def test_activations(units_file):
  """Every recorded sub-module of the first forward, layer by layer."""
  z = golden.load(units_file)
  units = _Units(units_file.parent, z)
  model, config = nnx.merge(units.graphdef, units.params), units.config.backbone
  act = lambda name: z[f"fwd1_act_{name}"]
  x = model.patchify(jnp.asarray(z["fwd1_x"][0]))
  tokens = act("patch_embedding")[0].transpose(1, 2, 3, 0)
  _close(x, tokens.reshape(x.shape), _LATENTS)
  _close(model.embed_text(jnp.asarray(z["prompt_embeds"][0])), act("text_embedding")[0], _LATENTS)
  embedding, projected = model.embed_time(time_features(z["fwd1_t"][0], config.freq_dim))
  _close(embedding, act("time_embedding"), _LATENTS)
  _close(projected.reshape(act("time_projection").shape), act("time_projection"), _LATENTS)

  rotation = rotary.chunk_rotation(model.rotary_tables(), jnp.int32(0), x.shape[0])
  cos, sin = (angles.reshape(*x.shape[:2], -1) for angles in rotation)
  graphdef, blocks = nnx.split(model.blocks)
  for layer in range(config.num_layers):
    at_layer = lambda tree, layer=layer: jax.tree.map(lambda p: p[layer], tree)
    block, text = nnx.merge(graphdef, at_layer(blocks)), at_layer(units.text)
    rows = block.modulation_rows(projected)
    q, k, v = (y.reshape(-1, *y.shape[2:]) for y in block.qkv(x, rows, cos, sin))
    attended = attention.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
    y = block.self_attention.out(attended.reshape(len(attended), -1))
    _close(y, act(f"block{layer}_self_attn")[0], _LATENTS)
    normed = block.cross_norm(x + y.reshape(x.shape) * rows[2]).reshape(-1, x.shape[-1])
    cross = attention.attend(block.cross_attention.queries(normed), text.k, text.v)
    _close(block.cross_attention.out(cross.reshape(len(cross), -1)), act(f"block{layer}_cross_attn")[0], _LATENTS)
    x = block.after_attention(x, attended.reshape(*x.shape[:2], *attended.shape[1:]), rows, text)
    _close(x.reshape(-1, x.shape[-1]), act(f"block{layer}")[0], _LATENTS)
  _close(model.unpatchify(x, embedding), z["fwd1_flow"][0], _LATENTS)


def test_text_memory(units_file):
  z = golden.load(units_file)
  text = _Units(units_file.parent, z).text
  _close(np.asarray(text.k).transpose(0, 2, 1, 3), z["cross_k"], _LATENTS)
  _close(np.asarray(text.v).transpose(0, 2, 1, 3), z["cross_v"], _LATENTS)


@pytest.mark.parametrize(
  ("source", "result", "start"),
  [
    ("rope_x", "rope_start0", 0),
    ("rope_x", "rope_start7", 7),
    ("rope_x", "rope_start500", 500),
    ("rope9_x", "rope9_start21", 21),
  ],
)
def test_rope(units_file, source, result, start):
  z = golden.load(units_file)
  config = golden.model_config(golden.read_config(z))
  c = config.backbone
  order = rotary.halves_order(c.num_heads, c.head_dim)
  to_halves = lambda x: x[0].reshape(x.shape[1], -1)[:, order].reshape(x.shape[1:])
  rows, columns = config.latent_height // c.patch_size, config.latent_width // c.patch_size
  tables = rotary.rotary_tables(c.head_dim, c.max_frames, rows, columns)
  x = jnp.asarray(to_halves(z[source]))
  cos, sin = rotary.chunk_rotation(tables, jnp.int32(start), x.shape[0] // config.frame_tokens)
  rotated = rotary.rotate(x, cos, sin)
  _close(rotated, to_halves(z[result]), 2e-6)
  # Moving keys that are already rotated equals rotating the raw keys at the new place.
  back = rotary.shift_frames(rotated, tables, jnp.int32(-start))
  _close(back, rotary.rotate(x, *rotary.chunk_rotation(tables, jnp.int32(0), x.shape[0] // config.frame_tokens)), 2e-6)


def test_schedule_and_time(units_file):
  z = golden.load(units_file)
  units = _Units(units_file.parent, z)
  config = units.config.schedule
  _close(sigma_table(config), z["sched_sigmas"], 1e-6)
  _close(config.num_train_timesteps * sigma_table(config), z["sched_timesteps"], 1e-3)
  _equal(config.denoising_steps, z["sched_steps_raw"])
  _close(denoising_schedule(config, 32).timesteps, z["sched_steps_warped"], 1e-4)
  for width in (32, 256):
    _close(time_features(z["time_t"], width), z[f"time_sinusoid_{width}"], 1e-6)
  embedding, projected = nnx.merge(units.graphdef, units.params).embed_time(
    time_features(z["time_t"], units.config.backbone.freq_dim)
  )
  _close(embedding, z["time_embedding"], _LATENTS)
  _close(projected.reshape(z["time_projection"].shape), z["time_projection"], _LATENTS)


def test_noise_formulas(units_file):
  z = golden.load(units_file)
  config = golden.model_config(golden.read_config(z)).schedule
  sigma = sigma_of(z["addnoise_t"], config).reshape(-1, 1, 1, 1)
  _close(sigma_table(config)[z["addnoise_timestep_index"]], sigma[:, 0, 0, 0], 0)
  _close((1 - sigma) * z["addnoise_x0"] + sigma * z["addnoise_noise"], z["addnoise_out"], 1e-5)
  _close(z["addnoise_x0"] - sigma * z["addnoise_noise"], z["flow2x0_out"], 1e-5)


def test_ema(units_file):
  z = golden.load(units_file)
  for name in ("k", "v"):
    sink, new = (jnp.asarray(z[f"ema_{which}_{name}"]) for which in ("cur", "new"))
    _close(memory_sinking.mix(sink, new, float(z["ema_alpha"])), z[f"ema_out_{name}"], 1e-7)


@pytest.mark.parametrize("alpha", [4, 8])
def test_lora(lora_file, alpha, tmp_path):
  z = golden.load(lora_file)
  recorded = golden.read_config(z)
  units = _Units(lora_file.parent, z)
  tensors = {name.removeprefix("lora/"): tensor for name, tensor in z.items() if name.startswith("lora/")}
  safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
  flavour = wan_dit.wan_flavour(units.config)
  adapter = adapters.load(tmp_path / "lora.safetensors", alpha, flavour, [flavour])
  assert adapter.scale == alpha / recorded["rank"]
  weights = golden.load(lora_file.parent / "weights.npz")
  merged = jax.tree.map(jnp.asarray, flavour.convert(adapters.merged(weights, adapter)))
  names = flavour.invert(merged)
  for key in (key for key in z if key.startswith(f"alpha{alpha}_merged/")):
    _close(names[key.split("/", 1)[1]], z[key], 2e-6)

  units.params, units.embeds = merged, jnp.asarray(z["prompt_embeds"][0])
  flow, x0, first = units.forward(z["x1"], z["t1"], 0, params=merged)
  _close(flow, z[f"alpha{alpha}_flow1"][0], _LATENTS)
  _close(x0, z[f"alpha{alpha}_x0_1"][0], _LATENTS)
  assert np.abs(np.asarray(flow) - z["nolora_flow1"][0]).max() > 1e-3
  flow, x0, second = units.forward(z["x2"], z["t2"], units.config.chunk_frames, [first], params=merged)
  _close(flow, z[f"alpha{alpha}_flow2"][0], _LATENTS)
  _close(x0, z[f"alpha{alpha}_x0_2"][0], _LATENTS)
  _check_cache(units.config, [first, second], z[f"alpha{alpha}_cache_k"], z[f"alpha{alpha}_cache_v"])


def test_converter_round_trip(units_file):
  """Recorded weights survive the way to our parameters and back bit for bit."""
  tensors = golden.load(units_file.parent / "weights.npz")
  config = golden.model_config(golden.read_config(golden.load(units_file)))
  flavour = wan_dit.wan_flavour(config)
  chex.assert_trees_all_equal(flavour.invert(flavour.convert(tensors)), tensors)
