"""Predicted against measured peak memory over families, formats, budgets: each plan's run in a process of its own.

    python bench/memory/sweep.py [--cases NAME ...] [--folder DIR]

Prints one JSON line a case (predicted and measured peak, their ratio, the same above the interpreter, choices) and
the range of the ratios; exit code 1 if one lies outside [1.00, 1.15]. Shapes are a few layers of usual models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 2048}
LLAMA |= {"rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True}
BERT = {"model_type": "bert", "architectures": ["BertModel"], "max_position_embeddings": 512, "type_vocab_size": 2}
BERT |= {"vocab_size": 8192, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}


def llama(layers: int, width: int, inner: int, heads: int, keys: int, vocab: int, **more: object) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": vocab}
    return (
        LLAMA | sizes | {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width // heads} | more
    )


def bert(layers: int, width: int, heads: int, **more: object) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return BERT | sizes | {"num_attention_heads": heads} | more


SMALL = llama(8, 576, 1536, 9, 3, 49152)
WIDE = llama(6, 2048, 8192, 32, 8, 32768)
QWEN = llama(6, 1024, 3072, 16, 8, 32768, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
ROBERTA = bert(3, 1536, 24, model_type="roberta", architectures=["RobertaModel"], max_position_embeddings=514)
ROBERTA |= {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
# What made predictions too high: wide models with few samples of other lengths, scores of all layers, many labels.
VARIED = {"is_varied": True, "start_layer": None, "rounds": 5, "max_local_steps": 1}
# name -> (transformers config, block format, options of [chain], [train] and [memory], labels and lengths of the data)
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama-576": (SMALL, "int4", {"batch_size": 8, "sequence_length": 256}),
    "llama-576-streamed": (SMALL, "int4", {"batch_size": 8, "sequence_length": 256, "budget": "smallest"}),
    "llama-576-nf4-window-4": (SMALL, "nf4", {"batch_size": 8, "sequence_length": 128, "window": 4}),
    "llama-2048": (WIDE, "int4", {"batch_size": 4, "sequence_length": 128}),
    "llama-2048-streamed": (WIDE, "int4", {"batch_size": 4, "sequence_length": 128, "budget": "smallest"}),
    "llama-2048-int8": (WIDE, "int8", {"batch_size": 2, "sequence_length": 128, "cache_format": "bf16"}),
    "qwen3-1024": (QWEN, "int4", {"batch_size": 4, "sequence_length": 256, "window": 3}),
    "bert-1024": (bert(8, 1024, 16), "int4", {"batch_size": 16, "sequence_length": 128}),
    "bert-1024-streamed": (
        bert(8, 1024, 16), "int4", {"batch_size": 16, "sequence_length": 128, "budget": "smallest"}
    ),
    "bert-2560-few": (bert(3, 2560, 40), "int4", {"batch_size": 3, "sequence_length": 96, "window": 1, **VARIED}),
    "roberta-1536-labels": (ROBERTA, "int4", {"batch_size": 7, "sequence_length": 96, "num_labels": 150, **VARIED}),
    "bert-768-bf16": (bert(6, 768, 12), "bf16", {"batch_size": 16, "sequence_length": 128, "window": 3}),
}  # fmt: skip


def main() -> int:
    if len(sys.argv) > 2 and sys.argv[1] == "--one":
        print(json.dumps(run_case(sys.argv[2], Path(sys.argv[3]))))
        return 0
    parser = argparse.ArgumentParser(description="predicted against measured peak memory")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--folder", help="where stores go (default: a temporary folder)")
    options = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory(prefix="chainfed-sweep-") as temporary:
        for name in options.cases:
            figures = in_process(name, Path(options.folder or temporary))
            ratios.append(figures["ratio"])
            print(json.dumps(figures), flush=True)
    print(f"predicted / measured: {min(ratios):.3f} to {max(ratios):.3f}", file=sys.stderr)
    return 0 if all(1.0 <= ratio <= 1.15 for ratio in ratios) else 1


def in_process(name: str, folder: Path) -> dict[str, Any]:
    """The figures of one case, run in a new process."""
    command = [sys.executable, __file__, "--one", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Two stages of a federation of two clients, then an evaluation; every token of a causal LM carries a label."""
    from chainfed_engine.cli.main import prepare_process

    prepare_process()
    import chainfed_engine as cfe
    from chainfed_engine.errors import MemoryBudgetExceeded

    config, block_format, given = CASES[name]
    options = dict(given)
    store = folder / f"{name.removesuffix('-streamed')}-store"
    if not (store / "store.json").exists():
        make = f"from chainfed_engine.model.synth import synth; synth({config!r}, {str(store)!r}, {block_format!r})"
        subprocess.run([sys.executable, "-c", make], check=True)  # its memory must not count
    causal = "tie_word_embeddings" in config
    streamed = options.pop("budget", None) == "smallest"
    data = {"labels": options.pop("num_labels", 2), "is_varied": options.pop("is_varied", False)}
    layers, window = config["num_hidden_layers"], options.setdefault("window", 2)
    base = {"rounds": 2, "clients_per_round": 2, "start_layer": layers - window - 1, "max_local_steps": 2, **options}
    samples = max(2 * options["batch_size"], data["labels"])
    clients = {f"client-{index}": rows(samples, causal, index, **data) for index in range(2)}
    held_out = rows(options["batch_size"], causal, 9, **data)
    if streamed:
        try:
            cfe.fit(store, clients, cfe.ChainConfig(budget=2**20, **base), evaluation=held_out)
        except MemoryBudgetExceeded as refusal:
            base["budget"] = int(str(refusal).split("would do is ")[1].split()[0]) + (4 << 20)
    result = cfe.fit(store, clients, cfe.ChainConfig(**base), evaluation=held_out)
    plan = next(event for event in result.events if event["event"] == "plan")
    memory = [event for event in result.events if event["event"] == "memory"][-1]
    interpreter = plan["parts"]["interpreter with torch"]
    predicted, measured = memory["predicted_peak_bytes"], memory["peak_rss_bytes"]
    return {
        "case": name,
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": measured,
        "ratio": round(predicted / measured, 4),
        "above_interpreter": [predicted - interpreter, measured - interpreter],
        "parts": plan["parts"],
        "choices": plan["choices"],
    }


def rows(count: int, causal: bool, seed: int, *, labels: int = 2, is_varied: bool = False) -> list[dict[str, str]]:
    """Rows of seeded letters, longer than any sequence here or of 10 to 110; a byte is a token."""
    import random

    letters = random.Random(seed)

    def text(length: int) -> str:
        return "".join(letters.choices("abcdefgh ", k=length))

    def length() -> int:
        return letters.randint(10, 110) if is_varied else 600

    if causal:
        return [{"prompt": "a", "response": text(length())} for _ in range(count)]
    return [{"text": "a" + text(length()), "label": f"label {index % labels}"} for index in range(count)]


if __name__ == "__main__":
    sys.exit(main())
