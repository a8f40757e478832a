"""What clients are told to do: settings, seeds, and the arrays they lack. In: where the run stands; out: tasks.

Pure functions of the server's state: asked twice, they give equal tasks.
"""

from collections.abc import Mapping, Sequence

from chainfed_engine import stand_in
from chainfed_engine.config import ChainConfig
from chainfed_engine.schedule import learning_rate
from chainfed_engine.server.closed_form import ClosedForm
from chainfed_engine.server.global_model import GlobalModel
from chainfed_engine.server.holdings import Holdings
from chainfed_engine.server.methods import Averaging
from chainfed_engine.server.outgoing import Outgoing
from chainfed_engine.server.plan import Plan
from chainfed_engine.server.sampling import PROFILE_STREAM, ROUND_STREAM, client_seed
from chainfed_engine.types import Arrays, Scalar, Stage, Task


class TaskMaker:
    """`client_windows`: layers a client can train at once, where that is a limit. `base`: fingerprint of the frozen
    model."""

    def __init__(
        self,
        config: ChainConfig,
        plan: Plan,
        model: GlobalModel,
        method: Averaging,
        *,
        hidden_size: int,
        client_windows: Mapping[str, int],
        closed_form: ClosedForm,
        base: str,
    ) -> None:
        self._config, self._plan, self._model, self._method = config, plan, model, method
        self._hidden_size, self._base = hidden_size, base
        self._client_windows, self._closed_form = client_windows, closed_form
        self._outgoing = Outgoing(packs=config.update_format == "int8")

    def profile(
        self, cohort: Sequence[str], attempt: int, depths: range, holdings: Holdings, *, with_scores: bool
    ) -> list[Task]:
        """One for each client of the cohort: statistics for stand-ins at `depths` and, `with_scores`, CKA by layer."""
        config, tasks = self._config, []
        needed, versions = self._outgoing.of(*self._model.adapters())
        for name in cohort:
            settings: dict[str, Scalar] = {
                "batch_size": config.batch_size,
                "num_batches": -(-stand_in.BATCHES // len(cohort)) if depths else 1,
                "depth_start": depths.start,
                "depth_stop": depths.stop,
                "with_scores": int(with_scores),
                "max_rows": -(-(config.stand_in_rows or stand_in.rows_in_all(self._hidden_size)) // len(cohort)),
                "seed": client_seed(config.seed, PROFILE_STREAM, attempt, name),
                "update_format": config.update_format,
            }
            arrays = _lacking(holdings, name, needed, versions)
            tasks.append(Task("profile", name, attempt, None, arrays, settings, versions, self._base))
        return tasks

    def evaluation(self, client: str, round_id: int) -> Task:
        arrays, versions = self._model.everything()
        settings: dict[str, Scalar] = {"batch_size": self._config.batch_size}
        return Task("evaluate", client, round_id, None, arrays, settings, versions, self._base)

    def train(self, name: str, stage: Stage, round_id: int, start_layer: int, holdings: Holdings) -> Task:
        """Local steps of one client on the round's stage."""
        config = self._config
        settings: dict[str, Scalar] = {
            "closed_form": False,
            "lr": learning_rate(config.lr, config.lr_decay, round_id, self._plan.rounds),
            "batch_size": config.batch_size,
            "local_epochs": config.local_epochs,
            "max_local_steps": config.max_local_steps,
            "seed": client_seed(config.seed, ROUND_STREAM, round_id, name),
            "start_layer": start_layer,
            "update_format": config.update_format,
            "trains_classifier": self._model.trains_classifier(stage),
            **self._method.settings(name),
        }
        return self._task(name, stage, round_id, start_layer, holdings, settings)

    def closed_form(self, stage: Stage, round_id: int, start_layer: int, holdings: Holdings) -> list[Task]:
        """One for each client that gives rows to the classifier's closed form in this round."""
        named = self._closed_form.settings(self._plan, round_id, self._model.classifier_shape)
        travels = {"update_format": self._config.update_format}
        return [
            self._task(name, stage, round_id, start_layer, holdings, {**settings, **travels})
            for name, settings in named.items()
        ]

    def _task(
        self,
        name: str,
        stage: Stage,
        round_id: int,
        start_layer: int,
        holdings: Holdings,
        settings: Mapping[str, Scalar],
    ) -> Task:
        stage = self._method.stage(stage, round_id, name)
        needed, versions = self._outgoing.of(*self._method.needed(stage, start_layer))
        arrays = _lacking(holdings, name, needed, versions)
        own = self._model.for_client(stage, self._client_windows.get(name))
        return Task("train", name, round_id, own, arrays, settings, versions, self._base)


def _lacking(holdings: Holdings, client: str, needed: Arrays, versions: Mapping[str, str]) -> Arrays:
    return {key: needed[key] for key in holdings.lacking(client, versions)}
