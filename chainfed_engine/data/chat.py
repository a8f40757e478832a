"""Chat templates: a prompt and its response, or a whole conversation, as one text, with the places that are learned.

A template is a program from a checkpoint, so it runs in jinja2's immutable sandbox, with the names transformers gives
templates (`messages`, `add_generation_prompt`, the special tokens, `raise_exception`, `tojson`) but no clock: the
tokens of a sample must not depend on the day.
"""

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chainfed_engine.errors import DataError

_REMEDY = "remove chat_template.jinja from the store's tokenizer folder to train on plain prompt and response"


class ChatTemplate:
    """One compiled template. Raises DataError where it does not compile or refuses the messages."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"the chat template does not compile: {_first_line(error)}; {_REMEDY}") from error

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        # Templates are programs: they may divide by zero, index out of range, or call what is not there.
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the chat template refuses the messages: {_first_line(error)}; {_REMEDY}") from error

    def prompt_and_response(self, prompt: str, response: str) -> tuple[str, int]:
        """The whole text and the index of the first character after what generation would be prompted with."""
        messages = [{"role": "user", "content": prompt}]
        start = self.render(messages, add_generation_prompt=True)
        text = self.render([*messages, {"role": "assistant", "content": response}], add_generation_prompt=False)
        if not text.startswith(start):
            raise DataError(f"the chat template does not continue its own generation prompt; {_REMEDY}")
        return text, len(start)

    def conversation(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and first and last + 1 character of each of the assistant's turns, its end mark included."""
        text = self.render(messages, add_generation_prompt=False)
        turns = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self.render(messages[:index], add_generation_prompt=True)
                turn = self.render(messages[: index + 1], add_generation_prompt=False)
                if not turn.startswith(start) or not text.startswith(turn):
                    raise DataError(
                        "the chat template rewrites earlier turns as the conversation goes on, so that it cannot be "
                        "trained on as one text; give one row a turn with prompt and response"
                    )
                turns.append((len(start), len(turn)))
        return text, turns


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words in some templates; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Not jinja2's own filter, which escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
