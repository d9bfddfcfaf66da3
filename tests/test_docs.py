"""The documentation: docstrings, the reference made of them, the pages' code, and the two READMEs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESCRIBED = [*ROOT.glob("*_adaptface.py"), *(ROOT / "adaptface").rglob("*.py")]

# --- docstrings -----------------------------------------------------------------------------------------------------


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def undocumented(files: dict[str, ast.Module]) -> list[str]:
    """Public functions, classes and methods without a docstring of their own or, for a method, of a class above."""
    classes = {node.name: node for tree in files.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def documented(owner: ast.ClassDef, method: str) -> bool:
        own = any(node.name == method and ast.get_docstring(node) for node in public(owner.body))
        above = (classes.get(ast.unparse(base).rpartition(".")[2]) for base in owner.bases)
        return own or any(documented(base, method) for base in above if base is not None)

    found = []
    for name, tree in files.items():
        for node in public(tree.body):
            if not ast.get_docstring(node):
                found.append(f"{name}:{node.lineno} {node.name}")
            for method in public(node.body) if isinstance(node, ast.ClassDef) else ():
                if not documented(node, method.name):
                    found.append(f"{name}:{method.lineno} {node.name}.{method.name}")
    return found


def test_every_public_name_has_a_docstring() -> None:
    files = {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in DESCRIBED}
    assert len(files) > 50
    assert undocumented(files) == []


def test_a_missing_docstring_is_noticed() -> None:
    code = "class A:\n '''a'''\n def f(self):\n  '''f'''\n def g(self): ...\nclass B(A):\n '''b'''\n def f(self): ...\ndef h(): ..."
    assert undocumented({"x": ast.parse(code)}) == ["x:5 A.g", "x:9 h"]
