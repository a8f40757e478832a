"""Where a run stands beside its parameters: rounds behind it, the start layer, what went wrong, who owes an answer."""

from collections.abc import Collection
from dataclasses import dataclass, field

from chainfed_engine.server.lateness import Awaited
from chainfed_engine.server.quarantine import Size
from chainfed_engine.server.saved import Progress
from chainfed_engine.server.setbacks import Setbacks


@dataclass
class RunState:
    """`round_id`: the next round, 0-based. `start_layer`: None until it has been chosen from profiles.
    `typical_size`: of the updates of the last cohort that could tell."""

    start_layer: int | None
    round_id: int = 0
    profile_attempts: int = 0
    setbacks: Setbacks = field(default_factory=Setbacks)
    awaited: Awaited = field(default_factory=Awaited)
    typical_size: Size | None = None

    @classmethod
    def restored(cls, progress: Progress) -> "RunState":
        """As it was saved."""
        size = None
        if progress.typical_norm is not None and progress.typical_steps is not None:
            size = Size(progress.typical_norm, progress.typical_steps)
        return cls(
            start_layer=progress.start_layer,
            round_id=progress.round_id,
            profile_attempts=progress.profile_attempts,
            setbacks=Setbacks(progress.rejections, progress.rejected_profiles, progress.only_non_finite),
            awaited=Awaited(progress.awaited),
            typical_size=size,
        )

    def progress(self, stand_in_depths: Collection[int], *, classifier_is_fitted: bool) -> Progress:
        """As it is saved; `stand_in_depths`: where stand-ins are fitted."""
        return Progress(
            round_id=self.round_id,
            profile_attempts=self.profile_attempts,
            start_layer=self.start_layer,
            stand_in_depths=tuple(sorted(stand_in_depths)),
            classifier_is_fitted=classifier_is_fitted,
            rejections=tuple(self.setbacks.rounds),
            rejected_profiles=tuple(self.setbacks.profiles),
            only_non_finite=self.setbacks.only_non_finite,
            typical_norm=self.typical_norm,
            typical_steps=None if self.typical_size is None else self.typical_size.steps,
            awaited=dict(self.awaited.rounds),
        )

    @property
    def typical_norm(self) -> float | None:
        return None if self.typical_size is None else self.typical_size.norm
