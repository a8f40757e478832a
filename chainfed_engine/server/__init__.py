"""The server as a state machine over tasks and replies: sample, check, aggregate, advance. No I/O, no torch."""

from chainfed_engine.server.server import Server
from chainfed_engine.server.setbacks import MAX_REJECTED_IN_A_ROW
from chainfed_engine.server.summary import Summary

__all__ = ["MAX_REJECTED_IN_A_ROW", "Server", "Summary"]
