"""Several commands of Flower's `flwr` in one process: importing it takes seconds, so each runs in a fork of this one.

In: one JSON argument with `register` (site -> public key file; a key that is registered already is left as it is) and
`run` (arguments of `flwr run`, or null). Out: exit 0, or 1 and the output of the command that failed. Run as a module
in an environment of processes.py, whose FLWR_HOME knows the SuperLink as `run`.
"""

import json
import os
import sys
import tempfile


def main() -> None:
    from flwr.cli.app import app

    request = json.loads(sys.argv[1])
    for site, public_key in sorted(request["register"].items()):
        # Flower's list of nodes names neither sites nor keys: only the attempt tells that a key is known.
        _forked(app, "supernode", "register", public_key, "run", "--name", site, unless="already in use")
    if request["run"] is not None:
        _forked(app, "run", *request["run"])


def _forked(app: object, *arguments: str, unless: str | None = None) -> None:
    """Run one command; ends this process where it fails, unless its output then holds `unless`."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = ["flwr", *arguments]
            assert callable(app)
            app()  # ends with SystemExit
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        text = output.read()
    if status and (unless is None or unless not in text):
        print(f"flwr {' '.join(arguments[:2])}: exit {status}: {' '.join(text.split())[-600:]}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
