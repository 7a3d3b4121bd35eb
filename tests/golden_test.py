"""Replays recorded searches of the released implementation: `pytest tests/golden_test.py --golden_dir=DIR` for
another folder.

Tolerances are the recording's own (tests/golden/README.md): latents, x0, keys and values 5e-5, scores 1e-4, fused
noise 1e-6, everything discrete exact.

A search runs once for each case and kind of devices, and every check reads what it left behind.
"""

import dataclasses
import functools
import itertools
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
from streamt1_jax.backbone.schedule import denoising_schedule, sigma_table, time_features
from streamt1_jax.convert import adapters
from streamt1_jax.convert.tables import wan_dit
from streamt1_jax.nn import rotary
from tests import golden_support as golden

_HERE = pathlib.Path(__file__).parent / "golden"
_LATENTS, _SCORES, _NOISE = 5e-5, 1e-4, 1e-6

# The cases of this repository that prove what a check is there to prove. The others repeat it and are slow.
_ENOUGH = {
  # C_ema05 has the same table as C, and its decay shows a wrong sink more clearly; the decay of C is that of A, B, D.
  "one_device": ("case_A", "case_B", "case_C_ema05", "case_D"),
  # A is on several devices under `_TOKENS`; the tests of meshes divide siblings as C does.
  "mesh": (),
  # D alone has a window that slides, several beams, and rewards that look at it.
  "scratch": ("case_D",),
  # One candidate shows that a change of 0.1% in one sink leaves the tolerance.
  "missing_update": ("case_B",),
}
# For these, XLA does as much as for users. A grows to its most sinks, and the window of D slides; the other cases
# differ from them in sizes and thresholds.
_OPTIMIZED = ("case_A", "case_D")
_TOKENS = "candidate:2,model:2,seq:2"


def pytest_generate_tests(metafunc):
  option = metafunc.config.getoption("--golden_dir")
  folder = pathlib.Path(option or _HERE)
  cases = sorted(folder.glob("case_*.npz"))

  def case(file, check, *values, name=None):
    slow = option is None and file.stem not in _ENOUGH.get(check, (file.stem,))
    return pytest.param(*values, marks=[pytest.mark.slow] * slow, id=name or file.stem)

  if "run" in metafunc.fixturenames:
    runs = [case(file, kind, (file, kind), name=f"{file.stem}-{kind}") for file in cases for kind in golden.DEVICES]
    if option is None:
      # A model of another folder may not divide so. Slow: `search_rewards_test` divides tokens, too.
      runs.append(pytest.param((_HERE / "case_A.npz", _TOKENS), id="case_A-tokens", marks=pytest.mark.slow))
    metafunc.parametrize("run", runs, indirect=True, scope="module")
  if "case_file" in metafunc.fixturenames:
    check = getattr(metafunc.function, "check", None)
    metafunc.parametrize("case_file", [case(file, check, file) for file in cases])
  for fixture, pattern in (("units_file", "units.npz"), ("lora_file", "lora.npz")):
    if fixture in metafunc.fixturenames:
      files = sorted(folder.glob(pattern))
      metafunc.parametrize(fixture, files, ids=[file.stem for file in files])


@pytest.fixture(scope="module")
def run(request):
  """A recorded search run again; on one device XLA gets the options that users' programs get, in `_OPTIMIZED` cases."""
  file, devices = request.param
  quick = jax.config.values["jax_disable_most_optimizations"]
  optimized = devices == "one_device" and (file.parent != _HERE or file.stem in _OPTIMIZED)
  jax.config.update("jax_disable_most_optimizations", quick and not optimized)
  try:
    return golden.replay(golden.load_case(file), devices)
  finally:
    jax.config.update("jax_disable_most_optimizations", quick)


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
    _close(golden.raw_keys(np.asarray(memory.k[beam, :, slot]), model), keys, _LATENTS)
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


def test_schedule(run):
  _close(run.case.models.generator.schedule.timesteps, run.case.arrays["denoising_timesteps"], 1e-4)


