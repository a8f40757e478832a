"""`synth`: a store of a given shape with random weights and a byte-level tokenizer, for trials of memory and speed.

Enters: the name of a shape or a transformers config. Leaves: a store like any other, made by the same plan and writer.
Weights have mean 0 (nf4: nearly) and standard deviation 0.02, norms are 1, biases 0. For int4, nf4 and int8 codes are
drawn uniformly and share one scale (one offset) for the whole matrix: quantising billions of normal values would show
nothing that this does not. bf16 and f32 weights are drawn from the normal distribution. Equal seeds give equal bytes.
"""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from chainfed_engine.errors import InvalidArgument, StorageError
from chainfed_engine.model.convert.api import default_head_format, write_store
from chainfed_engine.model.convert.expected import checkpoint_shapes
from chainfed_engine.model.convert.source import AnyArray, F32Array, Source, SourceTensor, allocate
from chainfed_engine.model.convert.writer import Progress
from chainfed_engine.model.header import parse_json
from chainfed_engine.model.layout import BlockFormat, parse_block_format
from chainfed_engine.model.shape import model_shape
from chainfed_engine.model.synth_tokenizer import NUM_TOKENS, special_token_ids, write_byte_tokenizer

WEIGHT_DEVIATION = 0.02
_UNIFORM_DEVIATION = {"int4": 4.6098, "nf4": 0.5167, "int8": 73.75}  # of codes drawn uniformly, for a scale of 1
_MAX_CONFIG_BYTES = 1_000_000


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }


def _bert(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 8, 128256, tied=False),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 8, 128256, tied=True),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49152, tied=True),
    "bert-large": _bert(24, 1024, 16),
    "bert-base": _bert(12, 768, 12),
    "minilm-l6": _bert(6, 384, 12),
}


def synth(
    shape: str | os.PathLike[str] | dict[str, Any],
    destination: str | os.PathLike[str],
    block_format: str = "int4",
    *,
    head_format: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a store of random weights and return its path.

    shape: a name in `SHAPES`, the path of a transformers config.json, or such a config as a dict. Formats, progress,
    resuming and errors as for `convert`; also InvalidArgument for an unknown name or a vocabulary under 261 tokens.
    """
    chosen = parse_block_format(block_format)
    chosen_head = parse_block_format(head_format) if head_format is not None else default_head_format(chosen)
    label, config = _config(shape)
    return write_store(_source(label, config, seed), Path(destination), chosen, chosen_head, progress)


class RandomTensor(SourceTensor):
    """Rows depend on seed, tensor and first row alone, so that an interrupted `synth` resumes with the same bytes."""

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, index: int):
        self.name, self.shape = name, shape
        self._key = (seed, index)
        self._constant = None if len(shape) == 2 else 0.0 if name.endswith(".bias") else 1.0

    def check(self) -> None:
        """Any shape can be drawn."""

    def read_rows(self, begin: int, end: int) -> F32Array:
        size = (end - begin, self.num_cols)
        if self._constant is not None:
            return np.full(size, self._constant, np.float32)
        rows = self._random(begin).standard_normal(size, dtype=np.float32)
        rows *= np.float32(WEIGHT_DEVIATION)
        return rows

    def encode(self, begin: int, end: int, block_format: BlockFormat) -> tuple[AnyArray, AnyArray | None]:
        if block_format not in _UNIFORM_DEVIATION:
            return super().encode(begin, end, block_format)
        codes, scales = allocate(block_format, end - begin, self.num_cols)
        assert scales is not None
        random_bytes = np.frombuffer(self._random(begin).bytes(codes.nbytes), np.uint8)
        codes[...] = random_bytes.view(codes.dtype).reshape(codes.shape)
        scale = WEIGHT_DEVIATION / _UNIFORM_DEVIATION[block_format]
        scales[...] = scale
        if block_format == "int4":
            scales[..., 8:] = -7.5 * scale  # the offset of each row's block
        elif block_format == "int8":
            np.maximum(codes, -127, out=codes)
        return codes, scales

    def _random(self, begin: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([*self._key, begin]))


def _config(shape: str | os.PathLike[str] | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(shape, dict):
        return "synth", dict(shape)
    name = os.fspath(shape)
    if name in SHAPES:
        return f"synth {name}", dict(SHAPES[name])
    path = Path(name)
    if not path.is_file():
        raise InvalidArgument(f"shape {name!r}: expected one of {', '.join(SHAPES)}, or the path of a config.json")
    try:
        with open(path, "rb") as file:
            content = parse_json(file.read(_MAX_CONFIG_BYTES), name)
    except OSError as error:
        raise StorageError(f"{name}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise InvalidArgument(f"{name}: expected the JSON object of a transformers config")
    return "synth", content


def _source(label: str, config: dict[str, Any], seed: int) -> Source:
    """The checkpoint that `config` describes, with the special tokens of the byte-level tokenizer."""
    shapes = checkpoint_shapes(config)
    shape = model_shape(config)
    if shape.vocab_size < NUM_TOKENS:
        raise InvalidArgument(f"vocab_size {shape.vocab_size}: the byte-level tokenizer needs {NUM_TOKENS}")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise InvalidArgument(f"seed {seed!r}: expected an integer in 0 .. 2**63 - 1")
    config = config | special_token_ids(shape.architecture)
    shape = model_shape(config)  # RoBERTa's positions depend on its padding token
    is_decoder = "norm.weight" in shapes
    if is_decoder and config.get("tie_word_embeddings") is not True:
        shapes["lm_head.weight"] = (shape.vocab_size, shape.hidden_size)
    if shape.architecture == "roberta" and config.get("type_vocab_size") is None:
        config["type_vocab_size"] = 2
    tensors: dict[str, SourceTensor] = {
        name: RandomTensor(name, size, seed, index) for index, (name, size) in enumerate(shapes.items())
    }
    return Source(
        label=label,
        identity=hashlib.sha256(json.dumps([config, seed], sort_keys=True).encode()).hexdigest(),
        config=config,
        tensors=tensors,
        write_tokenizer=partial(write_byte_tokenizer, shape.architecture, min(shape.max_positions, 1 << 20)),
    )
