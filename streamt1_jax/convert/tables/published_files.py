"""The published files: which flag of `streamt1 convert` takes each, where it is, and how to know it again.

Sizes and SHA-256 are those that the hub reports of the files, as several public repositories quote them. None of the
files was ever here. A file whose size and digest are not in the table can be fetched, and is never known again.
"""

from __future__ import annotations

from typing import NamedTuple


class PublishedFile(NamedTuple):
  """One file of one publisher.

  Attributes:
    flag: the flag of `streamt1 convert` that takes it.
    name: what people call it.
    repo: its repository on the hub.
    path: its path in the repository.
    size: its bytes; None if they are not known.
    sha256: its SHA-256 in hex, or what is known of its beginning.
  """

  flag: str
  name: str
  repo: str
  path: str
  size: int | None
  sha256: str


_WAN, _LONGLIVE, _QWEN = "Wan-AI/Wan2.1-T2V-1.3B", "Efficient-Large-Model/LongLive-1.3B", "Qwen/Qwen2-VL-7B-Instruct"

MODEL = "wan_1_3b"
"""The preset that these files are for."""
LORA_ALPHA = 256.0
"""The alpha of LongLive's adapter, which its file does not say."""

# fmt: off
PUBLISHED = (
  PublishedFile("backbone", "LongLive-1.3B base", _LONGLIVE, "models/longlive_base.pt", 5_676_334_208, "10a2aa8fcf89c77d9033f4c117405412a690e289625766619d293f0c5a208ee7"),  # noqa: E501
  PublishedFile("lora", "LongLive-1.3B adapter", _LONGLIVE, "models/lora.pt", 2_800_056_690, "c4e43b87d62d4b0614b496773639f1ab170a7ee486dc23407901e9d3a5ebc07a"),  # noqa: E501
  PublishedFile("vae", "Wan2.1 VAE", _WAN, "Wan2.1_VAE.pth", 507_609_880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),  # noqa: E501
  PublishedFile("text_encoder", "UMT5-XXL encoder of Wan2.1", _WAN, "models_t5_umt5-xxl-enc-bf16.pth", 11_361_920_418, "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d"),  # noqa: E501
  PublishedFile("tokenizer", "tokenizer.json of UMT5-XXL", _WAN, "google/umt5-xxl/tokenizer.json", 16_837_417, "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b"),  # noqa: E501
  PublishedFile("tokenizer", "spiece.model of UMT5-XXL", _WAN, "google/umt5-xxl/spiece.model", 4_548_313, "e3909a67b780650b35cf529ac782ad2b6b26e6d1f849d3fbb6a872905f452458"),  # noqa: E501
  PublishedFile("hpsv3", "HPSv3", "MizzenAI/HPSv3", "HPSv3.safetensors", 16_584_387_300, "a13d7ff5a07b7ffa0f7824e60d62e6ae144541ceefd5224b4c08fda7ab39f353"),  # noqa: E501
  PublishedFile("videoalign", "VideoReward of VideoAlign", "KlingTeam/VideoReward", "checkpoint-11352/model.pth", 5_031_072_529, "48375908e6112de9f0248402db156a23b480709a6960b091c598c6f4c88d21b9"),  # noqa: E501
  PublishedFile("reward_tokenizer", "tokenizer.json of Qwen2-VL", _QWEN, "tokenizer.json", None, ""),
)
# fmt: on
"""Every known file, a line each. `--from_hub` fetches the first one of a flag."""
