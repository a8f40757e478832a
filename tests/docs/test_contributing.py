"""The worked examples of CONTRIBUTING run: the family against transformers, the adapter against its contract."""

import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chainfed_engine.model import families
from chainfed_engine.model.convert import convert, expected
from chainfed_engine.model.families import names
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from tests.conftest import DECODER, inputs, make_batch, randomise, relative_error, streamed
from tests.docs.pages import ROOT, blocks


def module_of(path: str) -> types.ModuleType:
    """The Python block of CONTRIBUTING whose first line is `# path`, as a module."""
    texts = [block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "python"]
    text = next(text for text in texts if text.startswith(f"# {path}\n"))
    module = types.ModuleType(path.removesuffix(".py").replace("/", "."))
    exec(compile(text, path, "exec"), vars(module))
    return module


def test_the_family_of_the_example_runs_as_the_library_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("chainfed_engine/model/families/ernie4_5.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(families._NAMES, "ernie4_5", names.DECODER)
    for place in (families, expected):
        monkeypatch.setattr(place, "SUPPORTED", (*families.SUPPORTED, "ernie4_5"))
    values: dict[str, Any] = {
        **DECODER,
        "num_hidden_layers": 4,
        "tie_word_embeddings": True,
    }
    config = transformers.Ernie4_5Config(**values, bos_token_id=1, eos_token_id=2)
    config._attn_implementation = "sdpa"
    reference = transformers.Ernie4_5Model(config).eval()
    randomise(reference)
    reference.save_pretrained(tmp_path / "checkpoint")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*no tokenizer")
        convert(tmp_path / "checkpoint", tmp_path / "store", block_format="f32")
    model = FrozenModel(LayerStore.open(tmp_path / "store"))
    batch = make_batch([17, 9, 1, 12])
    tokens = batch.attention_mask.bool()
    with torch.no_grad():
        single = reference(**inputs(batch, 0)).last_hidden_state[tokens]
        exact = reference.double()(**inputs(batch, 0)).last_hidden_state[tokens]
    # In double, so that a failure tells which of the two is off.
    library, ours = (relative_error(rows, exact.float()) for rows in (single, streamed(model, batch)[tokens]))
    assert ours < 1e-5, f"the engine is {ours:.1e} away from float64, the library {library:.1e}"
    families.family.cache_clear()


def test_the_adapter_of_the_example_keeps_the_contract() -> None:
    module = module_of("chainfed_engine/adapters/gain.py")
    gain, other = module.Gain(8, layer=2), module.Gain(8, layer=2)
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(gain(hidden), hidden) and not gain.is_trained
    torch.nn.init.constant_(gain.gain, 0.5)
    other.load_arrays(gain.state_arrays())
    assert set(gain.state_arrays()) == {"adapters.2.gain"}
    assert other.is_trained and torch.equal(other(hidden), hidden * 1.5)


def test_every_place_named_for_a_kernel_has_the_example() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a kernel")[1]
    for path in ("csrc/include/chainfed/kernels.h", "csrc/quant/dequantize.cpp", "tests/csrc/quant_test.cpp"):
        assert path in text and "gather_rows" in (ROOT / path).read_text(encoding="utf-8")
    for path in ("csrc/bind/quant.cpp", "chainfed_engine/native/_native.pyi", "tests/native/test_kernels.py"):
        assert path in text and "gather_rows" in (ROOT / path).read_text(encoding="utf-8")
