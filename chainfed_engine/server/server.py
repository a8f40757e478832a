"""The server's state machine: rounds, a profile before those that need one, then done. No I/O, no clock, no torch.

`next_tasks()` says what clients are to do, `receive(replies)` checks, aggregates and advances; nothing happens in
between that would have to be saved. Equal configuration, initial parameters and replies give equal bits, in
whatever order the replies arrive and however often the run was saved and restored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.schedule import num_window_layers
from chainfed_engine.server import quarantine, saved
from chainfed_engine.server.checks import is_late, one_line
from chainfed_engine.server.closed_form import ClosedForm
from chainfed_engine.server.combine import Combiner, update_format
from chainfed_engine.server.global_model import GlobalModel
from chainfed_engine.server.holdings import Holdings
from chainfed_engine.server.lateness import late_task
from chainfed_engine.server.methods import method_class
from chainfed_engine.server.plan import Plan
from chainfed_engine.server.profile import ProfileCollector
from chainfed_engine.server.run_state import RunState
from chainfed_engine.server.sampling import PROFILE_STREAM, ROUND_STREAM, sample_clients
from chainfed_engine.server.summary import Summary, num_bytes
from chainfed_engine.server.tasks import TaskMaker
from chainfed_engine.server.updates import UpdateCollector
from chainfed_engine.types import Arrays, ModelShape, Reply, Stage, Task, TaskKind
from chainfed_engine.update_format import decode

MAX_CLAIMS = 1 << 16  # parameters that a client may say to hold


class Server:
    """`initial`: float32 adapters (`adapters.<layer>.<name>`) of every layer the method may train, and for
    classification `classifier.<name>`. `client_samples`: number of training samples by client, all positive.
    `client_windows`: layers a client can train at once, where that is a limit. `base`: fingerprint of the frozen model.
    Raises ConfigError for a configuration that cannot run, InvalidArgument for arrays or clients that do not fit.
    """

    def __init__(
        self,
        config: ChainConfig,
        shape: ModelShape,
        initial: Mapping[str, np.ndarray],
        client_samples: Mapping[str, int],
        task: TaskKind,
        *,
        client_windows: Mapping[str, int] | None = None,
        base: str = "",
    ) -> None:
        if not client_samples or min(client_samples.values()) < 1:
            raise InvalidArgument(f"expected at least one client, each with samples, got {dict(client_samples)!r:.200}")
        config = replace(
            config,
            window=num_window_layers(config.window, shape.num_layers, config.start_layer),
            update_format=update_format(config),
        )
        self.config = config
        self.shape = shape
        self.task = task
        self.client_samples = dict(client_samples)
        self.client_windows = dict(client_windows or {})
        self.base = base
        if any(layers < 1 for layers in self.client_windows.values()):
            raise InvalidArgument(f"client_windows: expected at least one layer each, got {self.client_windows!r:.200}")
        self._max_weight = quarantine.weight_cap(self.client_samples, config.weight_limit)
        weights = {name: min(count, self._max_weight or count) for name, count in self.client_samples.items()}
        closed_form = ClosedForm(config, weights)
        self._plan = Plan(config, shape.num_layers, task, closed_form.rounds_to_see_all)
        method = method_class(config.method)
        self._model = GlobalModel(
            {**initial, **method.extra_state(config, initial)},
            task,
            num_layers=shape.num_layers,
            trained_layers=self._plan.trained_layers(),
            uses_later_adapters=config.auxiliary_weight > 0 or config.foresight_every > 0,
            train_classifier=self._plan.train_classifier(shape.architecture, initial),
            refits=self._plan.refit_rounds > 0,
        )
        self._method = method(config, self._model)
        self.combiner = Combiner(config, self._plan, self._model, self._method, num_clients=len(client_samples))
        self._tasks = TaskMaker(
            config,
            self._plan,
            self._model,
            self._method,
            hidden_size=shape.hidden_size,
            client_windows=self.client_windows,
            closed_form=closed_form,
            base=base,
        )
        self._holdings = Holdings()
        self._run = RunState(self._plan.fixed_start_layer())
        self._pending: dict[str, Task] | None = None

    # -- where the run stands ------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self._run.round_id >= self._plan.rounds

    @property
    def rounds(self) -> int:
        """Rounds the run will have in all."""
        return self._plan.rounds

    @property
    def round_id(self) -> int:
        """The next round, 0-based; equally the number of rounds behind us, rejected ones included."""
        return self._run.round_id

    @property
    def profile_attempts(self) -> int:
        return self._run.profile_attempts

    @property
    def start_layer(self) -> int | None:
        """None until it has been chosen from profiles."""
        return self._run.start_layer

    def setbacks_at_end(self) -> str | None:
        """What to tell of a finished run whose last rounds were rejected, None where there is nothing. Raises
        NonFiniteLoss or InconsistentUpdates where all of them were."""
        return self._run.setbacks.at_end(self._run.round_id)

    def parameters(self) -> Arrays:
        """All adapters and the classifier: float32, shared, not to be written to."""
        return self._model.parameters()

    # -- tasks ---------------------------------------------------------------------------------------------------

    def next_tasks(self) -> list[Task]:
        """Tasks of the next exchange, by client name. Asking twice without `receive` gives equal tasks.

        Raises NonFiniteLoss or InconsistentUpdates once `MAX_REJECTED_IN_A_ROW` exchanges in a row were rejected.
        """
        if self.done:
            raise InvalidArgument("next_tasks: the run is done; look at `done` before asking")
        self._run.setbacks.check()
        tasks = self._profile_tasks() if self._profile_pending else self._train_tasks()
        self._holdings.forget_outdated({key: version for task in tasks for key, version in task.versions.items()})
        self._pending = {task.client: task for task in tasks}
        return tasks

    def evaluation_task(self, client: str) -> Task:
        """The whole adapted model for an evaluator; apart from the rounds and their traffic."""
        return self._tasks.evaluation(client, self._run.round_id)

    def _profile_tasks(self) -> list[Task]:
        attempt, depths = self._run.profile_attempts, self._missing_depths()
        cohort = self._cohort(self.config.profile_clients, PROFILE_STREAM, attempt)
        with_scores = self._run.start_layer is None
        return self._tasks.profile(cohort, attempt, depths, self._holdings, with_scores=with_scores)

    def _train_tasks(self) -> list[Task]:
        stage, start_layer = self._stage(), self._known_start_layer()
        if self._plan.fits_classifier(stage):
            return self._tasks.closed_form(stage, self._run.round_id, start_layer, self._holdings)
        cohort = self._cohort(self.config.clients_per_round, ROUND_STREAM, self._run.round_id)
        return [self._train_task(name) for name in cohort]

    def _train_task(self, name: str) -> Task:
        return self._tasks.train(name, self._stage(), self._run.round_id, self._known_start_layer(), self._holdings)

    # -- replies -------------------------------------------------------------------------------------------------

    def receive(self, replies: Iterable[Reply]) -> Summary:
        """Take the replies to the last `next_tasks()`; a bad reply is refused with a reason and does no harm.

        Consumes `replies` lazily. Without one usable reply the exchange is rejected: it counts, the state stays.
        """
        if self._pending is None:
            raise InvalidArgument("receive: expected next_tasks() before it")
        pending, collector = self._pending, self._collector(self._pending)
        rejected: dict[str, str] = {}
        silent, num_late, bytes_up = set(pending), 0, 0
        for reply in replies:
            bytes_up += num_bytes(reply.arrays)
            if is_late(reply, round_id=self._run.round_id, profile_attempts=self._run.profile_attempts):
                num_late += 1  # its client may still answer this exchange
                reason = self._receive_late(collector, reply)
                if reason is not None:
                    rejected[one_line(reply.client)] = reason
                continue
            asked = isinstance(reply.client, str) and reply.client in pending
            reason = collector.add(reply) if asked else "not asked in this round"
            silent.discard(reply.client if asked else "")
            if reason is not None:
                rejected[one_line(reply.client)] = reason
        self._pending = None
        bytes_down = sum(num_bytes(task.arrays) for task in pending.values())
        rejected = dict(sorted(rejected.items()))
        if isinstance(collector, ProfileCollector):
            summary = self._finish_profile(collector, rejected, bytes_down, bytes_up)
        else:
            summary = self._finish_round(collector, rejected, bytes_down, bytes_up)
        summary = replace(summary, silent=tuple(sorted(silent)), num_late=num_late)
        for client, task in pending.items():
            if client in summary.clients and client not in summary.stale:
                self._holdings.confirm(client, task.versions)
            else:
                self._holdings.forget(client)
        if summary.accepted:
            self._run.setbacks.accepted(summary.kind)
        else:
            self._run.setbacks.rejected(summary.kind, summary.rejected)
        return summary

    def _receive_late(self, collector: ProfileCollector | UpdateCollector, reply: Reply) -> str | None:
        """Count a reply to an earlier round where that is wanted and it still fits; the reason if it is refused."""
        wanted = self.config.late_replies == "discount" and isinstance(collector, UpdateCollector)
        if not wanted or self._plan.fits_classifier(self._stage()):
            return None
        if not isinstance(reply.client, str) or not self._run.awaited.owes(reply):
            return None
        assert isinstance(collector, UpdateCollector)
        task = late_task(self._train_task(reply.client), reply.round_id)
        if reply.stage != task.stage:
            return None
        return collector.add_late(reply, task, self._run.round_id - reply.round_id)

    def believe(self, client: str, versions: object) -> None:
        """Take a client at its word about what it holds; where the word is wrong, its next task fails and it is sent
        everything. `versions`: parameter -> version; anything else counts as nothing."""
        if client in self.client_samples and isinstance(versions, Mapping) and len(versions) <= MAX_CLAIMS:
            texts = {key: text for key, text in versions.items() if isinstance(key, str) and isinstance(text, str)}
            self._holdings.confirm(client, {key: text for key, text in texts.items() if len(key) + len(text) < 256})

    def forget(self, clients: Iterable[str]) -> None:
        """Rely no longer on what these clients hold: they answered a server that is gone, or were started anew."""
        for client in clients:
            self._holdings.forget(client)

    def _collector(self, pending: dict[str, Task]) -> ProfileCollector | UpdateCollector:
        if self._profile_pending:
            depths = self._missing_depths()
            return ProfileCollector(
                pending,
                shape=self.shape,
                depths=depths,
                samples=self.client_samples,
                with_scores=self._run.start_layer is None,
                max_weight=self._max_weight,
                norm_limit=self.config.norm_limit,
                halves=self.config.update_format == "int8",
            )
        closed_form = self._plan.fits_classifier(self._stage())
        method = self._method
        return UpdateCollector(
            pending,
            refuse=method.refuse_statistics if closed_form else method.refuse_update,
            before=None if closed_form else method.before,
            samples=self.client_samples,
            last_size=self._run.typical_size,
            max_weight=self._max_weight,
            decode=decode if self.config.update_format == "int8" and not closed_form else None,
        )

    def _finish_profile(
        self, collector: ProfileCollector, rejected: dict[str, str], bytes_down: int, bytes_up: int
    ) -> Summary:
        rejected = dict(sorted((rejected | collector.finish()).items()))
        attempt, accepted = self._run.profile_attempts, bool(collector.counted)
        if accepted:
            if self._run.start_layer is None:
                self._run.start_layer = collector.start_layer(self.config.threshold, self._plan.start_layers)
            dropped = self._model.add_stand_ins(collector.stand_ins(ridge=self.config.stand_in_ridge))
            self._holdings.forget_keys(dropped)
        self._run.profile_attempts += 1
        return Summary(
            "profile",
            attempt,
            accepted,
            clients=tuple(collector.counted),
            rejected=rejected,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
            start_layer=self._run.start_layer,
            scores=tuple(collector.scores.tolist()) if accepted else (),
            follows_round=self._run.round_id - 1,
        )

    def _finish_round(
        self, collector: UpdateCollector, rejected: dict[str, str], bytes_down: int, bytes_up: int
    ) -> Summary:
        stage, round_id = self._stage(), self._run.round_id
        config = self.config
        rejected |= collector.finish(
            norm_limit=self.combiner.norm_limit,
            aggregation=config.aggregation,
            hostile_share=config.hostile_share,
        )
        if self._plan.fits_classifier(stage):
            statistics = {client: reply.arrays for client, reply in collector.usable.items()}
            out_of_line = self._model.refuse_sizes(statistics, limit=config.norm_limit)
            collector.drop(out_of_line)
            rejected |= out_of_line
        if collector.usable and self._plan.fits_classifier(stage):
            if not self._explains(collector.mean_loss()):
                given = [collector.usable[name].arrays for name in sorted(collector.usable)]
                self._model.fit_classifier(given, weight=self._plan.row_weight(round_id))
        elif collector.usable:
            self._model.update(self.combiner.combine(collector.usable, stage, round_id))
        self._run.typical_size = collector.typical_size
        if config.late_replies != "drop":
            heard = {*collector.heard, *collector.late}
            self._run.awaited.finish(round_id, silent=set(collector.asked) - heard, heard=heard)
        self._run.round_id += 1
        return Summary(
            "round",
            round_id,
            bool(collector.usable),
            clients=tuple(sorted(collector.usable)),
            rejected=dict(sorted(rejected.items())),
            bytes_down=bytes_down,
            bytes_up=bytes_up,
            stage=stage,
            stale=dict(sorted(collector.late.items())),
            loss=collector.mean_loss(),
            totals=collector.totals(),
            start_layer=self._run.start_layer,
            typical_norm=self._run.typical_norm,
        )

    def _explains(self, loss: float | None) -> bool:
        """Whether this round would fit again a classifier that already explains the rows of this round's clients."""
        refits = self._run.round_id >= self._plan.first_refit_round
        shape = self._model.classifier_shape
        return refits and loss is not None and shape is not None and classifier_fit.explains(loss, shape[0])

    # -- save and restore ----------------------------------------------------------------------------------------

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """Everything the rest of the run depends on: parameters and stand-ins (shared), and a JSON-able record."""
        progress = self._run.progress(self._model.stand_in_depths(), classifier_is_fitted=self._model.is_fitted)
        return {**self._model.state(), **self._model.statistics()}, saved.to_record(self._identity(), progress)

    def restore(self, arrays: Arrays, record: Mapping[str, Any]) -> None:
        """Go on from a saved state of the same run. Clients are taken to hold nothing; a run that stopped after too
        many rejected rounds gets as many new chances. Raises CorruptFile or ConfigError and then changes nothing."""
        progress = saved.from_record(record, self._identity())
        saved.require_start_layer(progress, self._plan)
        own, depths = self._model.state(), progress.stand_in_depths
        kept = self._model.take_factor(arrays)
        others = {key: array for key, array in arrays.items() if key not in kept}
        stand_ins = saved.require_arrays(others, own, depths=depths, hidden_size=self.shape.hidden_size)
        self._model.update({key: arrays[key] for key in own})
        early = saved.refitted_too_early(record["run"]["rounds"], self._plan, progress.round_id)
        fitted = progress.classifier_is_fitted
        self._model.set_statistics({key: arrays[key] for key in stand_ins}, {} if early else kept, is_fitted=fitted)
        self._holdings = Holdings()
        self._pending = None
        self._run = RunState.restored(progress)
        if not self.done:
            self._run.setbacks.renew()

    # -- small parts ---------------------------------------------------------------------------------------------

    @property
    def _profile_pending(self) -> bool:
        """Whether clients must be asked for statistics before the next round."""
        return not self.done and (self._run.start_layer is None or bool(self._missing_depths()))

    def _missing_depths(self) -> range:
        """Depths to fit stand-ins for before the next round, no more than one exchange carries."""
        if self._run.start_layer is None:
            return range(0)
        at_most = stand_in.depths_at_once(self.shape.hidden_size)
        fitted = self._model.stand_in_depths()
        return self._plan.missing_depths(self._run.round_id, self._run.start_layer, fitted, at_most=at_most)

    def _known_start_layer(self) -> int:
        assert self._run.start_layer is not None, "the start layer is chosen before the first round"
        return self._run.start_layer

    def _stage(self) -> Stage:
        return self._plan.stage(self._run.round_id, self._known_start_layer())

    def _cohort(self, count: int, stream: int, index: int) -> list[str]:
        return sample_clients(self.client_samples, count, seed=self.config.seed, stream=stream, index=index)

    def _identity(self) -> dict[str, Any]:
        return saved.identity(self.config, self.shape, self.task, self.client_samples, self.client_windows, self.base)
