"""Texts that the caller has tokenised: whether the model can take the ids, and what truncation leaves of them.

Decides all rules on token ids. Must never know the other fields of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from embedserve.api import wire
from embedserve.api.violations import BadText
from embedserve.model.backend import ModelIdentity
from embedserve.model.tokenizer import TokenizedTexts, Truncation

__all__ = ["judge_token_ids"]


def judge_token_ids(
    request: Any, identity: ModelIdentity, truncation: Truncation
) -> tuple[TokenizedTexts, Iterable[BadText]]:
    """The ids of ``request.token_ids``, cut where ``truncation`` says so, and which of the texts are bad.

    Each text needs at least one id, all below ``vocab_size``, and, unless it is cut, at most ``max_input_length``.
    Raises ``DecodeError`` where the bytes are not ids at all.
    """
    ids, lengths = wire.token_id_rows(request)
    limit = identity.max_input_length
    over = lengths > limit
    outside = np.flatnonzero(ids >= identity.vocab_size)
    if truncation is Truncation.NONE:
        refused, truncated = over, np.zeros(len(lengths), dtype=np.bool_)
    else:
        refused, truncated = np.zeros(len(lengths), dtype=np.bool_), over
    bad: Iterable[BadText] = ()
    if len(outside) or not lengths.all() or refused.any():
        bad = _inspect(ids, lengths, outside, refused, identity)
    if truncated.any():
        ids, lengths = _cut(ids, lengths, limit, truncation)
    return TokenizedTexts(ids.view(np.int32), lengths, truncated), bad


def _inspect(
    ids: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int32],
    outside: npt.NDArray[np.intp],
    refused: npt.NDArray[np.bool_],
    identity: ModelIdentity,
) -> Iterator[BadText]:
    """``outside`` holds the positions in ``ids`` of those that the model does not know."""
    rows, first = np.unique(np.searchsorted(np.cumsum(lengths), outside, side="right"), return_index=True)
    unknown = dict(zip(rows.tolist(), ids[outside[first]].tolist(), strict=True))
    suspects = np.flatnonzero(refused | (lengths == 0)).tolist()
    for index in sorted({*suspects, *unknown}):
        length = int(lengths[index])
        if not length:
            yield BadText(index, "TOKEN_IDS_EMPTY", "no ids; a text needs at least one token")
        elif index in unknown:
            message = f"holds {unknown[index]}; ids must be below {identity.vocab_size}"
            yield BadText(index, "TOKEN_ID_OUT_OF_RANGE", message)
        else:
            limit = identity.max_input_length
            yield BadText(
                index, "TEXT_TOO_LONG", f"{length} tokens, the model takes {limit}: shorten it, or set truncate"
            )


def _cut(
    ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int32], limit: int, truncation: Truncation
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Keep the first or last ``limit`` ids of each text, as they are: no special token is put back."""
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, limit)
    starts = ends - lengths if truncation is Truncation.END else ends - kept
    offsets = np.cumsum(kept) - kept
    positions = np.arange(int(kept.sum())) + np.repeat(starts - offsets, kept)
    return ids[positions], kept.astype(np.int32)
