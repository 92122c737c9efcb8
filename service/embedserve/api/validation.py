"""Whether a request can be done at all, and what exactly it asks for.

Decides every limit on counts, bytes and options, and reports all that is wrong at once. Must never know gRPC, queues or
the engine: it takes parsed messages and gives plain values or raises ``errors``. Counts come first, because 200 KB of body
can carry 100,000 empty texts; nothing here costs more than the request's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from embedserve.api import wire
from embedserve.api.encoding import Encoding, row_bytes
from embedserve.errors import InvalidRequest, RevisionMismatch, UnknownModel, Violation
from embedserve.model.backend import ModelIdentity
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.scheduling.item import Priority

__all__ = ["BadText", "RequestLimits", "RequestValidator", "ValidCall", "ValidCount"]

PRIORITY_KEY: Final = "x-embedserve-priority"
TENANT_KEY: Final = "x-embedserve-tenant"
MAX_VIOLATIONS: Final = 32
"""Violations that one error lists; it says how many more there are. More than a person reads, under the trailer limit."""
MAX_ECHO_CHARACTERS: Final = 64
"""How much of a caller's own value an error repeats."""

_PRIORITIES: Final = {
    "interactive": Priority.INTERACTIVE,
    "default": Priority.DEFAULT,
    "bulk": Priority.BULK,
}
_TRUNCATIONS: Final = (Truncation.NONE, Truncation.NONE, Truncation.END, Truncation.START)
"""By the proto's numbers; unspecified means NONE."""
_ENCODINGS: Final = (Encoding.FLOAT32, *Encoding)
"""By the proto's numbers; unspecified means FLOAT32."""
_BINARY: Final = (Encoding.BINARY, Encoding.UBINARY)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask for. Each field is a setting of the same name."""

    max_texts: int = 16384
    """Texts, or lists of token ids, in one request: 64 times a usual batch, and 6 ms of our time at most."""
    max_text_bytes: int = 1 << 20
    """UTF-8 bytes of one text: far over any model's length, under what a tokenizer takes a second for."""
    max_send_message_bytes: int = 4 << 20
    """Bytes of one answer: what gRPC clients accept by default."""
    max_tenant_bytes: int = 64
    """Bytes of a tenant's name: tenants are keys of the scheduler's tables."""


class BadText(NamedTuple):
    """A text of a stream that cannot be embedded: becomes an ItemError."""

    index: int
    violation: Violation


class ValidCall(NamedTuple):
    """A request without transport, every default resolved. Exactly one of ``texts`` and ``tokens`` is given."""

    texts: list[str] | None
    """The good texts, in order."""
    tokens: TokenizedTexts | None
    """The caller's own token ids, already cut where ``truncation`` says so."""
    indexes: Sequence[int]
    """Index in the request of each good text; ``range(n)`` unless some are bad."""
    bad_texts: list[BadText]
    """Only ever filled for streams."""
    truncation: Truncation
    dimensions: int
    normalize: bool
    prompt: str
    """Text of the prompt; empty for none."""
    prompt_name: str
    """Its name; empty for none."""
    encoding: Encoding
    priority: Priority
    tenant: str


class ValidCount(NamedTuple):
    """A ``CountTokens`` request, every default resolved."""

    texts: list[str]
    prompt: str


class _Violations:
    """Keeps the first ``MAX_VIOLATIONS`` and counts the rest."""

    __slots__ = ("kept", "total")

    def __init__(self) -> None:
        self.kept: list[Violation] = []
        self.total = 0

    def add(self, field: str, description: str, reason: str) -> None:
        self.total += 1
        if self.total <= MAX_VIOLATIONS:
            self.kept.append(Violation(field, description, reason))

    def raise_if_any(self) -> None:
        if self.total > MAX_VIOLATIONS:
            more = self.total - MAX_VIOLATIONS + 1
            self.kept[-1] = Violation("", f"{more} more violations are not listed", "MORE_VIOLATIONS")
        if self.kept:
            raise InvalidRequest(self.kept)


def _echo(value: str) -> str:
    return repr(value if len(value) <= MAX_ECHO_CHARACTERS else value[:MAX_ECHO_CHARACTERS] + "…")