def test_candidates(run):
  for index, block in enumerate(run.blocks):
    _check_candidates(run.case, index, block.trace)


def test_evictions(run):
  for index, block in enumerate(run.blocks):
    _check_eviction(run.case, index, block.trace, block.before)


def test_visible_frames(run):
  """Key frames of every candidate, survivors or not: its parent's memory after the eviction, and its own chunk."""
  case = run.case
  chunk = case.model.chunk_frames
  for index, block in enumerate(run.blocks):
    for n, recorded in enumerate(case.arrays["key_frames"][index]):
      beam = n // case.search.beam_size
      frames = [int(block.evicted.frame[beam][slot]) for slot in _ordered_slots(block.evicted, beam)] + [index * chunk]
      _equal([frame + i for frame in frames for i in range(chunk)], _unpadded(recorded))


def test_memories(run):
  for index, block in enumerate(run.blocks):
    for beam, survivor in enumerate(run.case.arrays["surv_cand"][index]):
      _check_beam(run.case, index, beam, block.after, survivor)


def test_lineages(run):
  case, traces = run.case, [block.trace for block in run.blocks]
  for index in range(case.num_chunks):
    path = drivers.lineage([t.survivor for t in traces[: index + 1]], case.search.beam_size)
    for beam in range(case.search.top_k):
      seeds = [_per_candidate(t.candidates.seed)[t.survivor[k]] for t, k in zip(traces, path[:, beam], strict=False)]
      _equal(seeds, case.arrays["surv_history_seeds"][index, beam][: index + 1])


def test_final_videos(run):
  case = run.case
  models = dataclasses.replace(case.models, video_reward=case.video_reward)
  final = drivers.final_beams(case.params, case.condition, models, case.search, [block.trace for block in run.blocks])
  _close(final.latents, case.arrays["final_output"], _LATENTS)
  _close(final.scores, case.arrays["final_score"], _SCORES)
  assert final.best == int(case.arrays["final_best"])


def test_long_window(case_file):
  """The recorded frame ranges of the video reward are those of our sliding window."""
  arrays = golden.load(case_file)
  recorded = golden.read_config(arrays)
  chunk, window = golden.model_config(recorded).chunk_frames, golden.search_config(recorded).sliding_window
  for block, ranges in enumerate(arrays["long_window"]):
    expected = (max(0, block * chunk - chunk * (window - 1)), (block + 1) * chunk)
    assert {tuple(frames) for frames in ranges} == {expected}


def _first_traces(case, search, count):
  stream = drivers.stream(
    case.params, case.condition, case.models, search, num_chunks=case.num_chunks, seed=case.seed, record=True
  )
  return [jax.device_get(trace) for trace in itertools.islice(stream, count)]


def _check(name):
  """Which of `_ENOUGH` a test is."""
  return lambda test: setattr(test, "check", name) or test


@_check("scratch")
def test_scratch_decoding(case_file):
  """Rewards that decode their window from scratch see the same latents: the codec of the recordings is the identity."""
  case = golden.load_case(case_file)
  search = dataclasses.replace(case.search, reward_decode="scratch")
  for block, trace in enumerate(_first_traces(case, search, case.num_chunks)):
    _check_candidates(case, block, trace)


@_check("missing_update")
def test_missing_sink_update_is_noticed(case_file):
  """The negative control: without the EMA of the last sink, what follows it leaves the tolerance."""
  case = golden.load_case(case_file)
  merged = np.isin(case.arrays["route"], (memory_sinking.EMA, memory_sinking.APPEND_AT_MAXIMUM)).all(axis=1)
  if not merged.any():
    pytest.skip("this recording has no EMA of all beams at once")
  search = dataclasses.replace(case.search, sink_ema_decay=1.0)
  last = min(int(np.argmax(merged)) + 1, case.num_chunks - 1)
  trace = _first_traces(case, search, last + 1)[last]
  assert np.abs(_per_candidate(trace.steps["x0"]) - case.arrays["x0"][last]).max() > 2 * _LATENTS


