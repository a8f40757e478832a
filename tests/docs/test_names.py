"""No page names what does not exist: links, files, commands, options, configuration keys, targets, messages."""

import argparse
import re
from pathlib import Path

import pytest

import chainfed_engine as cfe
from chainfed_engine.cli.main import _parser
from chainfed_engine.config import ChainConfig
from chainfed_engine.config_file import _known
from chainfed_engine.memory.parts import Choices, Request, StoreSizes
from chainfed_engine.memory.plan import predict
from chainfed_engine.types import ModelShape
from tests.docs.pages import ALL_PAGES, ROOT, blocks, commands

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = ("chainfed_engine/", "csrc/", "tests/", "docs/", "examples/", "bench/", "cmake/")
WRITTEN = [page for page in ALL_PAGES if page.name not in ("LOG.md", "CHANGELOG.md", "RESULTS.md")]  # these look back


def named(page: Path) -> list[str]:
    """Inline code and the lines of shell blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = [line for block in blocks(page) if block.language == "sh" for line in commands(block)]
    return [*CODE.findall(text), *lines]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    parser = _parser()
    return next(dict(action.choices) for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def slugs(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in slugs(target), f"{page.name}: {link}: no such heading"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_files_exist(page: Path) -> None:
    for name in named(page):
        if name.startswith(FOLDERS) and not re.search(r"[*<{ ]", name):
            assert (ROOT / name).exists() or name.endswith(("/ernie4_5.py", "/gain.py")), f"{page.name}: {name}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_commands_and_options_exist(page: Path) -> None:
    known = subcommands()
    every = {
        option
        for parser in [_parser(), *known.values()]
        for action in parser._actions
        for option in action.option_strings
    }
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for name in named(page):
        words = name.split()
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets or "=" in words[1], f"{page.name}: {name}"
        if words[0] == "chainfed" and len(words) > 1 and words[1].islower():
            assert words[1] in known, f"{page.name}: {name}"
            options = {option for action in known[words[1]]._actions for option in action.option_strings}
            used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
            assert used <= options, f"{page.name}: {name}: {used - options}"
        elif re.fullmatch(r"--[a-z-]+", name):
            assert name in every, f"{page.name}: {name}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_configuration_keys_and_public_names_exist(page: Path) -> None:
    tables: dict[str, set[str]] = {}
    for table, key in _known():
        tables.setdefault(table, set()).add(key)
    text = page.read_text(encoding="utf-8")
    for name in named(page):
        for table, key in re.findall(r"\[([a-z]+)\] ([a-z_]+)", name):
            assert key in tables.get(table, {key}), f"{page.name}: [{table}] {key}"
        if found := re.fullmatch(r"\[([a-z]+)\]", name):
            assert found[1] in tables, f"{page.name}: {name}"
        for table, key in re.findall(r"--set ([a-z]+)\.([a-z_]+)=", name):
            assert key in tables[table], f"{page.name}: {name}"
    for attribute in set(re.findall(r"\bcfe\.([A-Za-z_]+)", text)):
        assert hasattr(cfe, attribute) or (ROOT / "chainfed_engine" / f"{attribute}.py").exists(), (
            page.name,
            attribute,
        )


def test_the_messages_of_the_troubleshooting_page_are_ours() -> None:
    page = (ROOT / "docs" / "guide" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`", page, flags=re.M)
    assert len(messages) > 12
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "chainfed_engine").rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    for message in messages:
        assert message in joined, f"no error says {message!r} any more"


def test_the_parts_of_the_page_on_budgets_are_those_of_a_plan() -> None:
    page = (ROOT / "docs" / "guide" / "budget.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| part \| .*?\n\n", page, flags=re.M | re.S)
    assert rows is not None
    told = {name for cell in re.findall(r"^\| (`[^|]*) \|", rows[0], flags=re.M) for name in CODE.findall(cell)}
    shape = ModelShape("llama", 4, 64, 128, 4, 4, 16, 300, 64)
    sizes = StoreSizes(4 << 20, 1 << 20, 1 << 20, 1 << 20, 4, 1)
    request = Request(shape, sizes, ChainConfig(), "causal-lm", 1, startup_bytes=1 << 42)
    found = {
        part.split(" (")[0]
        for num_slots, kept in ((None, 1 << 40), (2, 0))
        for part in predict(request, Choices(2, num_slots, 1, False, "int8", 1 << 20, 0, kept)).parts
    }
    assert told == found


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_no_page_holds_both_sides_of_a_merge(page: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(encoding="utf-8"), flags=re.M)
