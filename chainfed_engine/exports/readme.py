"""README.md of an exported folder: what it is, and lines of Python that load it. Text only."""

from pathlib import Path
from typing import Literal

from chainfed_engine.exports.library_names import LibraryModel

_WHERE = ("path or hub id of the original model", "the folder that holds the original file, and its name")


def readme(
    model: LibraryModel,
    to: Literal["peft", "merged", "gguf"],
    base: str,
    labels: tuple[str, ...],
    pooling: str | None,
    notes: tuple[str, ...],
    tokenizer: str,
) -> str:
    """Markdown for an export of kind `to`; `pooling`: what the classifier reads, None for a causal LM; `tokenizer`:
    where it is, "." for the folder itself."""
    what = "A LoRA adapter for PEFT" if to == "peft" else "A merged checkpoint for transformers"
    lines = [f"# {what}", "", f"Fine-tuned with chainfed-engine from `{base}` ({model.class_name}).", ""]
    if labels:
        lines += ["Labels: " + ", ".join(f"{index} {label!r}" for index, label in enumerate(labels)) + ".", ""]
    lines += [f"- {note}" for note in notes] + ([""] if notes else [])
    lines += ["```python", f"from transformers import {model.auto_class}, AutoTokenizer"]
    options = f", num_labels={len(labels)}" if model.head == "sequence-classifier" else ""
    if to == "peft":
        lines += [
            "from peft import PeftModel",
            "",
            f"base = {model.auto_class}.from_pretrained({_named(base)}{options})  # {_WHERE[base.endswith('.gguf')]}",
            'model = PeftModel.from_pretrained(base, ".").eval()  # the path of this folder',
            f"tokenizer = AutoTokenizer.from_pretrained({_named(tokenizer)})",
        ]
    else:
        lines += [
            "",
            f'model = {model.auto_class}.from_pretrained(".")  # the path of this folder',
            f"tokenizer = AutoTokenizer.from_pretrained({_named(tokenizer)})",
        ]
    if model.head == "sequence-classifier" and pooling == "last":
        lines += [
            "# This class finds the last token by the padding id: it must not be a token that texts end with.",
            "model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0",
        ]
    if labels:
        lines += ['inputs = tokenizer(["some text"], padding=True, padding_side="right", return_tensors="pt")']
        lines += ["logits = model(**inputs).logits"] if model.head != "none" else _classifier_lines(str(pooling))
    lines += ["```", ""]
    return "\n".join(lines)


def _named(base: str) -> str:
    """A path or hub id as `from_pretrained` takes it; a GGUF file is named beside its folder."""
    if not base.endswith(".gguf"):
        return repr(base)
    return f"{str(Path(base).parent)!r}, gguf_file={Path(base).name!r}"


def _classifier_lines(pooling: str) -> list[str]:
    pooled = {
        "mean": "pooled = (hidden * mask).sum(1) / mask.sum(1)",
        "first": "pooled = hidden[:, 0]",
        "last": "pooled = hidden[range(len(hidden)), mask.sum(1).long().squeeze(-1) - 1]",
    }[pooling]
    return [
        "",
        "from safetensors.torch import load_file",
        "",
        "hidden = model(**inputs).last_hidden_state",
        'mask = inputs["attention_mask"][:, :, None].float()',
        pooled,
        'head = load_file("classifier.safetensors")',
        'logits = pooled @ head["out_weight"].T + head.get("out_bias", 0)',
    ]
