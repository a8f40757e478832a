"""Where a checkpoint's tensor goes in a layer store (`locate_in`), and the way back (`name_in`).

Enters: a parameter name as a Hugging Face checkpoint spells it (with or without the base model's prefix, with the old
`gamma`/`beta` names of layer norms). Leaves: the role of the store's file, the layer's index, and the name inside that
file. Tables only: no transformers, no torch, no sizes (whoever copies the tensor checks shapes).
"""

import re
from dataclasses import dataclass
from typing import Literal

Role = Literal["layer", "embedding", "head", "skip"]


@dataclass(frozen=True)
class Location:
    """`layer`: an index for role "layer", else None. Role "skip": a tensor the engine has no use for; `name` is ""."""

    role: Role
    layer: int | None
    name: str


@dataclass(frozen=True)
class NameTable:
    """The names of one architecture, without the prefix. `layer_modules` have a `.weight` and may have a `.bias`."""

    prefix: str  # of the base model inside a model with a head, with the dot
    layers: str  # path of the list of layers
    layer_modules: frozenset[str]
    others: dict[str, str]  # checkpoint's name -> name in the embedding file
    head: str | None  # checkpoint's name of the LM head's matrix
    skipped: re.Pattern[str]  # heads of tasks the engine does not run, buffers


SKIP = Location("skip", None, "")
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


def _pairs(checkpoint: str, store: str) -> dict[str, str]:
    """A linear or a norm: its weight and its bias. `store` ends in "." or "_" and takes `weight` or `bias`."""
    return {f"{checkpoint}.{kind}": f"{store}{kind}" for kind in ("weight", "bias")}


_BERT_LAYER = frozenset(f"attention.self.{name}" for name in ("query", "key", "value")) | {
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
}
_BERT_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "word_embeddings.weight",
    "embeddings.position_embeddings.weight": "position_embeddings.weight",
    "embeddings.token_type_embeddings.weight": "token_type_embeddings.weight",
    **_pairs("embeddings.LayerNorm", "LayerNorm."),
}
_BERT_BUFFERS = r"embeddings\.(position_ids|token_type_ids)|qa_outputs\..*"

BERT = NameTable(
    "bert.",
    "encoder.layer.",
    _BERT_LAYER,
    _BERT_EMBEDDINGS | _pairs("pooler.dense", "classifier.transform_") | _pairs("classifier", "classifier.out_"),
    None,
    re.compile(_BERT_BUFFERS + r"|cls\..*"),
)
ROBERTA = NameTable(
    "roberta.",
    "encoder.layer.",
    _BERT_LAYER,
    _BERT_EMBEDDINGS
    | _pairs("classifier.dense", "classifier.transform_")
    | _pairs("classifier.out_proj", "classifier.out_"),
    None,
    re.compile(_BERT_BUFFERS + r"|lm_head\..*|pooler\..*|classifier\.(weight|bias)"),
)
DISTILBERT = NameTable(
    "distilbert.",
    "transformer.layer.",
    frozenset(
        {
            *(f"attention.{name}" for name in ("q_lin", "k_lin", "v_lin", "out_lin")),
            "sa_layer_norm",
            "ffn.lin1",
            "ffn.lin2",
            "output_layer_norm",
        }
    ),
    {
        "embeddings.word_embeddings.weight": "word_embeddings.weight",
        "embeddings.position_embeddings.weight": "position_embeddings.weight",
        **_pairs("embeddings.LayerNorm", "LayerNorm."),
        **_pairs("pre_classifier", "classifier.transform_"),
        **_pairs("classifier", "classifier.out_"),
    },
    None,
    re.compile(_BERT_BUFFERS + r"|vocab_(transform|layer_norm|projector)\..*"),
)
DECODER = NameTable(
    "model.",
    "layers.",
    frozenset(
        {
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
            "input_layernorm",
            "post_attention_layernorm",
        }
    ),
    {
        "embed_tokens.weight": "word_embeddings.weight",
        "norm.weight": "norm.weight",
        "score.weight": "classifier.out_weight",
    },
    "lm_head.weight",
    re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|qa_outputs\..*"),
)


def locate_in(table: NameTable, name: str) -> Location | None:
    """Where the tensor `name` goes; None for a name the architecture does not have."""
    name = name.removeprefix(table.prefix)
    stem, _, kind = name.rpartition(".")
    name = f"{stem}.{_OLD_NAMES.get(kind, kind)}"
    if name == table.head:
        return Location("head", None, "head.weight")
    if name in table.others:
        return Location("embedding", None, table.others[name])
    if table.skipped.fullmatch(name):
        return SKIP
    index, _, rest = name.removeprefix(table.layers).partition(".")
    module, _, kind = rest.rpartition(".")
    known = name.startswith(table.layers) and module in table.layer_modules and kind in ("weight", "bias")
    if not known or not (index.isascii() and index.isdigit()):
        return None
    return Location("layer", int(index), rest)


def name_in(table: NameTable, at: Location) -> str:
    """The checkpoint's name of what lies at `at`, without the base model's prefix: the inverse of `locate_in`."""
    if at.role == "head" and table.head is not None:
        return table.head
    if at.role == "layer":
        return f"{table.layers}{at.layer}.{at.name}"
    return next(name for name, stored in table.others.items() if stored == at.name)
