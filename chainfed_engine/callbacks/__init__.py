"""Watching a run: anything with `on_event(event)` given to `fit(..., callbacks=[...])` or to `ChainTrainer`.

    from chainfed_engine.callbacks import Logger, Progress, TensorBoard
    cfe.fit(store, clients, config, callbacks=[Progress(), TensorBoard("logs/"), Logger(wandb.init())])

Events are dicts with the key `event`, most of them lines of metrics.jsonl (federation/events.py lists their keys):
`plan`, `resume`, `profile`, `round`, `memory`, `eval`; besides these `phase` and `step` (something long begins, and
moves) and `end`, the last one, also after an error (`error`: its text, else None). A callback that raises stops it all.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from chainfed_engine.callbacks.loggers import Logger, TensorBoard, scalars
from chainfed_engine.callbacks.progress import Progress

__all__ = ["Callback", "Logger", "Progress", "TensorBoard", "notify", "scalars"]


class Callback(Protocol):
    """What `callbacks=` takes."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Called in the training process, between steps; keep it short and do not change the event."""


def notify(callbacks: Iterable[Callback], event: Mapping[str, Any]) -> None:
    """Hand one event to each, in their order."""
    for callback in callbacks:
        callback.on_event(event)
