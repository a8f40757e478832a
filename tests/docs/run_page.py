"""Runs the blocks of pages, each in a folder of its own: python run_page.py PAGE FOLDER [PAGE FOLDER ...].

TOML blocks that begin with `# NAME.toml` are written first. Python blocks share one namespace; `chainfed` lines run the
program in this process. The first failure ends a page; the result is one JSON object, page to traceback or "".
"""

import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

from chainfed_engine.cli.main import main, prepare_process
from tests.docs.pages import blocks, commands


def run_page(page: Path) -> None:
    found = [block for block in blocks(page) if block.reason is None]
    for block in found:
        if block.language == "toml":
            name = block.text.split("\n", 1)[0].removeprefix("# ").strip()
            assert name.endswith(".toml"), f"{page.name}:{block.line}: expected a first line `# NAME.toml`"
            Path(name).write_text(block.text, encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in found:
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), namespace)
        elif block.language == "sh":
            for line in commands(block):
                words = shlex.split(line)
                assert words[0] == "chainfed", f"{where}: {words[0]} is not run here; give a reason with `not run:`"
                code = main(words[1:])
                assert code == 0, f"{where}: exit code {code}: {line}"
        else:
            assert block.language in ("toml", "text", ""), f"{where}: unknown language {block.language}"


def main_of_pages(arguments: list[str]) -> dict[str, str]:
    """`PAGE FOLDER PAGE FOLDER ...` -> what went wrong in each page, "" where nothing did. Importing takes longer than
    running: all pages share one process."""
    wrong = {}
    for page, folder in zip(arguments[::2], arguments[1::2], strict=True):
        os.chdir(folder)
        try:
            run_page(Path(page))
            wrong[page] = ""
        except BaseException:
            wrong[page] = traceback.format_exc()
    return wrong


if __name__ == "__main__":
    prepare_process()
    real = os.dup(1)
    os.dup2(2, 1)  # what the blocks print goes to stderr; the result alone to stdout
    found = main_of_pages(sys.argv[1:])
    os.write(real, json.dumps(found).encode())
