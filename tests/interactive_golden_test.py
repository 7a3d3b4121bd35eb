"""Recorded interactive streaming: prompt switches, continuation, image start, long videos.

tests/golden/interactive/README.md says what was run. `--golden_interactive_dir` replays another folder in the format.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers, memory_sinking, recache
from streamt1_jax.between_chunks import commit_given, switch_prompt
from streamt1_jax.config import SearchConfig, SwitchConfig
from streamt1_jax.models import make_models
from streamt1_jax.noise_propagation import NoiseDraws
from streamt1_jax.reward_pruning import Flags
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition
from tests import golden_support as golden

_TOLERANCE = 5e-5


def _files(folder, *, sinks):
  """Recorded videos, or else the recordings that begin with a memory of several sinks."""
  return sorted(path for path in folder.glob("*.npz") if path.stem.startswith("sinks") == sinks)


def pytest_generate_tests(metafunc):
  folder = pathlib.Path(
    metafunc.config.getoption("golden_interactive_dir") or pathlib.Path(__file__).parent / "golden/interactive"
  )
  for name in ("recording", "sinks_file"):
    if name in metafunc.fixturenames:
      files = _files(folder, sinks=name == "sinks_file")
      mark = lambda path: [pytest.mark.slow] if path.stem.endswith("_long") else []
      metafunc.parametrize(name, [pytest.param(path, id=path.stem, marks=mark(path)) for path in files])


@dataclasses.dataclass(frozen=True)
class _Nothing(Promptless):
  """Plain streaming judges nothing."""

  def __call__(self, params, condition, frames, info):
    raise AssertionError


def _close(actual, expected):
  np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=_TOLERANCE)


def _equal(actual, expected):
  np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def _unpadded(row):
  return row[row >= 0]


def _recorded_models(model, videos):
  """Models that draw the noise of recorded videos: the base seed of a video is its place among them.

  Noise is a constant of the compiled programs, which all the videos share in this way.

  Args:
    model: its sizes.
    videos: the arrays of each, the row of its noise for every made chunk, and how many chunks are given before these.
  """
  longest = max(prefix + len(index) for _, index, prefix in videos)
  rows, first = [], 0
  for z, index, prefix in videos:
    made = np.maximum(np.arange(longest) - prefix, 0)
    rows.append(first + index[np.minimum(made, len(index) - 1)])
    first += len(z["noise"])
  rows = np.stack(rows)
  noise, renoise = (np.concatenate([z[name] for z, _, _ in videos]) for name in ("noise", "renoise"))

  def draw(seed):
    # Chunk c has seed 1000 c + base, and the first made chunk the base seed.
    row = jnp.asarray(rows)[seed % 1000, seed // 1000]
    return NoiseDraws(jnp.asarray(noise)[row], jnp.asarray(renoise)[row])

  return make_models(model, _Nothing(), _Nothing(), draw_noise=draw)


@functools.cache
def _models_of(folder, model):
  """Models for all of a folder's videos that were recorded with one model, and the names of these videos."""
  videos = {path.stem: golden.load(path) for path in _files(folder, sinks=False)}
  videos = {name: z for name, z in videos.items() if _model_of(golden.read_config(z)) == model}
  prefix = lambda z: golden.read_config(z)["case"]["prefix_chunks"]
  return _recorded_models(model, [(z, z["noise_index"], prefix(z)) for z in videos.values()]), list(videos)


def _model_of(config):
  """The recorded model, with room for the whole video."""
  case, model = config["case"], golden.model_config(config)
  longest = 3 * (case["prefix_chunks"] + case["num_chunks"] + 1)
  backbone = dataclasses.replace(model.backbone, max_frames=max(longest, model.backbone.max_frames))
  return dataclasses.replace(model, backbone=backbone)


