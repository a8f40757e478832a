"""The client as a state machine: a task comes in, a reply goes out. Data and caches never leave it."""

from chainfed_engine.client.client import Client
from chainfed_engine.client.trainer import Trainer

__all__ = ["Client", "Trainer"]
