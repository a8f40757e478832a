"""Getting a trained model out: into the files of other tools (`export`), or into a model in memory (`load_adapted`).

Enters: a run directory. Leaves: a PEFT adapter, a GGUF adapter for llama.cpp, a merged Hugging Face checkpoint, or a
plain transformers model with the adapters in it. The folder is not called `export`, because importing it would then
hide the function of that name in the package.
"""

from chainfed_engine.exports.adapted import AdaptedClassifier, load_adapted
from chainfed_engine.exports.save import save_run
from chainfed_engine.exports.targets import TARGETS, Exported, export

__all__ = ["TARGETS", "AdaptedClassifier", "Exported", "export", "load_adapted", "save_run"]
