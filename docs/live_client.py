"""Asks a live server for a video, changes its prompt once, and writes what comes to a file.

python docs/live_client.py http://127.0.0.1:8000 video.mp4 "a red circle moves left" "a blue square moves up"
"""

import asyncio
import json
import sys

import aiohttp


async def record(url: str, path: str, prompt: str, then: str, chunks: int = 8) -> None:
  async with aiohttp.ClientSession() as web, web.ws_connect(f"{url}/v1/realtime/video") as socket:
    await socket.send_json({"type": "session.start", "prompt": prompt})
    mine = False
    with open(path, "wb") as file:
      async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
          if mine:
            file.write(message.data)
          continue
        event = json.loads(message.data)
        kind, index = event["type"], event.get("transport_chunk_index")
        mine |= kind == "session.accepted"
        if kind != "search.candidates":
          print(event)
        if mine and index == chunks // 2:
          change = {"event_id": "1", "event": {"prompt": then}}
          await socket.send_json({"type": "session.interaction", "interaction": change})
        if mine and index == chunks - 1:
          await socket.send_json({"type": "session.stop"})
        if mine and kind == "session.done":
          break


if __name__ == "__main__":
  url, path, prompt, then = sys.argv[1:]
  asyncio.run(record(url, path, prompt, then))
