"""Certificates and keys of a federation, made once on one machine and handed out by folder.

    keys/ca.key                  stays where it was made
    keys/server/                 ca.crt server.crt server.key superexec.secret sites/NAME.pub: for `chainfed serve`
    keys/sites/NAME/             ca.crt site.key: for `chainfed join` at the site

TLS: an ECDSA P-256 authority of our own and one server certificate. A site proves who it is with an ECDSA P-384 key in
OpenSSH form, as Flower's SuperNodes do. Private files are readable by their owner alone.
"""

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainfed_engine.errors import ConfigError, StorageError
from chainfed_engine.federation.files import OWNER_ONLY_FILE, make_folder, storage_errors

_LOOPBACK = ("localhost", "127.0.0.1")  # the server's own processes reach it there
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def make_keys(folder: Path, sites: Sequence[str], hosts: Sequence[str], *, days: int = 365) -> list[Path]:
    """Make what is missing in `folder`: the authority and the server's part once, a key for every new site; the paths
    of all folders to hand out. `hosts`: names or addresses under which sites reach the server; those of this machine
    itself are always added. Raises ConfigError for names that cannot be, StorageError for a site that has a key
    already."""
    for name in sites:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"site {name!r}: expected letters, digits, dots, dashes and underscores, at most 63")
    if not sites or len(set(sites)) != len(sites):
        raise ConfigError("sites: expected at least one name, each once")
    server = folder / "server"
    make_folder(folder)
    if not (server / "server.crt").exists():
        _make_server(folder, server, hosts, days)
    for name in sites:
        target = folder / "sites" / name
        if target.exists():
            raise StorageError(f"{target}: exists already; remove it and {name}.pub to give the site another key")
    for name in sites:
        _make_site(folder, server, name)
    return [server, *(folder / "sites" / name for name in sites)]


def _make_server(folder: Path, server: Path, hosts: Sequence[str], days: int) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    make_folder(server / "sites")
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = _x509_name("chainfed authority")
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    hosts = list(dict.fromkeys([*hosts, *_LOOPBACK]))
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    certificate = (
        _certificate(_x509_name(hosts[0]), authority_name, server_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write_private(folder / "ca.key", _private_pem(authority_key))
    _write_private(server / "ca.crt", _public_pem(authority))
    _write_private(server / "server.key", _private_pem(server_key))
    _write_private(server / "superexec.secret", secrets.token_hex(32).encode())
    _write_private(server / "server.crt", _public_pem(certificate))


def _make_site(folder: Path, server: Path, name: str) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    target = folder / "sites" / name
    make_folder(target)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write_private(target / "site.key", private)
    _write_private(target / "ca.crt", (server / "ca.crt").read_bytes())
    _write_private(server / "sites" / f"{name}.pub", public + f" {name}\n".encode())


def _certificate(subject: Any, issuer: Any, public_key: Any, days: int) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=10))  # clocks of boards are off
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(**used: bool) -> Any:
    from cryptography import x509

    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign "
        "crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: used.get(name, False) for name in names.split()})


def _x509_name(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


def _public_pem(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    pem: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return pem


def _write_private(path: Path, content: bytes) -> None:
    with storage_errors(path, "write"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY_FILE)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
