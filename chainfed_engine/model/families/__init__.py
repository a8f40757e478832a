"""The architectures the engine runs, one short file each, behind two functions.

`locate(model_type, name)` says where a checkpoint's tensor goes in a layer store, `name_table` has the checkpoint's own
names (no torch needed for either);
`family(model_type)` gives the `Family`: how to build a layer, the embeddings and what the layers of a pass share.
`model_type` is that of a Hugging Face config. A family's modelling code is imported when `family` is first called.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

from chainfed_engine.errors import InvalidArgument, UnsupportedModel
from chainfed_engine.memory.deferred import deferred_imports
from chainfed_engine.model.families import names
from chainfed_engine.model.families.names import Location, NameTable

if TYPE_CHECKING:
    from chainfed_engine.model.families.base import Family, Pooling

__all__ = ["SUPPORTED", "Location", "NameTable", "chosen_pooling", "family", "locate", "name_table"]

_NAMES = {
    "bert": names.BERT,
    "roberta": names.ROBERTA,
    "distilbert": names.DISTILBERT,
    "llama": names.DECODER,
    "mistral": names.DECODER,
    "qwen2": names.DECODER,
    "qwen3": names.DECODER,
}
SUPPORTED: tuple[str, ...] = tuple(_NAMES)


def locate(model_type: str, name: str) -> Location | None:
    """Where the checkpoint's tensor `name` goes; None when the architecture has no such tensor.

    A tied checkpoint's `lm_head.weight` is located as the head like any other; the caller stores the matrix once.
    Raises UnsupportedModel for an architecture that is not in `SUPPORTED`.
    """
    return names.locate_in(name_table(model_type), name)


def name_table(model_type: str) -> NameTable:
    """The names of a checkpoint of `model_type`. Raises UnsupportedModel."""
    _require(model_type)
    return _NAMES[model_type]


@cache
def family(model_type: str) -> "Family":
    """The family of `model_type`. Raises UnsupportedModel for an architecture that is not in `SUPPORTED`."""
    _require(model_type)
    with deferred_imports():
        found: Family = import_module(f"chainfed_engine.model.families.{model_type}").FAMILY
    return found


def chosen_pooling(chosen: str, stored: "Pooling | None", model_type: str) -> "Pooling":
    """What a classifier reads; "auto": what the store says, else what the family's own does. Raises InvalidArgument."""
    if chosen == "auto":
        return stored or family(model_type).pooling
    if chosen in ("mean", "first", "last"):
        return cast("Pooling", chosen)
    raise InvalidArgument(f"pooling: expected 'auto', 'mean', 'first' or 'last', got {chosen!r}")


def _require(model_type: str) -> None:
    if model_type not in _NAMES:
        raise UnsupportedModel(
            f"architecture {model_type!r}: expected one of {', '.join(SUPPORTED)} (the config's model_type); "
            "use a checkpoint of one of these"
        )