class _Units:
  """One model and a growing memory, as the recorded single forwards use it."""

  def __init__(self, folder, arrays, params=None):
    self.config = golden.model_config(golden.read_config(arrays))
    self.graphdef, released = golden.load_backbone(folder, self.config)
    self.params = released if params is None else params
    self.text = golden.text_memory(self.graphdef, self.params, arrays["prompt_embeds"][0])

  def forward(self, x, t, first_frame, chunks=()):
    """Velocity, x0 and chunk memory of x [1, F, C, H, W] at t [1, F], with earlier `chunks` in memory."""
    stack = lambda name: np.stack([getattr(c, name) for c in chunks] or [self._empty()], axis=1)
    distances = first_frame - self.config.chunk_frames * np.arange(max(len(chunks), 1), dtype=np.int32)
    turns = rotary.turns_of(rotary.frame_turns(self.config.backbone.head_dim, 99), jnp.asarray(distances))
    memory = attention.MemoryView(stack("k"), stack("v"), jnp.int32(len(chunks)), turns)
    features = time_features(t[0], self.config.backbone.freq_dim)
    flow, chunk = _forward(self.graphdef, self.params, x[0], features, self.text, memory)
    sigma = golden.sigma_of(t[0], self.config.schedule).astype(np.float32).reshape(-1, 1, 1, 1)
    return flow, x[0] - sigma * np.asarray(flow), chunk

  def _empty(self):
    c = self.config
    return np.zeros((c.backbone.num_layers, c.backbone.num_heads, c.chunk_tokens, c.backbone.head_dim), np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, x, features, text, memory):
  attend = lambda q, k, v, layer: attention.attend_with_memory(q, k, v, memory, layer)
  return nnx.merge(graphdef, params)(x, features, text, attend)


def _check_cache(config, chunks, keys, values):
  """Recorded caches [L, tokens, A, D] are the chunks in order."""
  size = config.chunk_tokens
  for i, chunk in enumerate(chunks):
    part = slice(i * size, (i + 1) * size)
    _close(golden.raw_keys(np.asarray(chunk.k), config), keys[:, part], _LATENTS)
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


@functools.partial(jax.jit, static_argnums=0)
def _activations(graphdef, params, x, embeds, features, text):
  """Every sub-module of a first forward by the recording's names; the flow is that of the last one."""
  model = nnx.merge(graphdef, params)
  x = model.patchify(x)
  embedding, projected = model.embed_time(features)
  found = {
    "patch_embedding": x,
    "text_embedding": model.embed_text(embeds),
    "time_embedding": embedding,
    "time_projection": projected,
  }
  cos, sin = model.rotation(x.shape[0])
  definition, blocks = nnx.split(model.blocks)
  for layer in range(jax.tree.leaves(blocks)[0].shape[0]):
    block, own_text = nnx.merge(definition, _at_layer(blocks, layer)), _at_layer(text, layer)
    rows = block.modulation_rows(projected)
    q, k, v = (y.reshape(-1, *y.shape[2:]) for y in block.qkv(x, rows, cos, sin))
    attended = attention.attend(q, k.swapaxes(0, 1), v.swapaxes(0, 1))
    y = block.self_attention.out(attended.reshape(len(attended), -1))
    normed = block.cross_norm(x + y.reshape(x.shape) * rows[2]).reshape(-1, x.shape[-1])
    cross = attention.attend(block.cross_attention.queries(normed), own_text.k, own_text.v)
    x = block.after_attention(x, attended.reshape(*x.shape[:2], *attended.shape[1:]), rows, own_text)
    found[f"block{layer}_self_attn"] = y
    found[f"block{layer}_cross_attn"] = block.cross_attention.out(cross.reshape(len(cross), -1))
    found[f"block{layer}"] = x.reshape(-1, x.shape[-1])
  return found, model.unpatchify(x, embedding)


