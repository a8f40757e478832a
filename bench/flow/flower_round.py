"""What a round over Flower costs beyond the clients' own work: real processes on 127.0.0.1, TLS, registered keys.

    python bench/flow/flower_round.py --sites 4 --rounds 6

Every site is sent about 1 MB and answers about 1 MB in every round (a fixed window of two layers whose adapters hold
262,144 parameters), trains one step of four short texts, and is asked in every round. Prints one JSON line a round and
the median of all but the first. Needs Flower; starts and ends every process itself.
"""

import argparse
import contextlib
import csv
import json
import statistics
import tempfile
from pathlib import Path

from chainfed_engine.federation.keys import make_keys
from chainfed_engine.model.synth import synth
from tests.federation.flower_processes import free_ports, joined, log_text, rounds, serve, wait_for

SHAPE = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
CONFIG = """
[model]
store = "store"
[data]
train = "train.csv"
text = "text"
label = "label"
[chain]
window = 2
rounds = {rounds}
adapter_size = 256
[train]
method = "top-window"
batch_size = 4
sequence_length = 16
[federation]
clients_per_round = {sites}
deadline_seconds = 300
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    names = tuple(f"site-{index}" for index in range(options.sites))
    with tempfile.TemporaryDirectory(prefix="chainfed-flower-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        prepare(root, names, options.rounds)
        (port,) = free_ports(1)
        server = serve(root, port, names)
        stack.callback(server.wait, 60)
        stack.callback(server.terminate)
        with joined(root, names, port):
            wait_for(lambda: server.poll() is not None, 540, "the end of the run")
        if server.returncode:
            raise SystemExit(log_text(root))
        report(rounds(root), options.sites)


def prepare(root: Path, names: tuple[str, ...], num_rounds: int) -> None:
    (root / "shape.json").write_text(json.dumps(SHAPE))
    synth(str(root / "shape.json"), root / "store", block_format="int4")
    with open(root / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), ("warm", "yes"), ("cold", "no"), ("hot", "yes"), ("ice", "no")])
    text = CONFIG.format(rounds=num_rounds, sites=len(names))
    for name in (*names, "serve"):
        (root / f"{name}.toml").write_text(text)
    make_keys(root / "keys", names, ["localhost", "127.0.0.1"])


def report(events: list[dict[str, object]], sites: int) -> None:
    overheads = []
    for event in events:
        seconds = event["seconds"]
        assert isinstance(seconds, dict)
        own = (seconds["prepare"] + seconds["train"]) / sites
        overheads.append(seconds["transport"] + seconds["server"] - own)
        print(
            json.dumps(
                {
                    "round": event["round"],
                    "overhead_seconds": round(overheads[-1], 2),
                    "client_seconds": round(own, 3),
                    "bytes_down": event["bytes_down"],
                    "bytes_up": event["bytes_up"],
                }
            )
        )
    print(json.dumps({"sites": sites, "median_overhead_seconds": round(statistics.median(overheads[1:]), 2)}))


if __name__ == "__main__":
    main()
