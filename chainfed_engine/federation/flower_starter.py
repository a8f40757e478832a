"""Starts Flower's process for a message by forking one that has imported everything.

Flower's imports are two seconds of processor time, and a SuperNode's SuperExec starts `flwr-clientapp` anew for every
message, found by its name on PATH:

    SuperExec -> bin/flwr-clientapp (a dozen lines without Flower) -> socket -> this process -> fork -> Flower's main

What runs in the child is Flower's own program with the arguments and environment it was started with. Where this
process is not there, the small program runs Flower's directly: slower, the same result. Run as a module with the path
of the socket.
"""

import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

from chainfed_engine.federation.files import make_folder

PROGRAM = "flwr-clientapp"
_MAX_REQUEST = 1 << 20
_SHIM = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect({path!r})
except OSError:  # not there yet, or ended
    os.execv({program!r}, [{program!r}, *sys.argv[1:]])
connection.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode())
connection.shutdown(socket.SHUT_WR)
sys.exit((connection.recv(1) or b"\\1")[0])  # nothing: it was killed
"""


def install(folder: Path, path: Path, program: str) -> Path:
    """Write the small program into `folder`, to be put in front of PATH. `program`: Flower's own; `path`: socket."""
    make_folder(folder)
    shim = folder / PROGRAM
    shim.write_text(_SHIM.format(python=sys.executable, path=str(path), program=program), encoding="utf-8")
    shim.chmod(0o700)
    return folder


def serve(path: str) -> None:
    """Fork a child for every request, for ever."""
    from flwr.supernode.cli import flwr_clientapp

    import chainfed_engine.federation.flower_records  # noqa: F401 (what the app of a message imports)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the children
    listener = socket.socket(socket.AF_UNIX)
    Path(path).unlink(missing_ok=True)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(16)
    gc.collect()
    gc.freeze()  # pages of what was imported stay shared
    while True:
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                _run(connection, flwr_clientapp)


def _run(connection: socket.socket, main: object) -> None:
    """In the child: read the request, be Flower's program, tell how it ended. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.settimeout(10)
        request = bytearray()
        while part := connection.recv(1 << 16):
            request += part
            if len(request) > _MAX_REQUEST:
                raise ValueError("request too long")
        arguments, environment = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [PROGRAM, *arguments]
        assert callable(main)
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # the child must not go on as its parent
        print(f"chainfed: {PROGRAM}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            connection.sendall(bytes([code & 255]))
        finally:
            os._exit(code & 255)


if __name__ == "__main__":
    serve(sys.argv[1])