class RequestValidator:
    """Judges requests for one model."""

    def __init__(self, identity: ModelIdentity, limits: RequestLimits) -> None:
        """Prepare what every request needs of ``identity``."""
        self._identity = identity
        self._limits = limits
        self._names = frozenset(("", identity.name))
        self._revisions = frozenset(("", identity.revision, identity.weights_digest))
        self._prompts = dict(identity.prompts)
        default = identity.default_prompt_name or ""
        self._default_prompt = (default, self._prompts.get(default, ""))

    def embed(self, request: Any, metadata: Sequence[tuple[str, str | bytes]] = ()) -> ValidCall:
        """Judge a message of ``wire.parse_embed_request``: all texts must be good and the answer fit one message.

        Raises ``UnknownModel``, ``RevisionMismatch`` or ``InvalidRequest`` with every violation.
        """
        return self._embed(request, metadata, stream=False)

    def embed_stream(self, request: Any, metadata: Sequence[tuple[str, str | bytes]] = ()) -> ValidCall:
        """Judge a message of ``wire.parse_embed_stream_request``: bad texts are set apart in ``bad_texts``.

        Raises as ``embed`` does for whatever is wrong with the whole request.
        """
        return self._embed(request, metadata, stream=True)

    def count_tokens(self, request: Any) -> ValidCount:
        """Judge a ``CountTokensRequest``. Raises ``UnknownModel`` or ``InvalidRequest``."""
        self.model(request.model)
        violations = _Violations()
        self._count(len(request.texts), "texts", violations)
        violations.raise_if_any()
        _, prompt = self._prompt(request, violations, has_texts=True)
        texts = list(request.texts)
        if self._suspicious(texts):
            for bad in self._judge_texts(texts):
                violations.add(*_fields(bad.violation))
        violations.raise_if_any()
        return ValidCount(texts, prompt)

    def model(self, name: str) -> None:
        """Raise ``UnknownModel`` unless ``name`` is empty or that of the model."""
        if name not in self._names:
            raise UnknownModel(name[: 2 * MAX_ECHO_CHARACTERS], (self._identity.name,))

    def _embed(self, request: Any, metadata: Sequence[tuple[str, str | bytes]], *, stream: bool) -> ValidCall:
        self.model(request.model)
        if request.expected_revision not in self._revisions:
            raise RevisionMismatch(request.expected_revision[: 2 * MAX_ECHO_CHARACTERS], self._identity.revision)
        violations = _Violations()
        texts_given, ids_given = len(request.texts), len(request.token_ids)
        if texts_given and ids_given:
            violations.add("token_ids", "texts and token_ids are both set; set exactly one", "TEXTS_AND_TOKEN_IDS")
        self._count(texts_given or ids_given, "texts" if texts_given or not ids_given else "token_ids", violations)
        # Nothing below is worth its time when the counts are wrong, and nothing above has touched a text.
        violations.raise_if_any()

        truncation = self._truncation(request.truncate, violations)
        encoding = self._encoding(request.encoding, violations)
        dimensions = self._dimensions(request, encoding, violations)
        normalize = request.normalize if request.HasField("normalize") else self._identity.normalize
        prompt_name, prompt = self._prompt(request, violations, has_texts=texts_given > 0)
        priority, tenant = self._metadata(metadata, violations)
        if not stream and dimensions:
            self._answer_size(texts_given or ids_given, encoding, dimensions, violations)

        texts: list[str] | None = None
        tokens: TokenizedTexts | None = None
        bad_texts: list[BadText] = []
        indexes: Sequence[int] = range(texts_given or ids_given)
        if texts_given:
            texts = list(request.texts)
            if self._suspicious(texts):
                bad_texts = self._judge_texts(texts)
        else:
            tokens, bad_texts = self._tokens(request, truncation, violations)
        if bad_texts:
            if not stream:
                for bad in bad_texts:
                    violations.add(*_fields(bad.violation))
            else:
                indexes, texts, tokens = _without(bad_texts, indexes, texts, tokens)
        violations.raise_if_any()
        return ValidCall(
            texts,
            tokens,
            indexes,
            bad_texts,
            truncation,
            dimensions,
            normalize,
            prompt,
            prompt_name,
            encoding,
            priority,
            tenant,
        )

    # Counts and sizes --------------------------------------------------------------------------------------------------

    def _count(self, given: int, field: str, violations: _Violations) -> None:
        if given == 0:
            violations.add(field, "empty; give at least one text, or token_ids", "NO_TEXTS")
        elif given > self._limits.max_texts:
            violations.add(
                field, f"{given} given, at most {self._limits.max_texts} a request are allowed", "TOO_MANY_TEXTS"
            )

    def _answer_size(self, texts: int, encoding: Encoding, dimensions: int, violations: _Violations) -> None:
        size = row_bytes(encoding, dimensions)
        limit = self._limits.max_send_message_bytes
        if wire.max_response_bytes(texts, size) > limit:
            violations.add(
                "texts",
                f"{texts} vectors of {size} bytes ({dimensions} components as {encoding.name}) make an answer of more "
                f"than server.max_send_message_bytes = {limit}; at most {wire.max_texts_unary(size, limit)} fit: send "
                "fewer, or use EmbedStream",
                "ANSWER_TOO_LARGE",
            )

    def _suspicious(self, texts: list[str]) -> bool:
        """Whether any text needs a closer look: is empty, or long enough that its UTF-8 might pass the limit."""
        return not all(texts) or max(map(len, texts)) * 4 > self._limits.max_text_bytes

    def _judge_texts(self, texts: list[str]) -> list[BadText]:
        limit = self._limits.max_text_bytes
        bad = []
        for index, text in enumerate(texts):
            if not text:
                violation = Violation(f"texts[{index}]", "empty; a text needs at least one character", "TEXT_EMPTY")
                bad.append(BadText(index, violation))
            elif len(text) * 4 > limit and (size := len(text.encode())) > limit:
                violation = Violation(
                    f"texts[{index}]",
                    f"{size} bytes in UTF-8, at most {limit} are allowed (request.max_text_bytes)",
                    "TEXT_TOO_LARGE",
                )
                bad.append(BadText(index, violation))
        return bad

    # Token ids ---------------------------------------------------------------------------------------------------------

    def _tokens(
        self, request: Any, truncation: Truncation, violations: _Violations
    ) -> tuple[TokenizedTexts | None, list[BadText]]:
        try:
            ids, lengths = wire.token_id_rows(request)
        except DecodeError as error:
            violations.add("token_ids", f"malformed: {error}", "TOKEN_IDS_MALFORMED")
            return None, []
        limit = self._identity.max_input_length
        outside = ids >= self._identity.vocab_size
        over = lengths > limit
        bad: list[BadText] = []
        if outside.any() or not lengths.all() or (truncation is Truncation.NONE and over.any()):
            bad = self._judge_ids(lengths, np.flatnonzero(outside), ids, truncation)
        truncated = over if truncation is not Truncation.NONE else np.zeros(len(lengths), dtype=np.bool_)
        if truncated.any():
            ids, lengths = _cut_ids(ids, lengths, limit, truncation)
        return TokenizedTexts(ids.view(np.int32), lengths, truncated), bad

    def _judge_ids(
        self, lengths: np.ndarray[Any, Any], outside: np.ndarray[Any, Any], ids: Any, truncation: Truncation
    ) -> list[BadText]:
        ends = np.cumsum(lengths)
        first_outside = dict(
            zip(
                *(part.tolist() for part in (np.searchsorted(ends, outside[::-1], side="right"), ids[outside[::-1]])),
                strict=True,
            )
        )
        limit = self._identity.max_input_length
        bad = []
        for index, length in enumerate(lengths.tolist()):
            field = f"token_ids[{index}].ids"
            if not length:
                violation = Violation(field, "empty; a text needs at least one token", "TOKEN_IDS_EMPTY")
            elif index in first_outside:
                vocab = self._identity.vocab_size
                violation = Violation(
                    field, f"holds {first_outside[index]}, ids must be below {vocab}", "TOKEN_ID_OUT_OF_RANGE"
                )
            elif length > limit and truncation is Truncation.NONE:
                violation = Violation(
                    field, f"{length} tokens, the model takes {limit}; shorten it or set truncate", "TEXT_TOO_LONG"
                )
            else:
                continue
            bad.append(BadText(index, violation))
        return bad

    # Options -----------------------------------------------------------------------------------------------------------

    def _truncation(self, given: int, violations: _Violations) -> Truncation:
        if 0 <= given < len(_TRUNCATIONS):
            return _TRUNCATIONS[given]
        violations.add("truncate", f"{given} is not a value of Truncate", "UNKNOWN_TRUNCATE")
        return Truncation.NONE

    def _encoding(self, given: int, violations: _Violations) -> Encoding:
        if 0 <= given < len(_ENCODINGS):
            return _ENCODINGS[given]
        violations.add("encoding", f"{given} is not a value of Encoding", "UNKNOWN_ENCODING")
        return Encoding.FLOAT32

    def _dimensions(self, request: Any, encoding: Encoding, violations: _Violations) -> int:
        """Components of each vector; 0 where the option is wrong."""
        dimensions: int = self._identity.dimension
        if request.HasField("dimensions"):
            most, dimensions = dimensions, request.dimensions
            if not 1 <= dimensions <= most:
                violations.add(
                    "dimensions",
                    f"{dimensions} given, the model has {most}: ask for 1 to {most}",
                    "DIMENSIONS_OUT_OF_RANGE",
                )
                return 0
        if encoding in _BINARY and dimensions % 8:
            violations.add(
                "dimensions",
                f"{dimensions} is not a multiple of 8, which {encoding.name} needs",
                "DIMENSIONS_NOT_MULTIPLE_OF_8",
            )
            return 0
        return dimensions

    def _prompt(self, request: Any, violations: _Violations, *, has_texts: bool) -> tuple[str, str]:
        if not request.HasField("prompt_name"):
            return self._default_prompt if has_texts else ("", "")
        name = request.prompt_name
        if not has_texts:
            violations.add(
                "prompt_name", "not allowed with token_ids, which are used as they are", "PROMPT_WITH_TOKEN_IDS"
            )
            return "", ""
        if not name:
            return "", ""
        prompt = self._prompts.get(name)
        if prompt is None:
            known = ", ".join(map(_echo, self._prompts)) or "none"
            violations.add(
                "prompt_name", f"{_echo(name)} is not a prompt of this model; it has: {known}", "UNKNOWN_PROMPT"
            )
            return "", ""
        return name, prompt

    # Metadata ----------------------------------------------------------------------------------------------------------

    def _metadata(self, metadata: Sequence[tuple[str, str | bytes]], violations: _Violations) -> tuple[Priority, str]:
        priority, tenant = Priority.DEFAULT, ""
        for key, value in metadata:
            if key == PRIORITY_KEY:
                known = _PRIORITIES.get(value) if isinstance(value, str) else None
                if known is None:
                    violations.add(
                        f"metadata.{PRIORITY_KEY}",
                        f"{_echo(str(value))} given; use {', '.join(_PRIORITIES)}",
                        "UNKNOWN_PRIORITY",
                    )
                else:
                    priority = known
            elif key == TENANT_KEY:
                if not isinstance(value, str) or len(value) > self._limits.max_tenant_bytes or not _printable(value):
                    violations.add(
                        f"metadata.{TENANT_KEY}",
                        f"must be printable ASCII of at most {self._limits.max_tenant_bytes} bytes",
                        "BAD_TENANT",
                    )
                else:
                    tenant = value
        return priority, tenant


