"""A checkpoint's tokenizer as the files of a store: copied, or built once by transformers' own conversion.

Enters: a checkpoint folder or a .gguf file. Leaves: `tokenizer.json`, `tokenizer_config.json` and what else
`TOKENIZER_FILES` names, in the given empty folder; or the reason why there is none (the store is then made without).
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from chainfed_engine.model.format import TOKENIZER_FILES
from chainfed_engine.model.header import parse_json

MAX_TOKENIZER_BYTES = 256_000_000
_SLOW_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
# Where and how transformers loaded the tokenizer: facts about this machine, not about the tokenizer.
_LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path")
_PROBE_TEXTS = ("Hello world, this is a test: 12 + 34 = 46.", "naïve café — ünïcödé\n\tend")


def write_from_folder(folder: Path, destination: Path) -> str | None:
    """Copy or convert the tokenizer of a Hugging Face checkpoint folder; the reason when there is none."""
    if not (folder / "tokenizer.json").is_file():
        if not any((folder / name).is_file() for name in _SLOW_FILES):
            return "the checkpoint has no tokenizer files"
        return _convert(destination, folder, check=False)
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                return f"{name} has {path.stat().st_size} bytes, more than {MAX_TOKENIZER_BYTES}"
            shutil.copyfile(path, destination / name)
    _extract_chat_template(folder, destination)
    return None


def write_from_gguf(path: Path, destination: Path) -> str | None:
    """Build the tokenizer from a GGUF file's metadata; the reason when that fails or does not round-trip text."""
    return _convert(destination, path.parent, check=True, gguf_file=path.name)


def _extract_chat_template(folder: Path, destination: Path) -> None:
    """Older checkpoints keep the template in chat_template.json; a store keeps it in chat_template.jinja."""
    old = folder / "chat_template.json"
    if (destination / "chat_template.jinja").exists() or not old.is_file() or old.stat().st_size > MAX_TOKENIZER_BYTES:
        return
    content = parse_json(old.read_bytes(), str(old))
    if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
        (destination / "chat_template.jinja").write_text(content["chat_template"], encoding="utf-8")


def _convert(destination: Path, folder: Path, *, check: bool, **options: Any) -> str | None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # whatever the library meets in foreign files; the store is made without a tokenizer
        return f"transformers could not convert it: {type(error).__name__}: {str(error).strip()[:200]}"
    if not tokenizer.is_fast:
        return f"{type(tokenizer).__name__} has no fast form (tokenizer.json)"
    for text in _PROBE_TEXTS if check else ():
        decoded = str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))
        if decoded.strip() != text:
            return f"the converted tokenizer decodes {text!r} as {decoded!r}"
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        for name in TOKENIZER_FILES:
            if (Path(saved) / name).is_file():
                shutil.move(Path(saved) / name, destination / name)
    settings_path = destination / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in _LOCAL_KEYS}
    settings_path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return None
