"""A LoRA run as a PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

Enters: a `TrainedRun` of LoRA adapters, the model's sizes. Leaves: the two files, without the peft package. Layers
whose adapter was never trained are left out (they are the identity); the classifier goes along under `modules_to_save`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from chainfed_engine.adapters import LoRA
from chainfed_engine.exports.library_names import LibraryModel
from chainfed_engine.types import Arrays

_PREFIX = "base_model.model."
_TASKS = {"causal-lm": "CAUSAL_LM", "sequence-classifier": "SEQ_CLS", "none": "FEATURE_EXTRACTION"}


def write_peft(folder: Path, model: LibraryModel, adapters: dict[int, LoRA], head: Arrays | None, base: str) -> None:
    """Write the adapter into `folder`. `head`: arrays of the classification head by the store's names; `base`: the
    model it belongs to, as `from_pretrained` takes it."""
    first = next(iter(adapters.values()))
    tensors: dict[str, Any] = {}
    for layer, adapter in adapters.items():
        for path, part in lora_parts(adapter).items():
            stem = _PREFIX + model.layer_path(layer, path)
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = part
    for name, array in (head or {}).items():
        tensors[_PREFIX + model.classifier_path(name)] = array
    config = {
        "peft_type": "LORA",
        "task_type": _TASKS[model.head],
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in first.targets}),
        "layers_to_transform": sorted(adapters),
        "modules_to_save": list(model.classifier_modules) if head is not None else None,
    }
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def lora_parts(adapter: LoRA) -> dict[str, tuple[Any, Any]]:
    """Path of a projection inside the layer -> A [R,K] and B [N,R], float32."""
    query, value = adapter.targets
    arrays = {name: parameter.detach().numpy() for name, parameter in adapter.named_parameters()}
    return {query: (arrays["query_a"], arrays["query_b"]), value: (arrays["value_a"], arrays["value_b"])}
