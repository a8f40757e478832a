"""`chainfed keys`, `serve`, `join`: a federation over machines. Arguments in, exit code out."""

import argparse
from pathlib import Path


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    keys = subparsers.add_parser("keys", help="certificates and keys for a federation over machines")
    keys.add_argument("folder", metavar="DIR", help="folder to write; give server/ and sites/NAME/ to those concerned")
    keys.add_argument("--sites", required=True, type=_names, metavar="A,B,...", help="names of the sites")
    keys.add_argument(
        "--host",
        action="append",
        dest="hosts",
        metavar="NAME",
        help="name or address by which sites reach the server (may be given again; localhost and 127.0.0.1 always are)",
    )
    keys.add_argument("--days", type=int, default=365, help="how long the certificates hold (default: 365)")
    keys.set_defaults(command=make_keys)

    serve = subparsers.add_parser("serve", help="the server of a federation over machines (needs Flower)")
    serve.add_argument("config", metavar="CONFIG.toml")
    serve.add_argument("--out", required=True, metavar="DIR", help="run directory to write")
    serve.add_argument("--keys", required=True, metavar="DIR", help="the folder server/ that `chainfed keys` made")
    serve.add_argument("--sites", required=True, type=_names, metavar="A,B,...", help="names of the sites")
    serve.add_argument("--listen", default="127.0.0.1:8000", type=_address, metavar="HOST:PORT")
    serve.add_argument("--resume", action="store_true", help="go on with a run that was cut off in DIR")
    serve.add_argument("--meet-seconds", type=float, default=600.0, help="how long to wait for the sites at the start")
    serve.set_defaults(command=serve_run)

    join = subparsers.add_parser("join", help="a site of a federation over machines (needs Flower)")
    join.add_argument("config", metavar="CONFIG.toml", help="the site's own: [model] store, [data], [memory] budget")
    join.add_argument("--name", required=True, help="the name under which the server registered this site's key")
    join.add_argument("--out", required=True, metavar="DIR", help="the site's folder: caches, adapters, logs")
    join.add_argument("--keys", required=True, metavar="DIR", help="the folder sites/NAME/ that `chainfed keys` made")
    join.add_argument("--server", required=True, type=_address, metavar="HOST:PORT")
    join.add_argument("--port", type=int, default=9094, help="a free port of this machine for the SuperNode")
    join.add_argument(
        "--poll", type=float, default=0.5, metavar="SECONDS", help="between two looks for a message (default: 0.5)"
    )
    join.set_defaults(command=join_run)


def make_keys(options: argparse.Namespace) -> int:
    from chainfed_engine.federation.keys import make_keys as make

    for path in make(Path(options.folder), options.sites, options.hosts or [], days=options.days):
        print(path)
    return 0


def serve_run(options: argparse.Namespace) -> int:
    from chainfed_engine.callbacks import Progress
    from chainfed_engine.config_file import load_config
    from chainfed_engine.federation.flower_server import FlowerServer, ServeOptions

    host, port = options.listen
    out = Path(options.out)
    given = ServeOptions(
        Path(options.config),
        out,
        Path(options.keys),
        options.sites,
        host=host,
        port=port,
        resume=options.resume,
        meet_seconds=options.meet_seconds,
    )
    config = load_config(options.config).chain
    with Progress(budget_bytes=config.budget_bytes) as progress, FlowerServer(given) as server:
        progress({"event": "phase", "name": "starting Flower"})
        server.start()
        progress({"event": "phase", "name": f"waiting for {', '.join(options.sites)}"})
        server.watch(on_event=lambda event: progress({"rounds": config.rounds, **event}))
        print(f"{out}: {progress.summary()}")
    return 0


def join_run(options: argparse.Namespace) -> int:
    from chainfed_engine.federation.flower_site import FlowerSite, JoinOptions

    paths, server = (Path(options.config), Path(options.out), Path(options.keys)), "{}:{}".format(*options.server)
    with FlowerSite(JoinOptions(options.name, *paths, server, options.port, options.poll)) as site:
        print(f"{options.name}: joining {server}; end with Ctrl-C", flush=True)
        site.run()
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, each once, got {text!r}")
    return names


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return host, int(port)
