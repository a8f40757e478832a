"""A run's adapters in a plain transformers model, with one call: `load_adapted`.

Enters: a run directory and a model that transformers loaded, in any dtype, on any device. Leaves: the same model, its
layers changed in place by forward hooks; for a classification run inside an `AdaptedClassifier`, which gives logits.
Nothing of the model is replaced or renamed. What is added to its `state_dict`:

- bottleneck: `<layer>.chainfed_adapter.down_weight` [R,D], `.down_bias` [R], `.up_weight` [D,R], `.up_bias` [D]; any
  other adapter that acts on a layer's output, in the same place under its own names
- lora: `<projection>.chainfed_lora.a` [R,K], `.b` [N,R]
- an `AdaptedClassifier` has the model under `model.` and the classifier under `classifier.` (`out_weight` [C,D],
  `out_bias` [C], `transform_weight` [D,D], `transform_bias` [D], as far as the run has them)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from chainfed_engine.adapters import Adapter, LoRA
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.exports.trained_run import TrainedRun
from chainfed_engine.model.classifier import Classifier
from chainfed_engine.model.families import name_table
from chainfed_engine.model.shape import model_shape
from chainfed_engine.types import ModelShape

_ADAPTER, _LORA = "chainfed_adapter", "chainfed_lora"


class AdaptedClassifier(nn.Module):
    """A model without head and the trained classifier on its last hidden state.

    `forward(input_ids, attention_mask=None, labels=None, **inputs)` int64 [B,T] (labels [B]) gives transformers'
    `SequenceClassifierOutput` with logits [B,C] and, with labels, the mean cross-entropy. `labels`: names of the
    classes. Sequences must be padded on the right.
    """

    def __init__(self, model: nn.Module, classifier: Classifier, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.classifier, self.labels = model, classifier, labels

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.model(input_ids=input_ids, attention_mask=mask, **inputs).last_hidden_state
        logits = self.classifier(hidden, mask)
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class LowRankAddition(nn.Module):
    """scale * (x A^T) B^T, added to a projection's output by a hook."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()), scale

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional.linear(functional.linear(x.to(self.a.dtype), self.a), self.b) * self.scale
        return out


def load_adapted(run_dir: str | Path, model: nn.Module) -> nn.Module:
    """Put the trained adapters of a run into a transformers model, in place.

    `model`: the model the run's store was converted from, as `AutoModelForCausalLM`, `AutoModel` or
    `AutoModelForSequenceClassification` loads it. Returns it for a causal LM; for a classification run returns an
    `AdaptedClassifier` around it (around its base model, if it has a head of its own, which is not used). Adapters take
    the dtype and device of the layer they act on. Raises StorageError and CorruptFile for a run that cannot be read,
    InvalidArgument for a model of another architecture or size, or one that has adapters already.
    """
    run = TrainedRun.read(run_dir)
    shape = _shape_of(model)
    adapters = run.trained_adapters(shape)
    base = getattr(model, "base_model", model)
    layers = base.get_submodule(name_table(shape.architecture).layers.removesuffix("."))
    if any(name.rpartition(".")[2] in (_ADAPTER, _LORA) for name, _ in base.named_modules()):
        raise InvalidArgument("load_adapted: the model has adapters already; load a fresh one with from_pretrained")
    for index, adapter in adapters.items():
        _attach(layers.get_submodule(str(index)), adapter)
    if run.task == "causal-lm":
        return model
    classifier = run.classifier(shape)
    adapted = AdaptedClassifier(base, _like_model(classifier, base), run.labels)
    return adapted.train(model.training)


def _shape_of(model: nn.Module) -> ModelShape:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise InvalidArgument(f"load_adapted: expected a model of transformers, got {type(model).__name__}")
    values = config.to_dict()
    if values.get("model_type") == "xlm-roberta":  # RoBERTa with another vocabulary
        values["model_type"] = "roberta"
    return model_shape(values)


def _attach(layer: nn.Module, adapter: Adapter) -> None:
    if not isinstance(adapter, LoRA):  # it acts on the layer's output
        layer.add_module(_ADAPTER, _like_model(adapter.requires_grad_(True), layer))
        layer.register_forward_hook(_apply_adapter)
        return
    for path, branch in adapter.low_rank.items():
        projection = layer.get_submodule(path)
        projection.add_module(_LORA, _like_model(LowRankAddition(branch.a, branch.b, branch.scale), projection))
        projection.register_forward_hook(_apply_low_rank)


def _like_model(module: nn.Module, owner: nn.Module) -> Any:
    """On the owner's device, in its dtype (f32 beside quantised weights)."""
    weight = next((parameter for parameter in owner.parameters()), torch.empty(0))
    floating = weight.dtype if weight.is_floating_point() else torch.float32
    return module.to(device=weight.device, dtype=floating)


# Functions of the module, not closures, so that an adapted model can be copied.
def _apply_adapter(layer: nn.Module, inputs: Any, output: Any) -> Any:
    adapter: Any = getattr(layer, _ADAPTER)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def _apply_low_rank(projection: nn.Module, inputs: Any, output: Any) -> Any:
    addition: Any = getattr(projection, _LORA)
    return output + addition(inputs[0]).to(output.dtype)
