"""Sphinx: the guide, the pages beside it, and the reference from docstrings. `make docs` builds it offline."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import generated  # noqa: E402 (found only now)

from chainfed_engine import __version__  # noqa: E402

generated.write_all(Path(__file__).parent / "reference")

project = "chainfed-engine"
author = "the chainfed-engine authors"
copyright = f"2026, {author}"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `name` as Markdown does
html_theme = "furo"
html_title = f"chainfed-engine {version}"
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "github-dark"
myst_heading_anchors = 3
myst_url_schemes = ("http", "https", "mailto")
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
nitpicky = False
# Root pages are taken in whole; their links are written for the repository's front page.
suppress_warnings = ["myst.xref_missing", "myst.header"]


def as_literal_blocks(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: indented examples after a line of prose become literal blocks, `*` and `|` stay."""
    shown: list[str] = []
    for index, line in enumerate(lines):
        indented = line.startswith("    ") and line.strip()
        if indented and index and not lines[index - 1].startswith("    ") and (not shown or shown[-1] != "::"):
            shown += ["", "::", ""]
        elif not indented and index and lines[index - 1].startswith("    ") and line.strip():
            shown.append("")
        shown.append(line if indented else line.replace("*", "\\*").replace("|", "\\|").replace("_ ", "\\_ "))
    lines[:] = shown


def setup(app: object) -> None:
    app.connect("autodoc-process-docstring", as_literal_blocks)  # type: ignore[attr-defined]
