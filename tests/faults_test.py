"""What the program that puts faults into the core does: which faults, and what it sees of the tests."""

import ast
import pathlib

import pytest

from experiments.measure import mutation
from streamt1_jax.config import ConfigError
from streamt1_jax.measuring import faults
from streamt1_jax.measuring.test_runs import TestRuns

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _changes(source):
  return [(fault.before, fault.after) for fault in faults.faults(source)]


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("a < b", [("a < b", "a <= b"), ("a < b", "a >= b")]),
    ("a is None", [("a is None", "a is not None")]),
    ("a + b", [("a + b", "a - b")]),
    ("a // b", [("a // b", "a * b")]),
    ("x = a and b", [("a and b", "a or b")]),
    ("x = not a", [("not a", "a")]),
    ("x = -1", [("-1", "1"), ("1", "2")]),
    ("x = 0.0, 0.5, True", [("0.0", "1.0"), ("0.5", "1.0"), ("True", "False")]),
    ("x = min(a, b)", [("min", "max")]),
    ("x = f(a, b, c)", [("f(a, b, c)", "f(b, a, c)")]),
    ("x = f(a, a)", []),
    ("f(a)", [("f(a)", "pass")]),
    ("x = a if b else c", [("a if b else c", "c if b else a")]),
    ("if a: x = b", [("if a: x = b", "if not a: x = b"), ("if a: x = b", "if False: x = b")]),
    # What decides no result.
    ("'''Text.'''", []),
    ("import a", []),
    ("assert a < b", []),
    ("raise E(f'{a + b}')", []),
    ("@d(1)\ndef f(a: T[2]) -> T[3]: ...", []),
  ],
)
def test_by_hand(source, expected):
  assert _changes(source) == expected


def test_one_place_alone():
  source = "x = a + b\ny = a + b\n"
  assert [faults.with_fault(source, index) for index in range(2)] == ["x = a - b\ny = a + b", "x = a + b\ny = a - b"]
  assert [str(fault) for fault in faults.faults(source)] == [
    f"line {line}, column 4: `a + b` becomes `a - b`" for line in (1, 2)
  ]


@pytest.mark.parametrize("module", ["sampling", "backbone/schedule"])
def test_a_fault_of_the_core_is_another_program(module):
  source = (ROOT / "streamt1_jax" / f"{module}.py").read_text()
  (index,) = mutation.drawn(source, 1, 0)
  changed = faults.with_fault(source, index)
  compile(changed, module, "exec")
  assert changed != ast.unparse(ast.parse(source))


def test_draws():
  source = "x = 1, 2, 3, 4, 5, 6, 7, 8"
  draws = [mutation.drawn(source, 3, seed) for seed in range(10)]
  assert all(len(set(draw)) == 3 and draw == sorted(draw) and set(draw) <= set(range(8)) for draw in draws)
  assert len(set(map(tuple, draws))) > 1
  assert mutation.drawn(source, 100, 0) == list(range(8))


def test_the_tests_of_the_core_are_there():
  for names in mutation.TESTS.values():
    assert all((ROOT / "tests" / f"{name}_test.py").exists() for name in names)


def test_runs(tmp_path):
  """In a small repository: a fault that the test notices, one that it does not, and one that never ends."""
  root = tmp_path / "root"
  good = "def half(x):\n  return x / 2\n"
  files = {
    "streamt1_jax/__init__.py": "",
    "streamt1_jax/halves.py": good,
    "tests/conftest.py": "",
    "tests/__init__.py": "",
    "tests/halves_test.py": (
      "from streamt1_jax.halves import half\n\n\ndef test_half():\n  assert half(4) == 2\n\n\n"
      "def test_wrong():\n  assert half(4) == 3\n"
    ),
  }
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  path, tests = "streamt1_jax/halves.py", ["tests/halves_test.py::test_half"]
  with TestRuns(root, tmp_path / "work", 300.0) as runs:
    runs.require_good(tests)
    assert runs.fails(path, good.replace("/", "*"), tests)[0]
    assert not runs.fails(path, good.replace("x / 2", "x - 2"), tests)[0]
    assert not runs.fails(path, good, tests)[0]
    with pytest.raises(ConfigError, match="without a fault pytest ends with 1, not 0"):
      runs.require_good(["tests/halves_test.py"])
  with TestRuns(root, tmp_path / "work", 1.0) as runs:
    noticed, seconds = runs.fails(path, "while True: pass", tests)
    assert noticed
    assert seconds >= 1.0
  assert {name: (root / name).read_text() for name in files} == files
