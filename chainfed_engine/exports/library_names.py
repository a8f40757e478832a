"""What transformers calls the model classes and their parameters: `LibraryModel`, one for each kind of export.

Enters: an architecture and whether the model ends in an LM head, a sequence classifier or neither. Leaves: the class's
name, a parameter's full path by its place in the layer store, and which modules its classification head consists of.
"""

from dataclasses import dataclass
from typing import Literal

from chainfed_engine.model.families import Location, NameTable, name_table
from chainfed_engine.model.families.names import name_in

Head = Literal["causal-lm", "sequence-classifier", "none"]
_CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
_ENDINGS = {"causal-lm": "ForCausalLM", "sequence-classifier": "ForSequenceClassification", "none": "Model"}
_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classifier": "AutoModelForSequenceClassification",
    "none": "AutoModel",
}
_OUTSIDE_BASE = ("classifier.", "pre_classifier.", "score.", "lm_head.")


@dataclass(frozen=True)
class LibraryModel:
    """A model class of transformers."""

    architecture: str
    head: Head

    @property
    def class_name(self) -> str:
        return _CLASSES[self.architecture] + _ENDINGS[self.head]

    @property
    def auto_class(self) -> str:
        return _AUTO[self.head]

    @property
    def names(self) -> NameTable:
        return name_table(self.architecture)

    def path(self, at: Location) -> str:
        """Full path of the parameter at `at`: `bert.encoder.layer.3.attention.self.query.weight`."""
        name = name_in(self.names, at)
        inside = self.head != "none" and not name.startswith(_OUTSIDE_BASE)
        return self.names.prefix + name if inside else name

    def layer_path(self, layer: int, module: str) -> str:
        """Full path of a module of a layer."""
        return self.path(Location("layer", layer, module))

    def classifier_path(self, name: str) -> str:
        """Full path of `out_weight`, `transform_bias`, ... of the classification head."""
        return self.path(Location("embedding", None, f"classifier.{name}"))

    @property
    def classifier_modules(self) -> tuple[str, ...]:
        """The modules of the classification head, as PEFT's `modules_to_save` wants them."""
        return {
            "bert": ("classifier", "pooler"),
            "roberta": ("classifier",),
            "distilbert": ("classifier", "pre_classifier"),
        }.get(self.architecture, ("score",))
