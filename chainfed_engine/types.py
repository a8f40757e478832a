"""The few records that travel between the parts of the picture. No behaviour, no torch, no I/O.

`Task` and `Reply` are the federation's whole vocabulary: server and client are state machines over them, and a
transport only carries them. Arrays are NumPy; keys are dotted parameter names (see `parameter_key`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

SEED_COEFFICIENTS = "method.seed_coefficients"  # FedKSeed: float32 [K], how far along each direction
IGNORE_INDEX = -100  # label of a token that carries no loss (transformers' convention)

TaskKind = Literal["classification", "causal-lm"]
Arrays = dict[str, np.ndarray[Any, Any]]
Scalar = int | float | str | bool


@dataclass(frozen=True)
class Window:
    """Layers `start .. stop - 1` whose adapters are trained; the boundary is the hidden state entering `start`.

    `picked` (FedRA): only these of them are run and trained, ascending; the others are skipped.
    """

    start: int
    stop: int
    picked: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        return len(self.layers)

    @property
    def layers(self) -> Sequence[int]:
        return range(self.start, self.stop) if self.picked is None else self.picked


@dataclass(frozen=True)
class Stage:
    """One position of the schedule. `probe` trains the classifier alone on the final features."""

    kind: Literal["probe", "window"]
    window: Window
    sweep: int  # how many times the chain has wrapped round before this stage


@dataclass
class Batch:
    """What a collator yields. B sequences padded on the right to T tokens, on the CPU.

    `labels`: int64 [B] (classification) or int64 [B, T] (causal LM: label of position t is the *input* token t,
    shifted inside the objective, `IGNORE_INDEX` where no loss). `sample_ids`: one stable text per sequence.
    """

    input_ids: "torch.Tensor"  # int64 [B, T]
    attention_mask: "torch.Tensor"  # int64 [B, T], 1 = token, 0 = padding
    labels: "torch.Tensor | None"
    sample_ids: list[str]
    token_type_ids: "torch.Tensor | None" = None  # int64 [B, T], BERT only


@dataclass(frozen=True)
class Task:
    """Server to client. `arrays` holds only what the client lacks; it keeps what it got before.

    `versions`: fingerprint of every parameter the task needs, so that a client can tell what of its own still stands
    and the stage sees exactly these. An adapter that is not named is untrained: the identity. `base`: fingerprint of
    the frozen model that all clients must share ("": not compared).
    """

    kind: Literal["profile", "train", "evaluate"]
    client: str
    round_id: int
    stage: Stage | None
    arrays: Arrays = field(default_factory=dict)
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    base: str = ""


@dataclass(frozen=True)
class Reply:
    """Client to server. `arrays`: the trained parameters (train) or statistics (profile). `stage` and `base` are what
    the client really trained and on which frozen model."""

    kind: Literal["profile", "train", "evaluate"]
    client: str
    round_id: int
    num_samples: int
    arrays: Arrays = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None  # one line; a reply with an error carries no arrays
    stage: Stage | None = None
    base: str = ""


@dataclass(frozen=True)
class ModelShape:
    """What the server and the planner may know of a model: shapes, never weights."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int


def adapter_key(layer: int, name: str) -> str:
    """`adapters.3.up_weight`: parameter `name` of the adapter after layer 3."""
    return f"adapters.{layer}.{name}"


def classifier_key(name: str) -> str:
    """`classifier.out_weight`: parameter `name` of the trained classification head."""
    return f"classifier.{name}"


def stand_in_key(depth: int, name: str) -> str:
    """`stand_in.4.weight`: the linear stand-in from the hidden state after `depth` layers to the final one."""
    return f"stand_in.{depth}.{name}"


def layer_of_key(key: str) -> int | None:
    """Layer of an adapter key, None for any other key."""
    parts = key.split(".")
    return int(parts[1]) if parts[0] == "adapters" and len(parts) == 3 and parts[1].isdigit() else None
