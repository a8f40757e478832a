"""Who gives which rows to the classifier's closed form: many clients a round, few rows each, no row twice.

Skew is what harms: the rows of five clients of few labels fit a classifier that does not know the others. So a round
asks up to `MOST_CLIENTS` clients, dealt in turn, each for a share of its rows in proportion to its samples; all of them
together are as many as a round of training would visit. After training each is asked in one round, for more rows, as
the trained adapters are sent along. In: configuration, samples by client; pure functions of these.
"""

import math
from collections.abc import Mapping

import numpy as np

from chainfed_engine.classifier_fit import MOST_CLIENTS, refit_clients
from chainfed_engine.config import ChainConfig
from chainfed_engine.server.plan import Plan
from chainfed_engine.server.sampling import DEAL_STREAM, client_seed
from chainfed_engine.types import Scalar


class ClosedForm:
    """`samples`: by client, no more than it may weigh."""

    def __init__(self, config: ChainConfig, samples: Mapping[str, int]) -> None:
        self._config, self._samples = config, dict(samples)
        limit = config.max_local_steps * config.batch_size or max(samples.values())
        mean_visits = sum(min(count, limit) for count in samples.values()) / len(samples)
        self._visits = mean_visits * min(config.clients_per_round, len(samples))
        self._asked = min(max(config.clients_per_round, MOST_CLIENTS), len(samples))

    @property
    def rounds_to_see_all(self) -> int:
        """Rounds until every sample was seen once."""
        return math.ceil(sum(self._samples.values()) / self._visits)

    def settings(self, plan: Plan, round_id: int, shape: tuple[int, int] | None) -> dict[str, dict[str, Scalar]]:
        """What every client asked in this round, by name, is told: to give `num_rows` of its samples from `first_row`
        on, in an order drawn with `seed`, which is another before the windows and after them. `shape`: of the
        classifier, [C, D]."""
        assert shape is not None, "plans fit a classifier only where there is one"
        index, phase = plan.closed_form_index(round_id)
        at_most = plan.max_rows(shape, self._asked)
        asked, turns = self._asked, range(index * self._asked, (index + 1) * self._asked)
        if phase and refit_clients(asked, self._config.clients_per_round, plan.refit_rounds) < asked:
            turns = range(index * asked // plan.refit_rounds, (index + 1) * asked // plan.refit_rounds)
            asked = len(turns)
        dealt = self._dealt(turns)
        return {
            name: {
                "closed_form": True,
                "batch_size": self._config.batch_size,
                "seed": client_seed(self._config.seed, DEAL_STREAM, phase, name),
                **self._rows(name, dealt[name], asked, at_most),
            }
            for name in sorted(dealt)
        }

    def _rows(self, client: str, times_asked: int, asked: int, at_most: int) -> dict[str, Scalar]:
        count = self._samples[client]
        mean_asked = sum(self._samples.values()) * asked / len(self._samples)
        rows = min(math.ceil(count * self._visits / mean_asked), count, at_most)
        return {"first_row": times_asked % math.ceil(count / rows) * rows, "num_rows": rows}

    def _dealt(self, turns: range) -> dict[str, int]:
        """Clients whose turns these are, and how often each was asked before."""
        names, count = sorted(self._samples), len(self._samples)
        order = np.random.Generator(np.random.PCG64([self._config.seed, DEAL_STREAM])).permutation(count)
        return {names[order[turn % count]]: turn // count for turn in turns}
