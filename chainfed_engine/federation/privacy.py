"""How much a run has given away about any one client: epsilon by number of rounds. In: configuration; out: epsilon.

Clients are drawn in a fixed number without replacement and every round is one Gaussian release, composed over rounds
and therefore windows by Renyi differential privacy (dp-accounting, Google). Two runs are neighbours if one client's
data are replaced: its clipped change may turn round, so the sum moves by twice the clip.
"""

from functools import lru_cache

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError


def check_accountant(config: ChainConfig) -> None:
    """Raises ConfigError where the run wants privacy and there is nothing to account for it with."""
    if config.dp_noise:
        epsilon(config, num_clients=2, rounds=1)


def epsilon(config: ChainConfig, *, num_clients: int, rounds: int) -> float | None:
    """Epsilon at `dp_delta` after so many rounds of a federation of so many clients; None without privacy."""
    if not config.dp_noise:
        return None
    asked = min(config.clients_per_round, num_clients)
    return _epsilon(config.dp_noise, config.dp_delta, asked, num_clients, rounds)


@lru_cache(maxsize=1024)
def _epsilon(noise: float, delta: float, asked: int, num_clients: int, rounds: int) -> float:
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError(
            "[federation] dp_noise: needs the accountant: pip install 'chainfed-engine[privacy]'"
        ) from error
    if rounds == 0:
        return 0.0
    release = dp_accounting.GaussianDpEvent(noise / 2)
    if asked < num_clients:
        release = dp_accounting.SampledWithoutReplacementDpEvent(num_clients, asked, release)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(release, rounds)
    return float(accountant.get_epsilon(delta))
