"""A bucket in memory behind gs://. The libraries that a run reads and writes through find it there.

  etils.epath ── fsspec ── MemoryBucket ──┐
                                          ├── one dict of objects
  TensorStore's own GCS driver ── HTTP ───┘   a server on the loopback interface

It is what an object store is: no folders, nothing renamed, objects whole or not there.
"""

import contextlib
import datetime
import http.server
import json
import os
import pathlib
import shutil
import threading
import urllib.parse

import fsspec
from fsspec.implementations import memory


class MemoryBucket(memory.MemoryFileSystem):
  """fsspec's file system in memory, without folders."""

  protocol = ("gcs", "gs")
  root_marker = ""
  store: dict = {}
  pseudo_dirs: list = [""]

  @classmethod
  def _strip_protocol(cls, path):
    return os.fspath(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

  def mkdir(self, path, create_parents=True, **unused):
    pass

  def makedirs(self, path, exist_ok=False):
    pass


def objects() -> dict[str, bytes]:
  """Every object, by bucket/name."""
  return {name: file.getvalue() for name, file in MemoryBucket.store.items()}


def put(name: str, content: bytes) -> None:
  fsspec.filesystem("gcs").pipe_file(name, content)


def install() -> None:
  """Makes gs:// mean this process's memory, for fsspec and TensorStore."""
  fsspec.register_implementation("gcs", MemoryBucket, clobber=True)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://127.0.0.1:{server.server_port}"
  os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "none"


@contextlib.contextmanager
def moved_to_bucket(folder: pathlib.Path, bucket: str = "bucket"):
  """The files of `folder` are objects of `bucket`, and nowhere else; at the end all objects are files there."""
  install()
  MemoryBucket.store.clear()
  for path in folder.rglob("*"):
    if path.is_file():
      put(f"{bucket}/{path.relative_to(folder)}", path.read_bytes())
  shutil.rmtree(folder)
  try:
    yield
  finally:
    for name, content in objects().items():
      path = folder / pathlib.PurePath(name).relative_to(bucket)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)


class _Handler(http.server.BaseHTTPRequestHandler):
  """The part of Google's JSON interface that TensorStore uses."""

  protocol_version = "HTTP/1.1"
  # An answer is two writes. The system would hold the second one back until the first is acknowledged: 40 ms later.
  disable_nagle_algorithm = True

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    bucket, _, rest = url.path.partition("/b/")[2].partition("/o")
    if not rest:
      prefix = f"{bucket}/{query.get('prefix', '')}"
      names = sorted(name for name in list(MemoryBucket.store) if name.startswith(prefix))
      items = [_describe(name) for name in names]
      return self._reply(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
    found = MemoryBucket.store.get(f"{bucket}/{urllib.parse.unquote(rest[1:])}")
    if found is None:
      return self._reply(404, b"{}")
    content, status, headers = found.getvalue(), 200, {"x-goog-generation": "1"}
    if "Range" in self.headers:
      low, _, high = self.headers["Range"].removeprefix("bytes=").partition("-")
      if low:
        first, last = int(low), min(int(high) if high else len(content) - 1, len(content) - 1)
      else:
        first, last = max(0, len(content) - int(high)), len(content) - 1
      headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
      status, content = 206, content[first : last + 1]
    return self._reply(status, content, headers)

  def do_POST(self):
    url = urllib.parse.urlsplit(self.path)
    name = f"{url.path.split('/b/')[1].split('/')[0]}/{dict(urllib.parse.parse_qsl(url.query))['name']}"
    put(name, self.rfile.read(int(self.headers["Content-Length"])))
    return self._reply(200, json.dumps(_describe(name)).encode())

  def do_DELETE(self):
    bucket, _, name = urllib.parse.urlsplit(self.path).path.partition("/b/")[2].partition("/o/")
    found = MemoryBucket.store.pop(f"{bucket}/{urllib.parse.unquote(name)}", None)
    return self._reply(204 if found else 404, b"")

  def _reply(self, status, content, headers=None):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *unused):
    pass


def _describe(name: str) -> dict:
  bucket, _, path = name.partition("/")
  size, now = len(MemoryBucket.store[name].getvalue()), datetime.datetime.now(datetime.UTC).isoformat()
  return {
    "kind": "storage#object", "bucket": bucket, "name": path, "size": str(size), "generation": "1",
    "metageneration": "1", "updated": now, "timeCreated": now,
  }  # fmt: skip
