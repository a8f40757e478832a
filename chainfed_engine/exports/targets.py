"""`export`: a finished run into the files of other tools. Decides what fits the run, then one writer a target.

Enters: a run directory, a path that does not exist yet, the target, optionally the original checkpoint. Leaves: a
folder (`peft`, `merged`) with a README.md that shows how to load it, or one file (`gguf`).
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.numpy import save_file

from chainfed_engine.adapters import LoRA
from chainfed_engine.errors import InvalidArgument, StorageError
from chainfed_engine.exports import merged
from chainfed_engine.exports.folder import check_free, new_file, new_folder, open_to_readers
from chainfed_engine.exports.gguf_adapter import ARCHITECTURES, write_gguf
from chainfed_engine.exports.library_names import LibraryModel
from chainfed_engine.exports.merged import LIBRARY_DTYPES, Dtype
from chainfed_engine.exports.peft_adapter import write_peft
from chainfed_engine.exports.readme import readme
from chainfed_engine.exports.sequence_head import has_library_head, library_head
from chainfed_engine.exports.store_source import open_store
from chainfed_engine.exports.trained_run import TrainedRun
from chainfed_engine.model.convert import open_source
from chainfed_engine.model.convert.source import Source
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.layout import is_quantised
from chainfed_engine.model.shape import model_shape
from chainfed_engine.types import Arrays, ModelShape

Target = Literal["peft", "gguf", "merged"]
TARGETS: tuple[Target, ...] = get_args(Target)
CLASSIFIER_FILE = "classifier.safetensors"
_DTYPES: dict[str, Dtype] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_SPARE_BYTES = 64_000_000


@dataclass(frozen=True)
class Exported:
    """`path`: the folder or file that was written; `notes`: what a user should know about it, a line each."""

    path: Path
    notes: tuple[str, ...]


def export(
    run_dir: str | Path,
    out: str | Path,
    to: Target = "peft",
    *,
    base: str | Path | None = None,
    dtype: Literal["auto", "f32", "bf16", "f16"] = "auto",
    max_shard_bytes: int = merged.MAX_SHARD_BYTES,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Write a finished LoRA run for other tools.

    to: "peft" (a folder for `PeftModel.from_pretrained`), "gguf" (an adapter file for llama.cpp; causal LMs) or
    "merged" (a whole Hugging Face checkpoint). base: the checkpoint the store was made from (folder, hub id or .gguf);
    "merged" without it is made from the store's weights, dequantised. dtype: of a merged checkpoint; "auto": as the
    config says, else f32. progress(file, bytes done, bytes in all) is called while a merged checkpoint is written.

    Memory: blocks of 4 MiB and the adapters. Raises InvalidArgument for what cannot leave that way (it names one that
    can), StorageError, CorruptFile, UnsupportedModel.
    """
    if to not in TARGETS:
        raise InvalidArgument(f"export: expected to = {', '.join(map(repr, TARGETS))}, got {to!r}")
    if dtype not in ("auto", *LIBRARY_DTYPES):
        raise InvalidArgument(f"export: expected dtype 'auto', 'f32', 'bf16' or 'f16', got {dtype!r}")
    check_free(Path(out))
    run = TrainedRun.read(run_dir)
    _check_can_leave(run, to)
    info = run.store()
    adapters = _lora_adapters(run, info.shape)
    if to == "gguf":
        return _export_gguf(run, info, Path(out), adapters, base)
    with _opened(info, base) as source:
        model = _library_model(run, info)
        head = _head(run, info, source) if model.head == "sequence-classifier" else None
        name = str(base) if base is not None else info.source
        notes = _notes(run, info, model, to, base)
        with new_folder(Path(out)) as folder:
            if to == "peft":
                write_peft(folder, model, adapters, head, name)
            else:
                chosen = _dtype(source.config) if dtype == "auto" else dtype
                tensors = list(merged.merged_tensors(source, model, adapters, head))
                _check_space(folder, tensors, chosen)
                merged.write_checkpoint(folder, tensors, chosen, max_shard_bytes, progress)
                _write_config(folder, run, model, source, chosen)
            without = source.write_tokenizer(folder)
            if without is not None:
                notes += (f"tokenizer: not written, {without}; take that of {name}",)
            if run.task == "classification" and head is None:
                classifier = {
                    key.removeprefix("classifier."): run.arrays[key] for key in run.arrays if "classifier." in key
                }
                save_file(classifier, folder / CLASSIFIER_FILE, {"labels": json.dumps(run.labels)})
            pooling = run.pooling(info.architecture) if run.labels else None
            text = readme(model, to, name, run.labels, pooling, notes, "." if without is None else name)
            (folder / "README.md").write_text(text, encoding="utf-8")
            open_to_readers(folder)
    return Exported(Path(out), notes)


def _check_can_leave(run: TrainedRun, to: Target) -> None:
    if run.config.chain.adapter != "lora":
        raise InvalidArgument(
            f"{run.path}: {run.config.chain.adapter} adapters stand between the layers, where {to} has no place for "
            'them; load the run with chainfed_engine.load_adapted(run, model), or train with [chain] adapter = "lora"'
        )
    if to == "gguf" and run.task != "causal-lm":
        raise InvalidArgument(f"{run.path}: a GGUF adapter cannot hold a classifier; use --to peft or --to merged")