def _printable(value: str) -> bool:
    return value.isascii() and value.isprintable()


def _fields(violation: Violation) -> tuple[str, str, str]:
    return violation.field, violation.description, violation.reason


def _cut_ids(ids: Any, lengths: Any, limit: int, truncation: Truncation) -> tuple[Any, Any]:
    """Keep the first or last ``limit`` ids of each text, as they are: no special token is put back."""
    ends = np.cumsum(lengths)
    kept = np.minimum(lengths, limit)
    starts = ends - lengths if truncation is Truncation.END else ends - kept
    offsets = np.cumsum(kept) - kept
    positions = np.arange(int(kept.sum())) + np.repeat(starts - offsets, kept)
    return ids[positions], kept.astype(np.int32)


def _without(
    bad_texts: list[BadText], indexes: Sequence[int], texts: list[str] | None, tokens: TokenizedTexts | None
) -> tuple[Sequence[int], list[str] | None, TokenizedTexts | None]:
    """What is left of a stream's request without its bad texts."""
    keep = np.ones(len(indexes), dtype=np.bool_)
    keep[[bad.index for bad in bad_texts]] = False
    good = np.flatnonzero(keep).tolist()
    if texts is not None:
        texts = [texts[index] for index in good]
    if tokens is not None:
        tokens = TokenizedTexts(
            tokens.ids[np.repeat(keep, tokens.lengths)], tokens.lengths[keep], tokens.truncated[keep]
        )
    return good, texts, tokens
