"""Tables from the real `datasets` and `pandas` libraries: names of classes, missing values, splits, formats."""

from pathlib import Path
from typing import Any

import pytest

from chainfed_engine.data import as_table, read_table
from chainfed_engine.errors import DataError

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")


def labelled() -> Any:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)


@pytest.mark.parametrize("output_format", [None, "torch", "numpy", "pandas"])
def test_class_labels_come_by_name_whatever_the_output_format(output_format: str | None) -> None:
    table = as_table(labelled().with_format(output_format))
    assert table.columns == {"text": ["a", "b"], "label": ["neg", "pos"]}


def test_an_iterable_dataset_is_read_too_and_a_dict_of_splits_refused() -> None:
    assert as_table(labelled().to_iterable_dataset()).names("label") == ["neg", "pos"]
    with pytest.raises(DataError, match="one split of the data set; there are 'train'"):
        as_table(datasets.DatasetDict({"train": labelled()}))


def test_conversations_survive_datasets_and_parquet(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    datasets.Dataset.from_dict({"messages": [turns]}).to_parquet(tmp_path / "chat.parquet")
    assert read_table(tmp_path / "chat.parquet").conversations("messages") == [turns]
    assert as_table(pandas.read_parquet(tmp_path / "chat.parquet")).conversations("messages") == [turns]


def test_what_is_missing_in_a_data_frame_is_nothing_and_numbers_beside_it_stay_whole() -> None:
    frame = pandas.DataFrame({"text": ["a", None, "c"], "label": [1.0, 2.0, float("nan")]})
    table = as_table(frame)
    assert table.columns == {"text": ["a", None, "c"], "label": [1.0, 2.0, None]}
    with pytest.raises(DataError, match=r'row 2: column .label.: .* got nothing; .* missing = "drop"'):
        table.names("label")
    kept = table.without_blanks(["text", "label"])
    assert kept.texts("text") == ["a"] and kept.names("label") == ["1"]
    strings = pandas.DataFrame({"text": pandas.array(["a", pandas.NA], dtype="string")})
    assert as_table(strings).columns == {"text": ["a", None]}


def test_columns_of_a_data_frame_go_by_the_text_of_their_names_which_must_differ() -> None:
    numbered = pandas.DataFrame({0: ["a", "b"], ("x", "y"): [1, 2]})
    assert as_table(numbered).columns == {"0": ["a", "b"], "('x', 'y')": [1, 2]}
    with pytest.raises(DataError, match="a column name stands twice in '0', '0'"):
        as_table(pandas.concat([numbered[[0]], numbered[[0]]], axis=1))


def test_a_table_of_blanks_alone_is_refused_and_one_without_any_kept_as_it_is() -> None:
    with pytest.raises(DataError, match="every row lacks a value in one of 'text'"):
        as_table([{"text": " "}, {"text": None}]).without_blanks(["text"])
    table = as_table([{"text": "x"}])
    assert table.without_blanks(["text"]) is table
