from chainfed_engine.server.sampling import PROFILE_STREAM, ROUND_STREAM, client_seed, sample_clients

NAMES = [f"client-{index:03d}" for index in range(300)]


def _sample(index: int, *, seed: int = 0, count: int = 5, names: list[str] = NAMES) -> list[str]:
    return sample_clients(names, count, seed=seed, stream=ROUND_STREAM, index=index)


def test_a_cohort_depends_on_seed_and_round_alone() -> None:
    assert _sample(3) == _sample(3, names=NAMES[::-1])
    assert _sample(3) != _sample(4)
    assert _sample(3) != _sample(3, seed=1)
    assert sample_clients(NAMES, 5, seed=0, stream=PROFILE_STREAM, index=3) != _sample(3)


def test_a_cohort_has_distinct_sorted_names() -> None:
    for index in range(50):
        cohort = _sample(index, count=37)
        assert len(set(cohort)) == 37
        assert cohort == sorted(cohort)


def test_asking_for_more_than_there_are_takes_all() -> None:
    assert _sample(0, count=300) == _sample(9, count=10**6) == NAMES


def test_every_client_gets_its_turn() -> None:
    seen = {name for index in range(400) for name in _sample(index)}
    assert len(seen) > 290


def test_seeds_of_clients_and_rounds_differ_and_fit_63_bits() -> None:
    seeds = {client_seed(0, ROUND_STREAM, index, name) for index in range(10) for name in NAMES}
    assert len(seeds) == 3000
    assert max(seeds) < 2**63
