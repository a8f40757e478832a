"""Checks of `chainfed doctor` on a model: are the engine's shortcuts exact on this machine?

Enters: a layer store (None: a small random decoder made for the purpose). Leaves: one row a check, `problem` None where
it holds. Streamed weights must give the gradients that resident ones give, bit for bit; a boundary read from the cache,
and one that the cache moved up a layer at a time, must be the recomputed one. Memory: two layers of the store, and a
batch of 2 x 24 tokens; the cache lies in a temporary folder.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainfed_engine.adapters import Adapter, build_adapter
from chainfed_engine.errors import ChainfedError
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.model.synth import synth
from chainfed_engine.prefix import DEFAULT_FILL_BYTES, Prefix
from chainfed_engine.prefix.supply import BoundarySupply
from chainfed_engine.types import Batch, Window
from chainfed_engine.window import TrainedWindow

_SMALL_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LENGTHS = (24, 17)  # padding in one of two sequences


def check_model(path: Path | None) -> dict[str, Any]:
    """`store`, its sizes, `direct_read_bytes_per_s` over all of its layers, and `checks`."""
    with tempfile.TemporaryDirectory(prefix="chainfed-doctor-") as folder:
        if path is None:
            store = synth(_SMALL_MODEL, Path(folder) / "store", "int4")
            return {"store": None, **_examine(store, Path(folder))}
        return {"store": str(path), **_examine(path, Path(folder))}


def _examine(path: Path, folder: Path) -> dict[str, Any]:
    with LayerStore.open(path, num_slots=2, verify=True) as store:
        model = FrozenModel(store)
        adapters = _adapters(model)
        checks = [
            _check("streamed gradients are resident gradients", lambda: _gradients_agree(model, adapters, path)),
            _check("a cached boundary is the recomputed boundary", lambda: _boundaries_agree(model, adapters, folder)),
        ]
        speed = _read_speed(store)
        return {
            "architecture": store.info.architecture,
            "block_format": store.info.block_format,
            "num_layers": store.num_layers,
            "store_bytes": store.info.num_bytes,
            "direct_read_bytes_per_s": speed,
            "checks": checks,
        }


def _check(name: str, run: Any) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        problem = run()
    except ChainfedError as error:
        problem = " ".join(str(error).split())
    return {"name": name, "problem": problem, "seconds": round(time.perf_counter() - started, 3)}


def _adapters(model: FrozenModel) -> dict[int, Adapter]:
    """A trained-looking bottleneck after every layer, so that gradients reach all of its parameters."""
    adapters = {}
    for layer in range(model.num_layers):
        adapters[layer] = build_adapter("bottleneck", model.family, model.shape, layer, 8, seed=0)
        generator = torch.Generator().manual_seed(layer)
        with torch.no_grad():
            for parameter in adapters[layer].parameters():
                parameter.normal_(0.0, 0.02, generator=generator)
    return adapters


def _batch(model: FrozenModel) -> Batch:
    longest = min(max(_LENGTHS), model.shape.max_positions)
    mask = (torch.arange(longest) < torch.tensor(_LENGTHS)[:, None]).long()
    ids = torch.randint(0, model.shape.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
    return Batch(ids * mask, mask, None, ["doctor-0", "doctor-1"])


def _gradients_agree(model: FrozenModel, adapters: dict[int, Adapter], path: Path) -> str | None:
    """The top two layers with one slot in the ring, and with all of the store allowed to stay in memory."""
    start = max(model.num_layers - 2, 0)
    window, batch = Window(start, model.num_layers), _batch(model)
    with torch.no_grad():
        hidden, context = model.embed(batch), model.context(batch)
        for index in range(start):
            hidden = model.run_layer(index, hidden, context, adapters[index])
    gradients = []
    for num_slots in (1, None):
        with LayerStore.open(path, num_slots=num_slots) as store:
            gradients.append(_gradients(FrozenModel(store), window, adapters, hidden, batch))
    for name, streamed in gradients[0].items():
        if not torch.isfinite(streamed).all():
            return f"the gradient of {name} is not finite"
        if not torch.equal(streamed, gradients[1][name]):
            difference = float((streamed - gradients[1][name]).abs().max())
            return f"the gradients of {name} differ by up to {difference:.3g}; they must be equal"
    return None


def _gradients(
    model: FrozenModel, window: Window, adapters: dict[int, Adapter], hidden: Tensor, batch: Batch
) -> dict[str, Tensor]:
    trained = TrainedWindow(model, window, adapters)
    start = hidden.clone().requires_grad_(True)
    try:
        out = model.final_norm(trained(start, model.context(batch)))
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * batch.attention_mask[..., None]
        torch.autograd.backward((out * weights).sum())
        found = {
            f"adapter {name}": p.grad.clone() for name, p in trained.adapters.named_parameters() if p.grad is not None
        }
        assert start.grad is not None
        return {"the boundary": start.grad, **found}
    finally:
        trained.adapters.zero_grad(set_to_none=True)
        trained.close()


def _boundaries_agree(model: FrozenModel, adapters: dict[int, Adapter], folder: Path) -> str | None:
    """At the depth below the top two layers: filled and read again, moved up from a lower depth, and recomputed."""
    depth, batch = max(model.num_layers - 2, 1), _batch(model)
    origin = max(depth - 1, 1)
    prefix = Prefix(model, adapters, cache_format="f32", fill_bytes=DEFAULT_FILL_BYTES)
    with torch.no_grad():
        _, recomputed = next(iter(prefix.sweep([batch], range(depth))))
        with _supply(prefix, folder / "moved", origin, origin) as below:
            below.prepare([batch])
        found = {}
        for name, cache in (("moved up", "moved"), ("read from the cache", "filled"), ("read again", "filled")):
            with _supply(prefix, folder / cache, depth, origin) as supply:
                supply.prepare([batch])
                found[name] = supply.get(batch)
    kept = batch.attention_mask.bool()
    for name, boundary in found.items():
        if not torch.equal(boundary, found["read from the cache"]):
            return f"the boundary {name} differs from the one the cache was filled with; they must be equal"
        error = float((boundary[kept] - recomputed[kept]).norm() / recomputed[kept].norm())
        # The fused encoder and torch's adapter sum in another order: 1e-5 is ten times what f32 sums of this size give.
        if not error <= 1e-5:
            return f"the boundary {name} is off by {error:.3g} of the recomputed one, expected at most 1e-5"
    return None


@contextmanager
def _supply(prefix: Prefix, folder: Path, depth: int, origin: int) -> Iterator[BoundarySupply]:
    supply = BoundarySupply(
        prefix, folder, depth=depth, origin=origin, model_key="doctor", adapters_hash=lambda below: "doctor"
    )
    try:
        yield supply
    finally:
        supply.close()


def _read_speed(store: LayerStore) -> int | None:
    """Bytes a second of every layer's file, read in the way a run reads them."""
    before = store.stats()
    for index in range(store.num_layers):
        store.lease_layer(index).release()
    after = store.stats()
    read_ns = after["read_ns"] - before["read_ns"]
    return round(1e9 * (after["bytes_read"] - before["bytes_read"]) / read_ns) if read_ns else None
