"""Where a model computes: what is refused in which words, and that nothing on a device is mixed with the CPU's.

There need not be a device: torch's meta tensors have a place without memory, and complain like real ones when two
places meet; native calls are replaced by a look at where their arrays are.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_engine import native, prefix
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError, InvalidArgument, UnsupportedHardware
from chainfed_engine.model import linear
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.place import CPU, Place, batch_on, find_place
from chainfed_engine.objective import head
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Batch, Stage, Window
from chainfed_engine.window import TrainedWindow
from tests.conftest import Checkpoint, make_batch


def test_the_cpu_asks_nobody() -> None:
    assert find_place("cpu") is CPU
    assert CPU.torch_device == torch.device("cpu")


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:x", "cuda:1000", "CUDA", ""])
def test_other_texts_are_refused_by_the_configuration(text: str) -> None:
    with pytest.raises(ConfigError, match=r'\[train\] device: expected "cpu", "cuda" or "cuda:1"'):
        ChainConfig(device=text)


def test_a_build_without_cuda_says_so(tmp_path: Path) -> None:
    native.set_cuda_library(str(tmp_path / "missing.so"))
    try:
        with pytest.raises(UnsupportedHardware, match="CUDA is not part of this build"):
            find_place("cuda")
    finally:
        native.set_cuda_library(None)


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        native, "cuda_device", lambda index: {"name": "board", "is_unified": True, "library_from_tokens": 9}
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedHardware, match="has no CUDA for board; install the build of torch"):
        find_place("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_place("cuda:3") == Place(3, is_unified=True, library_from_tokens=9)


def test_the_number_of_a_missing_device_is_the_cores_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> dict[str, Any]:
        raise InvalidArgument(f"cuda_device: cuda:{index} is no device of this machine, which has 1")

    monkeypatch.setattr(native, "cuda_device", refuse)
    with pytest.raises(InvalidArgument, match="cuda:7 is no device"):
        find_place("cuda:7")


ELSEWHERE = torch.device("meta")


class Everywhere:
    """Stands for a matrix that is wherever it is needed."""

    block_format = "int4"

    def __init__(self, rows: int, cols: int) -> None:
        self.num_rows, self.num_cols = rows, cols


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Native calls that check where their tensors are and what stream they get; their names, as they are called."""
    calls: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def call(*arguments: Any, stream: int = 0, **named: Any) -> None:
            tensors = [one for one in (*arguments, *named.values()) if isinstance(one, torch.Tensor)]
            tensors += [part for one in named.values() if isinstance(one, tuple) for part in one]
            assert tensors
            assert {one.device for one in tensors} == {ELSEWHERE}, name
            assert stream == 17, name
            calls.append(name)

        return call

    for name in (
        "linear_forward",
        "linear_grad_input",
        "cross_entropy_update",
        "cross_entropy_finish",
        "boundary_encode",
        "boundary_decode",
    ):
        monkeypatch.setattr(native, name, watch(name))
    for name in (
        "linear_forward_workspace_bytes",
        "linear_grad_input_workspace_bytes",
        "cross_entropy_workspace_bytes",
    ):
        monkeypatch.setattr(native, name, lambda *_: 64)

    for module in (linear, head, prefix):
        monkeypatch.setattr(module, "stream_of", lambda tensor: 17)
    yield calls


