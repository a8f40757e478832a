import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from chainfed_engine.config import DataConfig
from chainfed_engine.data import Table, as_table, files, read_table
from chainfed_engine.errors import DataError

CSV = 'text,label\n"a, ""quoted""\nsecond line",1\nplain ä,2\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_keeps_quoted_line_ends_and_knows_lines(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", CSV))
    assert table.columns == {"text": ['a, "quoted"\nsecond line', "plain ä"], "label": ["1", "2"]}
    assert table.where(0).endswith("a.csv, line 2")
    assert table.where(1).endswith("a.csv, line 4")


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_read_like_plain_ones(tmp_path: Path, ending: str, compress: Any) -> None:
    plain = read_table(write(tmp_path / "a.csv", CSV))
    assert read_table(write(tmp_path / f"a.csv{ending}", compress(CSV.encode()))).columns == plain.columns


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_truncated_archive_is_one_clear_error(tmp_path: Path, ending: str, compress: Any, keep: float) -> None:
    rows = "".join(f"{i},{hash((i, 'x'))}\n" for i in range(2000))
    data = compress(("a,b\n" + rows).encode())
    with pytest.raises(DataError, match="damaged"):
        read_table(write(tmp_path / f"a.csv{ending}", data[: int(len(data) * keep)]))


def test_an_archive_that_is_none_is_refused(tmp_path: Path) -> None:
    for ending in (".gz", ".bz2", ".xz"):
        with pytest.raises(DataError):
            read_table(write(tmp_path / f"a.csv{ending}", CSV))


def test_jsonl_keeps_only_the_columns_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "n": 1, "more": [1]}\n\n{"text": "y", "n": 2}\n')
    table = read_table(path, ["text", "n"])
    assert table.columns == {"text": ["x", "y"], "n": [1, 2]}
    assert table.names("n") == ["1", "2"]
    assert table.where(1).endswith("line 3"), "blank lines count"
    assert read_table(path).columns["more"] == [[1], None]


def test_tsv_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.tsv", "\ufefftext\tlabel\nx,y\t1\n")).columns == {
        "text": ["x,y"],
        "label": ["1"],
    }


def test_parquet_reads_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "label": [1, 2], "more": [0.5, None]}), path)
    assert read_table(path, ["text", "label"]).columns == {"text": ["x", "y"], "label": [1, 2]}
    with pytest.raises(DataError, match=r"no column 'texts'; there are 'text', 'label', 'more'"):
        read_table(path, ["texts"])
    write(path, path.read_bytes()[:-10])
    with pytest.raises(DataError, match="not a Parquet file"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "at least one row"),
        ("a.csv", "text,label\n", "at least one row"),
        ("a.csv", "text,label\nx,1\ny\n", r"a\.csv, line 3: expected 2 values, got 1"),
        ("a.csv", 'text,label\nx,1\n"y,2\n', r"line 3: not a CSV row: .*; values are separated by commas"),
        ("a.csv", 'text;label\n"x";1\n', r"line 2: not a CSV row: .*another character: save it with commas"),
        ("a.csv", "text;label\nx,y;1\n", r"line 2: expected 1 values, got 2; the file seems to separate"),
        ("a.csv", "text,text\nx,1\n", "a column name stands twice"),
        ("a.csv", b"text,label\nx,1\n\xff\xfe,2\n", r"line 3: not UTF-8 text \(byte 0xff\); save it as UTF-8"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), r"a\.csv: UTF-16 text; save it as UTF-8"),
        ("a.jsonl", "", "at least one row"),
        ("a.jsonl", '{"text": 1}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", "[" * 100_000 + "\n", r"line 1: not JSON"),
        ("a.jsonl", "[1, 2]\n", r"line 1: expected an object .* got int"),
        ("a.json", "[]", "expected at least one row"),
        (
            "a.json",
            '[{"text": 1},\n\n{"text": ]',
            r"a\.json, line 3: not JSON: .*; write one object a line, or one list",
        ),
        ("a.json", '[{"text": 1}\n{"text": 2}]', r"line 2: not JSON: expected ',' or the end of the list, got '{'"),
        ("a.json", '[{"text": 1}, {"text": 2}', r"line 1: not JSON"),
        ("a.json", '{\n"text": 1\n}', r"line 1: not JSON: .*; write one object a line"),
        (
            "a.json",
            '[{"text": 1}]\n\n  {"text": 2}',
            r"line 3: expected the end of the file after the list's ']', got '{'",
        ),
        ("a.json", "[]\n]", r"line 2: expected the end of the file"),
        ("a.json", '[{"text": 1}:', r"expected ',' or the end of the list, got ':'"),
        ("a.csv", "text,label\nx,ä".encode()[:-1], r"line 2: ends in the middle of a UTF-8 character"),
        ("a.xlsx", "", "unknown kind of data file; expected .csv"),
        ("a", "", "unknown kind"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_read_in_pieces(tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PIECE_CHARS", 7)
    rows = [{"text": f'"[{{, \u6f22 {"x" * number}', "more": [number, {"a": None}]} for number in range(9)]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=indent))
    table = read_table(path)
    assert table.columns == {name: [row[name] for row in rows] for name in ("text", "more")}
    assert table.line_numbers.tolist() == [1 if indent is None else 2 + 9 * number for number in range(9)]
    with pytest.raises(DataError, match="end of the file after the list"):  # wherever a piece ends
        read_table(write(tmp_path / "d.json", path.read_text() + "   x"))
    assert read_table(write(tmp_path / "c.json", "\n\n" + path.read_text() + "\n \n")).columns == table.columns
    lines = write(tmp_path / "b.json", "\n".join(map(json.dumps, rows)))
    assert read_table(lines).columns == table.columns


def test_columns_are_told_in_the_order_of_the_rows() -> None:
    with pytest.raises(DataError, match="no column 'label'; there are 'text', 'z', 'a', 'q'"):
        as_table([{"text": "x", "z": 1, "a": 2}, {"q": 3}]).column("label")


def test_a_missing_column_names_those_there(tmp_path: Path) -> None:
    for path in (write(tmp_path / "a.csv", CSV), write(tmp_path / "a.jsonl", '{"text": "x", "label": 1}\n')):
        with pytest.raises(DataError, match=rf"{path.name}: no column 'texts'; there are 'text', 'label'"):
            read_table(path, ["texts", "label"])
    uneven = write(tmp_path / "b.jsonl", '{"text": "x"}\n{"label": 1}\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: no column 'text'; there are 'label'"):
        read_table(uneven, ["text"])
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder; name the data file in it"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected text, got nothing"),
        (3, "expected text, got int"),
        (float("nan"), "got nothing"),
        ("  ", "blank"),
    ],
)
def test_what_is_not_text_is_refused_with_its_row(value: object, message: str) -> None:
    table = as_table([{"text": "x"}, {"text": value}])
    with pytest.raises(DataError, match=rf"^examples, row 1: .*{message}"):
        table.texts("text")


