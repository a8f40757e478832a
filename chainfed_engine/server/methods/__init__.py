"""The server's side of each training method: who trains what, what a reply holds, how replies become a new model.

`averaging` is the rule and serves the chain; a method that differs from it is one short class beside it.
"""

from chainfed_engine.config import Method
from chainfed_engine.server.methods.averaging import Averaging
from chainfed_engine.server.methods.fedkseed import SeedSums
from chainfed_engine.server.methods.fedra import RandomLayers
from chainfed_engine.server.methods.flora import Stacking
from chainfed_engine.server.methods.fwdllm import ForwardGradients

__all__ = ["Averaging", "method_class"]

_OTHERS: dict[Method, type[Averaging]] = {
    "fedkseed": SeedSums,
    "fedra": RandomLayers,
    "flora": Stacking,
    "fwdllm": ForwardGradients,
}


def method_class(method: Method) -> type[Averaging]:
    """The class that leads rounds of `method`."""
    return _OTHERS.get(method, Averaging)