def _at_layer(tree, layer):
  return jax.tree.map(lambda p: p[layer], tree)


def test_activations(units_file):
  """Every recorded sub-module of the first forward, layer by layer."""
  z = golden.load(units_file)
  units = _Units(units_file.parent, z)
  features = time_features(z["fwd1_t"][0], units.config.backbone.freq_dim)
  found, flow = _activations(units.graphdef, units.params, z["fwd1_x"][0], z["prompt_embeds"][0], features, units.text)
  for name, value in found.items():
    recorded = z[f"fwd1_act_{name}"]
    if name == "patch_embedding":  # Channels first.
      recorded = recorded[0].transpose(1, 2, 3, 0)
    _close(value, recorded.reshape(value.shape), _LATENTS)
  _close(flow, z["fwd1_flow"][0], _LATENTS)


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
  x = to_halves(z[source])

  @jax.jit
  def at(x, start):
    """Rotated at their own frames, then turned by the first one: rotations compose."""
    cos, sin = rotary.chunk_rotation(c.head_dim, len(x) // config.frame_tokens, rows, columns)
    own = rotary.rotate(x, *(jnp.asarray(angles).reshape(len(x), -1) for angles in (cos, sin)))
    return rotary.turn(own, rotary.turns_of(rotary.frame_turns(c.head_dim, c.max_frames), start[None, None]))

  _close(at(x, np.int32(start)), to_halves(z[result]), 2e-6)


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
  features = time_features(z["time_t"], units.config.backbone.freq_dim)
  embedding, projected = jax.jit(nnx.merge(units.graphdef, units.params).embed_time)(features)
  _close(embedding, z["time_embedding"], _LATENTS)
  _close(projected.reshape(z["time_projection"].shape), z["time_projection"], _LATENTS)


def test_noise_formulas(units_file):
  z = golden.load(units_file)
  config = golden.model_config(golden.read_config(z)).schedule
  sigma = golden.sigma_of(z["addnoise_t"], config).reshape(-1, 1, 1, 1)
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
  config = golden.model_config(recorded)
  tensors = {name.removeprefix("lora/"): tensor for name, tensor in z.items() if name.startswith("lora/")}
  safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
  flavour = wan_dit.wan_flavour(config)
  adapter = adapters.load(tmp_path / "lora.safetensors", alpha, flavour, [flavour])
  assert adapter.scale == alpha / recorded["rank"]
  weights = golden.load(lora_file.parent / "weights.npz")
  merged = jax.tree.map(jnp.asarray, flavour.convert(adapters.merged(weights, adapter)))
  names = flavour.invert(merged)
  for key in (key for key in z if key.startswith(f"alpha{alpha}_merged/")):
    _close(names[key.split("/", 1)[1]], z[key], 2e-6)

  units = _Units(lora_file.parent, z, merged)
  flow, x0, first = units.forward(z["x1"], z["t1"], 0)
  _close(flow, z[f"alpha{alpha}_flow1"][0], _LATENTS)
  _close(x0, z[f"alpha{alpha}_x0_1"][0], _LATENTS)
  assert np.abs(np.asarray(flow) - z["nolora_flow1"][0]).max() > 1e-3
  flow, x0, second = units.forward(z["x2"], z["t2"], units.config.chunk_frames, [first])
  _close(flow, z[f"alpha{alpha}_flow2"][0], _LATENTS)
  _close(x0, z[f"alpha{alpha}_x0_2"][0], _LATENTS)
  _check_cache(config, [first, second], z[f"alpha{alpha}_cache_k"], z[f"alpha{alpha}_cache_v"])


def test_converter_round_trip(units_file):
  """Recorded weights survive the way to our parameters and back bit for bit."""
  tensors = golden.load(units_file.parent / "weights.npz")
  config = golden.model_config(golden.read_config(golden.load(units_file)))
  flavour = wan_dit.wan_flavour(config)
  chex.assert_trees_all_equal(flavour.invert(flavour.convert(tensors)), tensors)
