import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chainfed_engine.federation.codec import pack, receive_frame, send_frame, unpack
from chainfed_engine.federation.site_socket import SiteSocket


class EchoSite:
    name = "clinic"

    def answer(self, header: bytes, payload: bytes) -> tuple[bytes, bytes]:
        return header, payload


@pytest.fixture
def door() -> Iterator[SiteSocket]:
    socket_of_site = SiteSocket(EchoSite())  # type: ignore[arg-type]
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            socket_of_site.serve_once()

    thread = threading.Thread(target=serve)
    thread.start()
    yield socket_of_site
    ended.set()
    thread.join()
    socket_of_site.close()


def _connected(door: SiteSocket) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(door.path))
    return connection


def _ask(door: SiteSocket, header: bytes, payload: bytes) -> tuple[dict[str, Any], Any]:
    with _connected(door) as connection:
        send_frame(connection, header, payload)
        return unpack(*receive_frame(connection))


def test_a_message_goes_in_and_its_answer_comes_out(door: SiteSocket) -> None:
    assert _ask(door, *pack({"message": "hello"}, {}))[0] == {"message": "hello"}


def test_only_the_owner_can_reach_it(door: SiteSocket) -> None:
    assert stat.S_IMODE(door.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(door.path.stat().st_mode) == 0o600


def test_what_is_no_message_is_answered_with_an_error_and_the_next_one_is_served(door: SiteSocket) -> None:
    with _connected(door) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n" * 3)
        record, _ = unpack(*receive_frame(connection))
        assert record["message"] == "error" and "frame" in record["error"]
    with _connected(door) as connection:
        connection.sendall(b"CFM1")  # and gone
    assert _ask(door, *pack({"message": "hello"}, {}))[0] == {"message": "hello"}


def test_the_folder_is_gone_after_the_end() -> None:
    door = SiteSocket(EchoSite())  # type: ignore[arg-type]
    folder: Path = door.path.parent
    assert door.serve_once() is False
    door.close()
    assert not folder.exists()
