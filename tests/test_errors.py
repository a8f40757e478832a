"""Every message says what to do: its own words, or the remedy of its class."""

import ast
import inspect
from pathlib import Path

import pytest

from chainfed_engine import errors
from chainfed_engine.errors import ChainfedError

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, ChainfedError)]
ROOT = Path(__file__).parents[1] / "chainfed_engine"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_message_without_a_remedy_gets_that_of_its_class(kind: type[ChainfedError]) -> None:
    assert kind.remedy and not kind.remedy.endswith(".")
    assert str(kind("layer 3: nine bytes too many")) == f"layer 3: nine bytes too many; {kind.remedy}"
    for said in ("it is wrong; do better", "expected 3, got 4", "it must be whole"):
        assert str(kind(said)) == said
    assert str(kind()) == ""


def test_each_class_has_a_remedy_of_its_own() -> None:
    assert len({kind.remedy for kind in CLASSES}) == len(CLASSES) > 10


# (file, class): raised and turned into one of ours by whoever calls, or shown by the program that runs the file.
CAUGHT_NEARBY = {
    ("boundary.py", "ValueError"),
    ("files.py", "ValueError"),
    ("flower_starter.py", "ValueError"),
    ("header.py", "ValueError"),
    ("sizes.py", "ValueError"),
    ("tokenizer.py", "ValueError"),
    ("journal.py", "TypeError"),
    ("chat.py", "TemplateError"),
    ("reference.py", "ValueError"),
    ("client_app.py", "RuntimeError"),
    ("codec.py", "ConnectionError"),
}


def test_nothing_is_raised_to_a_user_but_errors_of_ours() -> None:
    """Python's own errors are raised only where Python's protocols want them, or inside one function that turns them
    into ours."""
    allowed = {
        "AttributeError",
        "AssertionError",
        "KeyError",
        "StopIteration",
        "NotImplementedError",
        "ArgumentTypeError",
    }
    ours = {kind.__name__ for kind in CLASSES}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                known = name in ours or name in allowed or not name.endswith(("Error", "Exception"))
                assert known or (path.name, name) in CAUGHT_NEARBY, f"{path}:{node.lineno} raises {name}"
