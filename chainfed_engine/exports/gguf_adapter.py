"""A LoRA run as a GGUF adapter for llama.cpp (`llama-cli --lora FILE`).

Enters: the LoRA adapters of a causal LM, the model's sizes. Leaves: one file: `adapter.type` "lora",
`adapter.lora.alpha`, and for each projection `blk.<layer>.attn_q.weight.lora_a` [R,K] and `.lora_b` [N,R], f32. Files
of GGUF architecture llama keep the rows of q in the order of interleaved RoPE, so the rows of its B go into that order,
too.
"""

from pathlib import Path

import numpy as np

from chainfed_engine.adapters import LoRA
from chainfed_engine.errors import UnsupportedModel
from chainfed_engine.exports.peft_adapter import lora_parts
from chainfed_engine.types import ModelShape

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_PROJECTIONS = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v"}


def write_gguf(path: Path, shape: ModelShape, adapters: dict[int, LoRA], base: str) -> None:
    """Write the adapter file. `base`: name of the model it belongs to, for people."""
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UnsupportedModel("writing GGUF needs the gguf package: pip install 'chainfed-engine[gguf]'") from error
    architecture = ARCHITECTURES[shape.architecture]
    writer = GGUFWriter(path, architecture)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(next(iter(adapters.values())).alpha))
        writer.add_string("general.base_model.0.name", base)
        for layer, adapter in adapters.items():
            for module, (a, b) in lora_parts(adapter).items():
                name = f"blk.{layer}.{_PROJECTIONS[module]}.weight"
                if architecture == "llama" and module == "self_attn.q_proj":
                    b = _interleaved(b, shape.num_heads)
                writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
                writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _interleaved(
    rows: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", num_heads: int
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Rows (head, half, pair) -> (head, pair, half)."""
    columns = rows.shape[1]
    return rows.reshape(num_heads, 2, -1, columns).swapaxes(1, 2).reshape(-1, columns)
