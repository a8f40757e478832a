"""Tables to tokens: `encode_classification` (one label a row), `encode_causal` (loss on the response only) and
`encode_messages` (loss on the assistant's turns of a conversation).

What leaves is an `EncodedData`: unpadded int32 arrays on the host, a stable id a sample, and which row of the table
each sample came from, so that a partition of rows can be carried over.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chainfed_engine.data.table import Table
from chainfed_engine.data.tokenizer import Ids, Tokenizer
from chainfed_engine.errors import DataError
from chainfed_engine.types import IGNORE_INDEX, TaskKind

_MANY_LABELS = 20  # more than these, and more than half as many as rows: rather a text or an id than a label


@dataclass(frozen=True)
class EncodedData:
    """N tokenised samples. `labels`: int64 [N] (classification) or one int32 array a sample, as long as its ids and
    IGNORE_INDEX where no loss (causal LM). `rows` int64 [N]: row of the source table. `num_dropped`: rows of the table
    that had no token left to learn from. `label_names`: text of label 0, 1, ... (classification)."""

    input_ids: list[Ids]
    labels: npt.NDArray[np.int64] | list[Ids]
    sample_ids: list[str]
    rows: npt.NDArray[np.int64]
    label_names: tuple[str, ...] = ()
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def task(self) -> TaskKind:
        return "classification" if isinstance(self.labels, np.ndarray) else "causal-lm"

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.input_ids)

    @property
    def most_targets(self) -> int:
        """Largest number of labelled tokens in a sample (causal LM); 1 for classification, 0 without samples."""
        if isinstance(self.labels, np.ndarray):
            return 1
        return max((int((labels[1:] != IGNORE_INDEX).sum()) for labels in self.labels), default=0)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "EncodedData":
        """Samples (not table rows) `indices`, in that order; arrays are shared, not copied."""
        picked = np.asarray(indices, dtype=np.int64)
        labels: Any = self.labels[picked] if isinstance(self.labels, np.ndarray) else [self.labels[i] for i in picked]
        return EncodedData(
            input_ids=[self.input_ids[i] for i in picked],
            labels=labels,
            sample_ids=[self.sample_ids[i] for i in picked],
            rows=self.rows[picked],
            label_names=self.label_names,
        )

    def of_rows(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "EncodedData":
        """The samples that came from the given table rows, in the order kept here; dropped rows are left out."""
        return self.subset(np.flatnonzero(np.isin(self.rows, np.asarray(rows, dtype=np.int64))))


def encode_classification(
    table: Table, tokenizer: Tokenizer, *, text: str, label: str, labels: Sequence[str] | None, max_length: int
) -> EncodedData:
    """Tokenise `text`; `labels`: the label vocabulary (evaluation), None: sorted from the table (training).

    Raises DataError for an unknown label or fewer than two labels.
    """
    names = table.names(label)
    known = tuple(labels) if labels is not None else tuple(sorted(set(names)))
    if len(known) < 2:
        raise DataError(f"{table.source}: column {label!r}: expected at least two labels, got only {known[0]!r}")
    if labels is None and len(known) > max(_MANY_LABELS, len(names) // 2):
        warnings.warn(
            f"{table.source}: column {label!r} has {len(known)} labels in {len(names)} rows; is it the labels' column?",
            stacklevel=2,
        )
    codes = {name: code for code, name in enumerate(known)}
    unknown = next((row for row, name in enumerate(names) if name not in codes), None)
    if unknown is not None:
        raise DataError(
            f"{table.where(unknown)}: unknown label {names[unknown]!r}; the model was trained on "
            f"{', '.join(map(repr, known[:32]))}{' ...' if len(known) > 32 else ''}"
        )
    targets = np.array([codes[name] for name in names], dtype=np.int64)
    input_ids = list(tokenizer.encode(table.texts(text), max_length))
    for row, ids in enumerate(input_ids):
        if not len(ids):
            raise DataError(f"{table.where(row)}: column {text!r} has no token of this tokenizer; drop such rows")
    return EncodedData(
        input_ids=input_ids,
        labels=targets,
        sample_ids=list(_sample_ids(input_ids, [targets[i : i + 1] for i in range(len(targets))])),
        rows=np.arange(len(table), dtype=np.int64),
        label_names=known,
    )


def encode_causal(table: Table, tokenizer: Tokenizer, *, prompt: str, response: str, max_length: int) -> EncodedData:
    """Tokenise prompt and response as one sequence, labels IGNORE_INDEX on the prompt.

    A row whose response is cut away entirely is dropped and counted. Raises DataError when none is left.
    """
    pairs = list(zip(table.texts(prompt), table.texts(response), strict=True))
    encoded = tokenizer.encode_pairs(pairs, max_length)
    samples = ((ids, np.arange(len(ids)) >= num_prompt) for ids, num_prompt in encoded)
    return _encoded_causal(table, samples, max_length)


def encode_messages(table: Table, tokenizer: Tokenizer, *, messages: str, max_length: int) -> EncodedData:
    """Tokenise conversations by the chat template, labels IGNORE_INDEX outside the assistant's turns.

    A row of `messages` is a list of {"role", "content"}. Rows without a token to learn are dropped and counted, as in
    `encode_causal`.
    """
    conversations = table.conversations(messages)
    return _encoded_causal(table, tokenizer.encode_conversations(conversations, max_length), max_length)


def _encoded_causal(table: Table, samples: Iterable[tuple[Ids, npt.NDArray[np.bool_]]], max_length: int) -> EncodedData:
    """From each row's ids and which of them carry loss."""
    input_ids: list[Ids] = []
    labels: list[Ids] = []
    rows: list[int] = []
    for row, (ids, learned) in enumerate(samples):
        # The label of position t is predicted from position t - 1: the first token never carries loss.
        if not learned[1:].any():
            continue
        target = np.where(learned, ids, np.int32(IGNORE_INDEX)).astype(np.int32)
        target[0] = IGNORE_INDEX
        input_ids.append(ids)
        labels.append(target)
        rows.append(row)
    if not rows:
        raise DataError(f"{table.source}: no response is left within {max_length} tokens; raise sequence_length")
    return EncodedData(
        input_ids=input_ids,
        labels=labels,
        sample_ids=list(_sample_ids(input_ids, labels)),
        rows=np.array(rows, dtype=np.int64),
        num_dropped=len(table) - len(rows),
    )


def _sample_ids(input_ids: Sequence[Ids], labels: Sequence[npt.NDArray[Any]]) -> Iterator[str]:
    """First 16 hex digits of sha256(tokens, labels), and how many equal samples came before: unique and stable."""
    seen: Counter[str] = Counter()
    for ids, target in zip(input_ids, labels, strict=True):
        digest = hashlib.sha256(ids.astype("<i4").tobytes() + b"|" + target.astype("<i8").tobytes()).hexdigest()[:16]
        yield f"{digest}-{seen[digest]}"
        seen[digest] += 1
