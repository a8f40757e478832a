"""The pages that are tested, and their code blocks in order."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
RUN_PAGES = [ROOT / "README.md", *GUIDE]
ALL_PAGES = [*RUN_PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
ALL_PAGES += sorted((ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*?) -->\n)?^```(?P<language>\S*)\n(?P<text>.*?)^```", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """`reason`: why it is not run, None where it is; `line`: of its fence in the page."""

    language: str
    text: str
    reason: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], found["reason"], text.count("\n", 0, found.start("text")))
        for found in _FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """Lines of a shell block without comments, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
