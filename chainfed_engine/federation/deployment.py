"""The server's side of a deployed federation: meet the sites, tell them how to train, run the rounds.

In: a courier (Flower's grid), CONFIG.toml and the sites' names. Out: a run directory, as `chainfed run` writes it. The
server holds the store too: the untrained adapters come from it, and evaluation, if CONFIG.toml names data for it.
`outcome.json` tells the process that started this one how it stands.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chainfed_engine import data
from chainfed_engine._version import __version__
from chainfed_engine.client import Client
from chainfed_engine.config import RunConfig
from chainfed_engine.config_file import dump_config, load_config
from chainfed_engine.data import EncodedData, Tokenizer
from chainfed_engine.errors import ChainfedError, ConfigError, InvalidArgument
from chainfed_engine.federation.codec import pack
from chainfed_engine.federation.files import make_folder, write_text
from chainfed_engine.federation.inputs import complete, encode, keep_labels, plan_run, with_own_window
from chainfed_engine.federation.patience import Patience
from chainfed_engine.federation.run import fit
from chainfed_engine.federation.run_directory import RunDirectory, check_free
from chainfed_engine.federation.session import open_trainer
from chainfed_engine.federation.site import setup_record
from chainfed_engine.federation.transport_flower import Courier, FlowerTransport
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.server import Server

OUTCOME_FILE = "outcome.json"
_END_SECONDS = 15.0  # that sites get to hear of a run's end; those that do not only see the server go


def serve_rounds(
    courier: Courier, *, config_path: str, out: str, sites: Sequence[str], resume: bool, meet_seconds: float
) -> None:
    """The whole run. Errors of the engine end it with a line in outcome.json; any other exception passes through."""
    directory = Path(out)
    make_folder(directory)
    _report(directory, "running", "")
    try:
        config = check_deployable(load_config(config_path))
        _serve(courier, config, directory, sorted(sites), resume, meet_seconds)
    except ChainfedError as error:
        _report(directory, "failed", " ".join(f"{type(error).__name__}: {error}".split()))
    except BaseException as error:
        _report(directory, "failed", " ".join(f"{type(error).__name__}: {error}".split()))
        raise
    else:
        _report(directory, "done", "")


def check_deployable(config: RunConfig) -> RunConfig:
    """Raises ConfigError for a run that a network could hold up for ever."""
    if not config.chain.deadline_seconds:
        raise ConfigError(
            "[federation] deadline_seconds: a round over a network needs a deadline, got none; for example 600"
        )
    return config


def _serve(
    courier: Courier, config: RunConfig, out: Path, sites: Sequence[str], resume: bool, meet_seconds: float
) -> None:
    check_free(out, resume=resume)
    transport = FlowerTransport(courier, Patience.of(config.chain))
    seconds = min(meet_seconds, _END_SECONDS)
    try:
        _run(transport, config, out, sites, resume, meet_seconds)
    except ChainfedError as error:
        _say_end(transport, sites, f"it failed: {error}", seconds)
        raise
    _say_end(transport, sites, "it is done", seconds)


def _run(
    transport: FlowerTransport, config: RunConfig, out: Path, sites: Sequence[str], resume: bool, meet_seconds: float
) -> None:
    info = StoreInfo.read(config.store)
    labels = _meet(transport, sites, info.fingerprint, config, meet_seconds)
    tokenizer = Tokenizer.load(config.store, info.config)
    evaluation = None
    if config.data.eval is not None:
        held_out = complete(config, data.read_table(config.data.eval, config.data.columns))
        evaluation = encode(config, held_out, tokenizer, labels or None)
    config = with_own_window(config, out, resume=resume)
    plan = plan_run(config, {}, evaluation)
    chain = plan.recorded_in(config.chain)
    ready = _set_up(transport, sites, setup_record(replace(config.chain, window=chain.window), labels), meet_seconds)
    trainer = open_trainer(Path(config.store), chain, plan, config.data.task, num_labels=len(labels))
    try:
        server = Server(
            chain,
            trainer.model.shape,
            trainer.parameters.export(),
            {site: _count(record, "num_samples") for site, record in ready.items()},
            config.data.task,
            client_windows={
                site: _count(record, "max_window")
                for site, record in ready.items()
                if record.get("max_window") is not None
            },
            base=info.fingerprint,
        )
        text = dump_config(replace(config, chain=chain))
        with RunDirectory(out, config_text=text, resume=resume) as directory:
            keep_labels(out, labels, resume=resume)
            held = {site: record.get("held") for site, record in ready.items()}
            evaluator = _evaluator(evaluation, trainer, tokenizer, info.fingerprint)
            fit(server, transport, evaluator, directory, resume=resume, held=held)
    finally:
        trainer.end()
        trainer.model.store.close()


def _evaluator(evaluation: EncodedData | None, trainer: Any, tokenizer: Tokenizer, base: str) -> Client | None:
    if evaluation is None:
        return None
    return Client("evaluator", evaluation, trainer, pad_id=tokenizer.pad_id, base=base)


def _meet(transport: FlowerTransport, sites: Sequence[str], base: str, config: RunConfig, seconds: float) -> list[str]:
    """Wait until every site said hello; the labels of all of them, sorted."""
    hellos = _ask_all(transport, sites, pack({"message": "hello"}, {}), seconds)
    names: set[str] = set()
    for site, hello in hellos.items():
        if hello.get("site") != site:
            raise InvalidArgument(f"site {site}: its key is registered under this name, it calls itself {hello!r:.80}")
        if hello.get("version") != __version__:
            raise InvalidArgument(
                f"site {site}: expected chainfed-engine {__version__}, got {hello.get('version')!r:.40}; install that"
            )
        if hello.get("base") != base:
            raise InvalidArgument(
                f"site {site}: its frozen model is {hello.get('base')!s:.12}, the server's {base[:12]}; convert the "
                "same checkpoint with the same options on both sides"
            )
        if hello.get("task") != config.data.task:
            raise InvalidArgument(f"site {site}: expected {config.data.task} data, got {hello.get('task')!r:.40}")
        labels = hello.get("labels")
        if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
            raise InvalidArgument(f"site {site}: expected the names of its labels, got {labels!r:.80}")
        names |= set(labels)
    return sorted(names)


def _set_up(
    transport: FlowerTransport, sites: Sequence[str], setup: Mapping[str, Any], seconds: float
) -> dict[str, Mapping[str, Any]]:
    return _ask_all(transport, sites, pack({"message": "setup", "setup": setup}, {}), seconds)


def _say_end(transport: FlowerTransport, sites: Sequence[str], outcome: str, seconds: float) -> None:
    """Tell everybody who is there that the run is over, so that a server that goes now does not look lost."""
    message = pack({"message": "end", "outcome": " ".join(outcome.split())}, {})
    for _ in transport.ask(dict.fromkeys(sites, message), Patience(deadline_seconds=seconds).start(len(sites))):
        pass


def _ask_all(
    transport: FlowerTransport, sites: Sequence[str], message: tuple[bytes, bytes], seconds: float
) -> dict[str, Mapping[str, Any]]:
    """Everybody's answer. Raises InvalidArgument naming those who gave none and what the others said."""
    if not sites:
        raise InvalidArgument("sites: expected at least one name, got none")
    wait = Patience(deadline_seconds=seconds).start(len(sites))
    answers = {answer.site: answer for answer in transport.ask(dict.fromkeys(sites, message), wait)}
    wrong = {site: answers[site].error for site in sites if site in answers and answers[site].error is not None}
    missing = [site for site in sites if site not in answers]
    if wrong or missing:
        said = "; ".join(f"{site}: {error}" for site, error in sorted(wrong.items()))
        gone = f"no answer of {', '.join(missing)} within {seconds:g} seconds" if missing else ""
        raise InvalidArgument(f"sites: {'; '.join(part for part in (said, gone) if part)}; start them and try again")
    return {site: answers[site].record for site in sites}


def _count(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 1 <= value < 2**40:
        raise InvalidArgument(f"site {record.get('site')!r:.80}: expected {name} as a whole number, got {value!r:.40}")
    return value


def _report(out: Path, status: str, error: str) -> None:
    write_text(out / OUTCOME_FILE, json.dumps({"status": status, "error": error, "pid": os.getpid()}))
