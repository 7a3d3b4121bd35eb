"""The chunk step: what it copies, what rewards see, and what a bad candidate can do."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from streamt1_jax import drivers
from streamt1_jax.backbone import attention
from streamt1_jax.chunk_step import chunk_step
from streamt1_jax.codec.base import LatentCodec
from streamt1_jax.codec.streaming import StreamingDecoder
from streamt1_jax.config import SearchConfig, preset
from streamt1_jax.execution import Execution
from streamt1_jax.nn.rotary import FrameTurns
from streamt1_jax.noise_propagation import NoiseDraws, gaussian_noise
from streamt1_jax.rewards.base import Promptless
from streamt1_jax.state import Condition, init_state, past_capacity
from streamt1_jax.step import denoise, small_pictures
from tests import small_codec
from tests import small_search as small
from tests import toy_generator as toy


def _stream(models, search, num_chunks, seed=0, params=None, **options):
  traces = drivers.stream(
    small.params() if params is None else params,
    small.condition(num_chunks),
    models,
    search,
    num_chunks=num_chunks,
    seed=seed,
    **options,
  )
  return [jax.device_get(trace) for trace in traces]


class TestMemory:
  """Denoising reads the memory, candidates share it, and only winners write it."""

  # Memories grow with the number of blocks, activations do not: a copy of a memory cannot hide among them.
  MODEL = dataclasses.replace(
    small.MODEL, name="many_blocks", backbone=dataclasses.replace(small.MODEL.backbone, num_layers=64)
  )

  def _abstract(self, beam_size):
    models, params = small.models(self.MODEL), small.params(self.MODEL)
    search = dataclasses.replace(small.SEARCH, beam_size=beam_size)
    state = jax.eval_shape(lambda: init_state(params, models, search, 0))
    run = functools.partial(chunk_step, models=models, search=search, first=False)
    return run, (params, state, small.condition(8, model=self.MODEL))

  def test_candidates_add_activations_alone(self):
    """Not their beam's memory, and no keys and values of their own chunk, which the clean pass makes for winners."""
    temporaries, sizes = [], (1, 8)
    for beam_size in sizes:
      run, arguments = self._abstract(beam_size)
      analysis = jax.jit(run, donate_argnums=1).lower(*arguments).compile().memory_analysis()
      temporaries.append(analysis.temp_size_in_bytes)
    memory = arguments[1].beams.memory.k
    beams, _, slots = memory.shape[:3]
    chunk_bytes = 2 * memory.size * memory.dtype.itemsize // (beams * slots)
    growth = np.diff(temporaries) / (beams * np.diff(sizes))
    assert (growth < 0.5 * chunk_bytes).all(), (temporaries, chunk_bytes)

  def test_no_array_holds_a_memory_per_candidate(self):
    run, arguments = self._abstract(beam_size=5)
    memory = arguments[1].beams.memory.k
    largest = max(aval.size for equation in _equations(jax.make_jaxpr(run)(*arguments)) for aval in _outputs(equation))
    assert memory.size <= largest < 2 * memory.size

  def test_denoising_writes_no_memory(self):
    """Nothing larger than a slot is made while a chunk is denoised, but slices of the memory are read."""
    models, params = small.models(self.MODEL), small.params(self.MODEL)
    memory = jax.eval_shape(lambda: init_state(params, models, small.SEARCH, 0)).beams.memory
    one_beam = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    turns = jax.ShapeDtypeStruct((memory.k.shape[2], memory.k.shape[-1]), jnp.float32)
    view = attention.MemoryView(one_beam(memory.k), one_beam(memory.v), count, FrameTurns(turns, turns))
    noise = jnp.zeros(self.MODEL.latent_shape)
    run = lambda params, *inputs: denoise(params, models, *inputs)
    text = small.condition(8, model=self.MODEL).text
    equations = list(_equations(jax.make_jaxpr(run)(params, noise, noise[None], text, view)))
    assert "dynamic_slice" in {equation.primitive.name for equation in equations}
    slot = view.k.size // view.k.shape[1]
    # An axis more or less, as custom batching rules add, copies nothing.
    copies = lambda equation: equation.primitive.name not in ("broadcast_in_dim", "reshape", "squeeze")
    assert max(aval.size for equation in equations if copies(equation) for aval in _outputs(equation)) <= slot


