"""`ChainConfig`: every choice of a run, flat, with the TOML table each field belongs to in its metadata.

Fields that may be "auto" are resolved by the planner and recorded in the run's own config.toml; what the user fixed
is never changed.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["chain", "none", "linear-probe", "top-window", "full-adapters"]


def _in(table: str, default: Any) -> Any:
    return field(default=default, metadata={"table": table})


@dataclass(frozen=True)
class ChainConfig:
    pooling: Literal["auto", "mean", "first", "last"] = _in("model", "auto")

    window: int = _in("chain", 2)
    auxiliary_weight: float = _in("chain", 0.2)
    start_layer: int | None = _in("chain", None)  # 0-based; None: from `threshold` by CKA
    threshold: float = _in("chain", 0.8)
    schedule: Literal["continuous", "train-and-freeze"] = _in("chain", "continuous")
    rounds: int = _in("chain", 24)
    probe_rounds: int = _in("chain", 0)
    adapter: Literal["bottleneck", "lora"] = _in("chain", "bottleneck")
    adapter_size: int = _in("chain", 16)  # bottleneck width or LoRA rank
    stand_in: bool = _in("chain", True)
    stand_in_ridge: float = _in("chain", 0.01)  # relative to the mean diagonal of X'X

    method: Method = _in("train", "chain")
    lr: float = _in("train", 1e-3)
    weight_decay: float = _in("train", 0.01)
    batch_size: int = _in("train", 16)
    sequence_length: int = _in("train", 128)
    local_epochs: int = _in("train", 1)
    max_local_steps: int = _in("train", 0)  # 0: no limit
    seed: int = _in("train", 0)

    budget: int | None = _in("memory", None)  # bytes; None: no limit
    cache_format: Literal["auto", "int8", "bf16", "f32"] = _in("memory", "auto")

    clients_per_round: int = _in("federation", 5)
    profile_clients: int = _in("federation", 16)
    eval_every: int = _in("federation", 0)  # 0: only at the end
