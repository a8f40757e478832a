"""The public functions on a store with a tokenizer: plan, fit, run, evaluate, and what they leave on disk."""

import json
import typing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chainfed_engine as cfe
from chainfed_engine import api
from chainfed_engine.config import DataConfig, Method, RunConfig
from chainfed_engine.config_file import load_config
from chainfed_engine.errors import ConfigError, DataError, InvalidArgument, MemoryBudgetExceeded, StorageError
from chainfed_engine.memory.parts import Choices
from chainfed_engine.memory.plan import Plan
from chainfed_engine.types import layer_of_key

SHAPES = {
    "bert": {"model_type": "bert", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128},
    "llama": {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        config = {**shape, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
        (folder / "config.json").write_text(json.dumps(config))
        made[name] = cfe.synth(str(folder / "config.json"), folder / "store", block_format="int4")
    return made


def examples(count: int, first: int = 0) -> list[dict[str, str]]:
    words = ("good film", "bad film")
    return [{"text": f"{words[i % 2]} {i}", "label": words[i % 2][:4].strip()} for i in range(first, first + count)]


def clients() -> dict[str, list[dict[str, str]]]:
    return {"anna": examples(9), "ben": examples(3, 20), "carla": examples(1, 40), "dora": examples(20, 60)}


METHODS = typing.get_args(Method)
CONFIG = cfe.ChainConfig(rounds=4, sequence_length=16, batch_size=4, clients_per_round=3, adapter_size=4, lr=1e-2)


def test_fit_trains_evaluates_and_saves(stores: dict[str, Path], tmp_path: Path) -> None:
    result = cfe.fit(stores["bert"], clients(), CONFIG, evaluation=examples(6, 100))
    assert 0.0 <= result.evaluation["accuracy"] <= 1.0
    rounds = [event for event in result.events if event["event"] == "round"]
    assert len(rounds) == 4 and all(np.isfinite(event["loss"]) for event in rounds)
    saved = result.save(tmp_path / "run")
    assert {"config.toml", "metrics.jsonl", "adapters.safetensors", "state"} <= {path.name for path in saved.iterdir()}
    with pytest.raises(StorageError, match="exists already"):
        result.save(saved)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(stores: dict[str, Path], method: str) -> None:
    options = replace(CONFIG, num_seeds=16, perturbations=2, max_gather_rounds=1)
    config = replace(options, method=method, start_layer=1 if method == "chain" else None)
    result = cfe.fit(stores["bert"], clients(), config, evaluation=examples(4, 100))
    assert np.isfinite(result.evaluation["loss"])
    start = cfe.fit(stores["bert"], clients(), replace(config, method="none")).parameters
    changed = {key for key, value in result.parameters.items() if not np.array_equal(value, start.get(key, 0 * value))}
    layers = {layer_of_key(key) for key in changed} - {None}
    expected = {"none": set(), "linear-probe": set(), "top-window": {2, 3}, "chain": {1, 2, 3}}
    assert layers == expected.get(method, {0, 1, 2, 3})
    assert any(key.startswith("classifier.") for key in changed) == (method != "none")


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"none", "linear-probe", "chain"}))
def test_every_method_trains_a_causal_lm(stores: dict[str, Path], method: str) -> None:
    config = replace(CONFIG, method=method, rounds=2, num_seeds=16, perturbations=2, max_gather_rounds=1)
    result = cfe.fit(stores["llama"], prompts(), config, evaluation=prompts()["ben"])
    assert np.isfinite(result.evaluation["token_loss"])
    assert all(event["accepted"] for event in result.events if event["event"] == "round")


