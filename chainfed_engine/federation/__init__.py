"""One federation in this process: transport, rounds, run directory. The only package that knows server and client."""

from chainfed_engine.federation.run import FitResult, fit
from chainfed_engine.federation.run_directory import RunDirectory, read_adapters
from chainfed_engine.federation.transport_local import LocalTransport, Transport

__all__ = ["FitResult", "LocalTransport", "RunDirectory", "Transport", "fit", "read_adapters"]
