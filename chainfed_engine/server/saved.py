"""The scalar part of a saved server: what run it belongs to and how far it got. In and out: plain JSON-able dicts.

A record comes from disk: types and ranges are checked before a field is used, and a record of another run (other
seed, method, clients, model) is refused instead of being continued into something nobody asked for.
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import ConfigError, CorruptFile
from chainfed_engine.schedule import num_probe_rounds, num_refit_rounds, schedule_kind
from chainfed_engine.server.checks import refuse_arrays
from chainfed_engine.server.plan import Plan
from chainfed_engine.types import Arrays, ModelShape, TaskKind, stand_in_key

FORMAT = "chainfed-server-state"
VERSION = 5
# What may change between a kill and the resume, because no bit of the result depends on it.
_FREE_FIELDS = {
    "budget",
    "stand_in_rows",
    "encrypt_cache",
    "eval_every",
    "rounds",
    "deadline_seconds",
    "quorum",
    "grace_seconds",
}  # rounds have a rule of their own, see `_require_rounds`


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run got. `stand_in_depths`: where stand-ins are fitted; `classifier_is_fitted`: in closed form, ever.

    `rejections`, `rejected_profiles`: one line of reasons for each round, each profile rejected in a row up to now.
    `typical_norm`, `typical_steps`: medians of the last cohort that was large enough to tell (see quarantine.py).
    `awaited`: client -> the round it owes an answer to (see lateness.py).
    """

    round_id: int
    profile_attempts: int
    start_layer: int | None
    stand_in_depths: tuple[int, ...]
    classifier_is_fitted: bool
    rejections: tuple[str, ...]
    rejected_profiles: tuple[str, ...]
    only_non_finite: bool
    typical_norm: float | None
    typical_steps: float | None
    awaited: Mapping[str, int]


