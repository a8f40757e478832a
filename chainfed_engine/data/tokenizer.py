"""The store's tokenizer: texts in, token ids out, by the `tokenizers` library alone.

Read from `<store>/tokenizer/`: `tokenizer.json`, and where present `tokenizer_config.json` and `chat_template.jinja`.
Special tokens are added as the file's own post-processor says; padding and truncation settings inside it are replaced
by the caller's length. Nothing is fetched and no code of the checkpoint runs, but its chat template, sandboxed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers

from chainfed_engine.data.chat import ChatTemplate
from chainfed_engine.errors import DataError

Ids = npt.NDArray[np.int32]
T = TypeVar("T")

# Tokenised at once, of which one text may be more: bounds the library's own memory, far above that of the ids (about
# 200 bytes a character).
_CHUNK_TEXTS, _CHUNK_CHARACTERS = 64, 1 << 17
_MAX_CONFIG_BYTES = 1 << 24


class Tokenizer:
    """See `load`. `pad_id` is a valid id of the vocabulary; which one does not matter, attention masks it."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        pad_id: int,
        eos_id: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad_id = pad_id
        self.eos_id = eos_id
        self.chat_template = chat_template

    @classmethod
    def load(cls, store_dir: str | Path, config: Mapping[str, Any] | None = None) -> "Tokenizer":
        """Open `store_dir/tokenizer/`. `config`: the model's configuration, whose `pad_token_id` and `eos_token_id`
        are used where the tokenizer names none. DataError where it is missing or does not open."""
        folder = Path(store_dir) / "tokenizer"
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; put the model's tokenizer.json there, or convert a checkpoint that holds one"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever its parser finds
            raise DataError(f"{path}: not a tokenizer that the tokenizers library opens: {error}") from error
        settings = _read_settings(folder / "tokenizer_config.json")
        special = _special_tokens(settings)
        eos_id = _token_id(tokenizer, special.get("eos_token"), config, "eos_token_id")
        pad_id = _token_id(tokenizer, special.get("pad_token"), config, "pad_token_id")
        if pad_id is None:
            pad_id = eos_id if eos_id is not None else 0
        source = _template_source(folder / "chat_template.jinja", settings)
        template = ChatTemplate(source, special) if source is not None else None
        return cls(tokenizer, pad_id=pad_id, eos_id=eos_id, chat_template=template)

    @property
    def vocab_size(self) -> int:
        """Entries including the added tokens; a model's embedding may have more rows."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, texts: Sequence[str], max_length: int) -> Iterator[Ids]:
        """Token ids of each text with special tokens, cut to `max_length` tokens, in chunks of texts."""
        added = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= added:
            raise DataError(f"sequence_length {max_length}: the tokenizer alone adds {added} tokens; raise it")
        self._tokenizer.enable_truncation(max_length)
        try:
            for chunk in _chunks(texts, len):
                for encoding in self._tokenizer.encode_batch_fast(chunk):
                    yield np.array(encoding.ids, dtype=np.int32)
        finally:
            self._tokenizer.no_truncation()

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], max_length: int) -> Iterator[tuple[Ids, int]]:
        """For each (prompt, response): the ids, cut to `max_length`, and how many of them belong to the prompt.

        With a chat template the text is the template's and carries its own special tokens. Without: `prompt`, a line
        feed, `response`, the tokenizer's special tokens, and the end-of-sequence token. A token that reaches over the
        end of the prompt counts as prompt.
        """
        for chunk in _chunks(pairs, lambda pair: len(pair[0]) + len(pair[1])):
            texts, starts = [], []
            for prompt, response in chunk:
                if self.chat_template is not None:
                    text, start = self.chat_template.prompt_and_response(prompt, response)
                else:
                    text, start = f"{prompt}\n{response}", len(prompt) + 1
                texts.append(text)
                starts.append(start)
            plain = self.chat_template is None
            for encoding, start in zip(
                self._tokenizer.encode_batch(texts, add_special_tokens=plain), starts, strict=True
            ):
                ids, num_prompt = encoding.ids, _num_prompt_tokens(encoding, start)
                if plain and self.eos_id is not None and ids[-1:] != [self.eos_id]:
                    ids = [*ids, self.eos_id]
                yield np.array(ids[:max_length], dtype=np.int32), min(num_prompt, max_length)

    def encode_conversations(
        self, conversations: Sequence[list[dict[str, str]]], max_length: int
    ) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
        """For each list of messages: the ids of the chat template's text, cut to `max_length`, and which of them lie
        inside a turn of the assistant. Raises DataError without a chat template."""
        if self.chat_template is None:
            raise DataError(
                "messages need a chat template, and the store's tokenizer has none; put chat_template.jinja into its "
                "tokenizer folder, or give prompt and response"
            )
        for chunk in _chunks(conversations, lambda messages: sum(len(message["content"]) for message in messages)):
            rendered = [self.chat_template.conversation(messages) for messages in chunk]
            encodings = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
            for encoding, (_, turns) in zip(encodings, rendered, strict=True):
                begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
                learned = np.zeros(len(begins), dtype=np.bool_)
                for start, stop in turns:
                    learned |= (begins >= start) & (ends <= stop) & (ends > begins)
                yield np.array(encoding.ids[:max_length], dtype=np.int32), learned[:max_length]


def _chunks(items: Sequence[T], num_characters: Callable[[T], int]) -> Iterator[list[T]]:
    """`items` in order, as many at a time as the library may hold."""
    chunk: list[T] = []
    held = 0
    for item in items:
        size = num_characters(item)
        if chunk and (len(chunk) == _CHUNK_TEXTS or held + size > _CHUNK_CHARACTERS):
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += size
    if chunk:
        yield chunk


def _num_prompt_tokens(encoding: tokenizers.Encoding, start: int) -> int:
    """Index of the first token whose characters all lie at or after `start`; special tokens in front have none."""
    for index, ((begin, end), special) in enumerate(zip(encoding.offsets, encoding.special_tokens_mask, strict=True)):
        if begin >= start and (end > begin or not special):
            return index
    return len(encoding.ids)


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {_MAX_CONFIG_BYTES} bytes")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, `pad_token`, ... as text; the file has them as text or as {"content": text}."""
    tokens = {}
    for name, value in settings.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    return tokens


def _token_id(
    tokenizer: tokenizers.Tokenizer, token: str | None, config: Mapping[str, Any] | None, key: str
) -> int | None:
    found: Any = tokenizer.token_to_id(token) if token is not None else None
    if found is None and config is not None:
        value = config.get(key)
        found = value[0] if isinstance(value, list) and value else value
    if found is None or isinstance(found, bool) or not isinstance(found, int):
        return None
    return found if 0 <= found < tokenizer.get_vocab_size(with_added_tokens=True) else None


def _template_source(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template file, else the one in tokenizer_config.json (text, or a list of {"name", "template"})."""
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
