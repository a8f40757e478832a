"""The planner: predicted peak memory from shapes, part by part, before anything is allocated.

Nothing here opens a weight file. Activation counts are floats a token that the library's layers keep (saved for the
backward pass) or hold at once (live), counted from their modules; the peak is the largest phase on top of what is
always there. Choices are searched from the fastest to the slowest and the first that fits the budget is taken; what the
user fixed (window, batch, sequence length) is never changed. Source of the floor: kernels' memory formula
R = base + max(fill, step).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from chainfed_engine.config import END_TO_END, FORWARD_ONLY, ChainConfig
from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.sizes import format_size
from chainfed_engine.types import ModelShape, TaskKind

F32 = 4
MIB = 1 << 20
STREAMED_FILL_BYTES = (64 * MIB, 16 * MIB, 4 * MIB)  # read each layer once for as many batches as this holds
RESIDENT_FILL_BYTES = (4 * MIB,)  # nothing is read again: small chunks stay in the processor's caches
SLACK_BYTES = 72 * MIB  # libraries at work (BLAS buffers, code paged in), allocator caches, Python objects of a run
HEAP_BYTES = 32 * MIB  # free memory that the allocator may hold at the top of its heap; holes add a quarter (measured)
HEAD_WORKSPACE_BYTES = 16 * MIB


@dataclass(frozen=True)
class StoreSizes:
    """Bytes of a store's files by role; `slot_bytes` is the largest file that goes through the ring."""

    layer_bytes: int
    head_bytes: int
    embedding_bytes: int
    slot_bytes: int
    num_layers: int
    num_head_shards: int

    @property
    def total_bytes(self) -> int:
        return self.layer_bytes + self.head_bytes + self.embedding_bytes


@dataclass(frozen=True)
class Choices:
    """What the planner may decide. `num_slots` None: every file stays resident."""

    num_slots: int | None
    micro_batch: int
    recompute: bool
    cache_format: Literal["int8", "bf16", "f32"]
    fill_bytes: int


