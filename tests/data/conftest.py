"""A small byte-level tokenizer with a chat template, written as a store's tokenizer folder."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Name the largest planet.",
    "Jupiter is the largest planet of the Solar System.",
    "What does a glacier move?",
    "A glacier moves rock, soil and debris. Größer als ein Haus: 氷河 🧊.",
]


def write_tokenizer(folder: Path, *, chat: bool) -> Path:
    """`folder`/tokenizer/ with 400 byte-level tokens; returns `folder`, usable as a store for Tokenizer.load."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    target = folder / "tokenizer"
    target.mkdir(parents=True)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "model_max_length": 64}
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if chat:
        (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture
def chat_store(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "chat", chat=True)


@pytest.fixture
def plain_store(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "plain", chat=False)
