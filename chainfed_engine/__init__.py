"""Fine-tune language models where the data is: one small window of adapters at a time, inside a byte budget.

     batch ─▶ prefix ─▶ boundary ─▶ window + adapters ─▶ objective ─▶ optimizer ─▶ update
              frozen,    cached,     the only autograd    local loss +              │
              streamed,  quantised,  graph: Q layers      λ · auxiliary             ▼
              4-bit      on disk                          branch                 federation round
                ▲                                                                   │
                └────────── schedule: next window ◀── server: check, aggregate ◀────┘

`convert` makes a layer store, `plan` predicts its memory, `fit` runs a federation in this process, `ChainTrainer`
trains in a loop of your own, `export` and `load_adapted` hand the result to other tools, `memory.measure` tells what a
stretch of a script really used. Names are imported when first used, so that `import chainfed_engine` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chainfed_engine._version import __version__

if TYPE_CHECKING:
    from chainfed_engine import memory
    from chainfed_engine.api import Result, evaluate, fit, plan
    from chainfed_engine.chain_trainer import ChainTrainer
    from chainfed_engine.config import ChainConfig
    from chainfed_engine.exports import AdaptedClassifier, Exported, export, load_adapted, save_run
    from chainfed_engine.model.convert import convert
    from chainfed_engine.model.synth import synth

__all__ = [
    "AdaptedClassifier",
    "ChainConfig",
    "ChainTrainer",
    "Exported",
    "Result",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "fit",
    "load_adapted",
    "memory",
    "plan",
    "save_run",
    "synth",
]

_HOMES = {
    "AdaptedClassifier": "exports",
    "ChainConfig": "config",
    "ChainTrainer": "chain_trainer",
    "Exported": "exports",
    "Result": "api",
    "convert": "model.convert",
    "evaluate": "api",
    "export": "exports",
    "fit": "api",
    "load_adapted": "exports",
    "plan": "api",
    "save_run": "exports",
    "synth": "model.synth",
}


def __getattr__(name: str) -> Any:
    if name == "memory":
        return import_module("chainfed_engine.memory")
    if name not in _HOMES:
        raise AttributeError(f"module 'chainfed_engine' has no attribute {name!r}")
    return getattr(import_module(f"chainfed_engine.{_HOMES[name]}"), name)
