"""Which matrices go into which file of the store, in which block format: all decided before a byte moves.

Enters: a `Source`, two block formats. Leaves: `StorePlan`, one `FilePlan` a file. Every tensor of the checkpoint is
either placed, or of a kind the engine knows it has no use for; anything missing, unknown or misshapen is an error.
"""

from dataclasses import dataclass
from typing import Any

from chainfed_engine.errors import CorruptFile, UnsupportedModel
from chainfed_engine.model.convert.expected import checkpoint_shapes
from chainfed_engine.model.convert.source import Source, SourceTensor
from chainfed_engine.model.families import Location, locate
from chainfed_engine.model.format import HEAD_SHARD_ROWS, Role, file_name, num_head_shards
from chainfed_engine.model.layout import TILE_COLS, BlockFormat
from chainfed_engine.model.shape import model_shape
from chainfed_engine.model.store_file import MatrixSpec
from chainfed_engine.types import ModelShape

WORDS = Location("embedding", None, "word_embeddings.weight")
HEAD = Location("head", None, "head.weight")
_ENCODERS = ("bert", "roberta", "distilbert")
_CLASSIFIER = "classifier."
Placed = dict[Location, SourceTensor]


@dataclass(frozen=True)
class TensorPlan:
    """`spec` is filled from rows first_row .. of `tensor`."""

    spec: MatrixSpec
    tensor: SourceTensor
    first_row: int = 0


@dataclass(frozen=True)
class FilePlan:
    name: str
    role: Role
    tensors: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class StorePlan:
    shape: ModelShape
    files: tuple[FilePlan, ...]
    tied: bool
    labels: tuple[str, ...] | None


def plan_store(source: Source, block_format: BlockFormat, head_format: BlockFormat) -> StorePlan:
    """Raises UnsupportedModel for an architecture or tensors the engine does not run, CorruptFile for missing ones."""
    expected = checkpoint_shapes(source.config)
    shape = model_shape(source.config)
    placed = _place(source, shape.architecture)
    if not _has_sequence_classifier(source.config):
        placed = {at: tensor for at, tensor in placed.items() if not at.name.startswith(f"{_CLASSIFIER}out")}
    tied = shape.architecture not in _ENCODERS and source.config.get("tie_word_embeddings") is True
    head = _take_head(source, placed, shape, tied)
    order = _check_shapes(placed, expected, shape, tied)
    files = [
        _file_plan("embedding", 0, [at for at in order if at.role == "embedding"], placed, block_format, head_format)
    ]
    for index in range(shape.num_layers):
        files.append(
            _file_plan("layer", index, [at for at in order if at.layer == index], placed, block_format, head_format)
        )
    if head is not None:
        files += _head_plans(head, shape, head_format)
    return StorePlan(shape, tuple(files), tied, _labels(source.config, placed))


def _place(source: Source, architecture: str) -> Placed:
    """Location -> tensor for everything the engine uses."""
    placed: Placed = {}
    unknown = []
    for name, tensor in source.tensors.items():
        at = locate(architecture, name)
        if at is None:
            unknown.append(name[:100])
        elif at.role != "skip":
            if at in placed:
                raise CorruptFile(f"{source.label}: {placed[at].name!r} and {name!r} are the same tensor of the model")
            tensor.check()
            placed[at] = tensor
    if unknown:
        raise UnsupportedModel(
            f"{source.label}: {len(unknown)} tensors are not part of {architecture}: {', '.join(unknown[:5])}; "
            "expected a checkpoint of the plain architecture (merge adapters into it first)"
        )
    return placed


def _has_sequence_classifier(config: dict[str, Any]) -> bool:
    """Whether `classifier.out_*` classifies sequences: heads for tokens and multiple choice have the same names."""
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and bool(architectures)
    return not named or any(str(name).endswith("ForSequenceClassification") for name in architectures or [])


def _take_head(source: Source, placed: Placed, shape: ModelShape, tied: bool) -> SourceTensor | None:
    """Remove the LM head from `placed` (and, when tied, the word embeddings, which are then the head) and return it."""
    head = placed.pop(HEAD, None)
    if tied:
        words = placed.pop(WORDS, None)
        head = words if words is not None else head
        if head is None:
            raise CorruptFile(f"{source.label}: neither word embeddings nor an LM head among the tensors")
    architectures = source.config.get("architectures")
    causal = isinstance(architectures, list) and any(str(name).endswith("ForCausalLM") for name in architectures)
    if head is None and causal and shape.architecture not in _ENCODERS:
        raise CorruptFile(f"{source.label}: no lm_head.weight, and the config does not say tie_word_embeddings")
    if head is not None and head.shape != (shape.vocab_size, shape.hidden_size):
        raise CorruptFile(f"{head.name}: shape {head.shape}; expected {(shape.vocab_size, shape.hidden_size)}")
    return head