def test_clients_whose_memory_cannot_hold_the_method_are_left_out(stores: dict[str, Path], tmp_path: Path) -> None:
    def plan(method: str) -> Any:
        return cfe.plan(stores["bert"], replace(CONFIG, method=method), task="classification")

    def above_interpreter(method: str) -> int:  # which is measured and differs a little from call to call
        planned = plan(method)
        return planned.predicted_peak_bytes - planned.parts["interpreter with torch"]

    assert above_interpreter("chain") <= above_interpreter("full-adapters") + 2**21  # replies of 64 clients
    half = plan("chain").predicted_peak_bytes // 2
    config = replace(CONFIG, rounds=3, clients_per_round=4, client_budgets=f"{half}, 64GiB")
    result = cfe.fit(stores["bert"], clients(), config, out=tmp_path / "run")
    (event,) = [event for event in result.events if event["event"] == "clients"]
    assert event["num_clients"] == len(event["left_out"]) == 2
    assert event == json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    took_part = {name for event in result.events if event["event"] == "round" for name in event["clients"]}
    assert took_part == clients().keys() - event["left_out"].keys()
    with pytest.raises(
        MemoryBudgetExceeded, match=r"no client can hold the method chain: it needs .* largest has 1\.0 MiB"
    ):
        cfe.fit(stores["bert"], clients(), replace(config, client_budgets="1MiB, 512KiB"))


@pytest.mark.parametrize(
    ("memory", "window", "left_out"),
    [("350MiB, 1GiB", 3, 0), ("260MiB, 1GiB", 1, 0), ("150MiB, 350MiB", 3, 2), ("1GiB", 4, 0), ("350MiB", 4, None)],
)
def test_a_window_left_open_is_as_wide_as_all_who_can_take_part_can_hold(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, memory: str, window: int, left_out: int | None
) -> None:
    def planned(config: RunConfig, *_: object) -> Plan:
        layers = config.chain.window or 4  # each takes 50 MiB beside 200
        if layers == 2:
            raise MemoryBudgetExceeded("a sliding window's stand-ins do not fit [memory] budget")
        choices = Choices(layers, None, 4, False, "int8", 1 << 20)
        return Plan((200 + 50 * layers) << 20, {}, choices, None)

    monkeypatch.setattr(api, "plan_run", planned)
    chain = replace(CONFIG, window=None if left_out is not None else 4, client_budgets=memory)
    config = RunConfig(store=str(stores["bert"]), chain=chain, data=DataConfig(train="train.csv", label="label"))
    members: Any = dict.fromkeys(("a", "b", "c", "d"))
    table: Any = None
    if left_out is None:  # what the user fixed stays, and nobody can hold it
        with pytest.raises(MemoryBudgetExceeded, match=r"needs 400\.0 MiB"):
            api._plan(config, table, members, None)
        return
    plan, absent = api._plan(config, table, members, None)
    assert (plan.choices.window, len(absent)) == (window, left_out)


