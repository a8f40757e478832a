from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from chainfed_engine.data import (
    EncodedData,
    Tokenizer,
    as_table,
    batches,
    collate,
    encode_causal,
    encode_classification,
    encode_messages,
)
from chainfed_engine.errors import DataError, InvalidArgument
from chainfed_engine.types import IGNORE_INDEX
from tests.data.conftest import TEXTS


@pytest.fixture
def tokenizer(plain_store: Path) -> Tokenizer:
    return Tokenizer.load(plain_store)


def classify(tokenizer: Tokenizer, labels: list[str] | None = None, rows: object = None) -> EncodedData:
    table = as_table(rows or [{"t": text, "y": y} for text, y in zip(TEXTS, "baba", strict=True)])
    return encode_classification(table, tokenizer, text="t", label="y", labels=labels, max_length=24)


def test_labels_are_sorted_text_and_codes_their_places(tokenizer: Tokenizer) -> None:
    encoded = classify(tokenizer)
    assert encoded.label_names == ("a", "b")
    assert encoded.task == "classification"
    assert np.array_equal(encoded.labels, [1, 0, 1, 0]) and isinstance(encoded.labels, np.ndarray)
    assert encoded.num_tokens == sum(map(len, encoded.input_ids)) and max(map(len, encoded.input_ids)) <= 24


def test_a_given_vocabulary_fixes_the_codes_and_unknown_labels_are_named(tokenizer: Tokenizer) -> None:
    assert classify(tokenizer, ["b", "z", "a"]).labels[0] == 0
    with pytest.raises(DataError, match=r"examples, row 1: unknown label 'a'; the model was trained on 'b', 'c'"):
        classify(tokenizer, ["b", "c"])
    with pytest.raises(DataError, match="expected at least two labels, got only 'b'"):
        classify(tokenizer, rows=[{"t": "x", "y": "b"}])


def test_a_column_that_looks_like_no_label_is_warned_of(tokenizer: Tokenizer) -> None:
    with pytest.warns(UserWarning, match="column 'y' has 30 labels in 31 rows; is it the labels' column?"):
        classify(tokenizer, rows=[{"t": "x", "y": str(row % 30)} for row in range(31)])
    classify(tokenizer, rows=[{"t": "x", "y": str(row % 30)} for row in range(60)])  # warnings are errors here


def test_sample_ids_are_unique_and_depend_on_tokens_and_label_only(tokenizer: Tokenizer) -> None:
    rows = [{"t": "x", "y": "a"}, {"t": "x", "y": "a"}, {"t": "x", "y": "b"}, {"t": "z", "y": "a"}]
    ids = classify(tokenizer, rows=rows).sample_ids
    assert len(set(ids)) == 4 and ids[0][:16] == ids[1][:16] != ids[2][:16]
    assert set(classify(tokenizer, rows=rows[::-1]).sample_ids) == set(ids), "the order of rows does not matter"


def test_causal_loss_is_on_the_response_only(tokenizer: Tokenizer) -> None:
    table = as_table([{"p": TEXTS[0], "r": TEXTS[1]}, {"p": TEXTS[2], "r": TEXTS[3]}])
    encoded = encode_causal(table, tokenizer, prompt="p", response="r", max_length=512)
    assert encoded.task == "causal-lm" and encoded.num_dropped == 0
    for ids, labels in zip(encoded.input_ids, encoded.labels, strict=True):
        start = int(np.argmax(labels != IGNORE_INDEX))
        assert start > 0 and (labels[:start] == IGNORE_INDEX).all()
        assert np.array_equal(labels[start:], ids[start:])


def test_rows_whose_response_is_cut_away_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    table = as_table([{"p": "word " * 60, "r": "x"}, {"p": "a", "r": "b"}, {"p": "c", "r": "d"}])
    encoded = encode_causal(table, tokenizer, prompt="p", response="r", max_length=16)
    assert (len(encoded), encoded.num_dropped, encoded.rows.tolist()) == (2, 1, [1, 2])
    assert encoded.of_rows([0, 2]).rows.tolist() == [2]
    with pytest.raises(DataError, match="no response is left within 2 tokens; raise sequence_length"):
        encode_causal(table.select([0]), tokenizer, prompt="p", response="r", max_length=2)


def test_subset_keeps_order_labels_and_ids(tokenizer: Tokenizer) -> None:
    encoded = classify(tokenizer)
    part = encoded.subset([2, 0])
    assert part.sample_ids == [encoded.sample_ids[2], encoded.sample_ids[0]]
    assert np.array_equal(part.labels, [1, 1]) and part.rows.tolist() == [2, 0]
    assert part.label_names == encoded.label_names


