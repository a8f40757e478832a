"""`ChainTrainer`: the piece a training script imports. One site, no federation, any source of batches.

    trainer = ChainTrainer("store/", ChainConfig(rounds=8), num_labels=2)
    trainer.profile(first_batch)                  # start layer by CKA; rows for the stand-ins
    while not trainer.done:
        for batch in loader: trainer.step(batch)
        trainer.advance()                         # next window; the cache moves up by one layer

Batches are dicts as tokenisers give them: `input_ids`, `attention_mask` int64 [B, T] padded on the right, `labels`
int64 [B] (classification) or [B, T] (causal LM, -100 where no loss), optionally `token_type_ids` and `sample_ids`
(one text a sequence; default: a hash of its tokens).
"""

import hashlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainfed_engine import classifier_fit, stand_in
from chainfed_engine.callbacks import Callback, notify
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError, InvalidArgument
from chainfed_engine.memory.meter import peak_rss_bytes
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.place import find_place
from chainfed_engine.model.store import LayerStore
from chainfed_engine.schedule import (
    Schedule,
    learning_rate,
    num_probe_rounds,
    num_refit_rounds,
    num_window_layers,
    schedule_kind,
)
from chainfed_engine.start_layer import choose_start_layer, start_layers
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Arrays, Batch, Stage, TaskKind, classifier_key


