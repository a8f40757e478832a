"""What a client asks of the machinery that trains: `step.StageTrainer` keeps this contract. No I/O of its own here."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from chainfed_engine.types import Arrays, Batch, Scalar, Stage


class Trainer(Protocol):
    """One frozen base that may serve many clients in turn. Arrays handed in are shared and not to be written to."""

    def begin(
        self,
        stage: Stage,
        arrays: Arrays,
        *,
        cache_dir: Path | None,
        lr: float,
        settings: Mapping[str, Scalar] | None = None,
    ) -> None:
        """Load every parameter the stage needs; fresh optimizer. `settings` may name the `start_layer` and say
        whether the stage `trains_classifier`."""

    def prepare(self, batches: Sequence[Batch]) -> Mapping[str, float]:
        """Fill or advance the boundary cache; returns what it cost, `prefix_layers_run` for one."""

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the loss."""

    def trained(self) -> Arrays:
        """The stage's trained parameters, float32."""

    def end(self) -> None:
        """Close what `begin` opened; harmless when nothing is open."""

    def profile(
        self,
        batches: Sequence[Batch],
        arrays: Arrays,
        *,
        depths: Collection[int] = (),
        max_rows: int | None = None,
        with_scores: bool = True,
    ) -> Arrays:
        """`cka` float64 [num_layers] (`with_scores`) and the stand-in statistics at `depths`, of at most `max_rows`
        rows."""

    def classifier_statistics(self, batches: Iterable[Batch], arrays: Arrays) -> tuple[Arrays, float]:
        """The least-squares factor of final features and labels, and the classifier's mean loss on them."""

    def evaluate(self, batches: Iterable[Batch], arrays: Arrays) -> Mapping[str, float]:
        """`accuracy` or `token_loss`, and `num_samples`."""
