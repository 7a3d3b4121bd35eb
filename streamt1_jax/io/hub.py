"""Repositories of the Hugging Face hub, where a folder is asked for: `hf://org/name` or `hf://org/name@revision`.

What is downloaded goes to the hub's own cache (`HF_HOME`), which other programs share. Files that are whole are not
fetched again, and what was downloaded once is found without a network. The package `huggingface_hub` does the work; it
is the extra `hub`, and is imported only here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

from etils import epath

from streamt1_jax.config import ConfigError

PREFIX = "hf://"
_REPO = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[\w./-]{1,200}))?", re.ASCII)
_STATUS_NO_ENTRY = (401, 403, 404)


class Wanted(NamedTuple):
  """Files of one repository.

  Attributes:
    repo: "org/name".
    revision: branch, tag or commit; None for its main branch.
    paths: paths of the files; None for all of them.
  """

  repo: str
  revision: str | None = None
  paths: tuple[str, ...] | None = None


def is_hub(path: epath.PathLike) -> bool:
  """Whether `path` names a repository of the hub."""
  return os.fspath(path).startswith(PREFIX)


def parse(url: str) -> Wanted:
  """The repository that `url` names. Raises ConfigError if it names none, or the extra `hub` is not installed."""
  found = _REPO.fullmatch(url.removeprefix(PREFIX))
  if found is None:
    raise ConfigError(f"{url!r} is not hf://org/name or hf://org/name@revision")
  _require_package(url)
  try:
    importlib.import_module("huggingface_hub.utils").validate_repo_id(found["repo"])
  except ValueError as error:
    raise ConfigError(f"{url!r} is no name of a repository: {error}") from error
  return Wanted(found["repo"], found["revision"])


def local(path: epath.PathLike) -> epath.Path:
  """`path` as a folder: of a hub's URL, the one its files are downloaded to. Raises ConfigError as `fetch` does."""
  if not is_hub(path):
    return epath.Path(path)
  (folder,) = fetch([parse(os.fspath(path))])
  return epath.Path(folder)


def fetch(wanted: Sequence[Wanted]) -> list[pathlib.Path]:
  """Downloads what is not there yet; sizes and the free disk are compared before the first byte.

  Returns:
    Per repository the folder in which its files have their paths.

  Raises:
    ConfigError: the extra `hub` is not installed; a repository, revision or file does not exist; the disk has too
      little space; the hub cannot be reached and the files were never downloaded.
    OSError: the disk is full, or the cache cannot be written. It names the cache.
  """
  hub = _require_package(", ".join(PREFIX + item.repo for item in wanted))
  needed, kept = 0, []
  for item in wanted:
    with _explained(hub, item):
      found = _look(hub, item)
      kept.append(found)
      if isinstance(found, list):
        _require_files(item, found)
        needed += sum(info.file_size or 0 for info in found if info.will_download)
  _require_space(hub, needed)
  folders = []
  for item, found in zip(wanted, kept, strict=True):
    if isinstance(found, list):
      # The commit whose sizes were compared, whatever was pushed since.
      revision = found[0].commit_hash if found else item.revision
      with _explained(hub, item):
        found = _snapshot(hub, item._replace(revision=revision))
    folders.append(pathlib.Path(found))
  return folders


def _require_package(what: str) -> ModuleType:
  if importlib.util.find_spec("huggingface_hub") is None:
    raise ConfigError(f"{what} needs the package huggingface_hub: pip install 'streamt1_jax[hub]'")
  return importlib.import_module("huggingface_hub")


def _snapshot(hub: ModuleType, item: Wanted, **options):
  patterns = None if item.paths is None else list(item.paths)
  return hub.snapshot_download(item.repo, revision=item.revision, allow_patterns=patterns, **options)


def _look(hub: ModuleType, item: Wanted):
  """What would be downloaded; or, if the hub cannot be reached, the folder of an earlier download."""
  try:
    return _snapshot(hub, item, dry_run=True)
  except hub.errors.DryRunError as error:
    reason = error.__cause__
    if isinstance(reason, hub.errors.RepositoryNotFoundError) or _status(reason) in _STATUS_NO_ENTRY:
      raise reason from None
    try:
      return _snapshot(hub, item, local_files_only=True)
    except hub.errors.LocalEntryNotFoundError:
      why = "it is told to stay offline" if isinstance(reason, hub.errors.OfflineModeIsEnabled) else f"{reason}"
      raise ConfigError(
        f"{PREFIX}{item.repo}: the hub cannot be reached, and the files were not downloaded before: {why}"
      ) from error


def _status(error: BaseException | None) -> int | None:
  return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def _explained(hub: ModuleType, item: Wanted) -> Iterator[None]:
  """What the library raises, in one line."""
  url = PREFIX + item.repo + ("" if item.revision is None else f"@{item.revision}")
  try:
    yield
  except ConfigError:
    raise
  except hub.errors.GatedRepoError as error:
    raise ConfigError(
      f"{url}: its publisher wants terms to be accepted: do that on its page, then `hf auth login`"
    ) from (error)
  except hub.errors.RepositoryNotFoundError as error:
    raise ConfigError(f"{url} does not exist on the hub, or is private; then log in: hf auth login") from error
  except hub.errors.RevisionNotFoundError as error:
    raise ConfigError(f"{url}: the repository has no such branch, tag or commit") from error
  except OSError as error:
    # The library's own errors have no number; the system's have.
    if error.errno is not None and _status(error) is None and not isinstance(error, ConnectionError):
      raise OSError(error.errno, os.strerror(error.errno), str(_cache(hub))) from error
    raise _broken(url, error) from error
  except Exception as error:  # Its network library has other types in every release.
    raise _broken(url, error) from error


def _broken(url: str, error: Exception) -> ConfigError:
  first = next(iter(str(error).splitlines()), "")
  return ConfigError(
    f"{url} cannot be downloaded: {type(error).__name__}: {first}; files that are whole are kept for the next try"
  )


def _require_files(item: Wanted, found: list) -> None:
  there = {info.filename for info in found}
  missing = [path for path in item.paths or () if path not in there]
  if missing or not there:
    raise ConfigError(f"{PREFIX}{item.repo} holds no {' or '.join(missing) or 'file'}")


def _cache(hub: ModuleType) -> pathlib.Path:
  return pathlib.Path(hub.constants.HF_HUB_CACHE).expanduser()


def _require_space(hub: ModuleType, needed: int) -> None:
  cache = _cache(hub).absolute()
  existing = next(folder for folder in [cache, *cache.parents] if folder.exists())
  free = shutil.disk_usage(existing).free
  if needed > free:
    raise ConfigError(
      f"{cache} (HF_HOME) needs {needed:,} bytes for the download, the disk has {free:,} left; nothing was downloaded"
    )