def test_labels_may_be_text_whole_numbers_or_booleans() -> None:
    assert as_table([{"y": "pos"}, {"y": 3}, {"y": np.int64(4)}, {"y": True}]).names("y") == ["pos", "3", "4", "true"]
    for value in (None, 0.5, "", [1]):
        with pytest.raises(DataError, match="expected a name"):
            as_table([{"y": value}]).names("y")


def test_python_records_data_frames_and_datasets_give_equal_tables() -> None:
    rows = [{"text": "x", "label": 1, "more": 0}, {"text": "y", "label": 2, "more": 0}]

    class FakeDataset:
        column_names = ["text", "label", "more"]  # noqa: RUF012

        def __getitem__(self, name: str) -> list[Any]:
            return [row[name] for row in rows]

    table = Table("t", {"text": ["x", "y"], "label": [1, 2]})
    for examples in (rows, iter(rows), pd.DataFrame(rows), FakeDataset(), table):
        assert as_table(examples, columns=["text", "label"]).columns == table.columns
    for examples in (rows, pd.DataFrame(rows), FakeDataset()):
        with pytest.raises(DataError, match=r"no column 'answer'; there are 'text', 'label', 'more'"):
            as_table(examples, columns=["text", "answer"])


@pytest.mark.parametrize("examples", [3, b"x", {"text": ["x"]}, None])
def test_other_objects_are_refused(examples: object) -> None:
    with pytest.raises(DataError, match="expected a path, a list of dicts"):
        as_table(examples)


def test_select_keeps_order_and_places(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.jsonl", "".join(json.dumps({"n": i}) + "\n" for i in range(5))))
    picked = table.select([3, 1])
    assert picked.columns == {"n": [3, 1]}
    assert picked.where(0).endswith("line 4")


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")).columns["text"][0]) == 300_000


def test_a_file_with_another_separator_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\na;b\n")
    with pytest.raises(DataError, match=r"no column 'text'; there are 'text;label'; .* as .tsv with tabs"):
        read_table(tmp_path / "a.csv", ["text", "label"])


def test_several_columns_joined_are_one_text_of_what_is_not_blank(tmp_path: Path) -> None:
    table = read_table(
        write(tmp_path / "a.csv", "subject,body,queue\nHallo,Grüße,a\n,only body,b\nonly subject,  ,a\n,,b\n")
    )
    assert table.column("subject + body") == ["Hallo\nGrüße", "only body", "only subject", None]
    with pytest.raises(DataError, match=r"line 5: column 'subject \+ body': expected text, got nothing; drop"):
        table.texts("subject + body")
    kept = table.without_blanks(["subject + body", "queue"])
    assert kept.texts("subject + body") == ["Hallo\nGrüße", "only body", "only subject"]
    with pytest.raises(DataError, match="no column 'bodi'; there are "):
        table.column("subject + bodi")
    numbers = as_table([{"a": "x", "b": 3}])
    with pytest.raises(DataError, match=r"column 'a \+ b': expected text, got int"):
        numbers.texts("a + b")
    whole = as_table([{"a + b": "a name of its own", "a": "x", "b": "y"}])
    assert whole.texts("a + b") == ["a name of its own"]


def test_a_run_reads_every_column_that_it_joins() -> None:
    config = DataConfig(train="a.csv", text="subject + body", label="queue")
    assert config.columns == ("subject", "body", "queue") and config.needed == ("subject + body", "queue")
    assert DataConfig(train="a.csv", label="queue").columns == ("text", "queue")
