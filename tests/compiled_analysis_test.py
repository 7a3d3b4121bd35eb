"""What is read from programs: collectives from compiled text, FLOP from jaxprs, both against counts by hand."""

import functools
import importlib.util
import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from streamt1_jax.backbone import flash_attention
from streamt1_jax.config import ConfigError
from streamt1_jax.io import rows
from streamt1_jax.measuring import compilation_table, compiled_step, flop_count, hlo_collectives, tpu_compiler
from streamt1_jax.measuring.hlo_collectives import Collective
from tests.command_line import call

SHAPE = {"x": 2, "y": 4}


def _collectives(f, *shapes, specs, out):
  mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), (AxisType.Auto,) * len(SHAPE))
  run = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
  text = jax.jit(run).lower(*(jnp.zeros(shape) for shape in shapes)).compile().as_text()
  return hlo_collectives.find(text, SHAPE, ("phase_one", "phase_two"))


def test_kinds_axes_phases_and_loops():
  def f(x):
    with jax.named_scope("phase_one"):
      x = jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.psum(x, "y") * 0.1, x)
    with jax.named_scope("phase_two"):
      return jax.lax.all_gather(x, "x"), jax.lax.ppermute(x, "y", [(0, 1), (1, 2)])

  found = _collectives(f, (16, 4), specs=P(("x", "y")), out=(P(None, ("x", "y")), P(("x", "y"))))
  shard = 16 * 4 * 4 // 8
  assert set(found) == {
    Collective("all-reduce", "y", "phase_one", shard, 5),
    Collective("all-gather", "x", "phase_two", 2 * shard, 1),
    Collective("collective-permute", "y", "phase_two", shard, 1),
  }
  assert hlo_collectives.by_kind(found)["all-reduce"] == {"count": 5, "bytes": 5 * shard}


def test_both_axes():
  (found,) = _collectives(lambda x: jax.lax.psum(x, ("x", "y")), (8,), specs=P(("x", "y")), out=P())
  assert (found.axes, found.phase, found.bytes) == ("x+y", "", 4)


def test_asynchronous_text():
  """As TPUs are compiled for: started and finished apart, groups as an iota."""
  text = """HloModule m
%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(30), backend_config={}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (bf16[4,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/phase_one/dot"}
  %d = bf16[16,128]{1,0} all-gather-done(%s)
}

ENTRY %main.5 (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%cond.1, body=%body.1
  %r = f32[8]{0:T(128)} all-reduce(%g), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
  ROOT %n = f32[2]{0:T(128)} all-reduce(%r), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b','c'}, use_global_device_ids=true
}
"""  # noqa: E501
  assert set(hlo_collectives.find(text, SHAPE, ("phase_one",))) == {
    Collective("all-gather", "y", "phase_one", 16 * 128 * 2, 30),
    Collective("all-reduce", "x", "", 32, 1),
    Collective("all-reduce", "y", "", 8, 1),
  }


def test_a_chain_is_one_collective():
  """As TPUs run one beside two computations: each of four fusions has the instruction."""
  gather = (
    "all-gather(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, "
    'frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/phase_one/gather"}'
  )
  text = f"""HloModule m
%start (p: bf16[4,128]) -> (bf16[4,128], bf16[16,128]) {{
  %g.1 = bf16[16,128]{{1,0}} {gather}
  ROOT %c.1 = (bf16[4,128], bf16[16,128], u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}}

%step (p: bf16[4,128]) -> (bf16[8,8], bf16[16,128]) {{
  %g.2 = bf16[16,128]{{1,0}} {gather}
  ROOT %t.2 = (bf16[8,8], bf16[16,128]) tuple(%dot, %g.2)
}}

%done (p: bf16[4,128]) -> bf16[16,128] {{
  %g.3 = bf16[16,128]{{1,0}} {gather}
  ROOT %c.3 = bf16[16,128]{{1,0}} custom-call(%p, %g.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[4,128]) -> bf16[16,128] {{
  %x = bf16[4,128]{{1,0}} parameter(0)
  %a = (bf16[4,128], bf16[16,128], u32[]) fusion(%x), kind=kCustom, calls=%start
  %b = (bf16[8,8], bf16[16,128]) fusion(%a), kind=kCustom, calls=%step
  %c = (bf16[8,8], bf16[16,128]) fusion(%b), kind=kCustom, calls=%step
  ROOT %d = bf16[16,128]{{1,0}} fusion(%c), kind=kCustom, calls=%done
}}
"""
  found = hlo_collectives.find(text, SHAPE, ("phase_one",))
  assert found == [Collective("all-gather", "y", "phase_one", 16 * 128 * 2, 1)]


