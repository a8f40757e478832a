"""`load_adapted`: runs of either kind in plain transformers models, saved and loaded again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_model, save_model

import chainfed_engine as cfe
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.types import Batch
from tests.conftest import DECODERS, ENCODERS, Checkpoint, inputs, relative_error
from tests.exports.conftest import LABELS, engine_logits, original

Make = Callable[..., Checkpoint]
TOLERANCE = 3e-5  # two f32 implementations of three layers, weights of deviation 0.15


def causal(made: Checkpoint) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(original(made))


def token_logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(batch)).logits[batch.attention_mask.bool()]


@pytest.mark.parametrize("adapter", ["bottleneck", "lora"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_causal_lm_has_the_engines_logits(
    checkpoint: Make, make_run: Any, padded_batch: Batch, name: str, adapter: str
) -> None:
    made = checkpoint(name, "ForCausalLM")
    run, plain = make_run(made, adapter=adapter), causal(made)
    wanted = engine_logits(run, padded_batch)
    assert relative_error(token_logits(plain, padded_batch), wanted) > 0.01
    assert cfe.load_adapted(run, plain) is plain
    assert relative_error(token_logits(plain, padded_batch), wanted) <= TOLERANCE


@pytest.mark.parametrize("adapter", ["bottleneck", "lora"])
@pytest.mark.parametrize("pooling", ["auto", "mean"])
@pytest.mark.parametrize("name", [*ENCODERS, "mistral", "qwen2"])
def test_a_classifier_has_the_engines_logits_around_a_model_with_or_without_a_head(
    checkpoint: Make, make_run: Any, padded_batch: Batch, name: str, pooling: str, adapter: str
) -> None:
    made = checkpoint(name, "Model" if name in ENCODERS else "ForCausalLM")
    run = make_run(made, adapter=adapter, labels=LABELS, pooling=pooling)
    wanted = engine_logits(run, padded_batch)
    for kind in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        model = cfe.load_adapted(run, kind.from_pretrained(original(made)))
        assert isinstance(model, cfe.AdaptedClassifier) and model.labels == LABELS and not model.training
        with torch.no_grad():
            out = model(**inputs(padded_batch), labels=torch.tensor([0, 1, 2, 0]))
        assert relative_error(out.logits, wanted) <= TOLERANCE
        assert float(out.loss) == pytest.approx(
            float(torch.nn.functional.cross_entropy(wanted, torch.tensor([0, 1, 2, 0]))), rel=1e-4
        )


@pytest.mark.parametrize(("adapter", "added"), [("bottleneck", "chainfed_adapter."), ("lora", "chainfed_lora.")])
def test_the_state_dict_keeps_every_name_and_goes_through_a_file(
    checkpoint: Make, make_run: Any, padded_batch: Batch, adapter: str, added: str, tmp_path: Path
) -> None:
    made = checkpoint("llama", "ForCausalLM")
    names = set(causal(made).state_dict())
    one, other = (cfe.load_adapted(make_run(made, adapter=adapter), causal(made)) for _ in range(2))
    new = set(one.state_dict()) - names
    assert names < set(one.state_dict()) and new and all(added in name for name in new)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if added in name:
                parameter.add_(0.05)
    save_model(one, str(tmp_path / "model.safetensors"))
    assert load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(token_logits(one, padded_batch), token_logits(other, padded_batch))
    copied = copy.deepcopy(one)
    assert torch.equal(token_logits(copied, padded_batch), token_logits(one, padded_batch))


def test_adapters_take_the_models_dtype_and_can_be_trained_on(
    checkpoint: Make, make_run: Any, padded_batch: Batch
) -> None:
    made = checkpoint("llama", "ForCausalLM")
    half = transformers.AutoModelForCausalLM.from_pretrained(original(made), dtype=torch.bfloat16)
    model = cfe.load_adapted(make_run(made, adapter="bottleneck"), half)
    adapters = {name: p for name, p in model.named_parameters() if "chainfed" in name}
    assert {parameter.dtype for parameter in adapters.values()} == {torch.bfloat16}
    model(**inputs(padded_batch), labels=padded_batch.input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapters.values())


def test_generation_with_a_cache_agrees_with_generation_without(checkpoint: Make, make_run: Any) -> None:
    made = checkpoint("qwen3", "ForCausalLM")
    model = cfe.load_adapted(make_run(made, adapter="bottleneck"), causal(made))
    prompt = {"input_ids": torch.tensor([[5, 9, 17]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    texts = [model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


def test_another_model_a_second_call_and_no_model_are_refused(checkpoint: Make, make_run: Any) -> None:
    made = checkpoint("llama", "ForCausalLM")
    run = make_run(made)
    with pytest.raises(InvalidArgument, match="trained on"):
        small = transformers.LlamaConfig(**{**made.reference.config.to_dict(), "num_hidden_layers": 2})
        cfe.load_adapted(run, transformers.LlamaForCausalLM(small))
    with pytest.raises(InvalidArgument):
        cfe.load_adapted(run, causal(checkpoint("llama-3.1", "ForCausalLM")))
    model = cfe.load_adapted(run, causal(made))
    with pytest.raises(InvalidArgument, match="already"):
        cfe.load_adapted(run, model)
    with pytest.raises(InvalidArgument, match="transformers"):
        cfe.load_adapted(run, torch.nn.Linear(2, 2))
