"""One stage on one site: boundary in, window, objective, optimizer, update out. It reads like the picture.

    batch -> prefix -> boundary -> window + adapters -> objective -> optimizer -> update

`StageTrainer` holds one frozen base and every adapter; a stage says which of them are trained. It knows nothing of
rounds, schedules or other sites. `begin` loads what the stage needs, `prepare` brings the boundary cache to the
window, `step` is one optimizer update, `trained` is the site's update.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chainfed_engine import classifier_fit, native
from chainfed_engine.adapters import Adapter, build_adapter
from chainfed_engine.cache_cipher import CacheCipher
from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import InvalidArgument, NonFiniteLoss
from chainfed_engine.memory.lean import kept_heap_bytes
from chainfed_engine.model.classifier import Classifier
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.place import batch_on
from chainfed_engine.objective import (
    CausalReadout,
    ClassificationReadout,
    Objective,
    accuracy_and_macro_f1,
    class_counts,
    require_labels,
)
from chainfed_engine.objective.stand_in import StandIn
from chainfed_engine.optimizer import AdamW
from chainfed_engine.parameters import Parameters
from chainfed_engine.prefix import DEFAULT_FILL_BYTES, Prefix, is_active
from chainfed_engine.prefix.supply import BoundarySupply
from chainfed_engine.profile import profile
from chainfed_engine.types import IGNORE_INDEX, Arrays, Batch, Scalar, Stage, TaskKind, Window
from chainfed_engine.window import TrainedWindow


class StageTrainer:
    """Trains one stage at a time over one frozen base. Not thread-safe; sites that share it take turns.

    `num_labels`: classes, for classification. `micro_batch`: sequences at a time in a step and in every pass through
    the layers (0: the whole batch).
    """

    def __init__(
        self,
        model: FrozenModel,
        config: ChainConfig,
        *,
        task: TaskKind,
        num_labels: int = 0,
        cache_format: str = "f32",
        micro_batch: int = 0,
        recompute: bool = False,
        fill_bytes: int = DEFAULT_FILL_BYTES,
    ) -> None:
        self.model, self.config, self.task = model, config, task
        self.micro_batch, self.recompute = micro_batch, recompute
        self.classifier: Classifier | None = None
        if task == "classification":
            if num_labels < 2:
                raise InvalidArgument(f"num_labels: a classification task needs at least 2 classes, got {num_labels}")
            classifier = model.new_classifier(num_labels, config.pooling, seed=config.seed).to(model.device)
            self.classifier = classifier
            self.readout: ClassificationReadout | CausalReadout = ClassificationReadout(
                classifier.pooling, classifier.pool, model.final_norm, classifier.score
            )
        else:
            if model.head is None:
                raise InvalidArgument(
                    f"task: {model.shape.architecture} has no LM head; give labels for classification"
                )
            self.readout = CausalReadout(model.final_norm, model.head)
        self.adapters: dict[int, Adapter] = {
            layer: self.new_adapter(layer).to(model.device) for layer in range(model.num_layers)
        }
        self.parameters = Parameters(self.adapters, self.classifier)
        self._cipher = CacheCipher() if config.encrypt_cache else None
        self.prefix = Prefix(model, self.adapters, cache_format=cache_format, fill_bytes=fill_bytes)
        self.end_objective = Objective(self.readout, None, [], 0.0, at_top=True)
        self.window: TrainedWindow | None = None
        self.above: TrainedWindow | None = None
        self._supply: BoundarySupply | None = None

    def new_adapter(self, layer: int) -> Adapter:
        """The untrained adapter of a layer."""
        config, model = self.config, self.model
        return build_adapter(config.adapter, model.family, model.shape, layer, config.adapter_size, config.seed)

    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        """Load every parameter the stage needs, open the site's cache, start a fresh optimizer."""
        self.end()
        self.stage, window = stage, stage.window
        self.parameters.load(arrays)
        origin = window.start if stage.kind == "probe" else int((settings or {}).get("start_layer", window.start))
        if window.start > 0:
            if cache_dir is None:
                raise InvalidArgument(f"begin: a window that starts at layer {window.start} needs a cache directory")
            self._supply = BoundarySupply(
                self.prefix,
                cache_dir,
                depth=window.start,
                origin=origin,
                model_key=self.model.record_key,
                adapters_hash=self.parameters.hash_below,
                cipher=self._cipher,
            )
        if self.window is None or self.window.window != window:
            if self.window is not None:
                self.window.close()
            self.window = None  # the old window's small parameters go before the new one's come
            self.window = TrainedWindow(self.model, window, self.adapters, recompute=self.recompute)
        self.objective = self._objective(arrays)
        self.above = self._layers_above(window)
        self._step_index = 0
        wanted = bool((settings or {}).get("trains_classifier", True))
        self._trains_classifier = wanted and not StandIn.holds_classifier(arrays, window.stop)
        trained = self.parameters.train_only(window, classifier=self._trains_classifier)
        self.optimizer = AdamW(trained, lr=lr, weight_decay=self.config.weight_decay)

    def prepare(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Bring the boundary cache of these samples to the window; `prefix_layers_run` counts layers over the data."""
        layers_run = self._supply.prepare(list(self._parts(batches))) if self._supply is not None else 0
        if layers_run:
            native.trim_heap()  # the prefix's buffers must not lie beside the window's
        return {"prefix_layers_run": float(layers_run)}

    def step(self, batch: Batch) -> float:
        """One optimizer update on one batch, micro-batch by micro-batch; returns the loss before it."""
        if self.window is None:
            raise InvalidArgument("step: no stage has begun; call begin first")
        foresees = self.above is not None and self._step_index % self.config.foresight_every == 0
        self._step_index += 1
        total = 0.0
        for micro, share in self._micro_batches(batch):
            context = self.model.context(micro)
            hidden = self.window(self.boundary(micro), context)
            if foresees and self.above is not None:
                hidden = self.above(hidden, context)
            objective = self.end_objective if foresees else self.objective
            loss = objective(hidden, batch_on(micro, hidden.device)) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            # Blocks of a shorter batch lie in the heap, those of a longer one beside it: free, the first must not stay.
            del hidden, loss
            native.trim_heap(above_bytes=kept_heap_bytes())
        if not math.isfinite(total):
            self.optimizer.zero_grad()
            raise NonFiniteLoss(
                f"loss became {total} in the window {self.stage.window}; lower [train] lr (now {self.lr})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def boundary(self, batch: Batch) -> Tensor:
        """Hidden state f32 [B, T, D] entering the window: cached, or computed and cached."""
        return self.model.embed(batch) if self._supply is None else self._supply.get(batch)

    def trained(self) -> Arrays:
        """The stage's trained parameters, float32 copies: the window's adapters, and the classifier if that is."""
        return self.parameters.export(self.stage.window, classifier=self._trains_classifier)

    def end(self) -> None:
        """Close the site's cache, in which samples added by `step` stay; what the steps' heap kept goes back."""
        if self._supply is not None:
            self._supply.close()
            self._supply = None
        native.trim_heap()  # holes between the buffers of sequences of other lengths

    def profile(
        self,
        batches: Sequence[Batch],
        arrays: Arrays,
        *,
        depths: Collection[int] = (),
        max_rows: int | None = None,
        with_scores: bool = True,
    ) -> Arrays:
        """CKA score of every layer (`with_scores`) and stand-in statistics for `depths`, under the parameters in
        `arrays`; at most `max_rows` rows, spread evenly (None: all), and no more than this site's own plan allows."""
        self.parameters.load(arrays)
        limits = [limit for limit in (max_rows, self.config.stand_in_rows) if limit is not None]
        statistics = profile(
            self.prefix,
            list(self._parts(batches)),
            self.readout,
            depths=depths,
            normalise=self.normalise,
            max_rows=min(limits, default=None),
            with_scores=with_scores,
        )
        native.trim_heap()
        return statistics

    @torch.no_grad()
    def classifier_statistics(self, batches: Iterable[Batch], arrays: Arrays) -> tuple[Arrays, float]:
        """What the closed-form classifier is fitted on: the least-squares factor of the final features and labels of
        these batches under the parameters in `arrays`, and the mean loss of the classifier as it is."""
        if self.classifier is None or not isinstance(self.readout, ClassificationReadout):
            raise InvalidArgument("classifier_statistics: expected a classification task, got a causal LM")
        self.parameters.load(arrays)
        readout, classifier = self.readout, self.classifier
        losses: list[tuple[float, int]] = []

        def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch, hidden in self.prefix.sweep(self._parts(batches), range(self.model.num_layers)):
                batch, labels = batch_on(batch, hidden.device), require_labels(batch)
                losses.append((float(readout.scores(hidden, batch)[0].sum()), len(labels)))
                features = classifier.transformed(readout.features(hidden, batch))
                yield features.cpu().numpy(), labels.cpu().numpy()

        statistics = classifier_fit.gathered(rows(), classifier.num_labels)
        native.trim_heap()
        return statistics, sum(loss for loss, _ in losses) / sum(count for _, count in losses)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], arrays: Arrays) -> dict[str, float]:
        """`accuracy`, `macro_f1` (the classes count alike) and `loss`, or `token_loss`, of the whole model with all
        adapters; `num_samples` seen."""
        self.parameters.load(arrays)
        samples, targets, loss = 0, 0, 0.0
        num_labels = self.classifier.num_labels if self.classifier is not None else 0
        counts = torch.zeros(3, num_labels, dtype=torch.int64)
        for batch, hidden in self.prefix.sweep(self._parts(batches), range(self.model.num_layers)):
            samples += len(batch.sample_ids)
            batch = batch_on(batch, hidden.device)
            if isinstance(self.readout, CausalReadout):
                losses = self.readout.token_losses(hidden, batch)
            else:
                losses, predicted = self.readout.scores(hidden, batch)
                counts += class_counts(require_labels(batch), predicted, num_labels)
            targets += len(losses)
            loss += float(losses.double().sum())
        native.trim_heap()
        if targets == 0:
            raise InvalidArgument("evaluate: the data holds no labelled sample")
        if self.task == "causal-lm":
            return {"token_loss": loss / targets, "num_target_tokens": float(targets), "num_samples": float(samples)}
        accuracy, macro_f1 = accuracy_and_macro_f1(counts)
        return {"accuracy": accuracy, "macro_f1": macro_f1, "loss": loss / samples, "num_samples": float(samples)}

    @property
    def lr(self) -> float:
        return self.optimizer.lr

    @property
    def normalise(self) -> bool:
        """Whether the stand-in takes rows at unit length: pre-norm models, whose head ignores a row's length."""
        return self.model.is_pre_norm

    def _objective(self, arrays: Arrays) -> Objective:
        stop = self.stage.window.stop
        at_top = stop == self.model.num_layers
        stand_in = None if at_top or not self.config.uses_stand_in else StandIn(arrays, stop, normalise=self.normalise)
        later = [self.adapters[layer] for layer in range(stop, self.model.num_layers)]
        active = [adapter for adapter in later if is_active(adapter)]
        return Objective(self.readout, stand_in, active, self.config.auxiliary_weight, at_top)

    def _layers_above(self, window: Window) -> TrainedWindow | None:
        """The layers above the window for streamed foresight, one of them in memory at a time: the backward pass runs
        each again from its input. Their adapters are read, not trained."""
        above = Window(window.stop, self.model.num_layers)
        if self.stage.kind == "probe" or not self.config.foresight_every or above.size == 0:
            return None
        if self.above is not None and self.above.window == above:
            return self.above
        self.above = None  # its small parameters go before the new ones come
        return TrainedWindow(self.model, above, self.adapters, recompute=True)

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Parts of the batch and each one's share of its targets, so that gradients add up to the whole batch's."""
        total = _num_targets(batch)
        if total == 0:
            raise InvalidArgument("step: no token of the batch carries a label; drop it or raise sequence_length")
        for part in self._parts([take_rows(batch, torch.arange(len(batch.sample_ids)))]):
            share = _num_targets(part) / total
            if share:
                yield part, share

    def _parts(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches in micro-batches: no pass may hold more tokens at once than a step does. Sequences of like
        lengths go together, so that little is padded."""
        for batch in batches:
            count = len(batch.sample_ids)
            size = self.micro_batch or count
            if count <= size:
                yield batch
                continue
            longest_first = batch.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
            for rows in torch.split(longest_first, size):
                yield take_rows(batch, rows)


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The sequences `rows` (indices) of a batch, cut to the longest of them."""
    longest = int(batch.attention_mask[rows].sum(dim=1).max())
    labels = batch.labels
    if labels is not None:
        labels = labels[rows, :longest] if labels.ndim == 2 else labels[rows]
    types = None if batch.token_type_ids is None else batch.token_type_ids[rows, :longest]
    names = [batch.sample_ids[row] for row in rows.tolist()]
    return Batch(batch.input_ids[rows, :longest], batch.attention_mask[rows, :longest], labels, names, types)


def _num_targets(batch: Batch) -> int:
    if batch.labels is None:
        raise InvalidArgument("step: the batch has no labels; give `labels` with every training batch")
    if batch.labels.ndim == 1:
        return len(batch.labels)
    return int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