class _Recording:
  """A recorded video and the search that should replay it."""

  def __init__(self, path):
    self.z = golden.load(path)
    self.config = golden.read_config(self.z)
    case = self.config["case"]
    self.model = _model_of(self.config)
    self.graphdef, self.backbone = golden.load_backbone(path.parent.parent, self.model)
    nearest = self.model.local_attention_frames - self.model.chunk_frames
    distance = {"absolute": None, "relative": nearest}[case["positions"]]
    self.search = dataclasses.replace(SearchConfig.streaming(self.model), sink_distance=distance)
    # Where nothing is computed anew, the sinks stay.
    sinks = "keep" if case["global_sink"] or case["recache"] == "none" else "move"
    self.switch = SwitchConfig(recache=case["recache"], sinks=sinks)
    self.prefix = case["prefix_chunks"]
    self.models, names = _models_of(path.parent, self.model)
    self.place = names.index(path.stem)
    self.params = {"backbone": self.backbone, "codec": {}, "image_reward": {}, "video_reward": {}}
    image = jnp.asarray(self.z["image"][0]) if "image" in self.z else None
    self.conditions = [
      Condition(golden.text_memory(self.graphdef, self.backbone, embeds), (), (), jnp.int32(10), image)
      for embeds in self.z["prompt_embeds"]
    ]

  def check_memory(self, memory, layout, first_frames):
    """Frames, keys and values of every slot."""
    order = _order(memory)
    _equal(memory.frame[order], _unpadded(first_frames))
    _check_slots(self.z, self.model, memory, order, layout)

  def check_view(self, memory, index, frame):
    """Which frames a chunk sees, and where it sees them."""
    chunk, order = self.model.chunk_frames, _order(memory)
    spread = lambda frames: [first + i for first in frames for i in range(chunk)]
    own = [frame]
    _equal(spread([*memory.frame[order], *own]), _unpadded(self.z["key_frames"][index]))
    placed = memory_sinking.placed_frames(_on_device(memory), jnp.int32(frame), self.model, self.search)
    # A chunk sees distances; the recording has positions, which begin anew with relative ones.
    shift = frame - int(self.z["query_start"][index])
    _equal(np.array(spread([*np.asarray(placed)[order], *own])) - shift, _unpadded(self.z["key_positions"][index]))


def _order(memory):
  """Valid slots of a memory in the recordings' order: sinks, then window, each by frame."""
  return sorted(range(int(memory.count)), key=lambda slot: (not memory.is_sink[slot], memory.frame[slot]))


def _check_slots(z, model, memory, order, layout):
  """Keys and values of the slots in their order."""
  recorded = z["kv_pool"][_unpadded(layout)]
  for slot, (keys, values) in zip(order, recorded.transpose(0, 2, 1, 3, 4, 5), strict=True):
    _close(golden.raw_keys(memory.k[:, slot], model), keys)
    _close(memory.v[:, slot].transpose(0, 2, 1, 3), values)


def _first_beam(state):
  """The memory of the only beam, on the host; a copy survives the donation of the state."""
  return jax.tree.map(lambda x: np.array(x[0]), state.beams.memory)


def _on_device(memory):
  return jax.tree.map(jnp.asarray, memory)


@functools.partial(jax.jit, static_argnames=("model", "search"))
def _evicted(memories, model, search):
  """The memories of all beams after they made room for a chunk."""
  return jax.vmap(lambda memory: memory_sinking.evict(memory, model, search)[0])(memories)


@functools.partial(jax.jit, static_argnames=("models", "search", "switch"))
def _recached(models, backbone, memory, first_frame, text, search, switch):
  """The memory of one beam under a new prompt, and the velocities that it was computed with."""
  generator, execution = models.generator, models.execution
  forward = generator.clean_forward(backbone, text, execution)
  return recache.recache(memory, forward, first_frame, generator.config, search, switch, execution)


