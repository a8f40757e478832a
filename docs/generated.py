"""Reference pages made from the code itself: every configuration key, every command. Called by conf.py."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from chainfed_engine.cli.main import _parser
from chainfed_engine.config import ChainConfig, DataConfig


def write_all(folder: Path) -> None:
    """configuration.md and command-line.md in `folder`; unchanged files are left alone, so that builds are quick."""
    for name, text in (("configuration.md", configuration()), ("command-line.md", command_line())):
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def configuration() -> str:
    """One table a TOML table, with default and range of each key as the program checks them."""
    tables: dict[str, list[str]] = {"model": ["| `store` | required | path of a layer store |"]}
    for record in (ChainConfig, DataConfig):
        hints = typing.get_type_hints(record)
        for item in dataclasses.fields(record):
            row = f"| `{item.name}` | {_default(item)} | {_allowed(hints[item.name], item.metadata)} |"
            tables.setdefault(item.metadata["table"], []).append(row)
    order = ["model", "data", *(name for name in tables if name not in ("model", "data"))]
    parts = [
        "# Configuration",
        "The keys of `CONFIG.toml`. Paths in a file are relative to its folder; `--set TABLE.KEY=VALUE` overrides "
        "a key. In Python, `ChainConfig` has the keys of all tables but `[data]` and `[model] store` as its fields.",
    ]
    for name in order:
        parts.append(f"## [{name}]\n\n| key | default | allowed |\n|---|---|---|\n" + "\n".join(tables[name]))
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """`--help` of the program and of each command."""
    parser = _parser()
    parts = ["# Command line", _block(parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                parts += [f"## {name}", _block(command)]
    return "\n\n".join(parts) + "\n"


def _block(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100)
    return f"```text\n{parser.format_help().strip()}\n```"


def _default(item: "dataclasses.Field[Any]") -> str:
    value = item.metadata["none"] if item.default is None else item.default
    return "required" if value == "" else f"`{str(value).lower() if isinstance(value, bool) else value!r}`"


def _allowed(hint: Any, metadata: Any) -> str:
    word = f', or `"{metadata["none"]}"`' if metadata["none"] else ""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f'`"{choice}"`' for choice in typing.get_args(hint))
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if metadata["size"]:
        return f'bytes, or text such as `"1GiB"`{word}'
    if kinds[0] in (int, float):
        start = "above" if metadata["above"] else "from"
        what = "whole number" if kinds[0] is int else "number"
        return f"{what} {start} {metadata['low']:g} to {metadata['high']:g}{word}"
    return {str: "text", bool: "`true` or `false`"}[kinds[0]] + word
