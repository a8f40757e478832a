"""PEFT adapters, loaded by the peft library into transformers' own models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import chainfed_engine as cfe
from chainfed_engine.errors import InvalidArgument, StorageError
from chainfed_engine.types import Batch
from tests.conftest import CONFIGS, DECODERS, ENCODERS, Checkpoint, inputs, relative_error
from tests.exports.conftest import LABELS, engine_logits, original

peft = pytest.importorskip("peft")
Make = Callable[..., Checkpoint]
TOLERANCE = 3e-5  # two f32 implementations of three layers, weights of deviation 0.15


@pytest.mark.parametrize("name", DECODERS)
def test_a_causal_lm_with_the_adapter_has_the_engines_logits(
    checkpoint: Make, make_run: Any, padded_batch: Batch, name: str, tmp_path: Path
) -> None:
    made = checkpoint(name, "ForCausalLM")
    run = make_run(made)
    notes = cfe.export(run, tmp_path / "out", "peft").notes
    assert any(note.startswith("tokenizer: not written, ") for note in notes), "the checkpoint has none"
    base = transformers.AutoModelForCausalLM.from_pretrained(original(made))
    with torch.no_grad():
        plain = base(**inputs(padded_batch)).logits[padded_batch.attention_mask.bool()]
        model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        got = model(**inputs(padded_batch)).logits[padded_batch.attention_mask.bool()]
    wanted = engine_logits(run, padded_batch)
    assert relative_error(got, wanted) <= TOLERANCE
    assert relative_error(plain, wanted) > 0.01


@pytest.mark.parametrize("head", ["fresh", "the checkpoint's own"])
@pytest.mark.parametrize("name", [*ENCODERS, "llama", "qwen3"])
def test_a_classifier_goes_along_as_modules_to_save(
    checkpoint: Make, make_run: Any, padded_batch: Batch, name: str, head: str, tmp_path: Path
) -> None:
    base_kind = {"fresh": "Model" if name in ENCODERS else "ForCausalLM"}.get(head, "ForSequenceClassification")
    made = checkpoint(name, base_kind)
    run = make_run(made, labels=LABELS)
    cfe.export(run, tmp_path / "out", "peft")
    torch.manual_seed(3)  # the class's own start of a missing head, which the adapter replaces
    base = transformers.AutoModelForSequenceClassification.from_pretrained(original(made), num_labels=3)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    pad = base.config.pad_token_id
    with torch.no_grad():
        got = model(**inputs(padded_batch, pad)).logits
    assert relative_error(got, engine_logits(run, padded_batch)) <= TOLERANCE
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_classifier_of_the_mean_goes_into_a_file_of_its_own_that_the_readme_applies(
    checkpoint: Make, make_run: Any, padded_batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint("bert")
    run = make_run(made, labels=LABELS, pooling="mean")
    done = cfe.export(run, tmp_path / "out", "peft", base=original(made))
    assert any("classifier.safetensors" in note for note in done.notes)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {(tmp_path / "out").stat().st_mode & 0o666}, modes
    code = (tmp_path / "out" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name: lambda texts, **options: inputs(padded_batch)
    )
    scope: dict[str, Any] = {}
    with torch.no_grad():
        exec(code, scope)
    assert relative_error(scope["logits"], engine_logits(run, padded_batch)) <= TOLERANCE


def test_only_trained_layers_are_written_and_all_of_them_if_none_is(
    checkpoint: Make, make_run: Any, tmp_path: Path
) -> None:
    made = checkpoint("llama", "ForCausalLM")
    for name, layers, wanted in (("some", (2,), [2]), ("none", (), [0, 1, 2])):
        cfe.export(make_run(made, layers=layers), tmp_path / name, "peft")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["layers_to_transform"] == wanted
        with safe_open(tmp_path / name / "adapter_model.safetensors", "np") as file:
            assert len(file.keys()) == 4 * len(wanted)
        model = transformers.AutoModelForCausalLM.from_pretrained(original(made))
        assert peft.PeftModel.from_pretrained(model, tmp_path / name).peft_config["default"].r == 4


@pytest.mark.parametrize("to", ["peft", "gguf", "merged"])
def test_a_bottleneck_run_is_refused_with_the_remedy(checkpoint: Make, make_run: Any, to: Any, tmp_path: Path) -> None:
    run = make_run(checkpoint("llama", "ForCausalLM"), adapter="bottleneck")
    with pytest.raises(InvalidArgument, match="load_adapted"):
        cfe.export(run, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_never_overwritten(checkpoint: Make, make_run: Any, tmp_path: Path) -> None:
    run = make_run(checkpoint("llama", "ForCausalLM"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(StorageError, match="exists already"):
        cfe.export(run, tmp_path / "out", "peft")
    (tmp_path / "empty").mkdir()
    cfe.export(run, tmp_path / "empty", "peft")


def test_the_base_of_another_model_is_refused(checkpoint: Make, make_run: Any, tmp_path: Path) -> None:
    run = make_run(checkpoint("llama", "ForCausalLM"))
    with pytest.raises(InvalidArgument, match="converted from"):
        cfe.export(run, tmp_path / "out", "merged", base=original(checkpoint("qwen3", "ForCausalLM")))
    assert set(CONFIGS) >= {"llama", "qwen3"}