def _replay(recording, check_chunk, check_switch):
  """Streams the recorded video; the checks see every chunk and every switch."""
  z, r = recording.z, recording
  inputs = r.models, r.search
  state = drivers.jitted_init_state(r.params, np.int32(r.place), *inputs)
  for index in range(r.prefix):
    given = jnp.asarray(z["given"][index])
    state, frames = commit_given(r.params, state, r.conditions[0], given, *inputs, first=index == 0)
    _equal(frames, given)
    check_chunk(index, state, None)
  switches = {int(chunk): number for number, chunk in enumerate(z.get("switch_chunk", ()))}
  for index in range(len(z["segment"])):
    chunk = r.prefix + index
    condition = r.conditions[z["segment"][index]]
    if index in switches:
      assert z["switch_segment"][switches[index]] == z["segment"][index]
      state = check_switch(switches[index], state, condition)
    before = jax.tree.map(np.array, state.beams.memory)
    first = chunk == 0
    state, trace = drivers.jitted_chunk_step(r.params, state, condition, *inputs, first=first, record=True)
    check_chunk(chunk, state, (before, jax.tree.map(np.array, trace)))


def test_replay(recording):
  r = _Recording(recording)
  z, frames = r.z, r.model.chunk_frames
  recorded = {int(chunk): row for row, chunk in enumerate(z["recorded_chunk"])} if "recorded_chunk" in z else None
  layouts = {int(c): z["kv_layout"][i] for i, c in enumerate(z.get("kv_chunk", ()))}

  def check_chunk(chunk, state, made):
    memory = _first_beam(state)
    firsts = _unpadded(z["cache_frames"][chunk])
    _equal(memory.frame[_order(memory)], firsts)
    if recorded is None:
      r.check_memory(memory, z["chunk_layout"][chunk], firsts)
    elif chunk in layouts:
      r.check_memory(memory, layouts[chunk], firsts)
    if made is None:
      return
    before, trace = made
    index = chunk - r.prefix
    r.check_view(jax.tree.map(lambda x: np.array(x[0]), _evicted(before, r.model, r.search)), index, chunk * frames)
    if recorded is not None:
      if chunk in recorded:
        _close(trace.latents[0], z["latents"][recorded[chunk]])
    elif "latents" in z:
      _close(trace.latents[0], z["latents"][index])
    if "x0" in z:
      # For a frame that is given, the recording has what the model said before it was overwritten.
      made_frames = slice(1 if "image" in z and chunk == 0 else 0, None)
      _close(trace.steps["x0"][0, 0][:, made_frames], z["x0"][index][:, made_frames])

  def check_switch(number, state, condition):
    before = _first_beam(state)
    r.check_memory(before, z["switch_layout_before"][number], z["switch_frames_before"][number])
    chunk = int(state.chunk_index)
    first_frame = jnp.int32(chunk * frames)
    recached = _recached(r.models, r.backbone, _on_device(before), first_frame, condition.text, r.search, r.switch)
    start, end = z["recache_frames"][number]
    after = jax.tree.map(np.array, recached.memory)
    for slot in range(int(after.count)):
      first = int(after.frame[slot]) - start
      velocity = np.asarray(recached.velocity[slot])
      # A slot that was not computed has no row; a sink that is kept is not among the frames, or left no trace there.
      if np.any(velocity):
        assert 0 <= first <= end - start - frames
        _close(velocity, z["recache_flow"][number][first : first + frames])
    state = switch_prompt(r.params, state, condition, r.models, r.search, r.switch)
    switched = _first_beam(state)
    r.check_memory(switched, z["switch_layout"][number], z["switch_frames"][number])
    assert int(state.chunk_index) == chunk
    return state

  _replay(r, check_chunk, check_switch)


@functools.cache
def _sinks_models(path):
  """Models for a recording of sinks: both ways to compute its window anew go on with the same programs."""
  z = golden.load(path)
  config = golden.read_config(z)
  model = golden.model_config(config)
  first_chunk = config["first_frame"] // model.chunk_frames
  return _recorded_models(model, [(z, np.arange(len(z["noise"])), first_chunk)])


