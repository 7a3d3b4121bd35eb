"""What the package knows about one reward: its `RewardSpec`.

  name, kind ─────────────────────────── selection: which rewards judge a search
  config_type, abstract_params, load ─── folder: from files to a `LoadedReward`
  make ───────────────────────────────── the search: the reward itself
  scorer ─────────────────────────────── scoring: whole videos
  candidate_flop, text, training ─────── measuring, conversion, training

Every reward's file ends with its SPEC, and `rewards.table.REWARDS` lists them. Functions that look a name up take the
table as an argument, so that a program can add its own: `{**REWARDS, "mine": SPEC}`.

How the weights of a published reward are converted is a second line, in `convert.tables.rewards.CONVERSIONS`, because
`convert` lies a floor above `rewards`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from etils import epath
from flax import nnx

from streamt1_jax.config import ConfigError, required
from streamt1_jax.parallel.sharding import Layout
from streamt1_jax.rewards.base import ImageReward, LoadedReward, PromptReader, VideoReward
from streamt1_jax.rewards.scorers import ScoringOptions, VideoScorer
from streamt1_jax.typing import Params

KINDS = ("image", "video")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class PublishedText(NamedTuple):
  """The instruction text of a published reward model; the text itself is read when weights are converted.

  Attributes:
    reward_tokens: the tokens whose hidden states are read, in the order of the text. Their ids follow those of the base
      tokenizer, in this order.
    sha256: checksum of the text.
    length: tokens before the media, and tokens after them with a prompt of 127 tokens, filled up to a multiple of 64.
  """

  reward_tokens: tuple[str, ...]
  sha256: str
  length: tuple[int, int]


class Training(NamedTuple):
  """How a small reward of this architecture is trained on the shapes world.

  Attributes:
    text: its instruction text, with `{text_prompt}` where the caption goes, and the reward tokens of the published one.
    config: gives the small sizes.
    graphdef: gives the graph definition of the model with a configuration.
    initial_params: gives fresh weights, (configuration, seed) to params.
    with_unit_scores: rescales trained scores, (params, configuration, mean [R], std [R]) to (configuration, params)
      whose scores have mean 0 and standard deviation 1.
  """

  text: str
  config: Callable[[], Any]
  graphdef: Callable[[Any], nnx.GraphDef]
  initial_params: Callable[[Any, int], Params]
  with_unit_scores: Callable[..., tuple[Any, Params]]


@dataclasses.dataclass(frozen=True)
class RewardSpec:
  """One reward.

  Attributes:
    name: what users call it, and the folder of a checkpoint that holds its weights: letters, digits and "_".
    kind: "image" scores the frames of a chunk, "video" the window that ends with it.
    make: gives the reward, (configuration, fps of the videos to be judged) to an `ImageReward` or a `VideoReward`, a
      frozen dataclass.
    config_type: frozen dataclass of sizes and constants, stored in `reward.json`; None for a reward without weights,
      which every checkpoint has. Such a reward is made with None for a configuration.
    abstract_params: gives the shapes of the weights, (configuration, dtype) to a nested dict of
      `jax.ShapeDtypeStruct`s; needed if there is a `config_type`.
    read_prompt: gives what turns captions into `prompt_features`, (folder, configuration) to a `PromptReader`; None for
      a reward that reads no prompt. The folder of a reward without weights need not exist.
    load: reads weights and prompt reader in another way than `folder.load_weights`, with its arguments.
    searched: of the shapes of the weights, those that lie on devices while a search runs; all by default.
    layout: axes of the weights' arrays; every device holds all of what it does not name.
    scorer: makes what scores whole videos, (column name, loaded reward, `ScoringOptions`) to a `VideoScorer`; by
      default a `FrameScorer` for an image reward, a `WindowScorer` for a video reward.
    candidate_flop: counts the FLOP of judging one candidate, (reward, frames, (height, width), text tokens) to int.
      `frames` are those of the chunk or of the window.
    text: the instruction text of a published model.
    training: how a small one is trained.
  """

  name: str
  kind: Literal["image", "video"]
  make: Callable[[Any, float], ImageReward | VideoReward]
  config_type: type | None = None
  abstract_params: Callable[[Any, Any], Params] | None = None
  read_prompt: Callable[[epath.Path, Any], PromptReader] | None = None
  load: Callable[..., tuple[Params, PromptReader]] | None = None
  searched: Callable[[Params], Params] = lambda params: params
  layout: Layout = ()
  scorer: Callable[[str, LoadedReward, ScoringOptions], VideoScorer] | None = None
  candidate_flop: Callable[[Any, int, tuple[int, int], int], int] | None = None
  text: PublishedText | None = None
  training: Training | None = None

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise ConfigError(f"the name of a reward must be letters, digits and '_', got {self.name!r}")
    if self.kind not in KINDS:
      raise ConfigError(f"{self.name}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
    if (self.config_type is None) != (self.abstract_params is None):
      raise ConfigError(f"{self.name}: config_type and abstract_params must be given together")

  @property
  def on_frames(self) -> bool:
    """Whether it judges the frames of a chunk by themselves, and not the window that ends with them."""
    return self.kind == "image"

  @property
  def is_stored(self) -> bool:
    """Whether it has weights, which a checkpoint may or may not have."""
    return self.config_type is not None

  @property
  def reads_prompt(self) -> bool:
    return self.read_prompt is not None

  def make_config(self, *args: Any, **fields: Any) -> Any:
    """An instance of `config_type`. Raises ConfigError for a reward without weights."""
    return required(self.config_type, f"the configuration of {self.name}")(*args, **fields)

  def weight_shapes(self, config: Any, dtype: Any) -> Params:
    """What `abstract_params` gives. Raises ConfigError for a reward without weights."""
    return required(self.abstract_params, f"the weights of {self.name}")(config, dtype)

  def flop(self, reward: Any, frames: int, size: tuple[int, int], text_tokens: int) -> int:
    """What `candidate_flop` counts. Raises ConfigError for a reward whose FLOP are not counted."""
    return required(self.candidate_flop, f"the FLOP of {self.name}")(reward, frames, size, text_tokens)

  @property
  def required_text(self) -> PublishedText:
    """`text`. Raises ConfigError for a reward without one."""
    return required(self.text, f"the instruction text of {self.name}")

  @property
  def required_training(self) -> Training:
    """`training`. Raises ConfigError for a reward that is not trained here."""
    return required(self.training, f"the training of {self.name}")


RewardTable = Mapping[str, RewardSpec]