def test_clients_memory_can_be_a_column(stores: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(
        "text,label,client,memory\ngood,good,a,64GiB\nbad,bad,a,64GiB\ngood,good,b,1MiB\nbad,bad,b,1MiB\n"
    )
    text = f"""[model]\nstore = "{stores["bert"]}"\n[data]\ntrain = "train.csv"\nlabel = "label"\nclient = "client"
client_budget = "memory"\n[chain]\nrounds = 1\nwindow = 1\nadapter_size = 4\n[train]\nsequence_length = 16\n"""
    (tmp_path / "run.toml").write_text(text)
    result = api.run(load_config(tmp_path / "run.toml"), tmp_path / "run")
    (event,) = [event for event in result.events if event["event"] == "clients"]
    assert event["left_out"] == {"b": 1 << 20}
    (tmp_path / "train.csv").write_text("text,label,client,memory\ngood,good,a,1GiB\nbad,bad,a,2GiB\n")
    with pytest.raises(DataError, match=r"line 3: column 'memory': client a has 2.0 GiB here and 1.0 GiB elsewhere"):
        api.run(load_config(tmp_path / "run.toml"), tmp_path / "other")


def test_a_client_with_one_sample_trains(stores: dict[str, Path]) -> None:
    alone = {"anna": examples(1), "ben": examples(1, 21)}
    result = cfe.fit(stores["bert"], alone, CONFIG)
    rounds = [event for event in result.events if event["event"] == "round"]
    assert all(event["accepted"] for event in rounds)
    assert {event["stage"]: event["steps"] for event in rounds} == {"probe": 0, "window": 2}


def test_a_class_that_only_the_evaluation_has_is_an_error_that_names_it(stores: dict[str, Path]) -> None:
    odd = [*examples(4, 100), {"text": "middling", "label": "so-so"}]
    with pytest.raises(DataError, match="row 4: unknown label 'so-so'; the model was trained on 'bad', 'good'"):
        cfe.fit(stores["bert"], clients(), CONFIG, evaluation=odd)


def test_one_class_only_is_an_error(stores: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="column 'label': expected at least two labels, got only 'good'"):
        cfe.fit(stores["bert"], {"anna": [{"text": "a", "label": "good"}] * 3}, CONFIG)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(stores: dict[str, Path]) -> None:
    first, second = (cfe.fit(stores["llama"], prompts(), CONFIG).parameters for _ in range(2))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    other = cfe.fit(stores["llama"], prompts(), replace(CONFIG, seed=7)).parameters
    assert not all(np.array_equal(first[key], other[key]) for key in first)


def prompts() -> dict[str, list[dict[str, str]]]:
    row = {"prompt": "say", "response": "abcabcabc"}
    return {"anna": [row] * 6, "ben": [row] * 3}


def test_a_causal_lm_learns_its_responses_window_by_window(stores: dict[str, Path]) -> None:
    config = replace(CONFIG, rounds=6, local_epochs=4, start_layer=0)
    untrained = cfe.fit(stores["llama"], prompts(), replace(config, method="none"), evaluation=prompts()["anna"])
    trained = cfe.fit(stores["llama"], prompts(), config, evaluation=prompts()["anna"])
    assert trained.evaluation["token_loss"] < untrained.evaluation["token_loss"] - 0.1


def write_run(folder: Path, store: Path, **train: object) -> Path:
    with (folder / "train.csv").open("w") as file:
        file.write("text,label,site\n")
        for name, rows in clients().items():
            file.writelines(f"{row['text']},{row['label']},{name}\n" for row in rows)
    with (folder / "eval.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in examples(6, 100))
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in train.items())
    (folder / "run.toml").write_text(
        f'[model]\nstore = "{store}"\n[data]\ntrain = "train.csv"\neval = "eval.jsonl"\nlabel = "label"\n'
        f'client = "site"\n[chain]\nrounds = 3\nadapter_size = 4\n[train]\nbatch_size = 4\nsequence_length = 16\n'
        f"{settings}\n"
    )
    return folder / "run.toml"


def test_evaluate_repeats_the_runs_own_last_figures(stores: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, stores["bert"]))
    result = api.run(config, tmp_path / "out")
    scores = cfe.evaluate(tmp_path / "out", tmp_path / "eval.jsonl")
    assert scores["accuracy"] == result.evaluation["accuracy"]
    assert scores["macro_f1"] == pytest.approx(result.evaluation["macro_f1"])
    assert scores["loss"] == pytest.approx(result.evaluation["loss"])
    memory = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any(event["event"] == "memory" and event["peak_rss_bytes"] > 0 for event in memory)
    assert memory[-1]["event"] == "eval"


def test_an_unknown_label_at_evaluation_is_named(stores: dict[str, Path], tmp_path: Path) -> None:
    api.run(load_config(write_run(tmp_path, stores["bert"])), tmp_path / "out")
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "odd", "label": "ugly"}) + "\n")
    with pytest.raises(DataError, match="ugly"):
        cfe.evaluate(tmp_path / "out", tmp_path / "other.jsonl")


