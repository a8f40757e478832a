"""A site that cannot reach its server says why: real TLS on 127.0.0.1, with keys that `chainfed keys` made."""

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed (extra `flower`)")

from chainfed_engine.federation import keys as keys_module
from chainfed_engine.federation.flower_server import reached_at
from chainfed_engine.federation.keys import make_keys
from chainfed_engine.federation.server_watch import ServerWatch, why_unreachable

FAILED = "WARNING :     Connection attempt failed, retrying in 2.00 seconds\n"
REACHED = "INFO :      SuperNode ID: 17\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ["clinic"], ["localhost", "127.0.0.1"])
    return folder


@contextlib.contextmanager
def _listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does `serve` with every connection; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def _tls(server: Path) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.crt", server / "server.key")
    return lambda connection: context.wrap_socket(connection, server_side=True).close()


def _why(server: str, keys: Path) -> str:
    reason = why_unreachable(server, keys / "sites" / "clinic" / "ca.crt")
    assert reason is not None and "\n" not in reason
    return reason


def test_a_server_that_answers_with_our_authoritys_certificate_is_well(keys: Path) -> None:
    with _listening(_tls(keys / "server")) as address:
        assert why_unreachable(address, keys / "sites" / "clinic" / "ca.crt") is None
        assert why_unreachable(address.replace("127.0.0.1", "localhost"), keys / "server" / "ca.crt") is None


def test_every_way_of_not_answering_has_a_reason_of_its_own_and_says_what_to_do(keys: Path, tmp_path: Path) -> None:
    with _listening(_tls(keys / "server")) as address:
        pass
    assert "nobody listens there; is `chainfed serve` running" in _why(address, keys)
    assert "name no-such-host.invalid is not known here" in _why("no-such-host.invalid:8000", keys)
    with _listening(lambda connection: connection.sendall(b"SSH-2.0-something\r\n" * 4)) as address:
        assert "expected TLS, got something else" in _why(address, keys)
    with _listening(lambda connection: None) as address:
        assert "broke off" in _why(address, keys) or "expected TLS" in _why(address, keys)
    empty = tmp_path / "sites" / "clinic"
    empty.mkdir(parents=True)
    (empty / "ca.crt").write_text("no certificate")
    assert "copy the folder again" in _why("127.0.0.1:1", tmp_path)


def test_a_wrong_certificate_is_told_from_a_wrong_name_and_from_one_that_has_expired(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path / "other", ["clinic"], ["127.0.0.1"])
    with _listening(_tls(tmp_path / "other" / "server")) as address:
        assert f"not signed by {keys / 'sites' / 'clinic' / 'ca.crt'}" in _why(address, keys)
    monkeypatch.setattr(keys_module, "_LOOPBACK", ())  # else 127.0.0.1 is always in it
    make_keys(tmp_path / "named", ["clinic"], ["fl.example.org"])
    with _listening(_tls(tmp_path / "named" / "server")) as address:
        assert "make the server's with `chainfed keys --host 127.0.0.1`" in _why(address, tmp_path / "named")

    class Past(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Past":
            return cls(2020, 1, 1, tzinfo=tz)

    monkeypatch.setattr(keys_module.datetime, "datetime", Past)
    make_keys(tmp_path / "old", ["clinic"], ["127.0.0.1"], days=2)
    with _listening(_tls(tmp_path / "old" / "server")) as address:
        assert "does not hold now" in _why(address, tmp_path / "old")


def test_a_server_that_vanishes_is_said_once_and_so_is_its_return(keys: Path, tmp_path: Path) -> None:
    log = tmp_path / "supernode.log"
    log.write_text("of an earlier start: " + FAILED)
    tls = _tls(keys / "server")
    with _listening(tls) as address:
        watch = ServerWatch("clinic", address, keys / "server" / "ca.crt", log)

        def look(text: str) -> str | None:
            with log.open("a") as file:
                file.write(text)
            return watch.look()

        assert look("") is None, "what was there before is not looked at"
        assert look(REACHED) == f"clinic: {address} answers"
        assert look(FAILED) is None, "a break that is over already"
    line = look(FAILED)
    assert line is not None and "expected the server to be there still: nobody listens there" in line
    assert line.endswith("trying again until Ctrl-C") and watch.trouble is not None
    assert look(FAILED) is None and look("INFO : something else\n") is None
    assert look("INFO :      Connection successful after 3.1 seconds and 4 tries.\n") == f"clinic: {address} answers"
    assert look(REACHED) is None and watch.trouble is None
    watch.run_ended = True
    assert look(FAILED) is None and watch.trouble is not None, "a server whose run is over may go"


def test_a_key_that_is_not_registered_is_told_from_a_server_that_is_gone(keys: Path, tmp_path: Path) -> None:
    log = tmp_path / "supernode.log"
    with _listening(_tls(keys / "server")) as address:
        watch = ServerWatch("clinic", address, keys / "server" / "ca.crt", log)
        assert watch.look() is None, "no log yet"
        log.write_text("ERROR :     Exit Code: 305\nan error while connecting")
        line = watch.look()
        assert line is not None and "its key is not registered" in line and "keys/server/sites/clinic.pub" in line


def test_a_server_that_listens_on_all_addresses_is_dialled_at_one_that_its_certificate_names() -> None:
    assert [reached_at(host) for host in ("0.0.0.0", "127.0.0.1", "fl.example.org")] == [
        "127.0.0.1", "127.0.0.1", "fl.example.org",
    ]  # fmt: skip
