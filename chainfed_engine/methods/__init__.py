"""The client's side of the methods that do not train as a stage of the chain does: one `StageTrainer` each.

A client calls `begin`, `prepare`, `step`, `trained` and `end` whatever the method; what a step does and what is sent
differs. The other methods, FedRA among them, are a `StageTrainer` with another window.
"""

from chainfed_engine.config import Method
from chainfed_engine.methods.fedkseed import SeedTrainer
from chainfed_engine.methods.flora import StackingTrainer
from chainfed_engine.methods.fwdllm import ForwardGradientTrainer
from chainfed_engine.step import StageTrainer

__all__ = ["trainer_class"]

_OTHERS: dict[Method, type[StageTrainer]] = {
    "fedkseed": SeedTrainer,
    "flora": StackingTrainer,
    "fwdllm": ForwardGradientTrainer,
}


def trainer_class(method: Method) -> type[StageTrainer]:
    """The class that trains `method` on a client."""
    return _OTHERS.get(method, StageTrainer)
