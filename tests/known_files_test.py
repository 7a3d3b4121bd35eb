"""Which published file a file is, by its size and SHA-256."""

import re

import pytest

from streamt1_jax.cli import command, convert
from streamt1_jax.convert import known_files
from streamt1_jax.convert.tables.published_files import PUBLISHED

# As they are quoted in public: bytes, and how the SHA-256 begins.
QUOTED = {
  "longlive_base.pt": (5_676_334_208, "10a2aa8fcf89c77d"),
  "lora.pt": (2_800_056_690, "c4e43b87d62d4b06"),
  "Wan2.1_VAE.pth": (507_609_880, "38071ab59bd94681"),
  "models_t5_umt5-xxl-enc-bf16.pth": (11_361_920_418, "7cace0da2b446bbb"),
  "spiece.model": (4_548_313, "e3909a67b780650b"),
  "HPSv3.safetensors": (16_584_387_300, "a13d7ff5a07b7ffa"),
  "model.pth": (5_031_072_529, "48375908e6112de9"),
}


@pytest.mark.parametrize("name", QUOTED)
def test_a_published_file_is_known(name):
  size, beginning = QUOTED[name]
  (file,) = [file for file in PUBLISHED if file.path.endswith(name)]
  assert file.size == size
  assert file.sha256.startswith(beginning)
  line = known_files.describe("renamed.bin", size, file.sha256)
  assert line == f"renamed.bin: this is the published {file.name} ({file.repo})"
  assert known_files.guess(size) == f"the size of the published {file.name}"


def test_another_content_of_the_same_size_is_said_to_be_changed():
  line = known_files.describe("Wan2.1_VAE.pth", 507_609_880, "0" * 64)
  assert line.startswith("Wan2.1_VAE.pth: not a file I know; it has the size of the published Wan2.1 VAE")


def test_other_files_are_not_known():
  (file,) = [file for file in PUBLISHED if file.path == "Wan2.1_VAE.pth"]
  for size, sha256 in ((507_609_881, file.sha256), (9, "0" * 64)):
    assert known_files.describe("a.pt", size, sha256) == "a.pt: not a file I know"
    assert known_files.guess(size) == ""


def test_the_table():
  flags = command.parse(convert.define_flags, [])
  for file in PUBLISHED:
    assert file.flag in flags
    assert re.fullmatch("[0-9a-f]{64}|[0-9a-f]{16}" if file.size else "", file.sha256), file
  assert len({(file.repo, file.path) for file in PUBLISHED}) == len(PUBLISHED)
  sizes = [file.size for file in PUBLISHED if file.size]
  assert len(set(sizes)) == len(sizes)