def test_flop():
  def f(x, w, image, kernel):
    x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x, x)
    y = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.jit(lambda x: x @ w)(x).sum() + y.sum()

  shapes = (5, 7), (7, 7), (1, 6, 8, 2), (3, 3, 2, 4)
  jaxpr = jax.make_jaxpr(f)(*map(jnp.zeros, shapes))
  assert flop_count.count(jaxpr) == 6 * (2 * 5 * 7 * 7) + 2 * 6 * 8 * 4 * 3 * 3 * 2


def test_flop_of_the_attention_kernel():
  """Own keys and all slots but the last, which is empty while the chunk is made."""
  beams, candidates, tokens, heads, width, layers, slots = 2, 3, 16, 4, 8, 2, 5
  q = jnp.zeros((beams, candidates, tokens, heads, width))
  cache = jnp.zeros((beams, layers, slots, heads, tokens, width))
  count = jnp.zeros(beams, jnp.int32)
  attend = functools.partial(flash_attention.attend_slots, interpret=True)
  turns = jnp.zeros((beams, slots, width))
  jaxpr = jax.make_jaxpr(attend)(q, q, q, cache, cache, count, turns, turns, jnp.int32(0))
  assert flop_count.count(jaxpr) == 4 * beams * candidates * heads * tokens * (slots * tokens) * width


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_kernel_or_its_substitute_lowers(platform):
  """Lowering needs no device: the kernel becomes Mosaic's own program on TPUs."""
  from streamt1_jax.backbone.attention import MemoryView, attend_with_memory
  from streamt1_jax.nn.rotary import FrameTurns

  tokens, heads, width = 24, 2, 128
  x = jax.ShapeDtypeStruct((tokens, heads, width), jnp.bfloat16)
  cache = jax.ShapeDtypeStruct((2, 3, heads, tokens, width), jnp.bfloat16)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  turns = FrameTurns(*[jax.ShapeDtypeStruct((3, width), jnp.float32)] * 2)
  attend = lambda q, k, v, layer, *memory: attend_with_memory(q, k, v, MemoryView(*memory), layer)
  memory = cache, cache, scalar, turns
  exported = jax.export.export(jax.jit(attend), platforms=[platform])(x, x, x, scalar, *memory)
  assert ("tpu_custom_call" in exported.mlir_module()) == (platform == "tpu")


_needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


# Where latents are judged all at once fits; large frames are decoded in turn.
_IN_TURN = "--decoding=in_turn"


def _compile(folder, *arguments):
  return call("measure.aot_compile", folder, *arguments)


@pytest.mark.parametrize(
  ("kind", "flags", "decoding"),
  [
    ("TPU v6 lite", [], "twice"),
    ("TPU v6 lite", ["--decoding=in_turn"], "in_turn"),
    ("TPU7x", [], "in_turn"),
    # Even in int8 both large rewards leave no room for decoder states of all candidates.
    ("TPU v6 lite", ["--rewards", "--reward_dtype=int8", "--max_sink_frames=3"], "twice"),
  ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_it_decodes_as_a_search_would_on_the_chip(tmp_path, monkeypatch, kind, flags, decoding):
  def build(model, search, execution, *_):
    raise ConfigError(f"built to decode {execution.decoding}")

  monkeypatch.setattr(tpu_compiler, "get_devices", lambda _: [types.SimpleNamespace(device_kind=kind)])
  monkeypatch.setattr(compiled_step, "build", build)
  result = _compile(tmp_path, "--topology=v6e:1x1", *flags)
  assert f"built to decode {decoding}\n" in result.stderr


@_needs_compiler
@pytest.mark.slow
def test_compiles_for_a_slice_that_is_not_there(tmp_path):
  arguments = ["--checkpoint_preset=golden", "--topology=v5e:2x4", "--mesh=data:2,candidate:2,model:2", _IN_TURN]
  result = _compile(tmp_path, *arguments)
  assert result.code == 0, result
  report = json.loads(result.stdout.splitlines()[-1])
  assert report["mesh"] == {"data": 2, "beam": 2, "sibling": 1, "model": 2, "seq": 1}
  assert report["fits"] is True
  parts = ("argument_bytes", "output_bytes", "temporary_bytes")
  assert report["hbm_peak_bytes_per_chip"] == sum(report[part] for part in parts) < report["hbm_limit_bytes"]
  assert report["hbm_limit_bytes"] == int(15.75 * 2**30)
  # By hand: 4 forwards of 4 candidates and 1 of 2 beams for both prompts, each seeing 8 chunks of 36 tokens.
  linear, text, patches = 2 * 36 * (6 * 96**2 + 2 * 96 * 192), 4 * 36 * 16 * 96, 4 * 36 * 64 * 96
  forward = 3 * (linear + text + 4 * 36 * 36 * 8 * 96) + patches
  assert report["flop"] == pytest.approx(2 * 18 * forward, rel=0.1)
  assert report["candidate_collectives_in_denoising"] == 0
  assert 0 < report["activation_collectives_per_block"] <= 3
  assert report["collectives"]["all-reduce"]["count"] >= 3 * 3 * 4
  assert report["compile_seconds"] > 0


@_needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
  ("topology", "mesh", "data"), [("v6e:2x2", "candidate:4", 1), ("v5e:2x4", "data:2,candidate:4", 2)]
)
def test_compiles_where_every_candidate_is_alone(tmp_path, topology, mesh, data):
  """libtpu 0.0.42.1 dies of `candidate:4` where scores are gathered and sliced again."""
  result = _compile(tmp_path, "--checkpoint_preset=golden", f"--topology={topology}", f"--mesh={mesh}", _IN_TURN)
  assert result.code == 0, result
  report = json.loads(result.stdout.splitlines()[-1])
  assert report["mesh"] == {"data": data, "beam": 2, "sibling": 2, "model": 1, "seq": 1}
  assert report["candidate_collectives_in_denoising"] == 0


@_needs_compiler
@pytest.mark.parametrize(
  ("topology", "count"), [("v6e:1x1", 1), ("v5e:2x4", 8), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 8), ("v5e:16x16", 256)]
)
def test_slices_that_are_described(topology, count):
  assert len(tpu_compiler.get_devices(topology)) == count


