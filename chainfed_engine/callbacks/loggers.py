"""Figures of a run for TensorBoard and for services like Weights & Biases. In: events; out: named numbers by round.

The step axis is the number of rounds done: 0 before the first, so that a resumed run goes on where it was.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from chainfed_engine.errors import InvalidArgument

Event = Mapping[str, Any]
_ROUND = {"loss": "train/loss", "accepted": "train/accepted", "bytes_down": "traffic/bytes_down"}
_ROUND |= {"bytes_up": "traffic/bytes_up", "steps": "train/steps", "prefix_layers_run": "train/prefix_layers_run"}


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event by their name in a chart; {} for events without any.

    `round`: train/loss, train/accepted, train/clients, train/refused, train/window_start, traffic/bytes_down,
    traffic/bytes_up, seconds/<part>; `eval`: eval/accuracy or eval/token_loss, eval/loss; `memory`:
    memory/peak_rss_bytes and others in bytes or nanoseconds; `profile`: profile/start_layer, cka/layer_<n>.
    """
    kind = event.get("event")
    named: dict[str, Any] = {}
    if kind == "round":
        named = {name: event.get(key) for key, name in _ROUND.items()}
        named |= {f"seconds/{part}": value for part, value in dict(event.get("seconds") or {}).items()}
        named |= {"train/clients": len(event.get("clients") or ()), "train/refused": len(event.get("rejected") or ())}
        if window := event.get("window"):
            named["train/window_start"] = window[0]
    elif kind in ("eval", "memory"):
        named = {f"{kind}/{key}": value for key, value in event.items() if key not in ("event", "round", "rounds")}
    elif kind == "plan":
        named = {"memory/predicted_peak_bytes": event.get("predicted_peak_bytes"), "memory/budget": event.get("budget")}
    elif kind == "profile":
        named = {f"cka/layer_{layer:02d}": score for layer, score in enumerate(event.get("cka") or ())}
        named["profile/start_layer"] = event.get("start_layer")
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def step_of(event: Event) -> int:
    """Rounds done when the event came."""
    return int(event.get("round", -1)) + 1


class Takes(Protocol):
    """What `Logger` writes to: a Weights & Biases run, a trackio run, or any object with this method."""

    def log(self, data: dict[str, Any], *, step: int) -> Any:
        """Record numbers of one step."""


class Logger:
    """Calls `target.log({name: number}, step=rounds done)` for each event that holds numbers."""

    def __init__(self, target: Takes) -> None:
        if not callable(getattr(target, "log", None)):
            got = type(target).__name__
            raise InvalidArgument(
                f"Logger: expected an object with log(dict, step=...), such as wandb.init(), got {got}"
            )
        self._target = target

    def on_event(self, event: Event) -> None:
        if values := scalars(event):
            self._target.log(values, step=step_of(event))


class TensorBoard:
    """Writes `scalars` as event files into `log_dir`; `tensorboard --logdir` shows them while the run goes on.

    Raises InvalidArgument where the package tensorboard is missing (extra `tensorboard`).
    """

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InvalidArgument(
                f"TensorBoard: the package tensorboard is missing ({error}); pip install 'chainfed-engine[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(log_dir))

    def on_event(self, event: Event) -> None:
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, global_step=step_of(event))
        if event.get("event") in ("round", "eval"):
            self._writer.flush()
        if event.get("event") == "end":
            self.close()

    def close(self) -> None:
        """Write what is left. A later event opens a new file in the same folder."""
        self._writer.close()
