"""Several commands of Flower's `flwr` in one process: importing it takes seconds, so each runs in a fork of this one.

In: one JSON argument with `register` (site -> public key file; a name that is registered already is left as it is) and
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
    listed = _forked(app, "supernode", "list", "run", "--format", "json") if request["register"] else ""
    for site, public_key in sorted(request["register"].items()):
        if f'"{site}"' not in listed:
            _forked(app, "supernode", "register", public_key, "run", "--name", site)
    if request["run"] is not None:
        _forked(app, "run", *request["run"])


def _forked(app: object, *arguments: str) -> str:
    """Output of one command; ends this process where it fails."""
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
    if status:
        print(f"flwr {' '.join(arguments[:2])}: exit {status}: {' '.join(text.split())[-600:]}", file=sys.stderr)
        raise SystemExit(1)
    return text


if __name__ == "__main__":
    main()