def _report_of_tiny(folder, *arguments):
  result = _compile(folder, "--checkpoint_preset=tiny", "--platform=cuda", "--attention=fold", *arguments)
  assert result.code == 0, result
  return json.loads(result.stdout)


@pytest.fixture(scope="module")
def later_chunk(tmp_path_factory):
  """What is said of the program of every chunk but the first."""
  return _report_of_tiny(tmp_path_factory.mktemp("later_chunk"), "--nofirst_chunk")


def test_the_first_chunk_is_another_program(tmp_path, later_chunk):
  """The decoder makes 9 frames of it, not 12: less work of the same weights and the same state."""
  first_chunk = _report_of_tiny(tmp_path, "--first_chunk")
  assert (first_chunk["first_chunk"], later_chunk["first_chunk"]) == (True, False)
  assert first_chunk["flop"] < later_chunk["flop"]
  assert first_chunk["argument_bytes"] == later_chunk["argument_bytes"]


def test_a_new_prompt_is_a_program_of_its_own(tmp_path, later_chunk):
  """It has 3 clean forwards of each of 2 beams, where a chunk has 18 forwards and decodes 4 candidates."""
  switch = _report_of_tiny(tmp_path, "--switch=released")
  assert (later_chunk["switch"], switch["switch"]) == (None, "released")
  assert switch["argument_bytes"] == later_chunk["argument_bytes"]
  assert 6 / 18 * 0.5 < switch["flop"] / later_chunk["flop"] < 6 / 18


def test_lowers_for_cuda(tmp_path):
  """The step has two places with attention: denoising and the clean pass, each one kernel in a loop over blocks."""
  arguments = ["--checkpoint_preset=bench_mid", "--platform=cuda", "--dtype=bfloat16"]
  result = _compile(tmp_path, *arguments)
  assert result.code == 0, result
  report = json.loads(result.stdout)
  assert report["attention"] == "triton"
  assert report["attention_calls"] == 2
  memory = 2 * 2 * 6 * 8 * 288 * 384 * 2  # keys and values of 2 beams, 6 blocks, 8 slots, 288 tokens, 384 channels
  latents = 2 * (8 + 1) * 3 * 16 * 16 * 24 * 4  # of the 8 slots and of the chunk that left the window
  weights = 15_500_000 * 2
  assert report["argument_bytes"] == pytest.approx(memory + latents + weights, rel=0.03)


@pytest.mark.parametrize("flag", ["topology=v5e:2x4", "mesh=model:2"])
def test_flags_of_tpus_are_refused_for_cuda(tmp_path, flag):
  result = _compile(tmp_path, "--checkpoint_preset=bench_mid", "--platform=cuda", f"--{flag}")
  assert result.code == 2, result
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert f"--{flag.split('=')[0]}" in line


