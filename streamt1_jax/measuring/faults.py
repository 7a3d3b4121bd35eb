"""Single-place faults in a source: each one is a change that a test of that source should notice.

  a < b       a <= b, a >= b            f(a, b)       f(b, a)
  a + b       a - b                     jnp.minimum   jnp.maximum
  a and b     a or b                    axis=1        axis=2
  if a:       if not a:                 f(a)          nothing, where it is a statement

Left alone are types, docstrings, decorators, assertions and messages of errors: they decide no result.
"""

import ast
import dataclasses
from collections.abc import Callable, Iterator

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
  ast.Lt: (ast.LtE, ast.GtE),
  ast.LtE: (ast.Lt, ast.Gt),
  ast.Gt: (ast.GtE, ast.LtE),
  ast.GtE: (ast.Gt, ast.Lt),
  ast.Eq: (ast.NotEq,),
  ast.NotEq: (ast.Eq,),
  ast.Is: (ast.IsNot,),
  ast.IsNot: (ast.Is,),
  ast.In: (ast.NotIn,),
  ast.NotIn: (ast.In,),
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv,
  ast.Pow: ast.Mult,
  ast.BitAnd: ast.BitOr,
  ast.BitOr: ast.BitAnd,
}
_PAIRS = (
  ("min", "max"),
  ("minimum", "maximum"),
  ("argmin", "argmax"),
  ("any", "all"),
  ("sum", "mean"),
  ("zeros", "ones"),
  ("zeros_like", "ones_like"),
  ("cos", "sin"),
)
_NAMES = dict(_PAIRS) | {second: first for first, second in _PAIRS}
_SKIPPED = (ast.Import, ast.ImportFrom, ast.Assert, ast.Raise, ast.JoinedStr)
_SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "bases"}


@dataclasses.dataclass(frozen=True)
class Fault:
  """One change.

  Attributes:
    line: where, counted from 1.
    column: where in the line, counted from 0.
    before: the expression or statement.
    after: what it becomes.
  """

  line: int
  column: int
  before: str
  after: str

  def __str__(self) -> str:
    return f"line {self.line}, column {self.column}: `{self.before}` becomes `{self.after}`"


def faults(source: str) -> list[Fault]:
  """All faults of a module, in the order of its text. Raises SyntaxError if it is no Python."""
  return [
    Fault(getattr(node, "lineno", 0), getattr(node, "col_offset", 0), _short(node), _short(other))
    for node, other, _ in _changes(ast.parse(source))
  ]


def with_fault(source: str, index: int) -> str:
  """The module with one of its `faults`, without its comments."""
  tree = ast.parse(source)
  _, other, put = list(_changes(tree))[index]
  put(other)
  return ast.unparse(ast.fix_missing_locations(tree))


Change = tuple[ast.AST, ast.AST, Callable[[ast.AST], None]]


def _changes(tree: ast.AST) -> Iterator[Change]:
  """Every fault: a node, what it becomes, and what puts that into the tree."""
  for field, value in ast.iter_fields(tree):
    if field in _SKIPPED_FIELDS:
      continue
    for place, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
      if not isinstance(node, ast.AST) or isinstance(node, _SKIPPED) or _is_text(node):
        continue
      yield from _own_changes(tree, field, place, node)
      yield from _changes(node)


def _is_text(node: ast.AST) -> bool:
  """Docstrings, the dots of a Protocol, and names of types."""
  is_alias = isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation)
  return is_alias or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _own_changes(parent: ast.AST, field: str, place: int | None, node: ast.AST) -> Iterator[Change]:
  """The faults of one node, which is in a field of its parent, at a place of it if that is a list."""

  def put(other: ast.AST) -> None:
    if place is None:
      setattr(parent, field, other)
    else:
      getattr(parent, field)[place] = other

  for other in _others(node):
    yield node, other, put


def _short(node: ast.AST) -> str:
  line = " ".join(ast.unparse(ast.fix_missing_locations(node)).split())
  return line if len(line) <= 80 else f"{line[:77]}..."


def _others(node: ast.AST) -> Iterator[ast.AST]:
  """What a node may become."""
  match node:
    case ast.Compare(left=left, ops=[operator], comparators=comparators):
      for other in _COMPARISONS[type(operator)]:
        yield ast.Compare(left, [other()], comparators)
    case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
      yield ast.BinOp(left, _OPERATORS[type(operator)](), right)
    case ast.BoolOp(op=operator, values=values):
      yield ast.BoolOp(ast.And() if isinstance(operator, ast.Or) else ast.Or(), values)
    case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert(), operand=operand):
      yield operand
    case ast.Constant(value=bool(value)):
      yield ast.Constant(not value)
    case ast.Constant(value=int(value)):
      yield ast.Constant(value + 1)
    case ast.Constant(value=float(value)):
      yield ast.Constant(2.0 * value if value else 1.0)
    case ast.Attribute(value=value, attr=name, ctx=context) if name in _NAMES:
      yield ast.Attribute(value, _NAMES[name], context)
    case ast.Name(id=name, ctx=ast.Load()) if name in _NAMES:
      yield ast.Name(_NAMES[name], ast.Load())
    case ast.Call(func=function, args=[first, second, *rest], keywords=keywords) if _order_matters(node):
      yield ast.Call(function, [second, first, *rest], keywords)
    case ast.IfExp(test=test, body=body, orelse=otherwise):
      yield ast.IfExp(test, otherwise, body)
    case ast.If(test=test, body=body, orelse=otherwise):
      # To turn a comparison round is a fault of its own.
      if not isinstance(test, ast.Compare):
        yield ast.If(ast.UnaryOp(ast.Not(), test), body, otherwise)
      yield ast.If(ast.Constant(False), body, otherwise)
    case ast.Expr(value=ast.Call()) | ast.AugAssign():
      yield ast.Pass()


def _order_matters(call: ast.Call) -> bool:
  """Whether the first two arguments can be told apart."""
  name = getattr(call.func, "attr", getattr(call.func, "id", None))
  first, second = call.args[:2]
  starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
  return not starred and name not in ("min", "max", "minimum", "maximum") and ast.dump(first) != ast.dump(second)
