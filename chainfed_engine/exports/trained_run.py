"""A finished run as it lies on disk, checked: which adapters and which classifier were trained, for which model.

Enters: the path of a run directory. Leaves: `TrainedRun`: configuration, float32 arrays by parameter name, labels; and
from them, given the sizes of a model, the adapters as modules and the classifier.
"""

from dataclasses import dataclass
from pathlib import Path

from chainfed_engine.adapters import Adapter, build_adapter
from chainfed_engine.config import RunConfig
from chainfed_engine.config_file import load_config
from chainfed_engine.errors import CorruptFile, InvalidArgument
from chainfed_engine.federation import read_adapters
from chainfed_engine.federation.inputs import LABELS_FILE, read_labels, store_of_run
from chainfed_engine.model.classifier import Classifier
from chainfed_engine.model.families import chosen_pooling, family
from chainfed_engine.model.families.base import Pooling
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.types import Arrays, ModelShape, TaskKind, classifier_key


@dataclass(frozen=True)
class TrainedRun:
    """`arrays`: float32 under `adapters.<layer>.<name>` and `classifier.<name>`; `labels`: () for a causal LM."""

    path: Path
    config: RunConfig
    arrays: Arrays
    labels: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> "TrainedRun":
        """Raises StorageError where files are missing, CorruptFile where they do not belong together."""
        folder = Path(path)
        arrays, record = read_adapters(folder)
        config = load_config(folder / "config.toml")
        if config.chain.method == "flora":
            raise InvalidArgument(
                f"{folder}: FLoRA ends in dense additions to the weights, which no other tool takes; train with method "
                '"lora", or with "chain" and adapter = "lora"'
            )
        labels = tuple(read_labels(folder)) if config.data.task == "classification" else ()
        if record.get("adapter") != config.chain.adapter or record.get("task") != config.data.task:
            raise CorruptFile(
                f"{folder}: config.toml and adapters.safetensors are of different runs; copy the run again"
            )
        run = cls(folder, config, arrays, labels)
        classes = (
            arrays[classifier_key("out_weight")].shape[:1] if labels and classifier_key("out_weight") in arrays else ()
        )
        if labels and classes != (len(labels),):
            raise CorruptFile(f"{folder}: {LABELS_FILE} names {len(labels)} labels, the classifier has {list(classes)}")
        return run

    @property
    def task(self) -> TaskKind:
        return self.config.data.task

    def store(self) -> StoreInfo:
        """The layer store the run was trained on. Raises StorageError where it no longer is."""
        return store_of_run(self.path, self.config)

    def adapters(self, shape: ModelShape) -> dict[int, Adapter]:
        """The adapter of every layer of a model of this shape, trained or not; InvalidArgument for other sizes."""
        chain = self.config.chain
        kind = family(shape.architecture)
        built = {
            layer: build_adapter(chain.adapter, kind, shape, layer, chain.adapter_size, chain.seed)
            for layer in range(shape.num_layers)
        }
        known = {key for adapter in built.values() for key in adapter.state_arrays()}
        unknown = sorted(key for key in self.arrays if key not in known and not key.startswith(classifier_key("")))
        if unknown:
            raise InvalidArgument(
                f"{self.path}: holds {unknown[0]}, which a model of {shape.num_layers} layers does not have; give the "
                "model that the run was trained on"
            )
        for adapter in built.values():
            adapter.load_arrays(self.arrays)
        return built

    def trained_adapters(self, shape: ModelShape) -> dict[int, Adapter]:
        """Those that are not the identity."""
        return {layer: adapter for layer, adapter in self.adapters(shape).items() if adapter.is_trained}

    def pooling(self, architecture: str) -> Pooling:
        """What the classifier reads: the mean over a sequence's tokens, its first or its last."""
        chosen = self.config.chain.pooling
        return chosen_pooling(chosen, self.store().pooling if chosen == "auto" else None, architecture)

    def classifier(self, shape: ModelShape) -> Classifier:
        """The trained classifier of a classification run."""
        kind = family(shape.architecture)
        transform = kind.transform_activation if classifier_key("transform_weight") in self.arrays else None
        bias = classifier_key("out_bias") in self.arrays
        classifier = Classifier(
            shape.hidden_size, len(self.labels), self.pooling(shape.architecture), transform=transform, bias=bias
        )
        classifier.load_arrays(self.arrays)
        return classifier
