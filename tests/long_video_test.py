"""Long videos: nothing is kept that grows with their length, and a kill in the middle changes no bit."""

import json
import weakref

import pytest

from experiments.measure import long_video
from streamt1_jax.pipeline import Pipeline
from tests.command_line import generate, save_model

PROMPT = "a red circle moves left over a dark blue background"
CHUNKS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("model") / "tiny")


def test_no_chunk_is_kept(tmp_path, monkeypatch, checkpoint):
  """Frames live while they wait for their save, and for the save before it, which may still be written.

  The frames that are judged together, a minute in earnest, are copies.
  """
  stream_states, frames, alive = Pipeline.stream_states, [], []

  def watched(self, *inputs, **options):
    for state, traces in stream_states(self, *inputs, **options):
      frames.append(weakref.ref(traces[0].frames))
      yield state, traces
      del traces
      alive.append(sum(frame() is not None for frame in frames))

  monkeypatch.setattr(Pipeline, "stream_states", watched)
  arguments = [f"--checkpoint={checkpoint}", f"--prompt={PROMPT}", f"--num_latent_frames={3 * CHUNKS}"]
  result = generate(tmp_path, *arguments, "--search=none", "--save_every=2")
  assert result.code == 0, result
  assert len(frames) == CHUNKS
  assert max(alive) <= 5, alive


@pytest.mark.slow(reason="makes 2 minutes of video twice, in processes of their own")
def test_killed_in_the_middle(tmp_path, capsys, checkpoint):
  arguments = [f"--model={checkpoint}", f"--work_dir={tmp_path}", "--seconds=120", "--save_every=10"]
  assert long_video.main(arguments) == 0
  report = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert report["same"]
  (resumed,) = report["killed"]["resumed_at_chunks"]
  assert 60 <= resumed <= report["killed_at_chunk"] + 20
  # Each chunk is 2.4 MB when it is enlarged for the encoder: kept, 128 of them would be 300 MB.
  resident = report["undisturbed"]["resident_bytes_by_tenths"]
  assert resident[-1] - resident[1] < 50e6
