"""A checkpoint of a given shape with random weights, as a hub keeps it: bf16 safetensors in shards, index, tokenizer.

    python bench/memory/checkpoint.py --shape llama-3.1-8b FOLDER [--shard-bytes 4GB]

For trials of conversion. Rows are drawn and written a block at a time: no tensor is ever whole in memory.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from chainfed_engine.model.convert.expected import checkpoint_shapes
from chainfed_engine.model.convert.hf_source import INDEX_FILE
from chainfed_engine.model.convert.source import rows_per_block, to_bf16
from chainfed_engine.model.shape import model_shape
from chainfed_engine.model.synth import SHAPES, WEIGHT_DEVIATION
from chainfed_engine.model.synth_tokenizer import special_token_ids, write_byte_tokenizer
from chainfed_engine.sizes import parse_size

BF16_BYTES = 2


def main() -> int:
    parser = argparse.ArgumentParser(description="write a random bf16 checkpoint of a given shape")
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--shard-bytes", type=parse_size, default=4 * 10**9)
    options = parser.parse_args()
    write_checkpoint(options.shape, Path(options.folder), options.shard_bytes)
    return 0


def write_checkpoint(shape: str, folder: Path, shard_bytes: int) -> None:
    """`folder` must not exist, and does only once it is whole. shard_bytes: what a shard holds at most, single tensors
    above it excepted."""
    config = dict(SHAPES[shape])
    sizes = model_shape(config)
    config |= special_token_ids(sizes.architecture)
    tensors = checkpoint_shapes(config)
    if "norm.weight" in tensors:
        tensors = {f"model.{name}": size for name, size in tensors.items()}
        if not config["tie_word_embeddings"]:
            tensors["lm_head.weight"] = (sizes.vocab_size, sizes.hidden_size)
    whole, folder = folder, folder.with_name(folder.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=2))
    write_byte_tokenizer(sizes.architecture, sizes.max_positions, folder)
    shards = split_into_shards(tensors, shard_bytes)
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: tensors[name] for name in names}, seed=index)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    folder.rename(whole)


def split_into_shards(tensors: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in tensors.items():
        num_bytes = BF16_BYTES * int(np.prod(size))
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], *, seed: int) -> None:
    """Matrices are normal with a deviation of 0.02, norms' weights 1, biases 0."""
    header, offset = {}, 0
    for name, size in tensors.items():
        end = offset + BF16_BYTES * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.Generator(np.random.SFC64(seed))
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors.items():
            if len(size) == 1:
                file.write(to_bf16(np.full(size, 0.0 if name.endswith(".bias") else 1.0, np.float32)).tobytes())
                continue
            step = rows_per_block(size[1])
            for begin in range(0, size[0], step):
                rows = generator.standard_normal((min(step, size[0] - begin), size[1]), dtype=np.float32)
                rows *= np.float32(WEIGHT_DEVIATION)
                file.write(to_bf16(rows).tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