def identity(
    config: ChainConfig,
    shape: ModelShape,
    task: TaskKind,
    client_samples: Mapping[str, int],
    client_windows: Mapping[str, int],
    base: str,
) -> dict[str, Any]:
    """What must be equal for a run to be continued; JSON-able."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_FIELDS}
    samples = dict(client_samples)
    model = dataclasses.asdict(shape)
    return {
        "config": fields,
        "rounds": config.rounds,
        "model": model,
        "task": task,
        "client_samples": samples,
        "client_windows": dict(client_windows),
        "base": base,
    }


def to_record(run: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """JSON-able; equal after a round trip through JSON."""
    record = {"format": FORMAT, "version": VERSION, "run": run, "progress": dataclasses.asdict(progress)}
    loaded: dict[str, Any] = json.loads(json.dumps(record))
    return loaded


def from_record(record: Mapping[str, Any], run: Mapping[str, Any]) -> Progress:
    """Raises CorruptFile for a record that is none, ConfigError for one of another run."""
    if not isinstance(record, Mapping) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise CorruptFile(f"saved state: expected a record of format {FORMAT} version {VERSION}; start a new run")
    _require_same_run(record.get("run"), json.loads(json.dumps(run)))
    progress = record.get("progress")
    names = {field.name for field in dataclasses.fields(Progress)}
    if not isinstance(progress, Mapping) or set(progress) != names:
        raise CorruptFile(f"saved state: expected progress with {sorted(names)}, got {progress!r:.200}")
    for name in ("round_id", "profile_attempts"):
        _require(_is_count(progress[name]), name, progress[name])
    for name in ("only_non_finite", "classifier_is_fitted"):
        _require(isinstance(progress[name], bool), name, progress[name])
    _require(
        progress["start_layer"] is None or _is_count(progress["start_layer"]), "start_layer", progress["start_layer"]
    )
    for name in ("typical_norm", "typical_steps"):
        value = progress[name]
        _require(value is None or (type(value) is float and 0 <= value < math.inf), name, value)
    awaited = progress["awaited"]
    owed = (
        isinstance(awaited, dict)
        and set(awaited) <= set(run["client_samples"])
        and all(map(_is_count, awaited.values()))
    )
    _require(owed, "awaited", awaited)
    _require_rounds(record["run"]["rounds"], run, progress["round_id"], progress["start_layer"])
    lines = {name: progress[name] for name in ("rejections", "rejected_profiles")}
    for name, found in lines.items():
        _require(isinstance(found, list) and all(isinstance(text, str) for text in found), name, found)
    depths = progress["stand_in_depths"]
    _require(isinstance(depths, list) and all(map(_is_count, depths)), "stand_in_depths", depths)
    told = {name: tuple(found) for name, found in lines.items()}
    return Progress(**{**progress, **told, "stand_in_depths": tuple(depths)})


def require_arrays(arrays: Arrays, like: Arrays, *, depths: Collection[int], hidden_size: int) -> list[str]:
    """The saved parameters must be those of `like`, all else stand-ins of exactly `depths`, whose keys are returned.

    A stand-in is `bias` [D] with `weight` [D, D], or with `in_weight` [r, D] and `out_weight` [D, r]; float32.
    """
    stand_in_keys = sorted(arrays.keys() - like.keys())
    expected: dict[str, tuple[int, ...]] = {key: array.shape for key, array in like.items()}
    for depth in depths:
        expected[stand_in_key(depth, "bias")] = (hidden_size,)
        low_rank = arrays.get(stand_in_key(depth, "in_weight"))
        if low_rank is None:
            expected[stand_in_key(depth, "weight")] = (hidden_size, hidden_size)
        else:
            expected[stand_in_key(depth, "in_weight")] = (len(low_rank), hidden_size)
            expected[stand_in_key(depth, "out_weight")] = (hidden_size, len(low_rank))
    reason = refuse_arrays(arrays, {key: np.broadcast_to(np.float32(0), shape) for key, shape in expected.items()})
    if reason is not None:
        raise CorruptFile(f"saved state: {reason}; start a new run")
    return stand_in_keys


def require_start_layer(progress: Progress, plan: Plan) -> None:
    """The start layer and the stand-ins must be those that `plan` can lead to."""
    fixed = plan.fixed_start_layer()
    found = progress.start_layer
    if found != fixed and (fixed is not None or found is None):
        raise CorruptFile(f"saved state: start layer {found} does not belong to this run; start a new run")
    if found is None:
        possible = range(0)
        if progress.round_id > 0:
            raise CorruptFile("saved state: rounds without a start layer; start a new run")
    else:
        plan.stage(0, found)  # raises where the layer is beyond the model
        possible = plan.stand_in_depths(found)
    if not set(progress.stand_in_depths) <= set(possible):
        raise CorruptFile(f"saved state: stand-ins at depths {progress.stand_in_depths} of a run without them")


def refitted_too_early(saved_rounds: int, plan: Plan, round_id: int) -> bool:
    """Whether the classifier was refitted where `plan`, of more rounds, still trains windows. What clients gave for it
    is to be let go: they give the same rows again at the end, and rows that count twice are fitted twice as closely."""
    before = dataclasses.replace(plan, config=dataclasses.replace(plan.config, rounds=saved_rounds))
    return before.first_refit_round < min(round_id, plan.first_refit_round)


def _require_rounds(saved_rounds: int, run: Mapping[str, Any], round_id: int, start_layer: int | None) -> None:
    """The number of rounds may change, but not below those that were run. Where they are not the first ones of a run of
    the new length, a warning says so. Raises ConfigError."""
    config, rounds = run["config"], run["rounds"]
    if rounds == saved_rounds:
        return
    change = f"resume: rounds was {saved_rounds} in the saved run and is {rounds} now"
    if rounds < round_id:
        raise ConfigError(f"{change}; {round_id} were run already: raise [chain] rounds or start a new run")
    rest = (config["probe_rounds"], run["task"], config["aggregation"])
    before, now = (num_probe_rounds(rest[0], count, *rest[1:]) for count in (saved_rounds, rounds))
    if config["method"] == "chain" and (before > 0) != (now > 0):
        raise ConfigError(f"{change}; that changes whether some of them probe: fix probe_rounds or start a new run")
    if round_id and not _is_beginning(saved_rounds, run, (before, now), start_layer):
        warnings.warn(
            f"{change}; the {round_id} that were run keep the learning rates and windows of the shorter or longer run, "
            "so the result differs from that of a run of this length from the start",
            stacklevel=2,
        )


def _is_beginning(
    saved_rounds: int, run: Mapping[str, Any], probe_rounds: tuple[int, int], start_layer: int | None
) -> bool:
    """Whether the rounds of a run of `saved_rounds` are the first of one of `run["rounds"]`: a continuous chain ends at
    the top, so it goes on by whole sweeps; train-and-freeze and a decaying rate share all rounds out."""
    config, rounds = run["config"], run["rounds"]
    if config["lr_decay"] != "none":
        return False
    if config["method"] != "chain":
        return True
    refits = (num_refit_rounds(config["refit_rounds"], probe_rounds[0], count) for count in (saved_rounds, rounds))
    sweep = run["model"]["num_layers"] - config["window"] - (start_layer or 0) + 1
    return (
        schedule_kind(config["schedule"], run["task"], run["model"]["num_layers"], config["window"]) == "continuous"
        and probe_rounds[0] == probe_rounds[1]
        and not any(refits)
        and (start_layer is None or (rounds - saved_rounds) % sweep == 0)
    )


def _require_same_run(saved: Any, run: Mapping[str, Any]) -> None:
    if not isinstance(saved, Mapping) or any(not isinstance(saved.get(name), type(run[name])) for name in run):
        raise CorruptFile("saved state: the description of its run is damaged; start a new run")
    for name, value in saved["config"].items():
        if name in run["config"] and run["config"][name] != value:
            raise ConfigError(
                f"resume: {name} was {value!r} in the saved run and is {run['config'][name]!r} now; "
                "put it back or start a new run"
            )
    if saved["config"].keys() != run["config"].keys():
        raise CorruptFile("saved state: its configuration has other fields than this version's; start a new run")
    for name, what in (
        ("model", "model shape"),
        ("task", "task"),
        ("client_samples", "clients or their samples"),
        ("client_windows", "layers that clients can train"),
        ("base", "frozen model's weights"),
    ):
        if saved[name] != run[name]:
            raise ConfigError(f"resume: the {what} differ from the saved run's; use the same model and data")


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise CorruptFile(f"saved state: progress.{name} cannot be {value!r:.100}; start a new run")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
