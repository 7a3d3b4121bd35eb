"""Messages of clients: what is taken, what is refused in one line, and that nothing else ever happens."""

import asyncio
import base64
import json
import random

import pytest

from streamt1_jax.serve import protocol
from streamt1_jax.serve.protocol import Interaction, Pause, Refused, Start, parse
from tests.live_server import PATIENCE, live

PICTURE = base64.b64encode(b"a picture").decode()


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    ({"type": "session.start", "prompt": "a"}, Start("a")),
    (
      {"type": "session.start", "prompt": "a", "search": "1x4", "seed": -3, "image": PICTURE, "format": "m4s"},
      Start("a", "1x4", -3, b"a picture"),
    ),
    (
      {"type": "session.interaction", "interaction": {"event_id": "7", "event": {"prompt": "b"}}},
      Interaction("b", "7"),
    ),
    ({"type": "session.pause"}, Pause()),
  ],
)
def test_messages(message, expected):
  assert parse(json.dumps(message)) == expected


@pytest.mark.parametrize(
  ("text", "code", "words"),
  [
    ("", "not_json", "JSON"),
    ("[" * 100_000, "not_json", "JSON"),
    ('{"type": "session.start", "prompt": "a", "seed": NaN}', "not_json", "JSON"),
    ("[]", "invalid", "object"),
    ('{"type": ["session.start"]}', "unknown_type", "session.start"),
    ('{"type": "session.start"}', "invalid", "prompt"),
    ('{"type": "session.start", "prompt": " "}', "invalid", "prompt"),
    (r'{"type": "session.start", "prompt": "\ud800"}', "invalid", "prompt"),
    ('{"type": "session.start", "prompt": "a", "seed": true}', "invalid", "seed"),
    ('{"type": "session.start", "prompt": "a", "seed": 2147483648}', "invalid", "seed"),
    ('{"type": "session.start", "prompt": "a", "image": "a b"}', "invalid", "image"),
    ('{"type": "session.start", "prompt": "a", "folder": "/etc"}', "invalid", "'folder'"),
    ('{"type": "session.save", "folder": "/etc"}', "invalid", "'folder'"),
    ('{"type": "session.interaction", "interaction": {"event": {}}}', "invalid", "prompt"),
    (json.dumps({"type": "session.start", "prompt": "a" * 2001}), "too_long", "2000"),
  ],
)
def test_refused(text, code, words):
  with pytest.raises(Refused) as refused:
    parse(text)
  assert refused.value.code == code
  told = protocol.error_event(refused.value)
  assert words in told["message"]
  assert "\n" not in told["message"]
  assert len(told["message"]) <= 500


def picture_of(size: int) -> str:
  """A message with a picture of `size` bytes."""
  return json.dumps({"type": "session.start", "prompt": "a", "image": base64.b64encode(bytes(size)).decode()})


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_a_picture_has_at_most_4_mb(extra):
  for size in (protocol.MOST_IMAGE_BYTES, protocol.MOST_IMAGE_BYTES - extra):
    assert len(parse(picture_of(size)).image) == size
  with pytest.raises(Refused, match=rf"4194304 bytes \(4 MB\), got {protocol.MOST_IMAGE_BYTES + extra}$") as refused:
    parse(picture_of(protocol.MOST_IMAGE_BYTES + extra))
  assert refused.value.code == "too_long"


def test_a_client_whose_picture_is_too_large_is_told_so_and_stays():
  async def run():
    async with live() as server:
      client = await server.client()
      assert (await client.hear())["most_image_bytes"] == protocol.MOST_IMAGE_BYTES
      await client.socket.send_str(picture_of(10_000_000))
      error = await client.hear_until("error")
      await client.say("session.ping")
      await client.hear_until("session.pong")
      return error

  error = asyncio.run(run())
  assert error["code"] == "too_long"
  assert "4 MB" in error["message"]


def test_a_refused_prompt_is_told_by_its_id():
  with pytest.raises(Refused) as refused:
    parse('{"type": "session.interaction", "interaction": {"event_id": "7", "event": {"prompt": 5}}}')
  assert protocol.error_event(refused.value)["event_id"] == "7"


KINDS = ["start", "interaction", "pause", "resume", "stop", "save", "ping", "queued", "", "\u2028"]
TEXTS = ["a", "", " ", "\ud800", "\x00", "<script>", "../../etc/passwd", "é" * 300, "a" * 3000, "one", "two", "m4s"]


