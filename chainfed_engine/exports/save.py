"""What a `ChainTrainer` has trained as a run directory, so that it can be evaluated and exported like any other.

Enters: a trainer, a path that does not exist yet, the names of the classes. Leaves: `config.toml`,
`adapters.safetensors` and `labels.json` in that folder.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from chainfed_engine.chain_trainer import ChainTrainer
from chainfed_engine.config import DataConfig, RunConfig
from chainfed_engine.config_file import dump_config
from chainfed_engine.errors import InvalidArgument
from chainfed_engine.exports.folder import new_folder
from chainfed_engine.federation.files import write_arrays
from chainfed_engine.federation.inputs import LABELS_FILE
from chainfed_engine.federation.run_directory import ADAPTERS_FORMAT, ADAPTERS_VERSION
from chainfed_engine.types import classifier_key


def save_run(trainer: ChainTrainer, path: str | Path, labels: Sequence[str] = ()) -> Path:
    """Write the parameters as trained so far; `labels`: name of class 0, 1, ... (a causal LM has none).

    `export`, `load_adapted` and `evaluate` (columns `text` and `label`, or `prompt` and `response`) take the folder.
    Raises InvalidArgument for another number of labels than the trainer has, StorageError when `path` is taken.
    """
    arrays = trainer.state_dict()
    weight = arrays.get(classifier_key("out_weight"))
    num_labels = 0 if weight is None else len(weight)
    if len(labels) != num_labels:
        raise InvalidArgument(f"save_run: expected a name for each of {num_labels} classes, got {len(labels)}")
    data = DataConfig(
        train="(in memory)", label="label" if num_labels else None, response=None if num_labels else "response"
    )
    info = trainer.model.store.info
    config = RunConfig(trainer.config, data, str(info.path.absolute()))
    about = {"adapter": trainer.config.adapter, "method": trainer.config.method, "task": data.task}
    record = {"format": ADAPTERS_FORMAT, "version": ADAPTERS_VERSION, "rounds": trainer.round_id, **about}
    with new_folder(Path(path)) as folder:
        write_arrays(folder / "adapters.safetensors", arrays, record)
        (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
        if num_labels:
            (folder / LABELS_FILE).write_text(json.dumps(list(labels)), encoding="utf-8")
    return Path(path)