@_needs_compiler
@pytest.mark.parametrize(
  ("arguments", "fragments"),
  [
    (["--topology=v9:1x1"], ["--topology=v9:1x1", "no such slice", "v5e:1x1"]),
    (["--mesh=model:5"], ["--mesh=model:5", "5 devices", "8"]),
    (["--mesh=model:8"], ["--mesh=model:8", "12 heads", "allowed: 1, 2, 4"]),
    (["--topology=v5e:4x4", "--mesh=model:16"], ["--mesh=model:16", "12 heads", "allowed: 1, 2, 4"]),
    (["--mesh=rows:2"], ["--mesh=rows:2", "data, candidate, model"]),
    (["--checkpoint_preset=huge"], ["huge", "wan_1_3b"]),
  ],
)
def test_bad_input(tmp_path, arguments, fragments):
  result = _compile(tmp_path, *arguments)
  assert result.code == 2, result
  (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  for fragment in fragments:
    assert fragment in line


_REPORT = {
  "reward_dtype": None,
  "max_sink_frames": 15,
  "argument_bytes": 3 * 2**30,
  "output_bytes": 0,
  "temporary_bytes": 2**29,
  "hbm_peak_bytes_per_chip": 7 * 2**29,
  "hbm_limit_bytes": 16 * 2**30,
  "fits": True,
  "collectives": {"all-reduce": {"count": 3, "bytes": 1_500_000_000}},
  "activation_collectives_per_block": 3.0,
  "candidate_collectives_in_denoising": 0,
  "compile_seconds": 61.7,
}


def _write_table(folder, report):
  """The file of a run that is through, with the same report for each compilation."""
  writer = rows.Writer(epath.Path(folder / "rows.jsonl"), {"num_layers": None})
  for case in compilation_table.CASES:
    writer.append({"case": case, "report": report})


def test_table_of_what_is_compiled_already(tmp_path):
  _write_table(tmp_path, _REPORT)
  before = (tmp_path / "rows.jsonl").read_text()
  result = call("measure.aot_table", tmp_path, "--output=rows.jsonl")
  assert result.code == 0, result
  assert (tmp_path / "rows.jsonl").read_text() == before
  header, _, *made = result.stdout.splitlines()
  assert len(made) == len(compilation_table.CASES)
  assert sum("| first |" in row for row in made) == sum("| later |" in row for row in made)
  columns = [cell.strip() for cell in header.strip("|").split("|")]
  for case, row in zip(compilation_table.CASES, made, strict=True):
    cells = dict(zip(columns, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    assert cells["slice"] == case["topology"]
    assert (cells["arguments"], cells["temporaries"], cells["peak"], cells["of"]) == ("3.00", "0.50", "3.50", "16.00")
    switch = f"new prompt, {case['switch']}" if "switch" in case else None
    assert cells["chunk"] == (switch or ("first" if case.get("first_chunk") else "later"))
    assert (cells["fits"], cells["rewards"], cells["compile, s"]) == ("yes", "built in", "62")
    assert (cells["collectives, GB"], cells["per block"]) == ("all-reduce 1.50", "3")


_LAST_WORDS = "F1128 rewriter.cc:7] Check failed: dims.ok()\n*** Check failure stack trace: ***\n    @ 0x1 main\n"


def test_why_a_compiler_died(tmp_path, monkeypatch):
  """An interpreter that says what a dying compiler says."""
  script = tmp_path / "python"
  script.write_text(f"#!/bin/sh\nprintf '{_LAST_WORDS}' >&2\nkill -ABRT $$\n")
  script.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(script))
  result = call("measure.aot_table", tmp_path, "--output=rows.jsonl")
  assert result.code == 3, result
  (line,) = result.stderr.splitlines()
  assert "--topology=v6e:1x1" in line
  assert line.endswith("ended with -6: F1128 rewriter.cc:7] Check failed: dims.ok()")
  assert rows.read(epath.Path(tmp_path / "rows.jsonl"), {"num_layers": None}) == []


@pytest.mark.parametrize("content", ["rows\n", "[1]\n", '{"case": {}}\n'])
def test_table_of_another_file(tmp_path, content):
  (tmp_path / "rows.jsonl").write_text(content)
  result = call("measure.aot_table", tmp_path, "--output=rows.jsonl")
  assert result.code == 2, result
  assert result.stderr.startswith("error: --output=rows.jsonl")
  assert (tmp_path / "rows.jsonl").read_text() == content
