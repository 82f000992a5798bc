"""Mistakes that a user can mend.

Each message says what was found, what was expected and what to do. The command line prints the
message alone; anything that is not a ``NexusError`` is a fault of this program and keeps its
traceback.
"""


class NexusError(Exception):
    """Base of all errors that the command line reports without a traceback."""


class ConfigError(NexusError):
    """A recipe, override or option that can't be understood or contradicts another."""


class DataError(NexusError):
    """Text that is missing, damaged, or not of the expected form."""


class CheckpointError(NexusError):
    """A model directory or training state that is incomplete, damaged or of another kind."""


class IncompatibleModelsError(NexusError):
    """Dense models that can't become experts of one model."""


class UnsupportedModelError(NexusError):
    """A model whose computation a Qwen2-MoE checkpoint can't express."""


class OutputExistsError(NexusError):
    """An output path that is taken: nothing is overwritten silently."""


class OutputBusyError(NexusError):
    """An output that another process is writing at this moment."""


class LayoutError(NexusError):
    """A combination of ranks, ZeRO stage and expert parallelism that can't run."""


class TrainingError(NexusError):
    """A run that can't go on: no progress, losses that are not numbers, lost ranks."""


class BadBatchesError(NexusError):
    """Several batches in a row without a finite gradient; the state behind them is saved."""


class InsufficientMemoryError(NexusError):
    """Work that does not fit into memory in the smallest pieces there are."""


class LoadingMemoryError(NexusError):
    """A model whose weights do not fit whole."""


class ServingError(NexusError):
    """A checkpoint that another program can't load, or would compute wrongly."""


def one_line(error: BaseException) -> str:
    """Return what a library says as one line of bearable length."""
    # transformers' messages can list every tensor of a model, or end in advice on upgrading
    return " ".join(str(error).split())[:300]
