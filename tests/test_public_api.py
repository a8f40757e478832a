"""The public interface is the one that docs/API.md promises."""

import difflib

import chainfed_engine as cfe
from tests.public_api import published, text


def test_the_public_interface_is_the_published_one() -> None:
    changes = "\n".join(difflib.unified_diff(published().splitlines(), text().splitlines(), "docs/API.md", "code", n=0))
    assert not changes, (
        f"the public interface has changed:\n{changes}\nif this is meant, follow CONTRIBUTING (Versions), then run "
        "python -m tests.public_api"
    )


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in cfe.__all__:
        found = getattr(cfe, name)
        assert isinstance(found, str) or (found.__doc__ or "").strip(), name
