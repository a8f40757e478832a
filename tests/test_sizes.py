import pytest

from chainfed_engine.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("0", 0),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("1GB", 10**9),
        ("1kB", 1000),
        ("1.5 GiB", 3 << 29),
        ("2TiB", 2 << 40),
        ("12B", 12),
    ],
)
def test_sizes_are_read_as_bytes(text: int | str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "512M", "-1", -1, "GiB", "1e9", "1.GiB", "1 GiB/s", "٣GiB", True, 1.5, None, "9" * 40]
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 30, "1.0 GiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_are_written_in_binary_units(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text