def _equations(jaxpr):
  """All equations that compute, those of nested programs included."""
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    nested = [
      value
      for parameter in equation.params.values()
      for value in (parameter if isinstance(parameter, (tuple, list)) else [parameter])
      if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    for inner in nested:
      yield from _equations(inner)
    if not nested:
      yield equation


def _outputs(equation):
  return [variable.aval for variable in equation.outvars]


class TestState:
  def test_state_is_donated(self):
    models, params, condition = small.models(), small.params(), small.condition(4)
    state = drivers.jitted_init_state(params, 0, models, small.SEARCH)
    for index in range(2):
      old = state
      state, _ = drivers.jitted_chunk_step(params, old, condition, models, small.SEARCH, first=index == 0)
      memory = old.beams.memory
      assert memory.k.is_deleted()
      assert memory.v.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, condition)))

  @pytest.mark.parametrize("reward_decode", ["streamed", "scratch"])
  def test_every_step_keeps_shapes_and_dtypes(self, reward_decode):
    """So the size of the state does not depend on how many chunks have been made. What beams carry and what survives
    leads with K, what is known of candidates with K and B."""
    models, params = small.models(), small.params()
    search = dataclasses.replace(small.SEARCH, reward_decode=reward_decode, beam_size=3)
    state = jax.eval_shape(lambda: init_state(params, models, search, 0))
    for first in (True, False):
      run = functools.partial(chunk_step, models=models, search=search, first=first, record=True)
      after, trace = jax.eval_shape(run, params, state, small.condition(60))
      chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
      chex.assert_tree_shape_prefix(after.beams, (2,))
      chex.assert_tree_shape_prefix((trace.candidates, trace.steps), (2, 3))
      chex.assert_tree_shape_prefix(trace._replace(candidates=None, steps=None), (2,))

  def test_memory_takes_the_backbones_dtype(self):
    params = small.params() | {"backbone": jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params()["backbone"])}
    for search, accumulates in ((small.SEARCH, False), (SearchConfig.paper(max_sink_frames=6), True)):
      memory = jax.eval_shape(lambda search=search: init_state(params, small.models(), search, 0)).beams.memory
      assert memory.k.dtype == memory.v.dtype == jnp.bfloat16
      assert (memory.accumulator is not None) == accumulates
      if accumulates:
        assert memory.accumulator.k.dtype == jnp.float32