@dataclass(frozen=True)
class Plan:
    """`predicted_peak_bytes` of resident memory; `parts` add up to it; `choices` are what the run will use."""

    predicted_peak_bytes: int
    parts: Mapping[str, int]
    choices: Choices
    budget: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "budget": self.budget,
            "parts": dict(self.parts),
            "choices": dict(vars(self.choices)),
            **self.facts,
        }

    def table(self) -> str:
        width = max(len(name) for name in self.parts)
        lines = [f"{name:<{width}}  {format_size(size):>12}" for name, size in self.parts.items()]
        lines.append(f"{'predicted peak':<{width}}  {format_size(self.predicted_peak_bytes):>12}")
        if self.budget is not None:
            lines.append(f"{'budget':<{width}}  {format_size(self.budget):>12}")
        lines += [f"{name}: {value}" for name, value in vars(self.choices).items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Request:
    """What is to be planned: `interpreter_bytes` is the process before a model is opened, measured by the caller."""

    shape: ModelShape
    sizes: StoreSizes
    config: ChainConfig
    task: TaskKind
    interpreter_bytes: int
    data_bytes: int = 0


def make_plan(request: Request) -> Plan:
    """The fastest choices within the budget. Raises MemoryBudgetExceeded naming the smallest budget that would do."""
    budget = request.config.budget
    smallest: Plan | None = None
    for choices in _from_fastest(request):
        plan = predict(request, choices)
        if budget is None or plan.predicted_peak_bytes <= budget:
            return plan
        if smallest is None or plan.predicted_peak_bytes < smallest.predicted_peak_bytes:
            smallest = plan
    assert smallest is not None and budget is not None
    largest = max(smallest.parts, key=lambda name: smallest.parts[name])
    raise MemoryBudgetExceeded(
        f"budget {format_size(budget)}: the smallest that would do is {format_size(smallest.predicted_peak_bytes)} "
        f"({largest} takes {format_size(smallest.parts[largest])}); raise [memory] budget or lower [train] "
        "sequence_length, batch_size, [chain] window or adapter_size"
    )


def predict(request: Request, choices: Choices) -> Plan:
    """Predicted peak of the given choices."""
    parts = {"interpreter with torch": request.interpreter_bytes, **_weights(request, choices)}
    parts["adapters and optimizer"] = _adapter_bytes(request)
    phases = {"window step": _step_bytes(request, choices), "prefix fill": _fill_bytes(request, choices)}
    highest = max(phases, key=lambda name: phases[name])
    parts[f"activations ({highest})"] = phases[highest]
    parts["data"] = request.data_bytes
    parts["slack"] = SLACK_BYTES
    return Plan(sum(parts.values()), parts, choices, request.config.budget)


def _from_fastest(request: Request) -> Iterator[Choices]:
    config = request.config
    formats: dict[str, tuple[Literal["int8", "bf16", "f32"], ...]] = {
        "auto": ("int8",), "int8": ("int8",), "bf16": ("bf16",), "f32": ("f32",)
    }  # fmt: skip
    cache_format = formats[config.cache_format][0]
    micro_batches = [config.batch_size]
    while micro_batches[-1] > 1:
        micro_batches.append((micro_batches[-1] + 1) // 2)
    trained = _window_layers(config, request.shape.num_layers)
    slots: list[int | None] = [None]
    slots += [
        count for count in (trained + 2, 3, 2) if count < request.sizes.num_layers + request.sizes.num_head_shards
    ]
    for num_slots in slots:
        for recompute in (False, True):
            for micro_batch in micro_batches:
                for fill_bytes in RESIDENT_FILL_BYTES if num_slots is None else STREAMED_FILL_BYTES:
                    yield Choices(num_slots, micro_batch, recompute, cache_format, fill_bytes)


def _weights(request: Request, choices: Choices) -> dict[str, int]:
    sizes = request.sizes
    if choices.num_slots is None:
        return {"layers": sizes.layer_bytes, "head": sizes.head_bytes, "embedding": sizes.embedding_bytes}
    return {"layer slots": choices.num_slots * sizes.slot_bytes}


def _window_layers(config: ChainConfig, num_layers: int) -> int:
    """Layers that a step runs with an adapter each."""
    if config.method == "fedra":
        return min(config.random_layers or -(-num_layers // 2), num_layers)
    if config.method in END_TO_END:
        return num_layers
    return 0 if config.method in ("linear-probe", "none") else min(config.window, num_layers)


def _adapter_bytes(request: Request) -> int:
    shape, config = request.shape, request.config
    one = 2 * config.adapter_size * shape.hidden_size + shape.hidden_size + config.adapter_size
    trained = _window_layers(config, shape.num_layers) * one
    held = shape.num_layers * one * 2  # the modules', and the federation's arrays
    if config.method == "flora":  # the sum of products beside every projection, there and here, and old and new
        attention, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        held += 4 * shape.num_layers * shape.hidden_size * (attention + keys)
    return F32 * (held + 4 * trained) + 3 * F32 * shape.hidden_size**2 * int(config.stand_in)


def saved_floats(shape: ModelShape) -> int:
    """Floats a token that one layer keeps for the backward pass (frozen linears keep none): the inputs of its two
    norms, queries, keys, values and their result, the activation's inputs; a normed query and key (Qwen3) once more."""
    attention, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if not is_decoder(shape):
        return 2 * shape.hidden_size + 4 * attention + shape.intermediate_size
    normed = attention + keys if shape.architecture == "qwen3" else 0
    return 2 * shape.hidden_size + 2 * attention + 2 * keys + 3 * shape.intermediate_size + normed


def live_floats(shape: ModelShape) -> int:
    """Floats a token that one layer holds at once without a graph, its input and output included."""
    attention = shape.num_heads * shape.head_dim
    expanded = 3 if is_decoder(shape) else 2
    return 3 * shape.hidden_size + 4 * attention + expanded * shape.intermediate_size


def is_decoder(shape: ModelShape) -> bool:
    return shape.architecture not in ("bert", "roberta", "distilbert")


def _step_bytes(request: Request, choices: Choices) -> int:
    shape, config = request.shape, request.config
    tokens = choices.micro_batch * config.sequence_length
    layers = _window_layers(config, shape.num_layers)
    adapters = layers * (shape.hidden_size + 2 * config.adapter_size)
    # The boundary needs no gradient, so the window's first layer keeps nothing.
    kept = adapters + max(0, layers - 1) * (shape.hidden_size if choices.recompute else saved_floats(shape))
    live = 2 * live_floats(shape) if layers else 0
    if config.method in FORWARD_ONLY:
        kept, live = 0, live_floats(shape)
    total = F32 * tokens * (shape.hidden_size + kept + live)
    total += HEAP_BYTES + total // 4 if layers else 0
    if request.task == "causal-lm":
        branches = 2 if config.auxiliary_weight and layers < shape.num_layers else 1
        total += F32 * tokens * shape.hidden_size * (4 + 4 * branches) + HEAD_WORKSPACE_BYTES
    return total


def _fill_bytes(request: Request, choices: Choices) -> int:
    shape, config = request.shape, request.config
    batch_tokens = config.batch_size * config.sequence_length
    held = max(choices.fill_bytes, F32 * batch_tokens * shape.hidden_size)
    return held + F32 * batch_tokens * live_floats(shape)


def smallest_budget(request: Request) -> int:
    """Predicted peak of the leanest choices."""
    unlimited = replace(request, config=replace(request.config, budget=None))
    return min(predict(unlimited, choices).predicted_peak_bytes for choices in _from_fastest(unlimited))
