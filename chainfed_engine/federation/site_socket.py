"""The door of a site's process: one message at a time over a Unix socket in a folder that its owner alone can enter.

A Flower client starts a process for every message; that process hands the message through here, so that torch, the
model and the data are loaded once and not for every message. In: frames of codec.py; out: the site's answers.
"""

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

from chainfed_engine.errors import CorruptFile
from chainfed_engine.federation.codec import pack, receive_frame, send_frame
from chainfed_engine.federation.site import Site

_ACCEPT_SECONDS = 0.5


class SiteSocket:
    """Owns the socket and its folder. `path`: short whatever the site's folder is called (Unix allows 107 bytes)."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._folder = Path(tempfile.mkdtemp(prefix="chainfed-"))  # mode 700
        self.path = self._folder / "site"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self.path))
        os.chmod(self.path, 0o600)
        self._socket.listen(4)
        self._socket.settimeout(_ACCEPT_SECONDS)

    def serve_once(self) -> bool:
        """Answer one message if one comes within half a second; whether one did."""
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return False
        with connection:
            connection.settimeout(60)  # the other end is a process on this machine, or a broken one
            try:
                header, payload = receive_frame(connection)
            except (CorruptFile, OSError) as error:
                line = f"{type(error).__name__}: {error}"
                header, payload = pack({"message": "error", "site": self._site.name, "error": line}, {})
            else:
                header, payload = self._site.answer(header, payload)
            with contextlib.suppress(OSError):  # the process that asked may be gone; the server will notice
                send_frame(connection, header, payload)
        return True

    def close(self) -> None:
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)