@pytest.mark.parametrize("way", ["released", "causal"])
def test_sinks(sinks_file, way):
  """A memory with three sinks, one of them an average, whose window is computed anew; then two chunks with flags."""
  z = golden.load(sinks_file)
  config = golden.read_config(z)
  model = golden.model_config(config)
  graphdef, backbone = golden.load_backbone(sinks_file.parent.parent, model)
  search = dataclasses.replace(
    SearchConfig.streaming(model),
    max_sink_frames=config["model"]["max_sink_size"],
    sink_ema_decay=config["ema_alpha"],
  )
  first_chunk = config["first_frame"] // model.chunk_frames
  models = _sinks_models(sinks_file)
  params = {"backbone": backbone, "codec": {}, "image_reward": {}, "video_reward": {}}
  text = golden.text_memory(graphdef, backbone, z["prompt_embeds"][0])
  condition = Condition(text, (), (), jnp.int32(first_chunk + 2))
  state = drivers.jitted_init_state(params, np.int32(0), models, search)
  memory = _recorded_memory(z, model, jax.tree.map(lambda x: x[0], state.beams.memory))
  state = state._replace(
    chunk_index=jnp.int32(first_chunk), beams=state.beams._replace(memory=jax.tree.map(lambda x: x[None], memory))
  )

  def check(layout, sink_frames, window_frames):
    found = _first_beam(state)
    order = _order(found)
    _equal(found.frame[order], [*sink_frames, *window_frames])
    _check_slots(z, model, found, order, layout)

  switch = SwitchConfig(recache=way)
  recached = _recached(models, backbone, memory, jnp.int32(config["first_frame"]), text, search, switch)
  for frame, flow in zip(z["window_frames"], z[f"{way}_flow"], strict=True):
    (slot,) = np.flatnonzero(np.asarray(recached.memory.frame) == frame)
    _close(recached.velocity[slot], flow)
  state = switch_prompt(params, state, condition, models, search, switch)
  check(z[f"{way}_layout"], z["sink_frames"], z["window_frames"])
  window = list(z["window_frames"])
  for index, x0 in enumerate(z[f"{way}_x0"]):
    state, trace = drivers.jitted_chunk_step(params, state, condition, models, search, first=False, record=True)
    _close(trace.steps["x0"][0, 0], x0)
    window = [*window[1:], config["first_frame"] + index * model.chunk_frames]
    check(z[f"{way}_layout_after"][index], z[f"{way}_sink_frames_after"][index], window)


def _recorded_memory(z, model, empty):
  """The recorded sinks and window in the form of `empty`, a memory without a chunk."""
  frames = np.concatenate([z["sink_frames"], z["window_frames"]])
  sinks, count = len(z["sink_frames"]), len(frames)
  groups = z["kv_pool"][z["layout_before"]]
  put = lambda entries, values, at=0: entries.at[at : at + len(values)].set(jnp.asarray(values, entries.dtype))
  by_slot = lambda values: jnp.asarray(np.stack(values, axis=1))
  keys = by_slot([golden.stored_keys(group[:, 0], model) for group in groups])
  values = by_slot([group[:, 1].transpose(0, 2, 1, 3) for group in groups])
  return empty._replace(
    k=empty.k.at[:, :count].set(keys),
    v=empty.v.at[:, :count].set(values),
    frame=put(empty.frame, frames),
    is_sink=put(empty.is_sink, np.arange(count) < sinks),
    flags=Flags(*(put(empty.flags[i], z["window_flags"][:, i], sinks) for i in range(2))),
    count=jnp.int32(count),
    latents=put(empty.latents, z["latents"], sinks),
    # A chunk has left the window: the first frames of the sinks and the window leave a gap.
    departed=empty.departed._replace(frame=jnp.int32(frames[sinks] - model.chunk_frames)),
  )
