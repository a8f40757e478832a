"""Every choice of a run: `ChainConfig` (flat), `DataConfig`, and the two together with the store as `RunConfig`.

Each field carries in its metadata the TOML table it belongs to and its range, so that loading, checking and writing
need no second list. Fields that may be "auto" are resolved by the planner and recorded in the run's own config.toml;
what the user fixed is never changed. Every mistake is one `ConfigError` that says what was expected.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from chainfed_engine.errors import ConfigError
from chainfed_engine.sizes import parse_size
from chainfed_engine.types import TaskKind

Method = Literal[
    "chain", "none", "linear-probe", "top-window", "full-adapters", "lora", "fedra", "flora", "fwdllm", "fedkseed"
]
FORWARD_ONLY: tuple[Method, ...] = ("fwdllm", "fedkseed")  # no backward pass: only losses are computed
END_TO_END: tuple[Method, ...] = ("full-adapters", "lora", "fedra", "flora", *FORWARD_ONLY)
LORA_METHODS: tuple[Method, ...] = ("lora", "flora")  # these train LoRA, whatever [chain] adapter says


def _in(
    table: str,
    default: Any,
    *,
    low: float = 0,
    high: float = 2**31 - 1,
    above: bool = False,
    none: str | None = None,
    size: bool = False,
) -> Any:
    """A field of `[table]`. Numbers lie in low..high (`above`: low itself is out); `none`: the word that means None;
    `size`: bytes, as a number or as text with a unit."""
    metadata = {"table": table, "low": low, "high": high, "above": above, "none": none, "size": size}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ChainConfig:
    """How to train. `budget` also takes text such as "1GiB". Raises ConfigError for a wrong type or range.

    Why the defaults of the chain are what they are: docs/RESULTS.md.
    """

    pooling: Literal["auto", "mean", "first", "last"] = _in("model", "auto")

    # layers trained at once; None: two thirds of them; fewer, which slide, where the budget does not hold them without
    # slowing steps down
    window: int | None = _in("chain", None, low=1, high=1024, none="auto")
    auxiliary_weight: float = _in("chain", 0.2, high=100)
    # 0-based; None: for a classifier layer 0 where the window holds more than half of the layers, else from `threshold`
    # by CKA, for causal LMs no lower than one window below the topmost and than half of the layers
    start_layer: int | None = _in("chain", None, high=1023, none="auto")
    threshold: float = _in("chain", 0.8, high=1)
    # "auto": every window once, bottom to top, where a classifier's holds more than half of the layers, else in sweeps
    schedule: Literal["auto", "continuous", "train-and-freeze"] = _in("chain", "auto")
    rounds: int = _in("chain", 24, low=1)
    # rounds that first fit the classifier in closed form; None: a fifth of them, 1 to 4, or as many as it takes to see
    # every sample once, if these are fewer; none for causal LMs
    probe_rounds: int | None = _in("chain", None, none="auto")
    # rounds that do it again at the end, on the trained features; None: as many, at most a fourth of the others
    refit_rounds: int | None = _in("chain", None, none="auto")
    adapter: Literal["bottleneck", "lora"] = _in("chain", "bottleneck")
    adapter_size: int = _in("chain", 16, low=1, high=4096)  # bottleneck width or LoRA rank
    stand_in: bool = _in("chain", True)
    # rows of all clients together that one depth's is fitted on; None: as many as the budget allows, at most 14551 for
    # D = 576 and 1024 for D = 4096
    stand_in_rows: int | None = _in("chain", None, low=16, high=2**20, none="auto")
    # every k-th step takes the exact end-to-end loss, the layers above the window streamed one at a time; 0: never
    foresight_every: int = _in("chain", 0)
    # whether steps train the classifier once it was fitted in closed form, where it is all that follows the last layer;
    # unless "always", it is a fixed part of the stand-in below the top
    train_classifier: Literal["never", "at-top", "always"] = _in("chain", "never")
    # relative to the mean squared column; None: by cross-validation
    stand_in_ridge: float | None = _in("chain", None, above=True, high=1e6, none="auto")

    method: Method = _in("train", "chain")  # noqa: RUF009 (an alias of Literal, immutable)
    device: str = _in("train", "cpu")  # "cpu", "cuda" or "cuda:1"
    lr: float = _in("train", 2e-3, above=True, high=10)
    lr_decay: Literal["none", "cosine"] = _in("train", "cosine")  # from `lr` in the first round down to the last
    weight_decay: float = _in("train", 0.01, high=10)
    batch_size: int = _in("train", 16, low=1, high=65536)
    sequence_length: int = _in("train", 128, low=2, high=2**20)
    local_epochs: int = _in("train", 1, low=1, high=10**6)
    max_local_steps: int = _in("train", 0)  # 0: no limit
    seed: int = _in("train", 0, high=2**63 - 1)

    # bytes; None: no limit
    budget: int | str | None = _in("memory", None, low=2**20, high=2**50, none="none", size=True)
    cache_format: Literal["auto", "int8", "bf16", "f32"] = _in("memory", "auto")
    encrypt_cache: bool = _in("memory", False)  # under a key that this process alone has; gone with it

    # of the methods that `chain` is compared with
    random_layers: int | None = _in("baseline", None, low=1, high=1024, none="auto")  # FedRA: a client; None: half
    min_rank: int | None = _in("baseline", None, low=1, high=4096, none="auto")  # FLoRA: None: a quarter of the largest
    perturbations: int = _in("baseline", 10, low=1, high=10**6)  # FwdLLM: directions a batch
    perturbation_step: float = _in("baseline", 1e-3, above=True, high=1)  # FwdLLM, FedKSeed
    max_variance: float = _in("baseline", 1.0, above=True, high=1e6)  # FwdLLM: of the mean, relative to its square
    max_gather_rounds: int = _in("baseline", 2, low=1)  # FwdLLM: rounds whose gradients go into one update, at most
    num_seeds: int = _in("baseline", 1024, low=1, high=2**20)  # FedKSeed

    clients_per_round: int = _in("federation", 5, low=1)
    # budgets dealt evenly to the clients, such as "512MiB, 1GiB"; one that cannot hold the method is left out
    client_budgets: str | None = _in("federation", None, none="none")
    profile_clients: int = _in("federation", 16, low=1)  # asked for statistics in one exchange, if there are so many
    eval_every: int = _in("federation", 0)  # 0: only at the end
    aggregation: Literal["mean", "median", "trimmed-mean", "multi-krum"] = _in("federation", "mean")
    # share of a cohort that the robust rules take to be hostile
    hostile_share: float = _in("federation", 0.1, high=0.49)
    norm_limit: float = _in("federation", 5.0, high=1e9)  # times the cohort's median norm; 0: no limit
    # what a client's samples, those that it trains on in the round, may weigh: medians of all clients'; 0: no limit
    weight_limit: float = _in("federation", 10.0, high=1e9)
    # replies to rounds that are over: dropped, or counted in a later one of the same window at 1 / (1 + rounds late)
    late_replies: Literal["drop", "discount"] = _in("federation", "drop")
    # what travels: float32, or adapters and classifier in eight bits (values down, changes up; 0.27 of the bytes) and
    # statistics in sixteen; "auto": that where clients send trained values and late replies are dropped
    update_format: Literal["auto", "f32", "int8"] = _in("federation", "auto")
    # differential privacy: noise as a multiple of the clip (0: none), L2 bound of a client's change, delta of epsilon
    dp_noise: float = _in("federation", 0.0, high=1e6)
    dp_clip: float = _in("federation", 1.0, above=True, high=1e9)
    dp_delta: float = _in("federation", 1e-5, above=True, high=0.5)
    deadline_seconds: float = _in("federation", 0.0, high=1e9)  # of an exchange; 0: none
    quorum: float = _in("federation", 1.0, above=True, high=1)  # share of the cohort that ends an exchange ...
    grace_seconds: float = _in("federation", 0.0, high=1e9)  # ... so long after it answered

    def __post_init__(self) -> None:
        _check_fields(self)
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device):
            raise ConfigError(f'[train] device: expected "cpu", "cuda" or "cuda:1", got {self.device!r}')
        if self.method in LORA_METHODS:
            object.__setattr__(self, "adapter", "lora")
        if self.client_budgets is not None:
            parse_sizes("[federation] client_budgets", self.client_budgets)
        if self.min_rank is not None and self.min_rank > self.adapter_size:
            raise ConfigError(
                f"[baseline] min_rank: expected at most [chain] adapter_size ({self.adapter_size}), got {self.min_rank}"
            )
        for name in ("probe_rounds", "refit_rounds"):
            others = (self.probe_rounds or 0) if name == "refit_rounds" else 0
            chosen: int | None = getattr(self, name)
            if chosen is not None and chosen > self.rounds - others:
                most = f"[chain] rounds ({self.rounds}){' - probe_rounds' if others else ''}"
                raise ConfigError(f"[chain] {name}: expected at most {most}, got {chosen}")

    @property
    def budget_bytes(self) -> int | None:
        """`budget`, which may be given as "1GiB", as the number of bytes that it is kept as."""
        assert not isinstance(self.budget, str)
        return self.budget

    @property
    def uses_stand_in(self) -> bool:
        """Whether windows below the top read a stand-in: not where every step takes the exact loss."""
        return self.stand_in and self.foresight_every != 1


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are. The task follows from the columns: `label` (classification), `response` or `messages`
    (causal LM: prompt and response, or whole conversations with loss on the assistant's turns).

    `text` and `prompt` may join several columns: "subject + body" is what is not blank of both, a line each. `missing`:
    what to do with rows whose text, label, prompt, response or messages are blank. Clients are named by the
    `client` column; without one the rows are dealt to `num_clients` clients by `partition` ("auto": "dirichlet" over
    the labels where there are labels, else "iid").
    """

    train: str = _in("data", "")
    eval: str | None = _in("data", None, none="none")
    hold_out: float = _in(
        "data", 0.0, high=0.9
    )  # share of the rows of `train` kept for evaluation, when there is no eval
    text: str = _in("data", "text")
    label: str | None = _in("data", None, none="none")
    prompt: str = _in("data", "prompt")
    response: str | None = _in("data", None, none="none")
    messages: str | None = _in("data", None, none="none")
    missing: Literal["error", "drop"] = _in("data", "error")
    client: str | None = _in("data", None, none="none")
    client_budget: str | None = _in("data", None, none="none")  # a column with each client's memory, bytes or "1GiB"
    partition: Literal["auto", "dirichlet", "iid"] = _in("data", "auto")
    alpha: float = _in("data", 1.0, above=True, high=1e6)  # small: clients of few labels; large: like IID
    num_clients: int = _in("data", 8, low=1, high=10**6)

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.train:
            raise ConfigError("[data] train: expected the path of a CSV, JSON, JSONL or Parquet file, got none")
        given = [name for name in ("label", "response", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "[data]: expected the name of one column: label (classification), response or messages (causal LM), "
                f"got {' and '.join(given) or 'none of them'}"
            )
        source, learned = ("text", self.label) if self.label is not None else ("prompt", self.response)
        if learned in joined_columns(getattr(self, source)) and self.messages is None:
            raise ConfigError(
                f"[data] {source}: expected other columns than {learned!r}, which is what the model is to learn"
            )
        if self.eval is not None and self.hold_out:
            raise ConfigError("[data] hold_out: expected 0 beside [data] eval; evaluation has one source")
        if self.partition == "auto":
            object.__setattr__(self, "partition", "dirichlet" if self.label is not None else "iid")
        if self.partition == "dirichlet" and self.label is None and self.client is None:
            raise ConfigError('[data] partition: "dirichlet" needs [data] label; use partition = "iid" or name client')

    @property
    def task(self) -> TaskKind:
        return "causal-lm" if self.label is None else "classification"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the training table that this run reads, without the client column."""
        return tuple(part for name in self.needed for part in joined_columns(name))

    @property
    def needed(self) -> tuple[str, ...]:
        """What every row must have: columns, or several joined by " + ", one of which is enough."""
        if self.messages is not None:
            return (self.messages,)
        return (self.prompt, self.response) if self.response is not None else (self.text, self.label or "")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: `store` is the path of the layer store, all paths absolute once loaded from a file."""

    chain: ChainConfig
    data: DataConfig
    store: str


def parse_sizes(name: str, text: str) -> list[int]:
    """Bytes of sizes with commas between them. Raises ConfigError that starts with `name`."""
    try:
        return [parse_size(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def joined_columns(name: str) -> list[str]:
    """The columns that "a + b" stands for; a plain name stands for itself."""
    return [part.strip() for part in name.split(" + ")]


def _check_fields(record: ChainConfig | DataConfig) -> None:
    hints = typing.get_type_hints(type(record))
    for item in dataclasses.fields(record):
        name = f"[{item.metadata['table']}] {item.name}"
        value = checked(name, hints[item.name], item.metadata, getattr(record, item.name))
        object.__setattr__(record, item.name, value)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a hint: (int, NoneType) for `int | None`, (int,) for int."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def checked(name: str, hint: Any, metadata: Mapping[str, Any], value: Any) -> Any:
    """`value` as the field keeps it. Raises ConfigError: what was expected, what came."""
    if typing.get_origin(hint) is Literal:
        words = typing.get_args(hint)
        if value not in words:
            nearest = nearest_word(value, list(words)) if isinstance(value, str) else ""
            raise ConfigError(f"{name}: expected one of {', '.join(map(repr, words))}, got {value!r}{nearest}")
        return value
    choices = alternatives(hint)
    if type(None) in choices and (value is None or (isinstance(value, str) and value == metadata["none"])):
        return None
    if metadata["size"]:
        try:
            value = parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    kind = choices[0]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        also = f' or "{metadata["none"]}"' if metadata["none"] else ""
        raise ConfigError(f"{name}: expected {_KINDS[kind]}{also}, got {value!r}")
    if kind in (int, float):
        _check_range(name, metadata, value)
    return value


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _check_range(name: str, metadata: Mapping[str, Any], value: float) -> None:
    low, high, above = metadata["low"], metadata["high"], metadata["above"]
    if not math.isfinite(value) or not (low < value if above else low <= value) or value > high:
        start = f"above {low}" if above else f"from {low}"
        raise ConfigError(f"{name}: expected a number {start} up to {high}, got {value}")


def nearest_word(word: str, known: Sequence[str]) -> str:
    """The hint that ends a message about an unknown word."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
