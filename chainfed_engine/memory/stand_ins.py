"""What stand-ins and the scores of layers hold at once, in bytes: a client's streamed pass, the server's fit, the maps.

From shapes and what is known of the samples. D hidden size; a depth's factor has 2 D + 1 columns.
"""

from chainfed_engine import least_squares, stand_in
from chainfed_engine.config import ChainConfig
from chainfed_engine.memory import closed_form
from chainfed_engine.memory.parts import F32, F64, Choices, Request, live_floats

# Of what fitting a stand-in holds: what its matrices of ever other sizes leave between them. Llama-3.2-1B's shape took
# 434 to 445 MiB where 442 were counted without it.
_FITTING_HOLES = 0.1
MAX_CKA_TOKENS = 2048
FEWEST_STAND_IN_ROWS = 256


def profile_bytes(request: Request, choices: Choices) -> int:
    """The clients' streamed pass for scores and stand-ins."""
    shape, scores = request.shape, _chooses_start_layer(request)
    if not (scores or _stand_in_depths(request)):
        return 0
    width, tokens = shape.hidden_size, _profile_tokens(request, choices)
    total = F32 * tokens * width + F32 * request.part_tokens(choices) * live_floats(shape)
    if scores:
        rows = min(_unpadded_profile_tokens(request), MAX_CKA_TOKENS)
        total = max(total + F32 * rows * width, F32 * (tokens + rows) * width + cka_bytes(rows, width))
    if _stand_in_depths(request):
        rows, depths = _profile_rows(request, choices), _depths_at_once(request)
        columns = 2 * width + 1
        kept = F32 * (depths + 1) * rows * width + depths * F32 * min(rows, columns) * columns
        reducing = closed_form.reducing_bytes(rows, columns)
        total = max(total + F32 * depths * rows * width, F32 * tokens * width + kept + reducing)
    return total


def cka_bytes(rows: int, width: int) -> int:
    """Comparing a layer's output with the embedding's: its rows gathered, then both in float64 and their products."""
    squares = 2 * rows * rows if rows <= width else width * width
    return F64 * (2 * rows * width + squares)


def solve_bytes(request: Request, choices: Choices) -> int:
    """The server's closed form for one depth, beside the statistics of one exchange."""
    if not _stand_in_depths(request):
        return 0
    width = request.shape.hidden_size
    columns = 2 * width + 1
    of_client = _profile_rows(request, choices)
    of_all = of_client * _profile_clients(request)
    rows = min(of_all, columns)
    rank = min(rows, width)
    # Statistics of the exchange (float32 rows, float64 once reduced), one depth's while the next reply is added.
    one = rows * columns * (F64 if of_all > columns else F32)
    reply = F32 * min(of_client, columns) * columns
    # Eigenvectors with LAPACK's two matrices of work, or rows seen through them; then the map of two thin factors.
    fitting = F64 * (rank * rank + max(4 * rank * rank, 3 * rank * width))
    making = F64 * (2 * rank * width + (width * width if 2 * rank >= width else 0))
    making += stand_in_map_bytes(request, choices)
    result = max(fitting, making) + F64 * 3 * least_squares.BLOCK_COLUMNS * max(rows, width)
    merging = closed_form.reducing_bytes(of_all, columns)
    merging += reply if merging else 0
    return int((1 + _FITTING_HOLES) * (_depths_at_once(request) * one + max(one + reply, merging, result)))


def statistics_bytes(request: Request, choices: Choices) -> int:
    """What is kept through the run: fitted maps, and the classifier's factor for the refit."""
    return _stand_in_bytes(request, choices) + closed_form.kept_bytes(request)


def _stand_in_bytes(request: Request, choices: Choices) -> int:
    """At every depth where a window may end below the top."""
    one, width = stand_in_map_bytes(request, choices), request.shape.hidden_size
    array = one // 2 if one < F32 * width * width else one
    depths = _stand_in_depths(request)
    return min(depths, 1 if stand_in.is_large(stand_in.KEY_PREFIX, array) else depths) * one


def stand_in_map_bytes(request: Request, choices: Choices) -> int:
    """One depth's map: a square, or two thin factors where fewer rows were seen."""
    width = request.shape.hidden_size
    rank = min(_profile_rows(request, choices) * _profile_clients(request), width)
    return F32 * width * (2 * rank if 2 * rank < width else width)


def profile_samples(config: ChainConfig, num_clients: int | None) -> int:
    """Of one client."""
    batches = -(-stand_in.BATCHES // _asked_for_profiles(config, num_clients)) if config.uses_stand_in else 1
    return batches * config.batch_size


def _asked_for_profiles(config: ChainConfig, num_clients: int | None) -> int:
    return min(config.profile_clients, num_clients or config.profile_clients)


def _profile_clients(request: Request) -> int:
    return _asked_for_profiles(request.config, request.facts.num_clients)


def _profile_samples(request: Request) -> int:
    samples, facts = profile_samples(request.config, request.facts.num_clients), request.facts
    return samples if facts.largest_client_samples is None else min(samples, facts.largest_client_samples)


def _profile_tokens(request: Request, choices: Choices) -> int:
    """Of one client; each part is padded to its longest sample, and the longest may lie in parts of their own."""
    samples, lengths, size = _profile_samples(request), request.facts.profile_lengths, request.part_samples(choices)
    if lengths is None:
        return samples * request.tokens
    parts_of_batch = -(-request.config.batch_size // size)
    parts = -(-samples // request.config.batch_size) * parts_of_batch
    return min(samples * request.tokens, size * sum(lengths[:parts]))


def _unpadded_profile_tokens(request: Request) -> int:
    samples, lengths = _profile_samples(request), request.facts.profile_lengths
    return samples * request.tokens if lengths is None else sum(lengths[:samples])


def _profile_rows(request: Request, choices: Choices) -> int:
    """Of one client and depth: tokens for a causal LM, pooled samples for a classifier."""
    limit = -(-choices.stand_in_rows // _profile_clients(request))
    rows = _unpadded_profile_tokens(request) if request.task == "causal-lm" else _profile_samples(request)
    return min(limit, rows)


def stand_in_row_counts(request: Request) -> tuple[int, ...]:
    """Rows that stand-ins may be fitted on, most first: what the user fixed, else halves of what the width repays."""
    if not _stand_in_depths(request):
        return (0,)
    if request.config.stand_in_rows is not None:
        return (request.config.stand_in_rows,)
    counts = [stand_in.rows_in_all(request.shape.hidden_size)]
    while counts[-1] >= 2 * FEWEST_STAND_IN_ROWS:
        counts.append(counts[-1] // 2)
    return tuple(counts)


def _chooses_start_layer(request: Request) -> bool:
    """Whether clients are asked for scores: not where there is no choice."""
    return request.config.method == "chain" and len(request.start_layers) > 1


def _stand_in_depths(request: Request) -> int:
    """Where a window may end below the top, from the lowest start layer on."""
    config = request.config
    if config.method != "chain" or not config.uses_stand_in:
        return 0
    return max(0, request.shape.num_layers - request.start_layers.start - request.window)


def _depths_at_once(request: Request) -> int:
    return min(stand_in.depths_at_once(request.shape.hidden_size), _stand_in_depths(request))
