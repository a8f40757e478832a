"""The same promises with the real trainer and core on a random model of three layers: order, kill, lost caches."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine.config import ChainConfig
from chainfed_engine.data import EncodedData
from chainfed_engine.federation import LocalTransport, RunDirectory
from chainfed_engine.federation.session import Session, plan_for
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.synth import synth
from chainfed_engine.types import Arrays

CONFIG = ChainConfig(
    rounds=5,
    window=1,
    clients_per_round=2,
    batch_size=2,
    sequence_length=8,
    adapter_size=4,
    lr=0.01,
    cache_format="int8",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    shape = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    (folder / "shape.json").write_text(json.dumps(shape))
    synth(str(folder / "shape.json"), folder / "store", block_format="int4")
    return folder / "store"


def _client(name: str, seed: int) -> EncodedData:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, 255, size=length).astype(np.int32) for length in (5, 8, 3)]
    names = [f"{name}-{index}" for index in range(3)]
    return EncodedData(input_ids=ids, labels=[row.copy() for row in ids], sample_ids=names, rows=np.arange(3))


class _Interrupted(Exception):
    pass


def _run(
    store: Path,
    out: Path,
    *,
    config: ChainConfig = CONFIG,
    stop_at: int | None = None,
    resume: bool = False,
    backwards: bool = False,
) -> Arrays:
    clients = {name: _client(name, seed) for seed, name in enumerate(("a", "b", "c"))}

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == stop_at:
            raise _Interrupted

    plan = plan_for(StoreInfo.read(store), config, "causal-lm")
    with Session(store, config, clients, _client("judge", 9), out, plan=plan, pad_id=0) as session:
        if backwards:
            members = list(session.transport._clients.values())
            session.transport = LocalTransport(members, order=lambda tasks: reversed(list(tasks)))
        with RunDirectory(out, resume=resume) as directory:
            return session.run(directory, on_event=on_event, resume=resume).parameters


@pytest.fixture(scope="module")
def expected(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    return _run(store, tmp_path_factory.mktemp("whole") / "run")


def _assert_same_bits(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].tobytes() != b[key].tobytes()] == []


def test_training_trains(expected: Arrays) -> None:
    assert any(array.any() for key, array in expected.items() if key.endswith("up_weight"))


def test_a_chain_of_exact_losses_alone_runs_below_the_top_and_asks_for_no_stand_in(store: Path, tmp_path: Path) -> None:
    """Every step streams the layers above its window, so nobody fits a stand-in and nobody may miss it."""
    trained = _run(store, tmp_path / "run", config=replace(CONFIG, start_layer=0, foresight_every=1))
    assert all(trained[f"adapters.{layer}.up_weight"].any() for layer in range(3))


def test_the_bits_do_not_depend_on_the_order_of_clients_that_share_one_trainer(
    store: Path, tmp_path: Path, expected: Arrays
) -> None:
    _assert_same_bits(_run(store, tmp_path / "run", backwards=True), expected)


@pytest.mark.parametrize("lose_caches", [False, True])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_that_was_cut_off_ends_with_the_same_bits_with_or_without_its_caches(
    store: Path, tmp_path: Path, expected: Arrays, stop_at: int, lose_caches: bool
) -> None:
    with pytest.raises(_Interrupted):
        _run(store, tmp_path / "run", stop_at=stop_at)
    if lose_caches:
        shutil.rmtree(tmp_path / "run" / "cache")
    _assert_same_bits(_run(store, tmp_path / "run", resume=True), expected)
