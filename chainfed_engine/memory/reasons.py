"""Why the planner chose as it did, in words: for what was given up, the peak that the alternative would have had."""

from dataclasses import replace
from typing import Any

from chainfed_engine.memory.parts import FREE_SLOTS, RESIDENT_FILL_BYTES, Request
from chainfed_engine.memory.prediction import Plan, predict, with_kept_heap
from chainfed_engine.memory.stand_ins import stand_in_row_counts
from chainfed_engine.sizes import format_size


def reasons(request: Request, chosen: Plan) -> dict[str, str]:
    """Why each of the chosen ones is as it is, by its name."""
    choices = chosen.choices

    def plan_with(**change: Any) -> Plan:
        other = replace(choices, kept_heap_bytes=0, **change)
        if other.num_slots is None:
            other = replace(other, fill_bytes=RESIDENT_FILL_BYTES[0])
        plan = predict(request, other)
        return with_kept_heap(request, plan) if choices.kept_heap_bytes else plan

    def peak_with(**change: Any) -> str:
        return format_size(plan_with(**change).predicted_peak_bytes)

    found = {
        "cache_format": "the smallest; its error is below that of the 4-bit layers"
        if request.config.cache_format == "auto"
        else "as given in [memory] cache_format"
    }
    if choices.num_slots is None:
        found["num_slots"] = "all layers and the head stay in memory: they fit"
    else:
        pinned = choices.num_slots >= request.window_layers + FREE_SLOTS
        kept = "the window's stay, two more stream" if pinned else "all stream"
        kept = "each is read when it is needed" if choices.num_slots == 1 else kept
        found["num_slots"] = f"{kept}; all in memory would peak at {peak_with(num_slots=None)}"
    whole = request.config.batch_size
    if choices.micro_batch < whole:
        larger = plan_with(micro_batch=min(whole, 2 * choices.micro_batch)).predicted_peak_bytes
        if chosen.budget is None or larger <= chosen.budget:
            found["micro_batch"] = f"a step of {whole} in parts of like lengths: less padding makes up for smaller ones"
        else:
            found["micro_batch"] = f"a step of {whole} in parts; the next larger would peak at {format_size(larger)}"
    else:
        found["micro_batch"] = "the whole batch at once fits"
    if choices.recompute:
        found["recompute"] = f"layers run again in backward; without, the peak would be {peak_with(recompute=False)}"
    else:
        found["recompute"] = "activations fit; nothing runs twice"
    if choices.kept_heap_bytes:
        found["kept_heap_bytes"] = "freed activations stay for the next step: fresh pages cost time"
    else:
        found["kept_heap_bytes"] = "freed activations go back at once: no room for holes, or a small step"
    found["fill_bytes"] = f"each layer is read once for {format_size(choices.fill_bytes)} of hidden states"
    most = stand_in_row_counts(request)[0]
    if request.config.stand_in_rows is not None and choices.stand_in_rows:
        found["stand_in_rows"] = "as given in [chain] stand_in_rows"
    elif choices.stand_in_rows < most:
        twice = peak_with(stand_in_rows=min(most, 2 * choices.stand_in_rows))
        found["stand_in_rows"] = f"of {most} that a map of this width repays; twice as many would peak at {twice}"
    elif most:
        found["stand_in_rows"] = "as many as a map of this width repays"
    return found
