"""The format of trace.json, which one check knows for all searches; `docs/trace.md` says what every field means."""

from typing import Any

from streamt1_jax.cost import Cost
from streamt1_jax.trace import ROUTE_NAMES

NONE = type(None)
NUMBER = (int, float)
MAYBE_NUMBER = (int, float, NONE)

VIDEO = {
  "version": int,
  "method": (str, NONE),
  "beam_size": int,
  "top_k": int,
  "given_chunks": int,
  "segments": list,
  "tries": list,
  "chunks": list,
}
"""The least that every trace says; one of a file also says `JUDGES`."""
JUDGES = {"image_rewards": dict, "video_rewards": dict, "short_frames": (int, NONE), "reward_dtype": (str, NONE)}
SEGMENT = {"chunk": int, "prompt": str}
TRY = {"begin": int, "chunks": int, "seed": int, "score": MAYBE_NUMBER, "kept": bool, "judged_frames": int}
CHUNK = {
  "chunk": int,
  "evictions": list,
  "candidates": list,
  "rejected": list,
  "survivors": list,
  "scores": list,
  "judged": bool,
  "rounds": (int, NONE),
  "events": list,
  "cost": (dict, NONE),
}
EVICTION = {"parent": int, "route": str, "frame": (int, NONE), "sink_frame": (int, NONE)}
CANDIDATE = {
  "candidate": int,
  "parent": int,
  "seed": int,
  "short": MAYBE_NUMBER,
  "long": MAYBE_NUMBER,
  "hybrid": MAYBE_NUMBER,
  "route": str,
  "flags": dict,
  "usable": bool,
  "survivor": bool,
  "rank": (int, NONE),
  "fate": str,
  "copies": int,
  "log_weight": MAYBE_NUMBER,
  "preview": MAYBE_NUMBER,
  "ahead": MAYBE_NUMBER,
}
REJECTED = {"parent": int, "place": int, "seed": int, "preview": MAYBE_NUMBER, "fate": str, "step": int}
EVENT = {
  "step": (str, int),
  "ancestors": (list, NONE),
  "distinct_parents": int,
  "ess": MAYBE_NUMBER,
  "resampled": (bool, NONE),
}
FINAL = {"scores": list, "best": int, "lineage": list}
STEP = {"chunk": int, "beam": int, "candidate": int}
FATES = ("survived", "duplicated", "pruned", "unusable")


def _has(value: Any, fields: dict[str, Any]) -> None:
  """All of these fields, each of its type. True is no number."""
  assert isinstance(value, dict)
  for name, kind in fields.items():
    assert name in value, name
    kinds = kind if isinstance(kind, tuple) else (kind,)
    assert type(value[name]) in kinds, (name, value[name])


def check_file(document: dict[str, Any]) -> None:
  """Fails unless the trace.json of a finished video is one tree in the format, and says what judged."""
  check(document)
  _has(document, JUDGES)
  for chunk in document["chunks"]:
    assert chunk["cost"] is not None


def check(document: dict[str, Any]) -> None:
  """Fails unless a finished video's trace is one tree in the format."""
  _has(document, VIDEO)
  assert document["version"] == 1
  for segment in document["segments"]:
    _has(segment, SEGMENT)
  for each in document["tries"]:
    _has(each, TRY)
    assert each["chunks"] >= 1
    assert document["given_chunks"] <= each["begin"] < document["given_chunks"] + len(document["chunks"])
  for index, chunk in enumerate(document["chunks"], document["given_chunks"]):
    _has(chunk, CHUNK)
    assert chunk["chunk"] == index
    _check_chunk(chunk, document["beam_size"], document["top_k"])
  final = document["final"]
  _has(final, FINAL)
  assert len(final["scores"]) == document["top_k"]
  for step in final["lineage"]:
    _has(step, STEP)
  assert [(step["chunk"], step["beam"], step["candidate"]) for step in final["lineage"]] == shown(document)


def _check_chunk(chunk: dict[str, Any], beam_size: int, top_k: int) -> None:
  assert [each["parent"] for each in chunk["evictions"]] == list(range(top_k))
  for each in chunk["evictions"]:
    _has(each, EVICTION)
    assert each["route"] in ROUTE_NAMES.values()
  for each in chunk["events"]:
    _has(each, EVENT)
    assert 1 <= each["distinct_parents"] <= top_k
  for each in chunk["rejected"]:
    _has(each, REJECTED)
    assert each["fate"] in ("rejected", "unusable")
  if chunk["cost"] is not None:
    assert set(chunk["cost"]) == set(Cost._fields)
    assert all(type(count) is int and count >= 0 for count in chunk["cost"].values())
  survivors, candidates = chunk["survivors"], chunk["candidates"]
  assert len(survivors) == len(chunk["scores"]) == top_k
  numbers = [each["candidate"] for each in candidates]
  assert len(set(numbers)) == len(numbers)
  assert set(survivors) <= set(numbers)
  for each in candidates:
    _has(each, CANDIDATE)
    assert each["parent"] == each["candidate"] // beam_size
    assert each["fate"] in FATES
    assert each["copies"] == survivors.count(each["candidate"])
    assert each["survivor"] == (each["copies"] > 0) == (each["fate"] in ("survived", "duplicated"))
    assert (each["fate"] == "duplicated") == (each["copies"] > 1)


def shown(document: dict[str, Any]) -> list[tuple[int, int, int]]:
  """Chunk, beam and candidate of every chunk of the video that is shown, from its nodes and their parents alone."""
  beam, path = document["final"]["best"], []
  for chunk in reversed(document["chunks"]):
    candidate = chunk["survivors"][beam]
    path.append((chunk["chunk"], beam, candidate))
    (node,) = (each for each in chunk["candidates"] if each["candidate"] == candidate)
    beam = node["parent"]
  return path[::-1]