def _lora_adapters(run: TrainedRun, shape: ModelShape) -> dict[int, LoRA]:
    """The trained adapters; all of them where none is trained, for a file without any would not load."""
    adapters = run.trained_adapters(shape) or run.adapters(shape)
    return {layer: adapter for layer, adapter in adapters.items() if isinstance(adapter, LoRA)}


def _library_model(run: TrainedRun, info: StoreInfo) -> LibraryModel:
    if run.task == "causal-lm":
        return LibraryModel(info.architecture, "causal-lm")
    return LibraryModel(info.architecture, "sequence-classifier" if has_library_head(run, info.shape) else "none")


def _export_gguf(
    run: TrainedRun, info: StoreInfo, out: Path, adapters: dict[int, LoRA], base: str | Path | None
) -> Exported:
    if info.architecture not in ARCHITECTURES:
        raise InvalidArgument(f"{run.path}: GGUF adapters are for {', '.join(ARCHITECTURES)}; use --to peft")
    with new_file(out) as partial:
        write_gguf(partial, info.shape, adapters, str(base) if base is not None else info.source)
    return Exported(out, _quantised_note(info))


@contextmanager
def _opened(info: StoreInfo, base: str | Path | None) -> Iterator[Source]:
    """The original checkpoint, if it is of the store's model, else the store."""
    source = open_store(info) if base is None else open_source(base)
    try:
        if model_shape(source.config) != info.shape:
            raise InvalidArgument(
                f"--base {base}: {model_shape(source.config)} is not the model of the run's store, {info.shape}; give "
                "the checkpoint the store was converted from"
            )
        yield source
    finally:
        source.close()


def _head(run: TrainedRun, info: StoreInfo, source: Source) -> Arrays:
    """The classification head; DistilBERT's needs a bound on the features, from the last layer's norm."""
    bound = 0.0
    if info.architecture == "distilbert":
        norm = f"transformer.layer.{info.num_layers - 1}.output_layer_norm"
        values = {
            kind: tensor.read_rows(0, 1)
            for name, tensor in source.tensors.items()
            for kind in ("weight", "bias")
            if name.endswith(f"{norm}.{kind}")
        }
        bound = float(info.shape.hidden_size**0.5 * abs(values["weight"]).max() + abs(values["bias"]).max())
    return library_head(run, info.shape, bound)


def _notes(
    run: TrainedRun, info: StoreInfo, model: LibraryModel, to: Target, base: str | Path | None
) -> tuple[str, ...]:
    notes: list[str] = []
    if to == "merged":
        if base is not None:
            notes.append(f"weights: the adapters merged into the original checkpoint {base}")
        elif is_quantised(info.block_format):
            notes.append(
                f"weights: read back from the store, so they carry its {info.block_format} rounding; for the exact "
                "ones give --base with the original checkpoint"
            )
    if to == "peft" or base is not None:
        notes += _quantised_note(info)
    if run.task == "classification" and model.head == "none":
        notes.append(
            f"classifier: it reads the {run.pooling(info.architecture)} of the tokens, which no class of transformers "
            f"does; it is in {CLASSIFIER_FILE}, and README.md shows how to apply it"
        )
    elif model.head == "sequence-classifier" and info.architecture == "distilbert":
        notes.append("classifier: run it in float32; half precision loses digits in this class's ReLU")
    return tuple(notes)


def _quantised_note(info: StoreInfo) -> tuple[str, ...]:
    if not is_quantised(info.block_format):
        return ()
    return (
        f"the adapters were trained on {info.block_format} weights; on the original ones the model differs a little",
    )


def _dtype(config: dict[str, Any]) -> Dtype:
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "f32")


def _check_space(folder: Path, tensors: list[merged.OutTensor], dtype: Dtype) -> None:
    from math import prod

    needed = sum(prod(tensor.shape) for tensor in tensors) * (4 if dtype == "f32" else 2) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(f"{folder.parent}: the checkpoint needs {needed} bytes, {free} are free; make room")


def _write_config(folder: Path, run: TrainedRun, model: LibraryModel, source: Source, dtype: Dtype) -> None:
    """config.json of the merged model."""
    dropped = ("torch_dtype", "_name_or_path", "quantization_config", "id2label", "label2id", "num_labels")
    config = {key: value for key, value in source.config.items() if key not in dropped}
    config |= {"architectures": [model.class_name], "dtype": LIBRARY_DTYPES[dtype]}
    if run.labels:
        config["id2label"] = {str(index): label for index, label in enumerate(run.labels)}
        config["label2id"] = {label: index for index, label in enumerate(run.labels)}
    if model.head == "sequence-classifier":
        config["problem_type"] = "single_label_classification"
        if config.get("pad_token_id") is None:  # by which decoders' classes find the last token
            config["pad_token_id"] = _pad_id(run)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pad_id(run: TrainedRun) -> int:
    from chainfed_engine.data import Tokenizer

    return Tokenizer.load(run.config.store, run.store().config).pad_id