class ChainTrainer:
    """Trains the chain on batches of one site; `round` in the configuration means one position of the window.

    `store`: a layer store's path or an open FrozenModel. `num_labels`: 0 for a causal LM. `cache_dir`: where boundary
    caches lie (default: a temporary folder that `close` removes). `callbacks` see a `profile`, a `round` and a `memory`
    event for each position of the window, an `eval` for each evaluation and `end` from `close`
    (chainfed_engine.callbacks). Nothing is planned or streamed here: every layer that was read stays in memory. Raises
    ConfigError for a window that does not fit, and for a budget, which only a planned run keeps.
    """

    def __init__(
        self,
        store: str | Path | FrozenModel,
        config: ChainConfig | None = None,
        *,
        num_labels: int = 0,
        cache_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config or ChainConfig()
        if self.config.budget is not None:
            raise ConfigError(
                "[memory] budget: ChainTrainer neither plans nor streams, so it cannot keep one; leave it out, or "
                "train with cfe.fit or `chainfed run`"
            )
        self.model = store if isinstance(store, FrozenModel) else _opened(Path(store), self.config)
        task: TaskKind = "classification" if num_labels else "causal-lm"
        cache_format = "int8" if self.config.cache_format == "auto" else self.config.cache_format
        self._trainer = StageTrainer(
            self.model, self.config, task=task, num_labels=num_labels, cache_format=cache_format
        )
        self._temporary = tempfile.TemporaryDirectory(prefix="chainfed-") if cache_dir is None else None
        self._cache_dir = Path(self._temporary.name if self._temporary else str(cache_dir))
        self._arrays: Arrays = self._trainer.parameters.export()
        self._calibration: list[Batch] = []
        self._schedule: Schedule | None = None
        self._classifier_factor: np.ndarray[Any, Any] | None = None  # of all batches given for it
        self._row_weight = 1.0
        self._is_fitted = False
        self._stage_begun = False
        self._callbacks = callbacks
        self._losses: list[float] = []
        self._seconds = 0.0
        self.round_id = 0

    def profile(self, batch: Mapping[str, Any] | Batch) -> dict[str, Any]:
        """One streamed pass: `cka` score of each layer and the `start_layer` it leads to; starts the chain there.

        May be called again before the first step to add rows for the stand-ins.
        """
        if self.round_id or self._stage_begun:
            raise InvalidArgument("profile: the chain has started; profile before the first step")
        self._calibration.append(as_batch(batch))
        scores = self._trainer.profile(self._calibration, self._arrays)["cka"]
        start = self.config.start_layer
        if start is None:
            allowed = start_layers(self._trainer.task, self.model.num_layers, self._window_layers)
            start = choose_start_layer(scores, threshold=self.config.threshold, allowed=allowed)
        self._schedule = self._make_schedule(start)
        found = {"cka": [float(score) for score in scores], "start_layer": start}
        self._notify("profile", **found)
        return found

    def step(self, batch: Mapping[str, Any] | Batch) -> float:
        """One optimizer update of the current window; returns the loss. The first call profiles if nobody has.

        In a probe stage nothing is updated: `advance` fits the classifier in closed form to the batches it was given.
        """
        batch = as_batch(batch)
        if self._schedule is None:
            self.profile(batch)
        probes = self.stage.kind == "probe"
        if not probes and not self._stage_begun:
            self._begin()
        started = time.perf_counter()
        self._losses.append(self._probe(batch) if probes else self._trainer.step(batch))
        self._seconds += time.perf_counter() - started
        return self._losses[-1]

    def advance(self) -> Stage | None:
        """Freeze the window where it is, move to the next, push the cache up; None when the schedule is over."""
        if self._schedule is None:
            raise InvalidArgument("advance: nothing was trained yet; call step first")
        if self._classifier_factor is not None and self._schedule.stage(self.round_id).kind == "probe":
            num_labels = len(self._arrays[classifier_key("out_weight")])
            bias = classifier_key("out_bias") in self._arrays
            loss, refits = self._mean_loss(), self._row_weight != 1.0
            if not (refits and loss is not None and classifier_fit.explains(loss, num_labels)):
                counted = classifier_fit.weighted(self._classifier_factor, 1 / self._row_weight)
                self._arrays.update(classifier_fit.solve(counted, num_labels, bias=bias))
            self._is_fitted = True
        if self._stage_begun:
            self._arrays.update(self._trainer.trained())
            self._trainer.end()
            self._stage_begun = False
            self._row_weight = classifier_fit.REFIT_WEIGHT
        self._report_round()
        self.round_id += 1
        if self.done:
            return None
        if self.stage.kind == "probe":
            return self.stage
        self._begin()
        self._trainer.prepare([])
        return self.stage

    @property
    def stage(self) -> Stage:
        """Where the window stands."""
        if self._schedule is None:
            raise InvalidArgument("stage: the start layer is not known yet; call profile or step first")
        return self._schedule.stage(self.round_id)

    @property
    def done(self) -> bool:
        return self.round_id >= self.config.rounds

    def evaluate(self, batches: Iterable[Mapping[str, Any] | Batch]) -> dict[str, float]:
        """`accuracy`, `macro_f1` and `loss`, or `token_loss`, of the whole model as trained so far."""
        scores = self._trainer.evaluate((as_batch(batch) for batch in batches), self.state_dict())
        self._notify("eval", **scores)
        return scores

    def state_dict(self) -> Arrays:
        """Every adapter and the classifier as float32 arrays, the current window's latest values included."""
        current = self._trainer.trained() if self._stage_begun else {}
        return {**self._arrays, **current}

    def load_state_dict(self, arrays: Arrays) -> None:
        """Take over parameters saved by `state_dict`; unknown keys or shapes raise InvalidArgument."""
        unknown = sorted(set(arrays) - set(self._arrays))
        if unknown:
            raise InvalidArgument(
                f"load_state_dict: unknown key {unknown[0]}; expected keys like {next(iter(self._arrays))}"
            )
        self._trainer.parameters.load(arrays)
        self._arrays.update(arrays)

    def close(self) -> None:
        self._trainer.end()
        if self._temporary is not None:
            self._temporary.cleanup()
        self._notify("end", error=None)

    def __enter__(self) -> "ChainTrainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _probe(self, batch: Batch) -> float:
        statistics, loss = self._trainer.classifier_statistics([batch], self._arrays)
        known = [] if self._classifier_factor is None else [self._classifier_factor]
        factor = classifier_fit.weighted(statistics[classifier_fit.FACTOR_KEY], self._row_weight)
        self._classifier_factor = classifier_fit.merge([*known, factor])
        return loss

    def _mean_loss(self) -> float | None:
        """Of this stage's steps so far; None without one."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def _report_round(self) -> None:
        """`round` and `memory` events of the stage that ends; `seconds`: the steps alone, without the caller's data."""
        window = self.stage.window
        about = {"loss": self._mean_loss(), "window": [window.start, window.stop], "steps": len(self._losses)}
        self._notify("round", **about, start_layer=self._schedule_start(), seconds={"train": self._seconds})
        self._notify("memory", peak_rss_bytes=peak_rss_bytes())
        self._losses, self._seconds = [], 0.0

    def _schedule_start(self) -> int | None:
        return self._schedule.start_layer if self._schedule else None

    def _notify(self, kind: str, **fields: Any) -> None:
        number = self.round_id if kind in ("round", "memory") else self.round_id - 1
        notify(self._callbacks, {"event": kind, "round": number, "rounds": self.config.rounds, **fields})

    def _begin(self) -> None:
        stage = self.stage
        stop = stage.window.stop
        stand_ins: Arrays = {}
        if self.config.uses_stand_in and stop < self.model.num_layers:
            sums = self._trainer.profile(self._calibration, self._arrays, depths=[stop])
            sums.pop("cka")
            stand_ins = self._with_classifier(stand_in.solve(sums, ridge=self.config.stand_in_ridge), stop)
        origin = self._schedule.start_layer if self._schedule else stage.window.start
        self._trainer.begin(
            stage,
            {**self._arrays, **stand_ins},
            cache_dir=self._cache_dir,
            lr=learning_rate(self.config.lr, self.config.lr_decay, self.round_id, self.config.rounds),
            settings={"start_layer": origin, "trains_classifier": not self._keeps_classifier("never")},
        )
        self._stage_begun = True

    def _with_classifier(self, solved: Arrays, depth: int) -> Arrays:
        if not self._keeps_classifier("never", "at-top"):
            return solved
        out = (self._arrays[classifier_key(name)] for name in ("out_weight", "out_bias"))
        return stand_in.with_classifier(solved, depth, *out)

    def _keeps_classifier(self, *choices: str) -> bool:
        """Whether `train_classifier` is one of these, where it has a say."""
        fitted = self._is_fitted and stand_in.is_linear_readout(self.model.shape.architecture, self._arrays)
        return fitted and self.config.train_classifier in choices and self.config.foresight_every == 0

    @property
    def _window_layers(self) -> int:
        config = self.config
        return num_window_layers(config.window, self.model.num_layers, config.start_layer)

    def _make_schedule(self, start_layer: int) -> Schedule:
        config = self.config
        probe_rounds = num_probe_rounds(config.probe_rounds, config.rounds, self._trainer.task, config.aggregation)
        refit_rounds = num_refit_rounds(config.refit_rounds, probe_rounds, config.rounds)
        layers, window = self.model.num_layers, self._window_layers
        kind = schedule_kind(config.schedule, self._trainer.task, layers, window)
        return Schedule(kind, layers, window, start_layer, config.rounds, probe_rounds, refit_rounds)


def as_batch(batch: Mapping[str, Any] | Batch) -> Batch:
    """A `Batch` of a tokeniser's dict of int64 tensors. Raises InvalidArgument naming the key and what it should be."""
    if isinstance(batch, Batch):
        return batch
    ids = _tensor(batch, "input_ids")
    mask = _tensor(batch, "attention_mask") if "attention_mask" in batch else torch.ones_like(ids)
    labels = _tensor(batch, "labels") if batch.get("labels") is not None else None
    types = _tensor(batch, "token_type_ids") if batch.get("token_type_ids") is not None else None
    if (
        ids.ndim != 2
        or mask.shape != ids.shape
        or (labels is not None and labels.shape not in (ids.shape, ids.shape[:1]))
    ):
        shapes = {name: list(value.shape) for name, value in (("input_ids", ids), ("attention_mask", mask))}
        raise InvalidArgument(
            f"batch: expected input_ids and attention_mask [B, T], labels [B] or [B, T]; got {shapes}"
        )
    sample_ids = batch.get("sample_ids")
    sample_ids = token_hashes(ids, mask, types) if sample_ids is None else [str(sample_id) for sample_id in sample_ids]
    if len(sample_ids) != len(ids):
        raise InvalidArgument(f"batch: expected one sample id a sequence ({len(ids)}), got {len(sample_ids)}")
    return Batch(ids, mask, labels, sample_ids, types)


def token_hashes(ids: Tensor, mask: Tensor, types: Tensor | None) -> list[str]:
    """A stable name for each sequence: sha256 of its tokens (and token types), padding left out."""
    names = []
    for row in range(len(ids)):
        length = int(mask[row].sum())
        digest = hashlib.sha256(ids[row, :length].contiguous().numpy().tobytes())
        if types is not None:
            digest.update(types[row, :length].contiguous().numpy().tobytes())
        names.append(digest.hexdigest())
    return names


def _tensor(batch: Mapping[str, Any], name: str) -> Tensor:
    value = batch.get(name)
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise InvalidArgument(
            f"batch: expected {name} as an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    return value


def _opened(store: Path, config: ChainConfig) -> FrozenModel:
    return FrozenModel(LayerStore.open(store, place=find_place(config.device)))
