"""An encrypted boundary cache: it can be neither read nor changed from outside, and a run's bits are the same."""

import stat
from pathlib import Path

import pytest
import torch

from chainfed_engine import api
from chainfed_engine.boundary import BoundaryCache
from chainfed_engine.cache_cipher import CacheCipher
from chainfed_engine.config_file import load_config
from chainfed_engine.federation import session
from tests.federation.deployed import make_files
from tests.test_boundary import FORMAT, encode

pytest.importorskip("cryptography", reason="cryptography is not installed (extra `privacy`)")

HIDDEN = 64


def _sealed(folder: Path, cipher: CacheCipher) -> torch.Tensor:
    records = encode(torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1)))
    with BoundaryCache.create(folder, 3, "key", **FORMAT, cipher=cipher) as cache:
        cache.append(["sample-a", "sample-b"], [2, 4], records[:6])
        cache.append(["sample-c"], [3], records[6:])
        cache.seal()
    return records


def test_what_was_encrypted_comes_back_and_stands_nowhere_in_the_files(tmp_path: Path) -> None:
    cipher = CacheCipher()
    records = _sealed(tmp_path, cipher)
    found = BoundaryCache.open(tmp_path, 3, "key", **FORMAT, cipher=cipher)
    assert found is not None and found.groups == [["sample-a", "sample-b"], ["sample-c"]]
    read = found.read(["sample-c", "sample-a", "sample-a"])
    assert read is not None and read[1] == [3, 2, 2]
    assert torch.equal(read[0], torch.cat([records[6:], records[:2], records[:2]]))
    found.close()
    written = b"".join(path.read_bytes() for path in sorted(tmp_path.iterdir()))
    plain = records.numpy().tobytes()
    assert not any(plain[first : first + 16] in written for first in range(0, len(plain) - 16, 16))
    assert b"sample" not in written
    assert (tmp_path / "depth-0003.bin").stat().st_size == len(plain)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_another_process_finds_nothing_and_a_plain_cache_is_not_taken_for_an_encrypted_one(tmp_path: Path) -> None:
    _sealed(tmp_path, CacheCipher())
    assert BoundaryCache.open(tmp_path, 3, "key", **FORMAT, cipher=CacheCipher()) is None
    assert BoundaryCache.open(tmp_path, 3, "key", **FORMAT) is None
    with BoundaryCache.create(tmp_path, 3, "key", **FORMAT) as plain:
        plain.append(["sample-a"], [2], encode(torch.ones(2, HIDDEN)))
        plain.seal()
    assert BoundaryCache.open(tmp_path, 3, "key", **FORMAT, cipher=CacheCipher()) is None


def test_records_that_were_changed_or_moved_are_a_miss(tmp_path: Path) -> None:
    cipher = CacheCipher()
    records = _sealed(tmp_path, cipher)
    path, size = tmp_path / "depth-0003.bin", records.shape[1]
    data = path.read_bytes()
    for changed in (data[:-1] + bytes([data[-1] ^ 1]), data[6 * size :] + data[3 * size : 6 * size] + data[: 3 * size]):
        path.write_bytes(changed)
        found = BoundaryCache.open(tmp_path, 3, "key", **FORMAT, cipher=cipher)
        assert found is not None and found.read(["sample-c"]) is None
        found.close()


@pytest.mark.parametrize(("number", "tag"), [(-1, 0), (1 << 96, 0), (0, -1), (0, 1 << 128)])
def test_numbers_of_a_damaged_index_do_not_open(number: int, tag: int) -> None:
    assert CacheCipher().decrypt(b"", number, tag, "place") is None


def test_a_run_with_an_encrypted_cache_ends_with_the_same_bits_and_leaves_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path)
    api.run(load_config(tmp_path / "all.toml"), tmp_path / "plain")
    text = (tmp_path / "all.toml").read_text()
    (tmp_path / "secret.toml").write_text(f"{text}[memory]\nencrypt_cache = true\n")
    left: list[Path] = []
    remove = session.shutil.rmtree  # type: ignore[attr-defined]
    monkeypatch.setattr(session.shutil, "rmtree", lambda path, **more: (left.append(path), remove(path, **more)))  # type: ignore[attr-defined]
    api.run(load_config(tmp_path / "secret.toml"), tmp_path / "secret")
    assert left == [tmp_path / "secret" / "cache"] and not left[0].exists()
    assert any((tmp_path / "plain" / "cache").rglob("depth-*"))
    for name in ("adapters.safetensors", "labels.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "secret" / name).read_bytes()
    for path in [*(tmp_path / "plain").rglob("*"), *(tmp_path / "secret").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
