"""Checkpoints into layer stores: `convert`. Sources are read a block of rows at a time; see `api` for the flow."""

from chainfed_engine.model.convert.api import convert, open_source

__all__ = ["convert", "open_source"]
