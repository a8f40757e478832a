"""The boundary cache on disk: what goes in comes out, and everything doubtful is a miss."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from chainfed_engine import native
from chainfed_engine.boundary import BoundaryCache, cache_key, wipe
from chainfed_engine.errors import InvalidArgument, StorageError

HIDDEN = 64
FORMAT = {"cache_format": "f32", "hidden_size": HIDDEN}


def encode(hidden: torch.Tensor) -> torch.Tensor:
    records = torch.empty(len(hidden), native.record_bytes("f32", HIDDEN), dtype=torch.uint8)
    native.boundary_encode(hidden, adapter=None, cache_format="f32", out=records)
    return records


def make(directory: Path, key: str = "key") -> tuple[BoundaryCache, torch.Tensor]:
    records = encode(torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1)))
    cache = BoundaryCache.create(directory, 3, key, **FORMAT)
    cache.append(["a", "b"], [2, 4], records[:6])
    cache.append(["c"], [3], records[6:])
    return cache, records


def test_sealed_samples_are_read_back_in_any_order(tmp_path: Path) -> None:
    cache, records = make(tmp_path)
    cache.seal()
    cache.close()
    found = BoundaryCache.open(tmp_path, 3, "key", **FORMAT)
    assert found is not None and "b" in found and found.groups == [["a", "b"], ["c"]]
    read = found.read(["c", "a"])
    assert read is not None and read[1] == [3, 2]
    assert torch.equal(read[0], torch.cat([records[6:], records[:2]]))
    found.close()


def test_another_key_depth_or_format_is_a_miss_and_destroys_nothing(tmp_path: Path) -> None:
    cache, _ = make(tmp_path)
    cache.seal()
    cache.close()
    assert BoundaryCache.open(tmp_path, 3, "other", **FORMAT) is None
    assert BoundaryCache.open(tmp_path, 4, "key", **FORMAT) is None
    assert BoundaryCache.open(tmp_path, 3, "key", cache_format="int8", hidden_size=HIDDEN) is None
    kept = BoundaryCache.open(tmp_path, 3, "key", **FORMAT)
    assert kept is not None
    kept.close()


def test_what_was_not_sealed_is_a_miss(tmp_path: Path) -> None:
    cache, _ = make(tmp_path)
    cache.close()
    assert BoundaryCache.open(tmp_path, 3, "key", **FORMAT) is None


def test_a_flipped_bit_is_a_miss(tmp_path: Path) -> None:
    cache, _ = make(tmp_path)
    cache.seal()
    cache.close()
    path = tmp_path / "depth-0003.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    found = BoundaryCache.open(tmp_path, 3, "key", **FORMAT)
    assert found is not None and found.read(["a"]) is None and "c" not in found
    found.close()


@pytest.mark.parametrize("damage", ["truncate", "index", "offsets", "types", "group"])
def test_damaged_files_are_a_miss(tmp_path: Path, damage: str) -> None:
    cache, _ = make(tmp_path)
    cache.seal()
    cache.close()
    records, index = tmp_path / "depth-0003.bin", tmp_path / "depth-0003.json"
    content = json.loads(index.read_text())
    if damage == "truncate":
        os.truncate(records, records.stat().st_size - 1)
    elif damage == "index":
        index.write_text(index.read_text()[:-3])
    else:
        if damage == "offsets":
            content["entries"]["a"] = [8, 2, 0]
        elif damage == "types":
            content["entries"] = ["a"]
        else:
            content["groups"].append(["nobody"])
        index.write_text(json.dumps(content))
    assert BoundaryCache.open(tmp_path, 3, "key", **FORMAT) is None


def test_files_belong_to_their_owner_alone(tmp_path: Path) -> None:
    cache, _ = make(tmp_path / "cache")
    cache.seal()
    cache.close()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_wipe_keeps_the_depths_it_is_told_to(tmp_path: Path) -> None:
    for cache in (make(tmp_path)[0], BoundaryCache.create(tmp_path, 4, "key", **FORMAT)):
        cache.seal()
        cache.close()
    wipe(tmp_path, keep=[4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth-0004.bin", "depth-0004.json"]


def test_use_after_close_and_an_unwritable_folder_are_errors(tmp_path: Path) -> None:
    cache, _ = make(tmp_path)
    cache.close()
    with pytest.raises(InvalidArgument, match="after close"):
        cache.read(["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="boundary cache"):
        BoundaryCache.create(tmp_path / "file", 1, "key", **FORMAT)


def test_keys_of_differently_split_parts_differ() -> None:
    assert cache_key("ab", "c") != cache_key("a", "bc")