def move(module: torch.nn.Module) -> None:
    """Replace every parameter and buffer by one without memory on the device."""
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False)):
            there = torch.empty(value.shape, device=ELSEWHERE)
            setattr(owner, name, torch.nn.Parameter(there, requires_grad=value.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(buffer.shape, device=ELSEWHERE))


def pretend(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model believes that its place is a device; its weights are wherever they are asked for."""
    model.device = model._compute.device = ELSEWHERE
    real = model.store.lease

    class Lease:
        def __init__(self, file: int) -> None:
            with real(file) as lease:
                self.sizes = {name: lease.matrix(name) for name in lease.names()}
                self.sizes = {name: Everywhere(one.num_rows, one.num_cols) for name, one in self.sizes.items()}

        def matrix(self, name: str) -> Any:
            return self.sizes[name]

        def __enter__(self) -> "Lease":
            return self

        def __exit__(self, *_: object) -> None: ...

        release = __exit__

    monkeypatch.setattr(model.store, "weights", Lease)


def labelled(kind: str) -> Batch:
    batch = make_batch([7, 4])
    if kind == "classes":
        batch.labels = torch.tensor([0, 2])
    else:
        batch.labels = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
    return batch


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classes"), ("llama", "words")])
def test_a_step_on_a_device_mixes_nothing_with_the_cpu(
    checkpoint: Callable[..., Checkpoint],
    elsewhere: list[str],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    kind: str,
) -> None:
    source = checkpoint(architecture, "Model" if kind == "classes" else "ForCausalLM")
    model = source.open()
    task = "classification" if kind == "classes" else "causal-lm"
    trainer = StageTrainer(model, ChainConfig(adapter_size=4, stand_in=False), task=task, num_labels=3)  # type: ignore[arg-type]
    window = TrainedWindow(model, Window(0, 2), trainer.adapters)
    trainer.stage, batch = Stage("window", Window(0, 2), 0), labelled(kind)
    objective = trainer._objective({})
    context = model.context(batch)
    pretend(model, monkeypatch)
    modules = [*window.layers, *trainer.adapters.values()]
    modules += [one for one in (model._norm, trainer.parameters.classifier) if one is not None]
    for module in modules:
        move(module)
    boundary = torch.empty(2, 7, model.shape.hidden_size, device=ELSEWHERE)
    moved = batch_on(batch, ELSEWHERE)
    hidden = window(boundary, context.to(ELSEWHERE))
    assert hidden.device == ELSEWHERE
    if kind == "classes":
        loss = objective(hidden, moved)
    else:  # which tokens carry a label is not known without values: take all
        assert moved.labels is not None
        rows, targets = model.final_norm(hidden[:, :-1].reshape(12, -1)), moved.labels[:, 1:].reshape(12)
        loss = head.weighted_head_loss(rows, targets, rows.new_ones(12), model.head)  # type: ignore[arg-type]
    loss.backward()
    assert {"linear_forward", "linear_grad_input"} <= set(elsewhere)
    assert ("cross_entropy_update" in elsewhere) == (kind == "words")
    trained = [parameter for parameter in window.adapters.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None and parameter.grad.device == ELSEWHERE for parameter in trained)
    model.store.close()


def test_records_go_through_the_device_and_come_back(
    checkpoint: Callable[..., Checkpoint], elsewhere: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("llama", "ForCausalLM").open()
    trainer = StageTrainer(model, ChainConfig(adapter_size=4), task="causal-lm", cache_format="int8")
    batch = make_batch([7, 4])
    pretend(model, monkeypatch)
    known = prefix.token_rows(batch)  # a count of tokens needs values
    monkeypatch.setattr(prefix, "token_rows", lambda _: known)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    hidden = torch.empty(2, 7, model.shape.hidden_size, device=ELSEWHERE)
    lengths, records = trainer.prefix._encode(hidden, batch, 0)
    assert lengths == [7, 4]
    assert records.device == torch.device("cpu")
    back = trainer.prefix.decode(records, batch)
    assert back.device == ELSEWHERE and back.shape == hidden.shape
    assert elsewhere == ["boundary_encode", "boundary_decode"]
    model.store.close()


def test_records_of_another_kind_of_device_are_another_cache(checkpoint: Callable[..., Checkpoint]) -> None:
    model = checkpoint("bert").open()
    on_cpu = model.record_key
    model.device = torch.device("cuda", 1)
    assert model.record_key == f"{on_cpu} cuda"
    model.store.close()


def test_a_batch_moves_whole_and_only_when_it_must() -> None:
    batch = make_batch([3, 2])
    batch.token_type_ids = torch.zeros_like(batch.input_ids)
    assert batch_on(batch, torch.device("cpu")) is batch
    moved = batch_on(batch, torch.device("meta"))
    tensors = (moved.input_ids, moved.attention_mask, moved.token_type_ids)
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
    assert moved.sample_ids == batch.sample_ids
    assert np.array_equal(batch.input_ids.shape, moved.input_ids.shape)
