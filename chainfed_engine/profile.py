"""One streamed pass over a few batches: what every layer does to the input, and the rows the stand-ins are fitted on.

Leaves the CKA score of each layer's output against the embedding output (Function-Oriented Adaptive Tuning) and, for
the depths asked for, the least-squares factor from the features there to the final features.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from chainfed_engine import stand_in
from chainfed_engine.model.place import batch_on
from chainfed_engine.objective import Readout
from chainfed_engine.objective.stand_in import unit_rows
from chainfed_engine.prefix import Prefix, token_rows
from chainfed_engine.start_layer import linear_cka
from chainfed_engine.types import Arrays, Batch

MAX_CKA_TOKENS = 2048  # scores move by less than 0.01 beyond; bounds the kept copy of the embedding output


@torch.no_grad()
def profile(
    prefix: Prefix,
    batches: Sequence[Batch],
    readout: Readout,
    *,
    depths: Collection[int],
    normalise: bool,
    max_rows: int | None = None,
    with_scores: bool = True,
) -> Arrays:
    """Arrays: `cka` float64 [num_layers] (`with_scores`); for each depth in `depths` (0 < depth < num_layers) the
    stand-in factor, of at most `max_rows` rows, spread evenly (None: all)."""
    model = prefix.model
    hidden = [model.embed(batch) for batch in batches]
    contexts = [model.context(batch) for batch in batches]
    initial = _tokens(hidden, batches) if with_scores else None
    scores = np.empty(model.num_layers)
    rows: dict[int, Tensor] = {}
    for layer in range(model.num_layers):
        for index, context in enumerate(contexts):
            hidden[index] = prefix.run_layer(layer, hidden[index], context)
        if initial is not None:
            scores[layer] = linear_cka(_tokens(hidden, batches), initial)
        if layer + 1 in depths:
            rows[layer + 1] = _features(hidden, batches, readout, normalise, max_rows)
    arrays: Arrays = {"cka": scores} if with_scores else {}
    if rows:
        final = _features(hidden, batches, readout, normalise, max_rows).numpy()
        for depth, features in rows.items():
            arrays.update(stand_in.statistics(depth, features.numpy(), final))
    return arrays


def _tokens(hidden: Sequence[Tensor], batches: Sequence[Batch]) -> np.ndarray:
    kept: list[Tensor] = []
    room = MAX_CKA_TOKENS
    for state, batch in zip(hidden, batches, strict=True):
        rows = token_rows(batch)[0][:room].to(state.device)
        tokens = state.reshape(-1, state.shape[-1])[rows].cpu()
        kept.append(tokens)
        room -= len(tokens)
        if room == 0:
            break
    return torch.cat(kept).numpy()


def _features(
    hidden: Sequence[Tensor], batches: Sequence[Batch], readout: Readout, normalise: bool, max_rows: int | None
) -> Tensor:
    pairs = zip(hidden, batches, strict=True)
    rows = torch.cat([readout.stand_in_rows(state, batch_on(batch, state.device)).cpu() for state, batch in pairs])
    if max_rows is not None and len(rows) > max_rows:
        rows = rows[torch.arange(max_rows) * len(rows) // max_rows]
    return unit_rows(rows) if normalise else rows