def test_batches_pad_right_and_mask(tokenizer: Tokenizer) -> None:
    encoded = classify(tokenizer)
    batch = collate(encoded, [0, 3], pad_id=9)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.labels is not None and batch.labels.tolist() == [1, 0]
    for row, index in enumerate([0, 3]):
        length = len(encoded.input_ids[index])
        assert batch.input_ids[row, :length].tolist() == encoded.input_ids[index].tolist()
        assert batch.attention_mask[row].sum() == length
        assert (batch.input_ids[row, length:] == 9).all()
    assert batch.attention_mask.all(dim=0).sum() == min(len(encoded.input_ids[i]) for i in (0, 3))


def test_causal_labels_are_padded_with_the_ignored_label(tokenizer: Tokenizer) -> None:
    table = as_table([{"p": "a", "r": "b"}, {"p": TEXTS[2], "r": TEXTS[3]}])
    encoded = encode_causal(table, tokenizer, prompt="p", response="r", max_length=512)
    batch = collate(encoded, [0, 1], pad_id=2)
    assert batch.labels is not None and batch.labels.shape == batch.input_ids.shape
    assert (batch.labels[batch.attention_mask == 0] == IGNORE_INDEX).all()


def test_without_a_seed_the_longest_batches_come_first_and_with_one_shuffled(tokenizer: Tokenizer) -> None:
    rows = [{"t": "word " * (1 + 7 * i % 11), "y": "ab"[i % 2]} for i in range(23)]
    encoded = classify(tokenizer, rows=rows)
    sorted_batches = list(batches(encoded, 5, seed=None, pad_id=0))
    lengths = [int(n) for batch in sorted_batches for n in batch.attention_mask.sum(dim=1)]
    assert lengths == sorted(lengths, reverse=True) and [len(b.sample_ids) for b in sorted_batches] == [5, 5, 5, 5, 3]
    orders = {}
    for seed in (0, 0, 1):
        order = [sample for batch in batches(encoded, 5, seed=seed, pad_id=0) for sample in batch.sample_ids]
        assert sorted(order) == sorted(encoded.sample_ids)
        assert orders.setdefault(seed, order) == order
    assert orders[0] != orders[1]


def test_empty_batches_and_sizes_are_refused(tokenizer: Tokenizer) -> None:
    encoded = classify(tokenizer)
    with pytest.raises(InvalidArgument, match="at least one sample"):
        collate(encoded, [], 0)
    with pytest.raises(InvalidArgument, match="batch_size of at least 1"):
        next(batches(encoded, 0, seed=None, pad_id=0))


CHAT = [
    {"role": "user", "content": TEXTS[0]},
    {"role": "assistant", "content": TEXTS[1]},
    {"role": "user", "content": "And a glacier?"},
    {"role": "assistant", "content": TEXTS[3]},
]


def test_a_conversation_is_learned_in_the_assistants_turns_alone(chat_store: Path) -> None:
    tokenizer = Tokenizer.load(chat_store)
    encoded = encode_messages(as_table([{"chat": CHAT}]), tokenizer, messages="chat", max_length=512)
    ids, labels = encoded.input_ids[0], encoded.labels[0]
    learned = labels != IGNORE_INDEX
    assert np.array_equal(labels[learned], ids[learned])
    raw = tokenizers.Tokenizer.from_file(str(chat_store / "tokenizer" / "tokenizer.json"))
    runs = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]]))).reshape(-1, 2)
    turns = [raw.decode(ids[first:last].tolist(), skip_special_tokens=False) for first, last in runs]
    assert turns == [f"{TEXTS[1]}<|im_end|>\n", f"{TEXTS[3]}<|im_end|>\n"]


def test_one_turn_is_learned_as_prompt_and_response_are(chat_store: Path) -> None:
    tokenizer = Tokenizer.load(chat_store)
    chat = encode_messages(as_table([{"m": CHAT[:2]}]), tokenizer, messages="m", max_length=64)
    pair = as_table([{"p": TEXTS[0], "r": TEXTS[1]}])
    wanted = encode_causal(pair, tokenizer, prompt="p", response="r", max_length=64)
    assert np.array_equal(chat.labels[0], wanted.labels[0]) and chat.sample_ids == wanted.sample_ids


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "expected a list of .* got str"),
        ([], "expected a list of .* got list"),
        ([{"role": "user"}], "expected a list of"),
        ([CHAT[1]], "that the user begins"),
        ([{"role": "clown", "content": "x"}, CHAT[1]], "no such role"),
    ],
)
def test_what_is_no_conversation_is_refused(chat_store: Path, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_messages(as_table([{"m": value}]), Tokenizer.load(chat_store), messages="m", max_length=64)


def test_messages_need_a_chat_template_that_only_appends(plain_store: Path, chat_store: Path) -> None:
    table = as_table([{"m": CHAT}])
    with pytest.raises(DataError, match=r"chat_template\.jinja"):
        encode_messages(table, Tokenizer.load(plain_store), messages="m", max_length=64)
    rewriting = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    (chat_store / "tokenizer" / "chat_template.jinja").write_text(rewriting)
    with pytest.raises(DataError, match="prompt and response"):
        encode_messages(table, Tokenizer.load(chat_store), messages="m", max_length=64)
