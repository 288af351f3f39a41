"""Which tests may never come to an assert, as far as their source tells; test_tidy.py refuses them.

A test asserts, by itself or by a function that it uses, and not only in a branch or in a loop that may have no turn.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
EXPECTATIONS = {"pytest.raises", "pytest.warns", "pytest.fail"}
ENDLESS = {"count"}
AS_LONG_AS_THEIR_ARGUMENTS = {
    "zip",
    "product",
    "permutations",
    "enumerate",
    "reversed",
    "sorted",
    "list",
    "tuple",
    "range",
    "cast",
}
VIEWS = {"items", "values", "keys", "split", "walk"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def functions() -> dict[str, list[tuple[Path, Function]]]:
    """Return every function below tests/ by its name."""
    found: dict[str, list[tuple[Path, Function]]] = defaultdict(list)
    for file in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, Function):
                found[node.name].append((file, node))
    return found


def asserts(node: ast.AST) -> bool:
    """Whether an expectation stands somewhere in a piece of source."""
    return any(
        isinstance(each, ast.Assert) or (isinstance(each, ast.Call) and ast.unparse(each.func) in EXPECTATIONS)
        for each in ast.walk(node)
    )


def names(node: ast.AST) -> set[str]:
    """Return the names that a piece of source uses, those behind a dot too."""
    every = list(ast.walk(node))
    attributes = {each.attr for each in every if isinstance(each, ast.Attribute)}
    return attributes | {each.id for each in every if isinstance(each, ast.Name)}


@cache
def asserting() -> frozenset[str]:
    """Return the names of functions that assert, by themselves or by one that they use."""
    used = {name: [(asserts(node), names(node)) for _, node in those] for name, those in functions().items()}
    found = {name for name, those in used.items() if any(itself for itself, _ in those)}
    while more := {name for name, those in used.items() if any(found & others for _, others in those)} - found:
        found |= more
    return frozenset(found)


def comes_to_an_assert(body: list[ast.stmt], given: set[str]) -> bool:
    """Whether a body asserts however its branches and loops go; `given`: what pytest or hypothesis hands over."""
    for statement in body:
        if is_sure(statement, given):
            return True
        if may_leave(statement, given):
            return False
    return False


def may_leave(statement: ast.stmt, given: set[str]) -> bool:
    """Whether a statement may end its function before anything was asserted."""
    if isinstance(statement, ast.If):
        branches = statement.body, statement.orelse
        return any(not comes_to_an_assert(each, given) and any(map(returns, each)) for each in branches)
    return isinstance(statement, ast.Return)


def returns(statement: ast.stmt) -> bool:
    """Whether a return stands in a statement."""
    return any(isinstance(node, ast.Return) for node in ast.walk(statement))


def is_sure(statement: ast.stmt, given: set[str]) -> bool:
    """Whether a statement asserts, whatever happens."""
    sure = False
    match statement:
        case ast.With(items=items, body=body):
            opened = any(asserts(item) or names(item) & asserting() for item in items)
            sure = opened or comes_to_an_assert(body, given)
        case ast.Try(body=body, finalbody=finalbody):
            sure = comes_to_an_assert([*body, *finalbody], given)
        case ast.While(test=ast.Constant(value=endless), body=body):
            sure = bool(endless) and comes_to_an_assert(body, given)
        case ast.For(iter=iterable, body=body):
            sure = not may_be_empty(iterable, given) and comes_to_an_assert(body, given)
        case ast.If(body=body, orelse=orelse):
            sure = comes_to_an_assert(body, given) and comes_to_an_assert(orelse, given)
        case ast.Assert() | ast.Expr() | ast.Assign() | ast.AnnAssign() | ast.Return():
            sure = asserts(statement) or bool(names(statement) & asserting())
    return sure


def may_be_empty(iterable: ast.expr, given: set[str]) -> bool:
    """Whether a loop over this may have no turn."""
    empty = True
    match iterable:
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements) | ast.Dict(keys=elements):
            empty = not elements
        case ast.Constant(value=value):
            empty = not value
        case ast.Name(id=name):
            empty = not name.isupper() and name not in given
        case ast.Attribute(value=value, attr=name):
            empty = not name.isupper() and may_be_empty(value, given)
        case ast.BinOp(left=left, right=right):
            empty = may_be_empty(left, given) and may_be_empty(right, given)
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in VIEWS:
            empty = may_be_empty(value, given)
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in AS_LONG_AS_THEIR_ARGUMENTS:
            empty = any(may_be_empty(each, given) for each in arguments if not isinstance(each, ast.Starred))
        case ast.Call(func=function):
            empty = ast.unparse(function) not in ENDLESS | asserting()
    return empty


def every_test() -> Iterator[tuple[str, Function]]:
    """Give each test and where it stands."""
    for name, those in functions().items():
        if name.startswith("test_"):
            yield from ((f"{file.relative_to(TESTS)}:{node.lineno} {name}", node) for file, node in those)


def is_true_by_form(condition: ast.expr) -> bool:
    """Whether a condition says nothing."""
    match condition:
        case ast.Constant() | ast.Tuple():
            return True
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            return ast.dump(left) == ast.dump(right) and not isinstance(left, ast.Call)
    return False
