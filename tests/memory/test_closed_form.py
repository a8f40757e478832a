"""What the planner counts for closed forms (classifier, stand-ins, scores), against how rows are dealt and held."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from chainfed_engine import classifier_fit, least_squares
from chainfed_engine.config import ChainConfig
from chainfed_engine.memory import closed_form
from chainfed_engine.memory.parts import Choices, DataFacts, Request, StoreSizes
from chainfed_engine.memory.plan import predict
from chainfed_engine.memory.stand_ins import cka_bytes, profile_bytes, solve_bytes, statistics_bytes
from chainfed_engine.server.closed_form import ClosedForm
from chainfed_engine.server.global_model import GlobalModel
from chainfed_engine.server.plan import Plan
from chainfed_engine.start_layer import linear_cka
from chainfed_engine.types import ModelShape

MIB = 1 << 20


def request_of(width: int, facts: DataFacts, **options: object) -> Request:
    shape = ModelShape("bert", 3, width, 4 * width, 4, 4, width // 4, 30522, 512)
    config = ChainConfig(**{"window": 1, "start_layer": 2, **options})  # type: ignore[arg-type]
    return Request(shape, StoreSizes(1, 0, 1, 1, 3, 0), config, "classification", 0, facts=facts)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of arrays at once, beside those of before. (LAPACK's own work is not seen.)"""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 19, 20, 29, 30, 31, 47, 400])
def test_rows_that_come_in_pieces_give_the_same_factor_bit_for_bit(count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(count, 29)).astype(np.float32)
    x, y = rows[:, :20], rows[:, 20:]
    cuts = [0, *sorted(set(np.random.default_rng(1).integers(0, count + 1, 9).tolist()) | {count})]
    pieces = ((x[begin:end], y[begin:end]) for begin, end in pairwise(cuts))
    np.testing.assert_array_equal(least_squares.gathered(pieces), least_squares.factor(x, y))


def test_factors_merged_at_a_weight_are_those_weighted_before() -> None:
    rng = np.random.default_rng(0)
    for counts in ((3, 4), (40, 9, 70)):
        parts = [rng.normal(size=(count, 30)).astype(np.float32) for count in counts]
        before = [parts[0], *(classifier_fit.weighted(part, 2.0) for part in parts[1:])]
        merged = classifier_fit.merge(parts, [1.0] + [2.0] * (len(parts) - 1))
        np.testing.assert_array_equal(merged, classifier_fit.merge(before))


