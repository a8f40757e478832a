"""The public interface as text: every public name with its parameters and defaults, every command with its options.

`python -m tests.public_api` writes it into docs/API.md, after a change that is meant (CONTRIBUTING, "Versions").
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chainfed_engine as cfe
from chainfed_engine import callbacks, errors
from chainfed_engine.cli.main import _parser
from chainfed_engine.config import DataConfig

PAGE = Path(__file__).parents[1] / "docs" / "API.md"
_BLOCK = re.compile(r"(?<=```text\n).*?(?=```)", re.DOTALL)


def text() -> str:
    lines = []
    for name in sorted(cfe.__all__):
        lines += list(_described(f"cfe.{name}", getattr(cfe, name)))
    lines += list(_described("chainfed_engine.config.DataConfig", DataConfig))
    for name in sorted(callbacks.__all__):
        lines += list(_described(f"chainfed_engine.callbacks.{name}", getattr(callbacks, name)))
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        bases = ", ".join(base.__name__ for base in kind.__bases__)
        lines.append(f"chainfed_engine.errors.{name}({bases})")
    return "\n".join([*lines, *_commands(_parser())]) + "\n"


def _described(path: str, found: Any) -> Iterator[str]:
    if inspect.ismodule(found):
        for name in sorted(getattr(found, "__all__", [])):
            yield from _described(f"{path}.{name}", getattr(found, name))
    elif inspect.isclass(found):
        yield from _described_class(path, found)
    elif callable(found):
        yield f"{path}{_signature(found)}"
    else:
        yield f"{path}: {type(found).__name__}"


def _described_class(path: str, kind: type) -> Iterator[str]:
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    if fields:
        yield path
        for field in fields:
            default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
            yield f"    {field.name}{default}"
    else:
        yield f"{path}{_signature(kind)}"
    names = {field.name for field in fields}
    for name, member in inspect.getmembers(kind):
        if name.startswith("_") or name in names or name not in vars(kind):
            continue
        if inspect.isfunction(member):
            yield f"    {name}{_signature(member)}"
        elif isinstance(inspect.getattr_static(kind, name), property):
            yield f"    {name}: property"


def _signature(found: Any) -> str:
    """Parameters and defaults, without types, whose text differs between versions of Python."""
    signature = inspect.signature(found)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _commands(parser: argparse.ArgumentParser, path: str = "chainfed") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in sorted(action.choices.items()):
                yield from _commands(command, f"{path} {name}")
            return
    shown = []
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            name = "|".join(action.option_strings) or str(action.metavar or action.dest).upper()
            shown.append(name if action.required else f"[{name}]")
    yield " ".join([path, *shown])


def published() -> str:
    """The block in docs/API.md."""
    found = _BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None, f"{PAGE}: no block ```text"
    return found[0]


if __name__ == "__main__":
    PAGE.write_text(_BLOCK.sub(lambda _: text(), PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")