def anything(chance: random.Random, depth: int = 0):
  """A JSON value."""
  kinds = ["text", "number", "constant"] + (["list", "object"] if depth < 4 else [])
  match chance.choice(kinds):
    case "text":
      return chance.choice(TEXTS)
    case "number":
      return chance.choice([0, -1, 2**31, 10**400, 0.5, -1e308, True])
    case "constant":
      return chance.choice([None, True, False])
    case "list":
      return [anything(chance, depth + 1) for _ in range(chance.randrange(4))]
  names = ["prompt", "seed", "search", "image", "interaction", "event", "event_id", "type", "folder", "format"]
  return {chance.choice(names): anything(chance, depth + 1) for _ in range(chance.randrange(5))}


def message(chance: random.Random) -> str | bytes:
  """Something a client may send: sometimes right, mostly not."""
  kind = f"session.{chance.choice(KINDS)}"
  right = {"type": kind, "prompt": chance.choice(TEXTS)}
  if kind == "session.interaction":
    right = {"type": kind, "interaction": {"event": {"prompt": chance.choice(TEXTS)}, "event_id": chance.choice(TEXTS)}}
  elif kind != "session.start":
    right.pop("prompt")
  match chance.randrange(6):
    case 0:
      return json.dumps(anything(chance))
    case 1:
      return chance.randbytes(chance.randrange(2000))
    case 2:
      text = json.dumps(right)
      at = chance.randrange(len(text))
      return text[:at] + chance.choice(["", "{", "[", '"', "\\", "\x00", "9" * 5000]) + text[at + 1 :]
    case 3:
      extra = anything(chance)
      return json.dumps(right | extra if isinstance(extra, dict) else right)
  return json.dumps(right)


def test_parsing_refuses_and_does_nothing_else():
  chance = random.Random(0)
  taken = refused = 0
  for _ in range(10_000):
    content = message(chance)
    text = content if isinstance(content, str) else content.decode(errors="replace")
    try:
      parse(text)
      taken += 1
    except Refused:
      refused += 1
  assert taken > 1000
  assert refused > 1000


# Slow: ten thousand messages, as parsing alone meets above.
@pytest.mark.parametrize("count", [1000, pytest.param(3400, marks=pytest.mark.slow)])
def test_no_client_disturbs_the_server_or_the_session_of_another(count):
  async def storm(server, chance: random.Random, count: int) -> int:
    """Sends `count` messages, over as many connections as it takes. Returns how many of these the server closed."""
    closed = sent = 0
    while sent < count:
      socket = await server.http.ws_connect("/v1/realtime/video", max_msg_size=0)
      while sent < count:
        content = message(chance)
        # Some are larger than any message may be, which ends the connection.
        if chance.random() < 0.002:
          content = "a" * (protocol.MOST_BYTES + 1)
        sent += 1
        try:
          await (socket.send_str(content) if isinstance(content, str) else socket.send_bytes(content))
        except UnicodeEncodeError:
          continue
        except ConnectionError:
          closed += 1
          break
        # Some vanish, and some read nothing of what they are told.
        if chance.random() < 0.005:
          break
      await socket.close()
    return closed

  async def run():
    async with live(rate=(1e9, 1e9), lead=0.0) as server:
      client = await server.client()
      await client.say("session.start", prompt="a")
      await client.hear_until("video.chunk_metadata")
      listening = asyncio.create_task(client.hear_until("session.done"))
      closed = await asyncio.gather(*(storm(server, random.Random(seed), count) for seed in range(3)))
      assert sum(closed) > 0
      refused = await server.metric("refused_total")
      assert refused > 500
      # The session goes on, under the prompt of the one whose it is.
      chunks = len(client.of("video.chunk_metadata"))
      while len(client.of("video.chunk_metadata")) < chunks + 2:
        await asyncio.sleep(0.01)
      await client.say("session.stop")
      await asyncio.wait_for(listening, PATIENCE)
      assert (await server.http.get("/healthz")).status == 200
      # And the next client that asks gets a session.
      late = await server.client()
      await late.say("session.start", prompt="b")
      while (await late.hear_until("video.start"))["prompt"] != "b":
        pass
    assert {chunk["prompt"] for chunk in client.of("video.chunk_metadata")} == {"a"}

  asyncio.run(run())


def test_too_many_messages_are_refused():
  async def run():
    async with live(rate=(3, 0.001)) as server:
      client = await server.client()
      for _ in range(5):
        await client.say("session.ping")
      for _ in range(3):
        await client.hear_until("session.pong")
      return [(await client.hear_until("error"))["code"] for _ in range(2)]

  assert asyncio.run(run()) == ["rate", "rate"]