@pytest.mark.parametrize("few", [False, True])
def test_a_client_takes_its_rows_in_within_what_is_counted_however_many_they_are(few: bool) -> None:
    width, labels, count = 256, 40, 250 if few else 9000
    facts = DataFacts(8, 8, None, count, 0, 1, count, labels)
    counted = closed_form.client_bytes(request_of(width, facts, probe_rounds=1), 0)
    rng, one = np.random.default_rng(0), rng_piece(width)

    def rows() -> object:
        return ((one, rng.integers(labels, size=len(one))) for _ in range(count // len(one)))

    measured = peak_bytes(lambda: classifier_fit.gathered(rows(), labels))  # type: ignore[arg-type]
    replies = 4 * (width + 1 + labels) * min(count, width + 1 + labels)
    assert measured <= counted
    assert counted - replies <= 1.3 * measured + MIB
    assert measured < 0.7 * count * width * 4 or few  # not all of them at once


def rng_piece(width: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(10, width)).astype(np.float32)


def test_the_server_fits_within_what_is_counted_and_that_grows_with_labels_and_clients() -> None:
    width = 128
    counted = {}
    for labels, clients in ((2, 4), (400, 4), (2, 40)):
        facts = DataFacts(8, 8, None, 300, 0, clients, 300 * clients, labels)
        request = request_of(width, facts, probe_rounds=1, rounds=4, clients_per_round=clients)
        rng = np.random.default_rng(0)
        initial = {
            "adapters.2.down_weight": np.zeros((4, width), np.float32),
            "classifier.out_weight": np.zeros((labels, width), np.float32),
            "classifier.out_bias": np.zeros(labels, np.float32),
        }
        model = GlobalModel(
            initial, "classification", num_layers=3, trained_layers=range(2, 3), uses_later_adapters=False,
            train_classifier="never", refits=True,
        )  # fmt: skip
        x = rng.normal(size=(300, width)).astype(np.float32)

        def fit(labels: int = labels, clients: int = clients, model: GlobalModel = model, x: np.ndarray = x) -> None:
            every = [classifier_fit.statistics(x, np.arange(300) % labels, labels) for _ in range(clients)]
            model.fit_classifier(every, weight=2.0)

        measured, counted[labels, clients] = peak_bytes(fit), closed_form.fit_bytes(request)
        assert measured <= counted[labels, clients]
        assert counted[labels, clients] <= 2 * measured + MIB  # eigh's own work is not in what is measured
    assert counted[400, 4] > 2 * counted[2, 4] and counted[2, 40] > 2 * counted[2, 4]


@pytest.mark.parametrize("seed", range(20))
def test_no_round_asks_for_more_rows_than_are_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = {f"client-{index}": int(count) for index, count in enumerate(rng.integers(1, 3000, rng.integers(1, 99)))}
    options = {
        "rounds": int(rng.integers(3, 30)),
        "clients_per_round": int(rng.integers(1, 80)),
        "max_local_steps": int(rng.choice([0, 3])),
        "batch_size": int(rng.choice([4, 32])),
    }
    facts = DataFacts(8, 8, None, max(samples.values()), 0, len(samples), sum(samples.values()), 5)
    request = request_of(64, facts, **options)
    bound = closed_form.rows_given(request)
    dealt = ClosedForm(request.config, samples)
    plan = Plan(request.config, 3, "classification", dealt.rounds_to_see_all)
    in_all = 0
    for round_id in [*range(plan.probe_rounds), *range(plan.rounds - plan.refit_rounds, plan.rounds)]:
        rows = [int(one["num_rows"]) for one in dealt.settings(plan, round_id, (5, 64)).values()]
        assert max(rows) <= bound.of_client and sum(rows) <= bound.of_round and len(rows) <= bound.clients
        in_all += sum(min(count, bound.columns) for count in rows)
    assert in_all <= bound.in_all
    unknown = closed_form.rows_given(request_of(64, DataFacts(), **options))
    assert unknown.of_round >= bound.of_round or unknown.of_client >= bound.of_client


def test_a_wide_model_with_a_handful_of_samples_is_not_charged_for_thousands_of_rows() -> None:
    """Predicted 784 MiB where 522 were taken: BERT of width 2560, three clients of four samples."""
    request = request_of(2560, DataFacts(96, 60, None, 4, 4, 3, 12, 2), stand_in=False)
    choices = Choices(1, 1, 2, False, "int8", 4 * MIB)
    assert statistics_bytes(request, choices) < MIB
    assert closed_form.fit_bytes(request) < 64 * MIB
    many = request_of(2560, DataFacts(96, 60, None, 4000, 4, 3, 12000, 2), stand_in=False)
    assert predict(many, choices).predicted_peak_bytes > predict(request, choices).predicted_peak_bytes + 200 * MIB


@pytest.mark.parametrize(("rows", "width"), [(900, 700), (900, 160), (400, 700)])
def test_comparing_two_layers_holds_them_once_in_float64_and_their_products(rows: int, width: int) -> None:
    x = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    y = x + 1
    measured = peak_bytes(lambda: linear_cka(x.copy(), y))
    assert 0.98 * measured <= cka_bytes(rows, width) <= 1.02 * measured


def test_statistics_are_counted_by_the_tokens_that_clients_have_and_not_by_their_longest_sample() -> None:
    """Predicted 572 MiB where 492 were taken: Llama of width 2560, clients of four samples of other lengths."""
    shape = ModelShape("llama", 4, 2560, 6912, 20, 5, 128, 32000, 2048)
    config = ChainConfig(window=1, start_layer=1, batch_size=1, sequence_length=96, profile_clients=2)
    padded = DataFacts(96, 50, 96, 4, 2, 3, 12)
    request = Request(shape, StoreSizes(1, 1, 1, 1, 4, 1), config, "causal-lm", 0, facts=padded)
    told = replace(request, facts=replace(padded, profile_lengths=(96, 60, 40, 24)))
    choices = Choices(1, None, 1, False, "int8", 4 * MIB, 2000)
    assert solve_bytes(told, choices) < 0.8 * solve_bytes(request, choices)
    more = replace(request, facts=replace(padded, profile_lengths=(96,) * 4))
    assert solve_bytes(more, choices) == solve_bytes(request, choices)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_hidden_states_of_a_profile_are_counted_as_their_parts_can_be_padded(micro_batch: int) -> None:
    lengths = (90, 80, 50, 30, 20, 10, 9, 8)
    request = request_of(256, DataFacts(90, 37, None, 8, 2, 1, 8, 2, lengths), batch_size=4, stand_in=False)
    request = replace(request, config=replace(request.config, start_layer=None, window=1))
    choices = Choices(1, None, micro_batch, False, "int8", 4 * MIB)
    rng, most = np.random.default_rng(0), 0
    for _ in range(200):  # one batch of four, in parts of like lengths
        batch = sorted(rng.permutation(lengths)[:4], reverse=True)
        parts = [batch[begin : begin + micro_batch] for begin in range(0, 4, micro_batch)]
        most = max(most, sum(len(part) * max(part) for part in parts))
    unknown = replace(request, facts=replace(request.facts, profile_lengths=None))
    without = replace(request, facts=replace(request.facts, profile_lengths=(0,) * 8))
    counted = profile_bytes(request, choices) - profile_bytes(without, choices)
    assert 4 * 256 * most <= counted
    assert profile_bytes(request, choices) <= profile_bytes(unknown, choices)
    wide = replace(request, config=replace(request.config, window=3))  # it starts from layer 0: nothing to be scored
    assert profile_bytes(wide, choices) == 0
