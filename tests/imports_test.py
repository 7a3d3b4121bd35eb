"""Imports only point down the floors of the house, so that a lower room can be read, tested and changed by itself."""

import ast
import itertools
import pathlib
import re

import streamt1_jax

PACKAGE = pathlib.Path(streamt1_jax.__file__).parent

FLOORS = (
  ("__main__",),
  ("cli",),
  ("serve",),
  ("evaluation", "report"),
  ("measuring", "training"),
  ("methods",),
  ("pipeline", "convert"),
  ("session", "starts"),
  ("saved_session",),
  ("steering",),
  ("saved_search", "trace", "finishing"),
  ("save_folder", "planning", "cost"),
  ("drivers",),
  ("between_chunks", "chunk_step"),
  ("rounds", "look_ahead"),
  ("step",),
  ("models",),
  ("wan_generator",),
  ("recache",),
  ("memory_sinking", "state"),
  ("generator",),
  ("policies", "rewards", "execution"),
  ("reward_pruning", "noise_propagation", "sampling"),
  ("backbone", "codec", "text", "data"),
  ("io", "parallel", "shipped"),
  ("nn",),
  ("config",),
  ("typing", "receipts", "messages"),
)
"""Rooms from the top floor down. A room may import rooms of lower floors, and itself."""

STRANGERS = (("rewards", "data"), ("backbone", "parallel"), ("nn", "config"))
"""Rooms that do not know each other, although one is above the other."""

NEEDS_TESTS = {
  ("measuring/device_numerics.py", "tests.golden_support"),
  ("measuring/forked_tests.py", "tests.conftest"),
}
"""Modules that run tests of a checkout, and what they import of it when they are asked to."""


def room_of(module: str) -> str:
  """The room of a dotted name: the part after the package."""
  return module.split(".")[1]


def floor_of(room: str) -> int:
  for floor, rooms in enumerate(FLOORS):
    if room in rooms:
      return floor
  raise KeyError(f"{room} has no floor yet: give it one in FLOORS")


def imported_rooms(source: str) -> set[str]:
  """Rooms of this package that a module imports, wherever in its text."""
  rooms = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    rooms |= {room_of(name) for name in names if name.startswith("streamt1_jax.")}
  return rooms


def test_imports_point_down():
  upward = []
  for path in sorted(PACKAGE.rglob("*.py")):
    inside = path.relative_to(PACKAGE)
    # The front door names what the whole package offers.
    if inside.parts[0] == "__init__.py":
      continue
    room = inside.parts[0].removesuffix(".py")
    for other in sorted(imported_rooms(path.read_text())):
      if other != room and (floor_of(other) <= floor_of(room) or (room, other) in STRANGERS):
        upward.append(f"{inside} imports {other}")
  assert not upward


def imported_by_name(source: str) -> set[str]:
  """Constants that a module gives to `import_module`."""
  calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
  given = (call.args[0] for call in calls if ast.unparse(call.func).endswith("import_module") and call.args)
  return {name.value for name in given if isinstance(name, ast.Constant)}


def test_experiments_and_tests_are_not_imported():
  found = set()
  for path in sorted(PACKAGE.rglob("*.py")):
    text, inside = path.read_text(), str(path.relative_to(PACKAGE))
    for line in text.splitlines():
      assert not line.lstrip().startswith(("from experiments", "import experiments", "from tests", "import tests")), (
        path
      )
    found |= {(inside, name) for name in imported_by_name(text) if re.match(r"(tests|experiments)(\.|$)", name)}
  assert found == NEEDS_TESTS


def test_contributing_names_every_room():
  house = (PACKAGE.parent / "CONTRIBUTING.md").read_text().split("## The house")[1].split("## ")[0]
  tree, order = house.split("Imports point down")
  rooms = [room for floor in FLOORS for room in floor]
  named = re.findall(r"\b(\w+)(?:\.py|/)(?= )", tree[: tree.index("\nexperiments/")])
  assert sorted(set(named) - {"streamt1_jax"}) == sorted(rooms)
  lines = [re.findall(r"`(\w+)`", line) for line in order.splitlines() if re.match(r"\d+\. ", line)]
  assert sorted(room for line in lines for room in line) == sorted(rooms)
  for above, below in itertools.pairwise(lines):
    assert max(map(floor_of, above)) < min(map(floor_of, below)), (above, below)


def test_what_an_upward_import_looks_like():
  source = (
    "from streamt1_jax import drivers\nfrom streamt1_jax.io.video import write_video\nimport streamt1_jax.cli.score"
  )
  assert imported_rooms(source) == {"drivers", "io", "cli"}
  assert imported_by_name('importlib.import_module("tests.a")\nimport_module(name)\nfind_spec("b")') == {"tests.a"}
  assert floor_of("drivers") < floor_of("io")
