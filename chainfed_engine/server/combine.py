"""What becomes of a round's usable updates: the method's own combination, or a private average. Checked at the start.

In: usable replies by client; out: new values of global arrays. Raises ConfigError for rules that do not go together.
"""

from collections.abc import Mapping
from typing import Literal

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError, InvalidArgument
from chainfed_engine.server.global_model import GlobalModel
from chainfed_engine.server.methods import Averaging, method_class
from chainfed_engine.server.plan import Plan
from chainfed_engine.server.privacy import private_average
from chainfed_engine.types import Arrays, Reply, Stage


def update_format(config: ChainConfig) -> Literal["f32", "int8"]:
    """What trained parameters travel as; "auto": eight bits wherever the rules that were chosen allow it."""
    if config.update_format != "auto":
        return config.update_format
    allowed = method_class(config.method).averages_values and config.late_replies == "drop"
    return "int8" if allowed else "f32"


class Combiner:
    """`noise_key`: 32 bytes that nobody else knows, to be set before the first round of a private run."""

    def __init__(
        self, config: ChainConfig, plan: Plan, model: GlobalModel, method: Averaging, *, num_clients: int
    ) -> None:
        self._config, self._model, self._method = config, model, method
        self._asked = min(config.clients_per_round, num_clients)
        self.noise_key: bytes | None = None
        if config.aggregation in ("median", "trimmed-mean") and not method.averages_values:
            raise ConfigError(
                f"[federation] aggregation: {config.aggregation} combines values of parameters, which clients of "
                f'{config.method} do not send; use "mean" or "multi-krum"'
            )
        if config.update_format != "f32" and not method.averages_values:
            raise ConfigError(
                f"[federation] update_format: {config.update_format} says how far parameters moved, and clients of "
                f'{config.method} do not send parameters; use "f32"'
            )
        if config.late_replies != "drop" and (config.update_format != "f32" or not method.averages_values):
            raise ConfigError(
                '[federation] late_replies: "discount" averages trained values; it goes with update_format = "f32" and '
                'a method whose clients send parameters; use "drop"'
            )
        if config.dp_noise:
            self._check_private(plan)

    @property
    def norm_limit(self) -> float:
        """With privacy the clip bounds what a client can do; to refuse one for the size of others would be a leak."""
        return 0.0 if self._config.dp_noise else self._config.norm_limit

    def combine(self, usable: Mapping[str, Reply], stage: Stage, round_id: int) -> Arrays:
        config = self._config
        if not config.dp_noise:
            return self._method.combine(usable)
        if self.noise_key is None:
            raise InvalidArgument("receive: a private run needs a noise key before its first round")
        return private_average(
            usable,
            self._model.trained(stage),
            asked=self._asked,
            clip=config.dp_clip,
            noise=config.dp_noise,
            key=self.noise_key,
            round_id=round_id,
        )

    def _check_private(self, plan: Plan) -> None:
        if self._config.late_replies != "drop":
            raise ConfigError(
                '[federation] dp_noise: expected late_replies = "drop"; a client may count in rounds that drew it alone'
            )
        start = plan.fixed_start_layer()
        profiles = start is None or bool(plan.stand_in_depths(start)) or plan.probe_rounds + plan.refit_rounds > 0
        if profiles or not self._method.averages_values or self._config.aggregation != "mean":
            raise ConfigError(
                "[federation] dp_noise: expected a fixed start_layer, stand_in = false, probe_rounds = 0 (statistics "
                'are not protected), aggregation = "mean" and a method whose clients send parameters'
            )
