import stat
from pathlib import Path

import pytest

from chainfed_engine.errors import ConfigError, StorageError

pytest.importorskip("cryptography", reason="cryptography is not installed (extra `flower`)")

from chainfed_engine.cli.main import main
from chainfed_engine.federation.keys import make_keys


def test_every_private_file_is_its_owners_alone_and_a_site_gets_no_key_but_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--sites", "clinic,hospital", "--host", "10.0.0.7"]) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 11
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in [folder, *folder.rglob("*")] if path.is_dir())
    assert sorted(path.name for path in (folder / "sites" / "clinic").iterdir()) == ["ca.crt", "site.key"]


def test_the_certificate_is_for_the_named_hosts_and_signed_by_our_authority(tmp_path: Path) -> None:
    from cryptography import x509

    make_keys(tmp_path / "keys", ["a"], ["fl.example.org", "10.0.0.7"])
    server = tmp_path / "keys" / "server"
    certificate = x509.load_pem_x509_certificate((server / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]


def test_a_public_key_belongs_to_its_private_one_and_names_its_site(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    make_keys(tmp_path / "keys", ["a"], ["localhost"])
    private = serialization.load_ssh_private_key((tmp_path / "keys/sites/a/site.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((tmp_path / "keys/server/sites/a.pub").read_bytes())
    assert private.public_key() == public


def test_sites_are_added_later_and_no_key_is_overwritten(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ["a"], ["localhost"])
    before = (tmp_path / "keys/server/server.crt").read_bytes()
    make_keys(tmp_path / "keys", ["b"], ["localhost"])
    assert (tmp_path / "keys/server/server.crt").read_bytes() == before
    with pytest.raises(StorageError, match="exists already"):
        make_keys(tmp_path / "keys", ["c", "a"], ["localhost"])
    assert not (tmp_path / "keys/sites/c").exists()


@pytest.mark.parametrize("names", [["../a"], ["a b"], [""], ["a", "a"], [], ["x" * 80]])
def test_names_that_cannot_be_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ConfigError, match="site"):
        make_keys(tmp_path / "keys", names, ["localhost"])
    assert not (tmp_path / "keys").exists()
