"""What the classifier in closed form holds at once, in bytes: a client's rows, the replies of all who are asked in a
round, their merging and the solution. From shapes and what is known of the samples; the shares that clients give are
bounded as `server/closed_form.py` deals them. D hidden size, C labels, W = D + 1 + C columns of a factor.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chainfed_engine import classifier_fit, least_squares
from chainfed_engine.schedule import num_probe_rounds, num_refit_rounds

if TYPE_CHECKING:
    from chainfed_engine.memory.parts import Request

F32, F64 = 4, 8
FEWEST_LABELS = 2


@dataclass(frozen=True)
class Rows:
    """That clients give in one round: one of them, all together; and all in every round (`in_all`)."""

    of_client: int
    of_round: int
    in_all: int
    clients: int
    columns: int


def fits_classifier(request: "Request") -> bool:
    config = request.config
    wanted = config.probe_rounds != 0 or bool(config.refit_rounds)
    return config.method == "chain" and request.task == "classification" and wanted


def rows_given(request: "Request") -> Rows:
    """At most; what is not known of the samples is as much as a run would take."""
    config, facts, width = request.config, request.facts, request.shape.hidden_size
    labels = max(facts.num_labels or FEWEST_LABELS, FEWEST_LABELS)
    clients = max(config.clients_per_round, classifier_fit.MOST_CLIENTS)
    clients = min(clients, facts.num_clients or clients)
    trained = min(config.clients_per_round, clients)
    # At least and at most: a round sees no more than `trained` clients' samples, and may see far fewer.
    fewest, most_rounds = (
        (probe, num_refit_rounds(config.refit_rounds, probe, config.rounds))
        for probe in (
            num_probe_rounds(config.probe_rounds, config.rounds, request.task, config.aggregation, to_see_all)
            for to_see_all in (-(-clients // trained), None)
        )
    )
    of_client = classifier_fit.max_rows(width, labels, clients * max(*fewest, 1))
    of_round = clients * of_client
    limit = config.max_local_steps * config.batch_size
    most, samples = facts.largest_client_samples, facts.training_samples
    # After training fewer are asked in a round, for more rows each.
    refits = range(1, max(most_rounds[1], 1) + 1)
    asked = min(classifier_fit.refit_clients(clients, config.clients_per_round, rounds) for rounds in refits)
    if most:
        of_round = min(of_round, trained * most + clients)
        of_client = min(of_client, most, -(-most * trained // asked))
    if limit and samples and most:
        # Those asked may be the larger ones, and shares go by size.
        asks_all = asked == facts.num_clients
        spread = 1.0 if asks_all else most * (facts.num_clients or clients) / samples
        of_round = min(of_round, int(trained * limit * spread) + 1 + clients)
    in_all = sum(most_rounds) * of_round
    if samples:
        of_round, in_all = min(of_round, samples), min(in_all, 2 * samples)
    return Rows(min(of_client, of_round), min(of_round, clients * of_client), in_all, clients, width + 1 + labels)


def kept_bytes(request: "Request") -> int:
    """The merged factor that waits for the rows of the refit."""
    if not fits_classifier(request) or request.config.refit_rounds == 0:
        return 0
    rows = rows_given(request)
    return F32 * min(rows.in_all, rows.columns) * rows.columns


def client_bytes(request: "Request", layer_bytes: int) -> int:
    """Rows of one client, all earlier replies held: while they are taken in, or while a layer runs for the next."""
    if not fits_classifier(request):
        return 0
    rows = rows_given(request)
    columns, step = rows.columns, least_squares.rows_at_once(rows.columns)
    if rows.of_client <= columns:  # blocks, then all of them in one
        held = F32 * columns * rows.of_client
        taking = 2 * held
    else:
        held = F64 * columns * columns + F32 * columns * step
        taking = F32 * columns * (columns + step) + reducing_bytes(rows.of_client, columns)
    return _replies(rows) + max(held + layer_bytes, taking)


def fit_bytes(request: "Request") -> int:
    """Replies of a round, merged into what was known, and the solution of that."""
    if not fits_classifier(request):
        return 0
    rows, width = rows_given(request), request.shape.hidden_size
    known = min(rows.in_all, rows.columns)
    merging = reducing_bytes(known + rows.of_round, rows.columns) or F32 * rows.columns * known
    rank = min(known, width)
    # Eigenvectors with LAPACK's two matrices of work; what is seen through them; the same for a block of columns.
    solving = F64 * (5 * rank * rank + 2 * rank * rows.columns) + F64 * 3 * least_squares.BLOCK_COLUMNS * known
    return _replies(rows) + F32 * rows.columns * known + max(merging, solving)


def reducing_bytes(rows: int, columns: int) -> int:
    """Taking rows into a triangular factor: what the decomposition is given, twice copied; the factor comes after."""
    if rows <= columns:
        return 0
    given = min(rows, columns + least_squares.rows_at_once(columns))
    return F64 * columns * 3 * given


def _replies(rows: Rows) -> int:
    return F32 * rows.columns * min(rows.of_round, rows.clients * min(rows.of_client, rows.columns))
