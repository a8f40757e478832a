"""The planner: the choices that keep to a budget, before anything is allocated.

Candidates are ordered by an estimate of their seconds a step; the fastest whose predicted peak (`prediction.py`) fits
is taken and says why each choice is as it is (`reasons.py`). What the user fixed (batch, sequence length, a window) is
never changed; a window left open is as wide as costs no speed.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.memory.parts import (
    F32,
    FREE_SLOTS,
    MIB,
    RESIDENT_FILL_BYTES,
    Choices,
    DataFacts,
    Request,
    StoreSizes,
    branches,
    keeps_deep_graphs,
    saved_floats,
    step_bytes,
)
from chainfed_engine.memory.prediction import START_UP, Plan, predict, with_kept_heap
from chainfed_engine.memory.reasons import reasons
from chainfed_engine.memory.stand_ins import stand_in_row_counts
from chainfed_engine.sizes import format_size

__all__ = [
    "Choices",
    "DataFacts",
    "Plan",
    "Request",
    "StoreSizes",
    "make_plan",
    "predict",
    "saved_floats",
    "smallest_plan",
    "what_would_shrink",
]

STREAMED_FILL_BYTES = (64 * MIB, 16 * MIB, 4 * MIB)  # read each layer once for as many batches as this holds
# Nominal rates for ordering candidates; a run's figures differ, their order seldom does.
_FLOPS_A_SECOND, _BYTES_A_SECOND = 150e9, 1.5e9
_HALVED_ROWS = 1.25  # a stand-in fitted on half the rows must make the step faster by more than this
_SLID_WINDOW = 2  # a window of no more layers than this may be slow; wider ones must not be
_TOKENS_AT_HALF_SPEED = 40  # in one product
_PADDING = 0.7  # of a random batch, relative to that of samples of mean length beside the longest of all
_FULL_SPEED_TOKENS = 256  # in one product: 384 are 4 % slower than 768, 192 17 % (SmolLM2, docs/LOG.md)
_LEAST_KEPT_STEP = 24 * MIB  # the blocks of smaller ones stay in a lean heap too
# Of a step whose freed blocks go back at once: 1.1 to 1.6 measured, and 1.4 to 1.8 where it keeps the activations of
# many layers, for then smaller blocks are mapped alone as well (docs/LOG.md).
_LEAN_SLOWDOWN, _DEEP_LEAN_SLOWDOWN = 1.3, 1.6


def make_plan(request: Request) -> Plan:
    """The choices within the budget. A window left to "auto" is the widest that slows no step down; all else is what is
    fastest. Raises MemoryBudgetExceeded naming the smallest budget that would do."""
    chosen, smallest = _chosen(request), smallest_plan(request)
    if chosen is not None:
        return replace(chosen, smallest_budget_bytes=smallest.predicted_peak_bytes, advice=_advice(request, chosen))
    budget = request.config.budget_bytes
    assert budget is not None
    if START_UP in smallest.parts:
        raise MemoryBudgetExceeded(
            f"budget {format_size(budget)}: the smallest that would do is {request.startup_bytes} bytes "
            f"({format_size(request.startup_bytes)}), which importing PyTorch and reading the data took before a model "
            f"was opened; raise [memory] budget, cut texts far longer than [train] sequence_length, or, without a GPU, "
            f"install PyTorch's CPU build, which takes less"
        )
    largest = max(smallest.parts, key=lambda name: smallest.parts[name])
    savings = what_would_shrink(request)
    raise MemoryBudgetExceeded(
        f"budget {format_size(budget)}: the smallest that would do is "
        f"{smallest.predicted_peak_bytes} bytes ({format_size(smallest.predicted_peak_bytes)}; {largest} takes "
        f"{format_size(smallest.parts[largest])}); raise [memory] budget"
        + ("" if not savings else f" or shrink it: {'; '.join(savings)}")
    )


def _chosen(request: Request) -> Plan | None:
    """The plan to run, None if none fits."""
    if not _is_window_open(request):
        return _fastest(request)
    widest = request.window
    for window in range(widest, 0, -1):
        plan = _fastest(_with_window(request, window), at_full_speed=window > _SLID_WINDOW)
        if plan is None:
            continue
        reason = "wider ones learn more; no wider than two thirds of the layers"
        if window < widest:
            reason = f"wider ones learn more, but up to {widest} layers do not fit without slowing steps down"
        return replace(plan, reasons={**plan.reasons, "window": reason})
    return None


def _is_window_open(request: Request) -> bool:
    return request.config.window is None and request.config.method in ("chain", "top-window")


def _with_window(request: Request, window: int) -> Request:
    return replace(request, config=replace(request.config, window=window))


def _at_full_speed(request: Request, choices: Choices) -> bool:
    """Whether a step runs no layer twice, keeps the window's layers and takes parts that are no slower than the batch:
    what large products gain in speed is no more than what parts of like lengths save in padding."""
    stays = choices.num_slots is None or choices.num_slots >= choices.window + FREE_SLOTS
    is_large = request.part_tokens(choices) >= min(request.batch_tokens, _FULL_SPEED_TOKENS)
    return stays and not choices.recompute and is_large


def _fastest(request: Request, *, at_full_speed: bool = False) -> Plan | None:
    """The fastest choices within the budget for a given window, None if none fit."""
    budget = request.config.budget_bytes
    candidates = [each for each in _candidates(request) if not at_full_speed or _at_full_speed(request, each)]
    lean = _DEEP_LEAN_SLOWDOWN if keeps_deep_graphs(request.config, request.window) else _LEAN_SLOWDOWN
    ordered: list[tuple[float, bool, Choices]] = []
    for choices in candidates:
        cost = _cost(request, choices)
        may_keep = request.device is None and step_bytes(request, choices) >= _LEAST_KEPT_STEP
        ordered.append((cost * lean if may_keep else cost, False, choices))
        ordered += [(cost, True, choices)] * may_keep
    for _, keeps_heap, choices in sorted(ordered, key=lambda each: each[0]):
        plan = predict(request, choices)
        if keeps_heap:
            plan = with_kept_heap(request, plan)
        if budget is None or plan.predicted_peak_bytes <= budget:
            return replace(plan, reasons=reasons(request, plan))
    return None


def _advice(request: Request, chosen: Plan) -> str | None:
    """Causal LMs learn more from LoRA in all layers than from a chain of few of them in the same time, where it fits;
    from two thirds of the layers they learn as much (measured: docs/RESULTS.md)."""
    if request.task != "causal-lm" or request.config.method != "chain":
        return None
    if chosen.choices.window >= 2 * request.shape.num_layers // 3:
        return None
    try:
        plan = make_plan(replace(request, config=replace(request.config, method="lora")))
    except MemoryBudgetExceeded:
        return None
    return (
        f'[train] method = "lora" fits too, at {format_size(plan.predicted_peak_bytes)}: a causal LM learned more from '
        f"it in the same time than from a window of {chosen.choices.window} (docs/RESULTS.md)"
    )


def _cost(request: Request, choices: Choices) -> float:
    """What candidates are ordered by: seconds a step, and what fewer rows for the stand-ins are worth."""
    halvings = math.log2(stand_in_row_counts(request)[0] / choices.stand_in_rows) if choices.stand_in_rows else 0.0
    return step_seconds(request, choices) * math.pow(_HALVED_ROWS, halvings)


def step_seconds(request: Request, choices: Choices) -> float:
    """Nominal time of one optimizer step and its share of the prefix, for ordering candidates."""
    shape, config, layers = request.shape, request.config, max(request.window_layers, 1)
    weights = request.sizes.layer_bytes / max(request.sizes.num_layers, 1)
    flops = request.batch_tokens * layers * weights * 2 * (4 + int(choices.recompute))
    rows = config.batch_size * request.targets * branches(request) if request.task == "causal-lm" else 0
    flops += 4.0 * rows * shape.hidden_size * shape.vocab_size
    parts = -(-config.batch_size // choices.micro_batch)
    # Parts of like lengths are padded less; smaller products are slower; every part pays its calls.
    mean = min(request.facts.mean_tokens or request.tokens, request.tokens)
    flops *= 1 - _PADDING * (1 - mean / request.tokens) * (1 - 1 / parts)
    flops *= 1 + _TOKENS_AT_HALF_SPEED / (request.part_samples(choices) * mean)
    overhead = 0.01 * parts
    read = 0.0
    if choices.num_slots is not None:
        pinned = choices.num_slots >= layers + FREE_SLOTS
        read += parts * (request.sizes.head_bytes * (rows > 0) + (0 if pinned else 2 * layers * weights))
        tokens_held = max(choices.fill_bytes / (F32 * shape.hidden_size), request.batch_tokens)
        read += request.sizes.layer_bytes * request.batch_tokens / tokens_held
        if choices.num_slots == 1:  # nothing is read ahead
            return (flops / _FLOPS_A_SECOND + read / _BYTES_A_SECOND) + overhead
    return max(flops / _FLOPS_A_SECOND, read / _BYTES_A_SECOND) + overhead + 0.1 * read / _BYTES_A_SECOND


def smallest_plan(request: Request) -> Plan:
    """The leanest choices, whatever the budget; of a window left open, as narrow as that takes."""
    narrow = (1, min(_SLID_WINDOW, request.window))
    tried = [_with_window(request, window) for window in narrow] if _is_window_open(request) else [request]
    plans = (predict(one, choices) for one in tried for choices in _candidates(one))
    return min(plans, key=lambda plan: plan.predicted_peak_bytes)


def what_would_shrink(request: Request) -> list[str]:
    """What the user could change and how many bytes less the leanest choices would then take, largest first."""
    config, now = request.config, smallest_plan(request).predicted_peak_bytes
    trials: dict[str, dict[str, Any]] = {
        "[train] sequence_length": {"sequence_length": max(2, config.sequence_length // 2)},
        "[train] batch_size": {"batch_size": max(1, config.batch_size // 2)},
        "[chain] window": {"window": max(1, request.window // 2)},
        "[chain] adapter_size": {"adapter_size": max(1, config.adapter_size // 2)},
        "[chain] stand_in": {"stand_in": False},
    }
    if config.stand_in_rows is not None:
        trials["[chain] stand_in_rows"] = {"stand_in_rows": max(16, config.stand_in_rows // 2)}
    saved: list[tuple[int, str]] = []
    for name, change in trials.items():
        less = now - smallest_plan(replace(request, config=replace(config, **change))).predicted_peak_bytes
        value = next(iter(change.values()))
        if less >= MIB and getattr(config, next(iter(change))) != value:
            saved.append((less, f"{name} = {str(value).lower()} saves {format_size(less)}"))
    return [text for _, text in sorted(saved, reverse=True)]


def _candidates(request: Request) -> Iterator[Choices]:
    config, sizes = request.config, request.sizes
    cache_format: Literal["int8", "bf16", "f32"] = "int8" if config.cache_format == "auto" else config.cache_format
    micro_batches = [config.batch_size]
    while micro_batches[-1] > 1:
        micro_batches.append((micro_batches[-1] + 1) // 2)
    slots: list[int | None] = [None]
    wanted = (request.window_layers + FREE_SLOTS, 3, 2, 1)
    slots += [count for count in dict.fromkeys(wanted) if count < sizes.num_layers + sizes.num_head_shards]
    for num_slots in slots:
        for recompute in (False, True) if request.window_layers > 1 else (False,):
            for micro_batch in micro_batches:
                for held in RESIDENT_FILL_BYTES if num_slots is None else STREAMED_FILL_BYTES:
                    for rows in stand_in_row_counts(request):
                        yield Choices(request.window, num_slots, micro_batch, recompute, cache_format, held, rows)
