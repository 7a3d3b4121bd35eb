"""A hub in the place of Hugging Face's: a server on this machine that answers what the library asks of a repository.

with hub_server.serve({"maker/model": folder}) as hub:
  result = hub.run(tmp_path, "generate", "--checkpoint=hf://maker/model", ...)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from tests import command_line
from tests.command_line import Result

REVISIONS = ("main", "v1")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
  """The server.

  Attributes:
    repos: folder of every repository, by "org/name". Each has one commit, which is its branch main and its tag v1.
    url: where it listens.
    asked: method and path of every request, in order, and its Range if it has one.
    claimed: bytes that it says a file has, by path, where that is a lie.
    broken_once: paths that it stops sending in the middle, the first time.
  """

  repos: Mapping[str, pathlib.Path]
  url: str = ""
  asked: list[str] = dataclasses.field(default_factory=list)
  claimed: dict[str, int] = dataclasses.field(default_factory=dict)
  broken_once: set[str] = dataclasses.field(default_factory=set)

  def run(
    self,
    folder: pathlib.Path,
    program: str,
    *arguments: str,
    file_bytes: int | None = None,
    jax_settings: Mapping[str, Any] | None = None,
    **environment: str,
  ) -> Result:
    """Runs a command in a process of its own, whose cache of the hub is in `folder`."""
    variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", **environment}
    given = (variables, program, arguments, file_bytes)
    process = command_line.start_function(folder, run_with, *given, jax_settings=jax_settings or {})
    process.join()
    return command_line.result_of(process.exitcode, folder)

  def downloads(self) -> list[str]:
    """Paths of the files whose content was asked for."""
    return [
      line.split("/resolve/")[1].split("/", 1)[1]
      for line in self.asked
      if line.startswith("GET") and "/resolve/" in line
    ]


def run_with(variables: Mapping[str, str], program: str, arguments: tuple[str, ...], file_bytes: int | None) -> None:
  """Runs a command with these variables; for `start_function`. The library reads them when it is imported."""
  os.environ.update(variables)
  if file_bytes is not None:
    command_line.limit_file_size(file_bytes)
  command_line.run_main(program, arguments)


@contextlib.contextmanager
def serve(repos: Mapping[str, pathlib.Path]) -> Iterator[Hub]:
  """A hub that holds `repos`, until the end of the block."""
  hub = Hub(repos)
  handler = type("Handler", (_Handler,), {"hub": hub})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    hub.url = f"http://127.0.0.1:{server.server_port}"
    # The server looks that often whether it should end, and a test waits for it.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
      yield hub
    finally:
      server.shutdown()
      thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
  """The layout of the hub: /api/models/REPO/revision/REV, /api/models/REPO/tree/REV, /REPO/resolve/REV/PATH."""

  hub: Hub
  protocol_version = "HTTP/1.1"
  # An answer is two writes. The system would hold the second one back until the first is acknowledged: 40 ms later.
  disable_nagle_algorithm = True

  def do_GET(self):
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    ranged = self.headers.get("Range")
    self.hub.asked.append(f"{self.command} {path}" + (f" {ranged}" if ranged else ""))
    in_api = path.startswith("/api/models/")
    parts = path.removeprefix("/api/models" if in_api else "").split("/")[1:]
    repo, (kind, revision, *rest) = "/".join(parts[:2]), [*parts[2:], "", ""][: max(2, len(parts) - 2)]
    if repo not in self.hub.repos:
      # What the hub says to somebody who is not logged in: the repository may be private.
      return self._reply(401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
    if revision not in (*REVISIONS, COMMIT):
      return self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    answer = {"revision": self._info, "tree": self._tree, "resolve": self._file}[kind]
    answer(repo, "/".join(rest))

  do_HEAD = do_GET

  def _info(self, repo: str, _: str):
    siblings = [{"rfilename": name} for name in self._files(repo)]
    self._reply(200, json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode())

  def _tree(self, repo: str, _: str):
    entries = []
    for name, path in self._files(repo).items():
      content = path.read_bytes()
      digest, size = hashlib.sha256(content).hexdigest(), self.hub.claimed.get(name, len(content))
      lfs = {"oid": digest, "size": size, "pointerSize": 130}
      entries.append({"type": "file", "path": name, "size": size, "oid": digest[:40], "lfs": lfs})
    self._reply(200, json.dumps(entries).encode())

  def _file(self, repo: str, name: str):
    path = self._files(repo).get(name)
    if path is None:
      return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
    content = path.read_bytes()
    digest, size = hashlib.sha256(content).hexdigest(), self.hub.claimed.get(name, len(content))
    headers = {
      "ETag": f'"{digest}"',
      "X-Linked-Etag": f'"{digest}"',
      "X-Linked-Size": str(size),
      "X-Repo-Commit": COMMIT,
    }
    if "Range" in self.headers:
      first = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0])
      headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
      return self._reply(206, content[first:], headers)
    sent = None
    if self.command == "GET" and name in self.hub.broken_once:
      self.hub.broken_once.remove(name)
      sent = len(content) // 2
    self._reply(200, content, headers, sent)

  def _files(self, repo: str) -> dict[str, pathlib.Path]:
    folder = self.hub.repos[repo]
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

  def _reply(self, status: int, content: bytes, headers: Mapping[str, str] | None = None, sent: int | None = None):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content[:sent])
    if sent is not None:
      self.close_connection = True

  def log_message(self, *unused):
    pass
