"""Stores of random weights: as real ones, with the promised spread, the same bytes for the same seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModel, AutoTokenizer

from chainfed_engine import native
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.synth import SHAPES, synth
from tests.model.convert_cases import CASES, stored
from tests.model.test_format import TINY


@pytest.mark.parametrize("name", ["bert", "roberta-mlm", "distilbert", "llama", "mistral", "qwen2", "qwen3"])
def test_a_transformers_config_gives_the_tensors_of_its_model(name: str, tmp_path: Path) -> None:
    import transformers

    model_class, config_class, settings, layers = CASES[name]
    config = getattr(transformers, config_class)(**settings | {"vocab_size": 300})
    config.save_pretrained(tmp_path)
    info = StoreInfo.read(synth(tmp_path / "config.json", tmp_path / "store", "f32"))
    layer = getattr(transformers, model_class)(config).get_submodule(layers)[0].state_dict()
    found = stored(info.layers[0])
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in layer.items()}
    weight = next(value for key, value in found.items() if value.ndim == 2)
    assert abs(weight.std().item() - 0.02) < 0.002
    assert AutoModel.from_config(AutoConfig.for_model(**info.config)).config.num_hidden_layers == 3


@pytest.mark.parametrize("block_format", ["int4", "nf4", "int8", "bf16", "f32"])
def test_decoded_weights_have_mean_0_and_deviation_002(block_format: str, tmp_path: Path) -> None:
    info = StoreInfo.read(synth(TINY, tmp_path / "store", block_format))
    reader = native.StoreReader([file.native() for file in info.files], num_slots=1)
    with reader.acquire(1) as lease:
        out = np.empty((96, 64), np.float32)
        native.dequantize_rows(lease.matrix("mlp.up_proj.weight"), 0, 96, out=out)
    reader.close()
    assert abs(out.mean()) < 0.002 and abs(out.std() - 0.02) < 0.001


def test_equal_seeds_give_equal_bytes_also_after_an_interruption(tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name == "layer-0001.safetensors":
            raise KeyboardInterrupt

    whole = synth(TINY, tmp_path / "whole", "nf4", seed=7)
    with pytest.raises(KeyboardInterrupt):
        synth(TINY, tmp_path / "store", "nf4", seed=7, progress=stop)
    store = synth(TINY, tmp_path / "store", "nf4", seed=7)
    assert (store / "store.json").read_bytes() == (whole / "store.json").read_bytes()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_the_byte_level_tokenizer_round_trips_any_text(architecture: str, tmp_path: Path) -> None:
    config: dict[str, Any] = TINY | {"model_type": architecture, "num_key_value_heads": None}
    info = StoreInfo.read(synth(config, tmp_path / "store"))
    tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path)
    text = "naïve 東京\n\t\x00 <end>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < 261 and tokenizer.pad_token_id == info.config["pad_token_id"]
    assert tokenizer.model_max_length == info.shape.max_positions
    framed = ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert framed == (architecture != "llama")


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_configs_that_transformers_accepts(name: str) -> None:
    config = AutoConfig.for_model(**SHAPES[name])
    assert config.hidden_size == SHAPES[name]["hidden_size"]


def test_a_named_shape_becomes_a_store(tmp_path: Path) -> None:
    info = StoreInfo.read(synth("minilm-l6", tmp_path / "store"))
    assert (info.shape.hidden_size, info.num_layers, info.source) == (384, 6, "synth minilm-l6")


def test_unknown_shapes_and_small_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"expected one of llama-3.1-8b, .*or the path of a config.json"):
        synth("gpt-9", tmp_path / "store")
    with pytest.raises(InvalidArgument, match="byte-level tokenizer needs 261"):
        synth(TINY | {"vocab_size": 260}, tmp_path / "store")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InvalidArgument, match="expected the JSON object"):
        synth(tmp_path / "config.json", tmp_path / "store")
