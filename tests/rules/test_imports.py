"""Who may import whom: every module stands in a row and imports from its own row or the rows below it.

Imports inside functions count; those under `if TYPE_CHECKING:` do not, for they never run.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "chainfed_engine"
ROOT = Path(__file__).parents[2] / PACKAGE

ROWS: tuple[frozenset[str], ...] = (
    frozenset(
        {"errors", "types", "config", "config_file", "schedule", "start_layer", "stand_in", "sizes", "_version"}
        | {"directions", "least_squares", "classifier_fit", "update_format"}
    ),
    frozenset({"native", "memory", "cache_cipher"}),
    frozenset({"model", "data", "adapters"}),
    frozenset({"parameters", "optimizer", "prefix", "boundary", "window", "objective"}),
    frozenset({"profile", "step", "methods", "client", "callbacks", "chain_trainer"}),
    frozenset({"server"}),
    frozenset({"federation"}),
    frozenset({"api", "exports", "report", "study"}),
    frozenset({"cli", "__init__", "__main__"}),
)
FORBIDDEN = {
    "boundary": {"window"},
    "window": {"boundary", "prefix"},
    "server": {name for row in ROWS[1:] for name in row} - {"server"},
}
KNOWS_BOTH_SIDES = {"federation"}


def _files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def _part(path: Path) -> str:
    """The module of the first level that a file belongs to: `server` for server/checks.py, `step` for step.py."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _parts() -> set[str]:
    return {_part(path) for path in _files()}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def _imported_names(path: Path) -> set[str]:
    """Full dotted names of everything a file imports, `a.b` for both `import a.b` and `from a import b`."""
    names: set[str] = set()
    package = (PACKAGE, *path.relative_to(ROOT).parent.parts)
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*origin, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def _imported_parts(path: Path) -> set[str]:
    """First-level modules of ours that a file imports; `__init__` where it takes a name of the package itself."""
    parts = _parts()
    inside = [name.split(".") for name in _imported_names(path) if name.split(".")[0] == PACKAGE]
    return {name[1] if len(name) > 1 and name[1] in parts else "__init__" for name in inside}


def _row(part: str) -> int:
    rows = [index for index, row in enumerate(ROWS) if part in row]
    assert rows, f"{part} stands in no row: put it into ROWS at the lowest place that its imports allow"
    return rows[0]


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_row_or_below(path: Path) -> None:
    part = _part(path)
    for other in _imported_parts(path) - {part}:
        assert _row(other) <= _row(part), f"{path.name} ({part}) may not import {other}, which stands above it"
        assert other not in FORBIDDEN.get(part, set()), f"{path.name} ({part}) may not import {other}"


def test_only_the_federation_knows_both_server_and_client() -> None:
    seen: dict[str, set[str]] = {}
    for path in _files():
        seen.setdefault(_part(path), set()).update(_imported_parts(path) | {_part(path)})
    both = {part for part, imported in seen.items() if {"server", "client"} <= imported}
    assert both <= KNOWS_BOTH_SIDES


def test_only_native_imports_the_compiled_core() -> None:
    for path in _files():
        if _part(path) != "native":
            assert not any(name.split(".")[-1] == "_native" or "._native." in name for name in _imported_names(path)), (
                path
            )


def test_the_server_and_the_first_row_need_nothing_but_numpy() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", PACKAGE}
    for path in _files():
        if _part(path) in ROWS[0] | {"server"}:
            assert {name.split(".")[0] for name in _imported_names(path)} <= allowed, path


def test_the_rule_sees_what_it_should(tmp_path: Path) -> None:
    source = """
import chainfed_engine.model.store
from chainfed_engine import native
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
def f():
    from chainfed_engine.server.checks import one_line
"""
    path = ROOT / "client" / "never_written.py"
    tree = ast.parse(source)
    modules = [node for node in _runtime_nodes(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(modules) == 4
    assert _part(path) == "client" and _row("client") < _row("server")