def _ancestors(traces, beam_size, chunk, beam):
  """Position of the survivor in every chunk up to `chunk`, walking back from its beam."""
  positions = [beam]
  for index in range(chunk, 0, -1):
    positions.append(int(traces[index].survivor[positions[-1]]) // beam_size)
  return positions[::-1]


class TestWindow:
  """What the video reward sees."""

  def test_window_is_the_lineage(self):
    """The reward is a checksum of the window's frames and their places."""
    models, search = small.models(), small.SEARCH
    traces = _stream(models, search, 12)
    moved = False
    for chunk, trace in enumerate(traces):
      longs = small.per_candidate(trace.candidates.long)
      for beam, survivor in enumerate(trace.survivor):
        path = _ancestors(traces, search.beam_size, chunk, beam)
        moved |= path != [beam] * len(path)
        frames = np.concatenate([traces[i].frames[position] for i, position in enumerate(path)])
        expected = models.video_reward.by_numpy(frames[-3 * search.sliding_window :])
        np.testing.assert_allclose(longs[survivor], expected, rtol=0, atol=2e-5)
    assert moved, "no beam ever changed its parent: too easy"

  def test_window_of_one_is_the_chunk(self):
    """The reward is the sum of the window."""
    search = dataclasses.replace(small.SEARCH, sliding_window=1)
    condition = Condition((), (), (), jnp.int32(6))
    for trace in drivers.stream(toy.PARAMS, condition, toy.MODELS, search, num_chunks=6, seed=0):
      longs = small.per_candidate(trace.candidates.long)[trace.survivor]
      np.testing.assert_allclose(longs, trace.frames.sum(axis=(1, 2, 3, 4)), rtol=1e-6)
      assert longs.all()

  def test_image_reward_sees_the_chunk(self):
    for trace in _stream(small.models(), small.SEARCH, 3):
      shorts = small.per_candidate(trace.candidates.short)[trace.survivor]
      expected = (trace.frames * small.pattern(1)).mean(axis=(1, 2, 3, 4))
      np.testing.assert_allclose(shorts, expected, rtol=0, atol=1e-6)

  def test_hybrid_and_survivors_follow_from_the_scores(self):
    num_chunks = 5
    for chunk, trace in enumerate(_stream(small.models(), small.SEARCH, num_chunks)):
      short, long = (small.per_candidate(x).astype(np.float64) for x in (trace.candidates.short, trace.candidates.long))
      weight = min(chunk / (num_chunks - 1), small.SEARCH.fusion_cap)
      hybrid = weight * short + (1 - weight) * long
      np.testing.assert_allclose(small.per_candidate(trace.candidates.hybrid), hybrid, rtol=0, atol=1e-5)
      np.testing.assert_array_equal(trace.survivor, np.argsort(-hybrid, kind="stable")[: small.SEARCH.top_k])


def _marked_noise(seed):
  """Gaussian noise of the seed's last seven digits. The bits of those before it say what candidates of chunk 2 are bad.

  A bad one has a NaN: between the steps if the base seed is 0, at the start if it is 50. What is bad is thus no part of
  the program, and one program serves all searches.
  """
  mark, own = seed // 10**7, seed % 10**7
  # The seed of candidate i of beam k is base + 1000 * chunk + 100 * k + i.
  n = own // 100 % 10 * small.SEARCH.beam_size + own % 50
  bad, at_start = (own // 1000 == 2) & ((mark >> n) % 2 == 1), own % 100 >= 50
  draws = gaussian_noise(small.MODEL.latent_shape, 2)(own)
  spoiled = lambda array, bad: array.at[(0,) * array.ndim].set(jnp.where(bad, jnp.nan, array[(0,) * array.ndim]))
  return NoiseDraws(spoiled(draws.fresh, bad & at_start), spoiled(draws.renoise, bad & ~at_start))


@dataclasses.dataclass(frozen=True)
class _DoctoredScore(Promptless):
  """The usual image score, except that one candidate of one chunk gets another: `params` says which."""

  def __call__(self, params, condition, chunk, info):
    bad = (info.chunk_index == params["chunk"]) & (info.candidate_index == params["candidate"])
    return jnp.where(bad, params["value"], small.ImageMatch()(params, condition, chunk, info))


class TestBadCandidates:
  SEARCH = dataclasses.replace(small.SEARCH, first_candidate="fresh")
  CHUNK = 2

  def _doctored(self, chunk, candidate, value, seed=0):
    models = dataclasses.replace(small.models(), image_reward=_DoctoredScore(), draw_noise=_marked_noise)
    reward = {"chunk": jnp.int32(chunk), "candidate": jnp.int32(candidate), "value": jnp.float32(value)}
    return _stream(models, self.SEARCH, 5, seed, params=small.params() | {"image_reward": reward})

  def _usual_scores(self, seed=0):
    return self._doctored(chunk=-1, candidate=0, value=0.0, seed=seed)

  def _check(self, traces, banned, seed=0):
    """Up to the bad chunk nothing differs; there the best others survive; after it all is finite."""
    clean = self._usual_scores(seed)
    for chunk in range(self.CHUNK):
      np.testing.assert_array_equal(traces[chunk].survivor, clean[chunk].survivor)
    trace, usual = traces[self.CHUNK], clean[self.CHUNK]
    assert list(np.flatnonzero(~small.per_candidate(trace.candidates.usable))) == sorted(banned)
    ranking = np.argsort(-small.per_candidate(usual.candidates.hybrid), kind="stable")
    expected = [n for n in ranking if n not in banned][: self.SEARCH.top_k]
    expected += [expected[0]] * (self.SEARCH.top_k - len(expected))
    np.testing.assert_array_equal(trace.survivor, expected)
    for trace in traces:
      assert np.isfinite(trace.latents).all()
      assert np.isfinite(trace.score).all()
    for trace in traces[self.CHUNK + 1 :]:
      assert trace.candidates.usable.all()

  @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
  def test_bad_score_of_the_best_candidate(self, value):
    best = int(self._usual_scores()[self.CHUNK].survivor[0])
    self._check(self._doctored(self.CHUNK, best, value), [best])

  def test_nan_in_the_noise(self):
    """From seed 0, the best candidate's between the steps; from seed 50, all but one candidate's at the start."""
    best = int(self._usual_scores()[self.CHUNK].survivor[0])
    for seed, banned in ((0, [best]), (50, [0, 1, 3])):
      mark = sum(1 << n for n in banned)
      self._check(self._usual_scores(seed + 10**7 * mark), banned, seed)


@dataclasses.dataclass(frozen=True)
class _DoctoredSum(toy.WindowSum):
  """The sum of the window, but for one candidate of one chunk."""

  def __call__(self, params, condition, window, info):
    bad = (info.chunk_index == params["chunk"]) & (info.candidate_index == params["candidate"])
    return jnp.where(bad, params["value"], super().__call__(params, condition, window, info))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("chunk", "candidate", "others"), [(0, 3, [2, 1]), (1, 0, [1, 3])])
def test_bad_video_score_of_the_best_candidate(chunk, candidate, others, value):
  """By hand. The noise of chunk 0 is 0 to 3, and a chunk is half of it: 3 and 2 survive, without 3 these are 2 and 1.

  In chunk 1 the fresh noise is 6, 0, 1, 2. Fused with -0.1 of the parents' 3 and 2 it is 5.67, -0.3, 0.79, 1.79, and
  chunks are 5.1, 2.1, 1.9, 2.4, windows 6.6, 3.6, 2.9, 3.4. A quarter of the first and the rest of the second: 0 is
  best, then 1, then 3.
  """
  models = dataclasses.replace(toy.MODELS, video_reward=_DoctoredSum())
  reward = {"chunk": jnp.int32(chunk), "candidate": jnp.int32(candidate), "value": jnp.float32(value)}
  search = dataclasses.replace(small.SEARCH, first_candidate="fresh")
  condition = Condition((), (), (), jnp.int32(5))
  stream = drivers.stream(toy.PARAMS | {"video_reward": reward}, condition, models, search, num_chunks=5, seed=0)
  traces = [next(stream) for _ in range(chunk + 1)]
  assert small.per_candidate(traces[chunk].candidates.usable).tolist() == [n != candidate for n in range(4)]
  assert traces[chunk].survivor.tolist() == others
  if chunk:
    assert traces[0].survivor.tolist() == [3, 2]


class _TwoNumbers(toy.ToyGenerator):
  """Latents of two equal numbers; the second is NaN where a first chunk ends with 1.5."""

  def init_memory(self, params, search):
    return jnp.zeros(self.latent_shape)

  def denoise(self, params, x, step, text, view, execution, image=None):
    x0 = view + x
    return x0.at[0, 0, 0, 1].set(jnp.where((step == 1) & (x0[0, 0, 0, 0] == 1.5), jnp.nan, x0[0, 0, 0, 1]))


class _Bytes(LatentCodec):
  """Frames in bytes, where a NaN is 0."""

  def decode(self, params, latents, state, *, first):
    return jnp.nan_to_num(10 * latents).astype(jnp.uint8), state

  def frame_dtype(self):
    return jnp.dtype(jnp.uint8)


def test_a_single_nan_that_no_frame_shows():
  """The frames of the four candidates are 0, 5, 10, and 15 beside 0: a mean of 7.5 that would survive."""
  shape = (1, 1, 1, 2)

  def draw(seed):
    return NoiseDraws(jnp.full(shape, seed % 7, jnp.float32), jnp.zeros((1, *shape)))

  models = dataclasses.replace(
    toy.MODELS, generator=_TwoNumbers(latent_shape=shape), codec=_Bytes(shape[1:]), draw_noise=draw
  )
  condition, search = Condition((), (), (), jnp.int32(2)), small.SEARCH
  trace = next(drivers.stream(toy.PARAMS, condition, models, search, num_chunks=2, seed=0))
  np.testing.assert_array_equal(trace.candidates.short, [[0.0, 5.0], [10.0, 7.5]])
  np.testing.assert_array_equal(trace.candidates.usable, [[True, True], [True, False]])
  assert trace.survivor.tolist() == [2, 1]


@functools.partial(jax.jit, static_argnums=0)
def _decode(decoder, params, latents):
  return decoder.decode(params, latents, decoder.init_state(params), first=True)[0]


class _HalfOfTheLast(toy.ToyGenerator):
  """Latents of a size that a decoder takes, from Gaussian noise and half of the last chunk's."""

  def init_memory(self, params, search):
    return jnp.zeros(self.latent_shape)

  def denoise(self, params, x, step, text, view, execution, image=None):
    return 0.5 * view + x


class TestRewardDecode:
  """With a real decoder. Windows of 2 chunks over 4 chunks: the window leaves the start of the video."""

  WINDOW = 2

  def _traces(self, reward_decode, decoding="together", **overrides):
    decoder, codec_params = small_codec.decoder()
    reward, execution = small_codec.Brightness(), Execution(decoding=decoding)
    generator = _HalfOfTheLast(small.MODEL.latent_shape)
    models = dataclasses.replace(
      small.models(), generator=generator, codec=decoder, image_reward=reward, video_reward=reward, execution=execution
    )
    search = SearchConfig(
      max_sink_frames=6, sliding_window=self.WINDOW, reward_decode=reward_decode, first_candidate="fresh", **overrides
    )
    condition, params = Condition((), (), (), jnp.int32(4)), toy.PARAMS | {"codec": codec_params}
    return [jax.device_get(x) for x in drivers.stream(params, condition, models, search, num_chunks=4, seed=0)]

  def _decode_alone(self, latents):
    """One call of the decoder on latents that begin a video."""
    decoder, params = small_codec.decoder()
    return np.asarray(_decode(decoder, params, latents))

  def test_scores(self):
    """One beam, one candidate: both modes make the same video, and each judges it by its own frames."""
    single = {"beam_size": 1, "top_k": 1}
    streamed, scratch = self._traces("streamed", **single), self._traces("scratch", **single)
    latents = np.concatenate([trace.latents[0] for trace in streamed])
    video = self._decode_alone(latents)
    bounds = [0, 5, 11, 17, 23]
    judge = small_codec.Brightness().by_numpy
    for chunk in range(4):
      own = latents[3 * chunk : 3 * chunk + 3]
      window = latents[max(0, 3 * (chunk + 1 - self.WINDOW)) : 3 * chunk + 3]
      frames = video[bounds[chunk] : bounds[chunk + 1]]
      # A full window has as many frames as a video of two chunks by itself.
      seen = video[max(0, bounds[chunk + 1] - 11) : bounds[chunk + 1]]
      for trace, short, long in (
        (streamed[chunk], frames, seen),
        (scratch[chunk], self._decode_alone(own), self._decode_alone(window)),
      ):
        np.testing.assert_allclose(trace.latents[0], own, rtol=0, atol=1e-5)
        # Truncation to uint8 turns the last digit of a float into one step of 255.
        assert np.abs(trace.frames[0].astype(int) - frames).max() <= 1
        np.testing.assert_allclose(trace.candidates.short[0, 0], judge(short), rtol=0, atol=2e-3)
        np.testing.assert_allclose(trace.candidates.long[0, 0], judge(long), rtol=0, atol=4e-3)
    difference = [abs(a.candidates.long - b.candidates.long).max() for a, b in zip(streamed, scratch, strict=True)]
    assert difference[0] < 1e-6
    assert max(difference[1:]) > 0.02

  def test_a_full_window_is_as_long_as_its_latents_alone(self):
    """117 frames for the 30 latents of the released window, however long the video is."""
    codec = StreamingDecoder(small_codec.decoder()[0].graphdef, preset("tiny").codec, (4, 4))
    assert codec.config.temporal_stride == 4
    models = dataclasses.replace(small.models(), codec=codec)
    past = lambda window: past_capacity(models, SearchConfig(max_sink_frames=6, sliding_window=window))
    assert past(10) + codec.num_frames(3, first=False) == 117
    assert (past(2), past(1)) == (9, 0)
    assert past_capacity(models, SearchConfig(reward_decode="scratch")) == 0

  @pytest.mark.parametrize("decoding", [pytest.param("together", marks=pytest.mark.slow), "twice"])
  def test_frames_follow_the_winners_lineage(self, decoding):
    """Two beams of two: every beam's decoder state went where the beam went."""
    traces = self._traces("streamed", decoding)
    assert any(list(trace.survivor // 2) != [0, 1] for trace in traces[1:])
    for beam in range(2):
      path = _ancestors(traces, 2, 3, beam)
      latents = np.concatenate([traces[i].latents[position] for i, position in enumerate(path)])
      frames = np.concatenate([traces[i].frames[position] for i, position in enumerate(path)])
      assert np.abs(frames.astype(int) - self._decode_alone(latents)).max() <= 1


def test_noise_draws_are_used_once_each():
  """Two candidates with the same fresh noise and different re-noise end in different chunks, and the reverse."""
  usual = gaussian_noise(small.MODEL.latent_shape, 2)

  def draw(seed):
    """Seeds below 100 share the fresh noise of seed 0, and all others share its re-noise."""
    own, shared = usual(seed), usual(jnp.int32(0))
    low = seed < 100
    return NoiseDraws(jnp.where(low, shared.fresh, own.fresh), jnp.where(low, own.renoise, shared.renoise))

  models = dataclasses.replace(small.models(), draw_noise=draw)
  for seed, same_start in ((0, True), (100, False)):
    trace = _stream(models, small.SEARCH, 1, seed, record=True)[0]
    noise, x0 = (small.per_candidate(trace.steps[name]) for name in ("noise", "x0"))
    assert (np.abs(noise[0] - noise[1]).max() == 0) == same_start
    assert (np.abs(x0[0, 0] - x0[1, 0]).max() == 0) == same_start
    assert np.abs(x0[0, 1] - x0[1, 1]).max() > 1e-3


def test_previews_change_nothing_else():
  models = small.models()
  watched = dataclasses.replace(models, execution=dataclasses.replace(models.execution, preview_frames=2))
  beams, candidates = small.SEARCH.top_k, small.SEARCH.beam_size
  for plain, seen in zip(_stream(models, small.SEARCH, 3), _stream(watched, small.SEARCH, 3), strict=True):
    assert plain.previews is None
    assert seen.previews.shape == (beams, candidates, 2, *small.FRAME)
    chex.assert_trees_all_equal(plain, seen._replace(previews=None))
    # These are the first and the last of three frames: the middles of two halves.
    survivors = seen.previews.reshape(-1, *seen.previews.shape[2:])[seen.survivor]
    np.testing.assert_array_equal(survivors, seen.frames[:, [0, 2]])


def test_previews_of_large_pictures_are_means_of_squares():
  pictures = np.random.default_rng(0).integers(0, 256, (2, 1, 3, 5, 330, 3), dtype=np.uint8)
  small_ones = np.asarray(small_pictures(jnp.asarray(pictures)))
  assert small_ones.shape == (2, 1, 3, 1, 110, 3)
  square = pictures[1, 0, 2, :3, 327:330].reshape(-1, 3)
  np.testing.assert_allclose(small_ones[1, 0, 2, 0, 109], square.mean(axis=0), atol=0.501)
  np.testing.assert_array_equal(small_pictures(jnp.asarray(pictures[..., :160, :])), pictures[..., :160, :])


def test_nothing_is_previewed_where_losers_are_not_kept():
  params, search = small.params(), dataclasses.replace(small.SEARCH, beam_size=3)
  for decoding, has_previews in (("together", True), ("twice", False)):
    execution = dataclasses.replace(small.models().execution, preview_frames=2, decoding=decoding)
    models = dataclasses.replace(small.models(), execution=execution)
    state = jax.eval_shape(lambda models=models: init_state(params, models, search, 0))
    run = functools.partial(chunk_step, models=models, search=search, first=True)
    previews = jax.eval_shape(run, params, state, small.condition(1))[1].previews
    assert (previews and previews.shape) == ((2, 3, 2, *small.FRAME) if has_previews else None)
