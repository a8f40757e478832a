"""Every exception the engine raises on purpose: one class a cause, all under `ChainfedError`.

A message says what was expected, what came, and what to do; where it does not say the last, the class's own remedy is
added. The command line prints it as one line and exits
with code 2; anything else that escapes is a bug and keeps its traceback.
"""

from typing import ClassVar


class ChainfedError(Exception):
    """Base of all errors of the engine. `remedy`: what to do when the message itself does not say."""

    remedy: ClassVar[str] = "see what `chainfed doctor` says and report both"

    def __str__(self) -> str:
        message = super().__str__()
        says_what_to_do = any(mark in message for mark in ("; ", "expected", " must "))
        return message if says_what_to_do or not message else f"{message}; {self.remedy}"


class InvalidArgument(ChainfedError, ValueError):
    """A caller's value, array or batch does not keep the contract of the function."""

    remedy = "change the argument that is named"


class ConfigError(ChainfedError, ValueError):
    """A configuration file or option: unknown key, wrong type, value out of range."""

    remedy = "correct the configuration (keys, defaults and ranges: chainfed_engine/config.py)"


class DataError(ChainfedError, ValueError):
    """A data file or table: missing column, unknown label, empty client, text that cannot be used."""

    remedy = "correct the data file or name another one"


class UnsupportedModel(ChainfedError, ValueError):
    """A checkpoint of an architecture, tensor type or layout that the engine does not run."""

    remedy = "use a plain checkpoint of BERT, RoBERTa, DistilBERT, Llama, Mistral, Qwen2 or Qwen3"


class CorruptFile(ChainfedError, ValueError):
    """Bytes on disk that do not keep the promises of their format: truncated, checksum, bad header."""

    remedy = "the file is damaged or was changed: copy, download or make it again"


class StorageError(ChainfedError, OSError):
    """The file system refused: missing, unwritable, full. Names the path and the bytes needed."""

    remedy = "check the path, its permissions and the free space"


class MemoryBudgetExceeded(ChainfedError, MemoryError):
    """The plan does not fit the byte budget; names the smallest budget that would do."""

    remedy = "raise the budget, or lower window, batch_size or sequence_length"


class InconsistentUpdates(ChainfedError, ValueError):
    """Client updates that cannot be aggregated: other keys, shapes, dtypes, or no usable update at all."""

    remedy = "let all clients run the same version, model and configuration"


class NonFiniteLoss(ChainfedError, ArithmeticError):
    """The loss or an update became NaN or infinite; the state before the round is kept."""

    remedy = "lower [train] lr"


class UnsupportedHardware(ChainfedError, RuntimeError):
    """A SIMD level or device this machine or build does not have."""

    remedy = "choose a level that `chainfed doctor` lists, or unset CHAINFED_SIMD"


class NativeUnavailable(ChainfedError, ImportError):
    """The compiled core is missing or of another version; says how to build it."""

    remedy = "build it with `pip install .`"
