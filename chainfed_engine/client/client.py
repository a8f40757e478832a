"""One client: `handle(task)` trains, profiles or evaluates on its own data and answers. Free of transports.

In: a `Task` with the arrays this client lacks. Out: a `Reply` with the stage's trained parameters, statistics or
scores; whatever goes wrong by the engine's own account becomes a reply with one line of error. Owns its encoded
data, the parameters it holds, and its cache folder; the trainer may be shared with other clients that take turns.
"""

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from chainfed_engine.client.held import HeldParameters
from chainfed_engine.client.trainer import Trainer
from chainfed_engine.data import EncodedData, batches, order_by_length
from chainfed_engine.errors import ChainfedError, DataError, InvalidArgument, NonFiniteLoss
from chainfed_engine.types import Arrays, Batch, Reply, Task
from chainfed_engine.update_format import encode, halved, unpacked


class Client:
    """`cache_dir`: a folder of this client alone (None: no cache). `pad_id`: the tokenizer's padding token. `base`:
    fingerprint of the frozen model. `max_window`: layers this client can train at once (None: as many as are asked).
    `held_dir`: a folder of this client alone for the parameters it was sent (None: they live as long as the object).

    Raises DataError without samples. Fewer samples than a batch make one smaller batch.
    """

    def __init__(
        self,
        name: str,
        data: EncodedData,
        trainer: Trainer,
        *,
        cache_dir: Path | None = None,
        pad_id: int = 0,
        base: str = "",
        max_window: int | None = None,
        held_dir: Path | None = None,
    ) -> None:
        if len(data) == 0:
            raise DataError(f"client {name}: expected at least one sample, got none; drop the client or give it data")
        self.name = name
        self._data = data
        self._trainer = trainer
        self._cache_dir = cache_dir
        self._pad_id = pad_id
        self._base = base
        self.max_window = max_window
        self._held = HeldParameters(held_dir)

    @property
    def num_samples(self) -> int:
        return len(self._data)

    @property
    def held_versions(self) -> dict[str, str]:
        """Parameter -> version of everything this client need not be sent again."""
        return self._held.versions

    def forget_outdated(self, current: Mapping[str, str]) -> None:
        """Free held parameters whose version is not the one in `current`; hundreds of clients in one process hold no
        more than the server does."""
        self._held.forget_outdated(current)

    def handle(self, task: Task) -> Reply:
        """Do the task. Errors of the engine become `Reply.error`; any other exception is a bug and passes through."""
        try:
            if task.client != self.name:
                raise InvalidArgument(f"expected a task for {self.name}, got one for {task.client}")
            if task.base != self._base:
                raise InvalidArgument(
                    f"the run's frozen model is {task.base[:12] or 'unnamed'}, this client has {self._base[:12]}; "
                    "convert the same checkpoint with the same options on both sides"
                )
            parameters = unpacked(self._held.take(task))
            match task.kind:
                case "train":
                    arrays, metrics = self._train(task, parameters)
                case "profile":
                    arrays, metrics = self._profile(task, parameters)
                case "evaluate":
                    arrays, metrics = {}, self._evaluate(task, parameters)
                case unknown:
                    raise InvalidArgument(f"expected a task to train, profile or evaluate, got {unknown!r}")
        except ChainfedError as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            return Reply(
                task.kind, self.name, task.round_id, self.num_samples, error=line, stage=task.stage, base=self._base
            )
        return Reply(
            task.kind, self.name, task.round_id, self.num_samples, arrays, metrics, stage=task.stage, base=self._base
        )

    def _train(self, task: Task, parameters: Arrays) -> tuple[Arrays, dict[str, float]]:
        if task.stage is None:
            raise InvalidArgument("train: expected a stage, got none")
        if task.settings.get("closed_form"):
            return self._classifier_statistics(task, parameters)
        lr = _number(task, "lr")
        trainer, started = self._trainer, time.perf_counter()
        trainer.begin(task.stage, parameters, cache_dir=self._cache_dir, lr=lr, settings=task.settings)
        try:
            # The cache is filled in groups that never change: its records depend on how samples were grouped.
            data = self._training_data(task)
            costs = trainer.prepare(list(batches(data, _integer(task, "batch_size"), seed=None, pad_id=self._pad_id)))
            prepared = time.perf_counter()
            loss, num_steps = self._run_steps(task, data)
            # Copies, because the trainer's own buffers serve the next client.
            trained = {key: np.array(value, copy=True) for key, value in trainer.trained().items()}
            if task.settings.get("update_format") == "int8":
                trained = encode(trained, parameters, seed=_integer(task, "seed"))
        finally:
            trainer.end()
        metrics = {
            **costs,
            "loss": loss,
            "steps": float(num_steps),
            "prepare_seconds": prepared - started,
            "train_seconds": time.perf_counter() - prepared,
        }
        return trained, metrics

    def _classifier_statistics(self, task: Task, parameters: Arrays) -> tuple[Arrays, dict[str, float]]:
        """One pass of the whole model over the samples that the task names."""
        started = time.perf_counter()
        order = np.random.default_rng(_integer(task, "seed")).permutation(len(self._data))
        first = _integer(task, "first_row")
        picked = order[first : first + _integer(task, "num_rows")]
        if not len(picked):
            raise InvalidArgument(f"train: the task asks for samples from {first} on of {len(self._data)}")
        data = self._data.subset(np.sort(picked))
        some = batches(data, _integer(task, "batch_size"), seed=None, pad_id=self._pad_id)
        statistics, loss = self._trainer.classifier_statistics(some, parameters)
        statistics = _as_wanted(statistics, task)
        return statistics, {"loss": loss, "steps": 0.0, "train_seconds": time.perf_counter() - started}

    def _training_data(self, task: Task) -> EncodedData:
        """All samples; with fewer steps than batches, that many of the cache's groups, drawn anew for every task, so
        that the prefix runs over no sample that is not trained on."""
        size, max_steps = _integer(task, "batch_size"), _integer(task, "max_local_steps")
        num_groups = -(-len(self._data) // max(size, 1))
        if not 0 < max_steps < num_groups:
            return self._data
        drawn = np.random.default_rng(_integer(task, "seed")).choice(num_groups, size=max_steps, replace=False)
        picked = [order_by_length(self._data)[group * size : (group + 1) * size] for group in drawn]
        return self._data.subset(np.sort(np.concatenate(picked)))

    def _run_steps(self, task: Task, data: EncodedData) -> tuple[float, int]:
        """Mean loss over the samples seen, and the number of optimizer steps."""
        weighted, num_seen, num_steps = 0.0, 0, 0
        max_steps = _integer(task, "max_local_steps")
        for epoch in range(_integer(task, "local_epochs")):
            remaining = max_steps - num_steps if max_steps else None
            shuffled = batches(
                data, _integer(task, "batch_size"), seed=_integer(task, "seed") + epoch, pad_id=self._pad_id
            )
            for batch in islice(shuffled, remaining):
                loss = self._trainer.step(batch)
                if not math.isfinite(loss):
                    raise NonFiniteLoss(f"loss became {loss} at step {num_steps}; try a lower lr")
                weighted += loss * len(batch.sample_ids)
                num_seen += len(batch.sample_ids)
                num_steps += 1
        if num_steps == 0:
            raise InvalidArgument("train: the task asks for no step; expected local_epochs of at least 1")
        return weighted / num_seen, num_steps

    def _profile(self, task: Task, parameters: Arrays) -> tuple[Arrays, dict[str, float]]:
        some = list(islice(self._batches(task, seed=_integer(task, "seed")), _integer(task, "num_batches")))
        depths = range(_integer(task, "depth_start"), _integer(task, "depth_stop"))
        started = time.perf_counter()
        max_rows = _integer(task, "max_rows")
        with_scores = _integer(task, "with_scores") > 0
        statistics = self._trainer.profile(some, parameters, depths=depths, max_rows=max_rows, with_scores=with_scores)
        statistics = _as_wanted(statistics, task)
        return statistics, {"profile_seconds": time.perf_counter() - started}

    def _evaluate(self, task: Task, parameters: Arrays) -> dict[str, float]:
        return dict(self._trainer.evaluate(self._batches(task, seed=None), parameters))

    def _batches(self, task: Task, *, seed: int | None) -> Iterator[Batch]:
        return batches(self._data, _integer(task, "batch_size"), seed=seed, pad_id=self._pad_id)


def _as_wanted(statistics: Arrays, task: Task) -> Arrays:
    return halved(statistics) if task.settings.get("update_format") == "int8" else statistics


def _number(task: Task, name: str) -> float:
    value = task.settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgument(f"task {task.kind}: expected setting {name} as a number, got {value!r}")
    return float(value)


def _integer(task: Task, name: str) -> int:
    value = task.settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"task {task.kind}: expected setting {name} as a whole number >= 0, got {value!r}")
    return value
