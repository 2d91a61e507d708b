"""Errors that name the parameter, the rank and the remedy."""


class ConfigurationError(ValueError):
    """A setting cannot work; raised at construction, before any communication."""


class NothingGainedError(ConfigurationError):
    """The model is too small to be compressed as asked for."""


class RankMismatchError(RuntimeError):
    """Ranks disagree about settings, parameters or the selection, or a message was damaged on its way.

    Raised alike on all ranks where they exchange in collectives. Where neighbours alone exchange, by who received
    what was not sent; the others are told that this rank has ended.
    """


class RankLostError(RuntimeError):
    """This rank waits for one that has ended or does not answer; names the rank, the step and the operation."""
