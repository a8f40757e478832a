"""Every exception the engine raises on purpose: one class a cause, all under `ChainfedError`.

A message says what was expected, what came, and what to do. The command line prints it as one line and exits
with code 2; anything else that escapes is a bug and keeps its traceback.
"""


class ChainfedError(Exception):
    """Base of all errors of the engine."""


class InvalidArgument(ChainfedError, ValueError):
    """A caller's value, array or batch does not keep the contract of the function."""


class ConfigError(ChainfedError, ValueError):
    """A configuration file or option: unknown key, wrong type, value out of range."""


class DataError(ChainfedError, ValueError):
    """A data file or table: missing column, unknown label, empty client, text that cannot be used."""


class UnsupportedModel(ChainfedError, ValueError):
    """A checkpoint of an architecture, tensor type or layout that the engine does not run."""


class CorruptFile(ChainfedError, ValueError):
    """Bytes on disk that do not keep the promises of their format: truncated, checksum, bad header."""


class StorageError(ChainfedError, OSError):
    """The file system refused: missing, unwritable, full. Names the path and the bytes needed."""


class MemoryBudgetExceeded(ChainfedError, MemoryError):
    """The plan does not fit the byte budget; names the smallest budget that would do."""


class InconsistentUpdates(ChainfedError, ValueError):
    """Client updates that cannot be aggregated: other keys, shapes, dtypes, or no usable update at all."""


class NonFiniteLoss(ChainfedError, ArithmeticError):
    """The loss or an update became NaN or infinite; the state before the round is kept."""


class UnsupportedHardware(ChainfedError, RuntimeError):
    """A SIMD level or device this machine or build does not have."""


class NativeUnavailable(ChainfedError, ImportError):
    """The compiled core is missing or of another version; says how to build it."""
