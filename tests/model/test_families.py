"""Every family, run layer by layer from a store, gives transformers' own results."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from chainfed_engine.errors import InvalidArgument, UnsupportedModel
from chainfed_engine.model.families import SUPPORTED, Location, family, locate
from chainfed_engine.types import Batch
from tests.conftest import CONFIGS, DECODERS, ENCODERS, Checkpoint, inputs, make_batch, relative_error, streamed

Make = Callable[..., Checkpoint]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForCausalLM", "ForMaskedLM"])
def test_locate_knows_every_tensor_that_transformers_saves(name: str, head: str) -> None:
    family_name, values = CONFIGS[name]
    model_class = getattr(transformers, f"{family_name}{head}", None)
    if model_class is None or (head == "ForCausalLM" and name in ENCODERS):
        pytest.skip("no such class, or one that makes the encoder a decoder")
    config = getattr(transformers, f"{family_name}Config")(**values)
    with torch.device("meta"):
        model = model_class(config)
    layers: dict[int, set[str]] = {}
    for tensor in model.state_dict():
        location = locate(config.model_type, tensor)
        assert location is not None, tensor
        if location.role == "layer":
            assert location.layer is not None
            layers.setdefault(location.layer, set()).add(location.name)
    kind = family(config.model_type)
    wanted = set(kind.layer(kind.config(config.to_dict()), 0).state_dict())
    assert layers == dict.fromkeys(range(3), wanted)


def test_locate_maps_heads_old_names_and_buffers() -> None:
    assert locate("bert", "bert.embeddings.LayerNorm.gamma") == Location("embedding", None, "LayerNorm.weight")
    assert locate("bert", "bert.pooler.dense.bias") == Location("embedding", None, "classifier.transform_bias")
    assert locate("roberta", "classifier.out_proj.weight") == Location("embedding", None, "classifier.out_weight")
    assert locate("llama", "lm_head.weight") == Location("head", None, "head.weight")
    assert locate("qwen2", "layers.11.self_attn.q_proj.bias") == Location("layer", 11, "self_attn.q_proj.bias")
    for architecture, name in [
        ("bert", "bert.embeddings.position_ids"),
        ("bert", "cls.predictions.decoder.weight"),
        ("roberta", "lm_head.dense.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ]:
        assert locate(architecture, name) == Location("skip", None, "")


@pytest.mark.parametrize(
    "name", ["", "weight", "model.layers.-1.mlp.up_proj.weight", "model.layers.0.mlp.experts.weight"]
)
def test_locate_returns_none_for_a_name_the_architecture_does_not_have(name: str) -> None:
    assert locate("llama", name) is None


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"gpt2.*bert"):
        locate("gpt2", "wte.weight")
    with pytest.raises(UnsupportedModel, match="gpt2"):
        family("gpt2")
    assert len(SUPPORTED) == 7


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert", {"is_decoder": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("llama", {"is_causal": False}),
        ("qwen3", {"hidden_act": "relu"}),
    ],
)
def test_a_variant_that_would_run_as_another_model_is_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(change))):
        family(name).config({"model_type": name, **change})


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "64"}, {"num_attention_heads": 5}, {"hidden_act": "no such function"}, {"vocab_size": None}],
)
def test_a_config_that_transformers_refuses_is_an_unsupported_model(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="transformers"):
        kind = family("bert")
        kind.embeddings(kind.config(change))
        kind.layer(kind.config(change), 0)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("lengths", [[17, 9, 1, 12], [7, 7]])
def test_an_encoder_streamed_from_an_f32_store_is_transformers_own(
    checkpoint: Make, name: str, lengths: list[int]
) -> None:
    tiny, batch = checkpoint(name), make_batch(lengths)
    with torch.no_grad():
        wanted = tiny.reference(**inputs(batch)).last_hidden_state
    tokens = batch.attention_mask.bool()
    assert relative_error(streamed(tiny.open(), batch)[tokens], wanted[tokens]) <= 1e-5


def test_token_types_reach_the_embeddings(checkpoint: Make, padded_batch: Batch) -> None:
    tiny = checkpoint("bert")
    batch = replace(
        padded_batch, token_type_ids=(torch.arange(17) > 4).long().expand(4, -1) * padded_batch.attention_mask
    )
    with torch.no_grad():
        wanted = tiny.reference(**inputs(batch), token_type_ids=batch.token_type_ids).last_hidden_state
    tokens = batch.attention_mask.bool()
    assert relative_error(streamed(tiny.open(), batch)[tokens], wanted[tokens]) <= 1e-5


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("lengths", [[17, 9, 1, 12], [7, 7]])
def test_a_decoder_streamed_from_an_f32_store_has_transformers_logits(
    checkpoint: Make, name: str, lengths: list[int]
) -> None:
    tiny, batch = checkpoint(name, "ForCausalLM"), make_batch(lengths)
    model = tiny.open()
    tokens = batch.attention_mask.bool()
    with torch.no_grad():
        wanted = tiny.reference(**inputs(batch)).logits[tokens]
    assert model.head is not None
    assert relative_error(model.head.logits(streamed(model, batch)[tokens]), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "llama", "mistral-sliding", "qwen2", "qwen3"])
def test_a_checkpoints_own_classification_head_gives_transformers_logits(
    checkpoint: Make, padded_batch: Batch, name: str
) -> None:
    tiny = checkpoint(name, "ForSequenceClassification")
    model = tiny.open()
    with torch.no_grad():
        wanted = tiny.reference(**inputs(padded_batch, tiny.reference.config.pad_token_id)).logits
        batch = replace(padded_batch, input_ids=inputs(padded_batch, tiny.reference.config.pad_token_id)["input_ids"])
        got = model.new_classifier(3)(streamed(model, batch), batch.attention_mask)
    assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_longer_than_the_position_table_is_refused_with_both_lengths(checkpoint: Make, name: str) -> None:
    model = checkpoint(name).open()
    assert model.shape.max_positions == 40
    assert streamed(model, make_batch([40])).isfinite().all()
    with pytest.raises(InvalidArgument, match=r"41 tokens.*positions for 40.*sequence_length"):
        model.embed(make_batch([41]))
    with pytest.raises(InvalidArgument, match="41 tokens"):
        model.context(make_batch([41]))


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[0, 0, 0]]])
def test_padding_anywhere_but_on_the_right_is_refused(checkpoint: Make, mask: list[list[int]]) -> None:
    batch = replace(make_batch([3]), attention_mask=torch.tensor(mask))
    with pytest.raises(InvalidArgument, match="padded on the right"):
        checkpoint("llama").open().context(batch)


def test_a_batch_without_padding_and_a_causal_batch_need_no_mask(checkpoint: Make) -> None:
    assert checkpoint("bert").open().context(make_batch([5, 5])).masks == {"full_attention": None}
    assert checkpoint("llama").open().context(make_batch([5, 2])).masks == {"full_attention": None}
    mask = checkpoint("bert").open().context(make_batch([5, 2])).masks["full_attention"]
    assert mask is not None and mask.shape == (2, 1, 1, 5) and mask.dtype == torch.bool
    sliding = checkpoint("qwen2-sliding").open().context(make_batch([9, 2])).masks
    assert sliding["full_attention"] is None
    assert sliding["sliding_attention"] is not None and sliding["sliding_attention"].shape == (1, 1, 9, 9)
