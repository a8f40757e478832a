"""Memory as a promise: the planner (`plan`, `parts`), what is really used (`meter`, `cgroup`), a lean heap (`lean`).

`with cfe.memory.measure() as used: ...` fills `used.peak_bytes` and the other figures for a stretch of any script.
Names are imported when first used: `lean` must be able to act before anything large is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainfed_engine.memory.meter import Measurement, Meter, measure

__all__ = ["Measurement", "Meter", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chainfed_engine.memory' has no attribute {name!r}")
    return getattr(import_module("chainfed_engine.memory.meter"), name)
