"""Arithmetic over named quantities, such as `1 - subject.activation_bytes / baseline.activation_bytes`.

A quantity is `source.name`, or `source['any name']`; + - * / and numbers are all there is. Numbers may be arrays: a
quantity's bootstrap draws go through the same formula as its value.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

from dyno.errors import UserError

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
GRAMMAR = "it takes numbers, + - * / and quantities, written source.name or source['name']"


def parsed(text: str, where: str) -> ast.expr:
    """The syntax tree of a formula. Raises UserError when it is anything but arithmetic over quantities."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise UserError(f"{where}: '{text}' is no formula: {GRAMMAR}") from error
    list(_quantities(tree, text, where))
    return tree


def quantities(text: str) -> list[tuple[str, str]]:
    """(source, name) of every quantity in a formula, in order."""
    return list(dict.fromkeys(_quantities(parsed(text, "formula"), text, "formula")))


def evaluate(text: str, look: Callable[[str, str], Any]) -> Any:
    """The formula's number, or array of draws; `look(source, name)` gives a quantity's."""

    def number(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](number(node.left), number(node.right))
        if isinstance(node, ast.UnaryOp):
            return -number(node.operand)
        if isinstance(node, ast.Constant):
            return node.value
        pair = _quantity(node)
        assert pair is not None  # `parsed` saw to it
        return look(*pair)

    return number(parsed(text, "formula"))


def _quantity(node: ast.expr) -> tuple[str, str] | None:
    """(source, name) where a node is a quantity."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id, node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Constant):
        return node.value.id, str(node.slice.value)
    return None


def _quantities(node: ast.expr, text: str, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield from _quantities(node.left, text, where)
        yield from _quantities(node.right, text, where)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield from _quantities(node.operand, text, where)
    elif pair := _quantity(node):
        yield pair
    elif not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        raise UserError(f"{where}: '{text}' is no formula: {GRAMMAR}")
