"""Exceptions as a log may show them: what happened and where, without words that may be a caller's.

Decides whose messages are believed to hold nothing of a request: our own errors, whose sentences are written here and
carry numbers and names; the operating system's; torch's own types, since the device sees token ids only. Any other
exception may quote what it stumbled over (``ValueError: could not convert 'the text'``), so that its type and its lines
of code have to do. Must never know what raised it.
"""

from __future__ import annotations

from embedserve.errors import EmbedServeError

__all__ = ["without_messages"]

_TRUSTED = (EmbedServeError, OSError, MemoryError)
_TRUSTED_MODULES = ("torch", "embedserve")
_DEPTH_MAX = 16
"""Causes of causes that are kept; a longer chain is a loop or says nothing more."""


def without_messages(error: BaseException) -> BaseException:
    """``error`` with its chain, where each exception whose message may hold a text has lost it.

    A twin has the type's name, the traceback, the cause and the context of its original. An exception that is trusted
    is returned as it is unless something behind it has to change.
    """
    return _twin(error, _DEPTH_MAX)


def _twin(error: BaseException, depth: int) -> BaseException:
    cause = _behind(error.__cause__, depth)
    context = None if error.__suppress_context__ else _behind(error.__context__, depth)
    if _trusted(error) and cause is error.__cause__ and (context is error.__context__ or error.__suppress_context__):
        return error
    twin = _nameless(error)
    twin.__traceback__ = error.__traceback__
    twin.__context__ = context
    twin.__cause__ = cause
    twin.__suppress_context__ = error.__suppress_context__
    return twin


def _behind(error: BaseException | None, depth: int) -> BaseException | None:
    return _twin(error, depth - 1) if error is not None and depth else None


def _trusted(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, _TRUSTED) or module in _TRUSTED_MODULES


def _nameless(error: BaseException) -> BaseException:
    """A new exception that is called as ``error`` is."""
    said = str(error) if _trusted(error) else "[withheld]"
    kind = type(error)
    twin = type(kind.__name__, (Exception,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    made: BaseException = twin(said)
    return made