def test_a_budget_that_cannot_fit_is_refused_before_anything_is_written(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    config = load_config(write_run(tmp_path, stores["bert"]), ["memory.budget=16MiB"])
    with pytest.raises(MemoryBudgetExceeded, match="smallest that would do"):
        api.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_adds_up_and_shrinks_with_the_budget(stores: dict[str, Path]) -> None:
    free = cfe.plan(stores["llama"], batch_size=64, sequence_length=64)
    assert sum(free.parts.values()) == free.predicted_peak_bytes
    tight = cfe.plan(stores["llama"], batch_size=64, sequence_length=64, budget=free.predicted_peak_bytes - 2_000_000)
    assert tight.predicted_peak_bytes < free.predicted_peak_bytes
    assert "predicted peak" in tight.table() and tight.to_json()["predicted_peak_bytes"] == tight.predicted_peak_bytes


def test_a_function_among_the_callbacks_is_refused_before_anything_is_written(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=r"on_event\(event\), got <built-in function print>.*on_event="):
        cfe.fit(stores["bert"], clients(), CONFIG, out=tmp_path / "run", callbacks=[print])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_a_dict_is_no_configuration(stores: dict[str, Path]) -> None:
    given: Any = {"rounds": 3}
    for call in (partial(cfe.fit, stores["bert"], clients(), given), partial(cfe.plan, stores["bert"], given)):
        with pytest.raises(InvalidArgument, match=r"expected a cfe.ChainConfig, got dict"):
            call()


def test_a_table_without_a_client_column_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="client"):
        cfe.fit(stores["bert"], examples(4), CONFIG)


def test_the_splits_of_a_data_set_are_not_taken_for_clients() -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list([{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    with pytest.raises(DataError, match="one split of the data set; there are 'train', 'test'"):
        cfe.fit("no store is read", datasets.DatasetDict({"train": split, "test": split}))


def test_conversations_are_learned_and_evaluated(stores: dict[str, Path], tmp_path: Path) -> None:
    store = with_chat_template(stores["llama"], tmp_path)
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "abcabc"}]
    rows = {"anna": [{"messages": turns * 2}] * 6, "ben": [{"messages": turns}] * 3}
    config = replace(CONFIG, sequence_length=64, start_layer=0)
    result = cfe.fit(store, rows, config, evaluation=rows["ben"], out=tmp_path / "run")
    assert result.evaluation["token_loss"] is not None
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows["ben"][0]) + "\n")
    assert cfe.evaluate(tmp_path / "run", tmp_path / "eval.jsonl")["num_target_tokens"] == 7.0


def with_chat_template(store: Path, folder: Path) -> Path:
    import hashlib
    import shutil

    shutil.copytree(store, folder / "store")
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (folder / "store" / "tokenizer" / "chat_template.jinja").write_text(template)
    content = json.loads((folder / "store" / "store.json").read_text())
    record = {"name": "chat_template.jinja", "bytes": len(template)}
    content["tokenizer_files"].append({**record, "sha256": hashlib.sha256(template.encode()).hexdigest()})
    (folder / "store" / "store.json").write_text(json.dumps(content))
    return folder / "store"


def test_rows_with_blanks_are_refused_by_line_or_left_out_openly(stores: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, stores["bert"]))
    with (tmp_path / "train.csv").open("a") as file:
        file.write(",bad,anna\n good film, ,ben\n")
    with pytest.raises(DataError, match=r"line 36: .*missing = \"drop\""):
        api.run(config, tmp_path / "out")
    dropping = load_config(tmp_path / "run.toml", ["data.missing=drop"])
    with pytest.warns(UserWarning, match="2 of 35 rows lack a value and are left out"):
        api.run(dropping, tmp_path / "out")


def test_a_table_with_none_of_the_columns_names_those_it_has(stores: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"'label', 'response' or 'messages'.* there are 'sentiment', 'text'"):
        cfe.fit(stores["bert"], {"anna": [{"text": "a", "sentiment": "b"}]}, CONFIG)


def test_a_share_of_the_rows_is_held_out_for_evaluation(stores: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, stores["bert"]), ["data.eval=none", "data.hold_out=0.2"])
    result = api.run(config, tmp_path / "out")
    assert result.evaluation["num_samples"] == 6.0  # a fifth of 17 and of 16 rows
    with pytest.raises(ConfigError, match="one source"):
        load_config(tmp_path / "run.toml", ["data.hold_out=0.2"])