def _check_shapes(
    placed: Placed, expected: dict[str, tuple[int, ...]], shape: ModelShape, tied: bool
) -> list[Location]:
    """All locations in file order: the model's, then its classifier's."""
    order: dict[Location, tuple[int, ...]] = {}
    for name, size in expected.items():
        at = locate(shape.architecture, name)
        assert at is not None, name
        order[at] = size
    if tied:  # the head shards hold the word embeddings
        order.pop(WORDS)
    missing = [name for name in order if name not in placed]
    if missing:
        raise CorruptFile(f"{len(missing)} tensors of the model are missing from the checkpoint: {_names(missing)}")
    extra = [at for at in placed if at not in order and not at.name.startswith(_CLASSIFIER)]
    if extra:
        raise UnsupportedModel(f"{len(extra)} tensors do not belong to a model of this config: {_names(extra)}")
    order |= _classifier_shapes(placed, shape.hidden_size)
    for at, size in order.items():
        if placed[at].shape != size:
            raise CorruptFile(f"{placed[at].name}: shape {placed[at].shape}; the config implies {size}")
    return list(order)


def _classifier_shapes(placed: Placed, hidden_size: int) -> dict[Location, tuple[int, ...]]:
    def at(name: str) -> Location:
        return Location("embedding", None, _CLASSIFIER + name)

    out = placed.get(at("out_weight"))
    num_classes = out.num_rows if out is not None else 0
    shapes: dict[str, tuple[int, ...]] = {
        "transform_weight": (hidden_size, hidden_size),
        "transform_bias": (hidden_size,),
        "out_weight": (num_classes, hidden_size),
        "out_bias": (num_classes,),
    }
    return {at(name): size for name, size in shapes.items() if at(name) in placed}


def _names(places: list[Location]) -> str:
    shown = [at.name if at.layer is None else f"layer {at.layer} {at.name}" for at in places[:5]]
    return ", ".join(shown) + (", ..." if len(places) > 5 else "")


def _file_plan(
    role: Role, index: int, places: list[Location], placed: Placed, block_format: BlockFormat, head_format: BlockFormat
) -> FilePlan:
    tensors = []
    for at in places:
        tensor = placed[at]
        chosen: BlockFormat = "f32"
        if at == WORDS or role == "layer":
            chosen = _format_of(tensor.shape, head_format if at == WORDS else block_format)
        tensors.append(TensorPlan(MatrixSpec(at.name, chosen, tensor.shape), tensor))
    return FilePlan(file_name(role, index), role, tuple(tensors))


def _format_of(shape: tuple[int, ...], block_format: BlockFormat) -> BlockFormat:
    """Vectors and matrices narrower than a tile stay f32."""
    return block_format if len(shape) == 2 and shape[1] >= TILE_COLS else "f32"


def _head_plans(head: SourceTensor, shape: ModelShape, head_format: BlockFormat) -> list[FilePlan]:
    plans = []
    for index in range(num_head_shards(shape.vocab_size)):
        first_row = index * HEAD_SHARD_ROWS
        size = (min(HEAD_SHARD_ROWS, shape.vocab_size - first_row), shape.hidden_size)
        spec = MatrixSpec("head.weight", _format_of(size, head_format), size)
        plans.append(FilePlan(file_name("head", index), "head", (TensorPlan(spec, head, first_row),)))
    return plans


def _labels(config: dict[str, Any], placed: Placed) -> tuple[str, ...] | None:
    """Class names in the order of the classification head's rows; None without such a head."""
    out = placed.get(Location("embedding", None, f"{_CLASSIFIER}out_weight"))
    if out is None:
        return None
    names = config.get("id2label")
    if not isinstance(names, dict):
        return tuple(f"LABEL_{index}" for index in range(out.num_rows))
    labels = [names.get(str(index)) for index in range(out.num_rows)]
    if len(names) != out.num_rows or not all(isinstance(label, str) for label in labels):
        raise CorruptFile(f"config: id2label does not name the {out.num_rows} classes of the classification head")
    return tuple(str(label) for label in labels)
