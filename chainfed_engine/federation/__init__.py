"""A federation: transports, rounds, run directory. The only package that knows server and client.

Names load when they are used: what carries messages (codec.py) must start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainfed_engine.federation.run import FitResult, fit
    from chainfed_engine.federation.run_directory import RunDirectory, read_adapters
    from chainfed_engine.federation.transport_local import LocalTransport, Transport

__all__ = ["FitResult", "LocalTransport", "RunDirectory", "Transport", "fit", "read_adapters"]

_HOMES = {
    "FitResult": "run",
    "LocalTransport": "transport_local",
    "RunDirectory": "run_directory",
    "Transport": "transport_local",
    "fit": "run",
    "read_adapters": "run_directory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chainfed_engine.federation' has no attribute {name!r}")
    return getattr(import_module(f"chainfed_engine.federation.{_HOMES[name]}"), name)
