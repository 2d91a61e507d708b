"""Every test that docs/promises.md names is there, and the README promises nothing beside it."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.ranks import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_named_test_is_there(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for named, name in NAMED if named == file} <= there


def test_every_promise_names_its_tests() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and line != "| promise | held by |"]
    assert len(rows) > 40
    assert all(re.search(r"\| `tests/[^|]+` \|$", row) for row in rows)


def test_the_readme_links_to_the_page() -> None:
    promises = (ROOT / "README.md").read_text().split("## What it promises")[1].split("\n## ")[0]
    assert "(docs/promises.md)" in promises
