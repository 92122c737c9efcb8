"""Whether a request can be done at all, and what exactly it asks for.

Decides every limit on counts, bytes and options, and reports all that is wrong at once. Must never know gRPC, queues or
the engine: it takes parsed messages and gives plain values or raises ``errors``. Counts come first, because 200 KB of
body can carry 100,000 empty texts; nothing here costs more than the request's own size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from embedserve.api import wire
from embedserve.api.encoding import Encoding, row_bytes
from embedserve.api.token_ids import judge_token_ids
from embedserve.api.violations import MAX_ECHO_CHARACTERS, BadText, Violations, echo
from embedserve.errors import RevisionMismatch, UnknownModel
from embedserve.model.backend import ModelIdentity
from embedserve.model.tokenizer import TokenizedTexts, Truncation
from embedserve.scheduling.item import Priority

__all__ = ["RequestLimits", "RequestValidator", "ValidCall", "ValidCount", "caller_of"]

PRIORITY_KEY: Final = "x-embedserve-priority"
TENANT_KEY: Final = "x-embedserve-tenant"
_PRIORITIES: Final = {
    "interactive": Priority.INTERACTIVE,
    "default": Priority.DEFAULT,
    "bulk": Priority.BULK,
}
_TRUNCATIONS: Final = (Truncation.NONE, Truncation.NONE, Truncation.END, Truncation.START)
"""By the proto's numbers; unspecified means NONE."""
_ENCODINGS: Final[tuple[Encoding, ...]] = (Encoding.FLOAT32, *Encoding)
"""By the proto's numbers; unspecified means FLOAT32."""
_BINARY: Final = (Encoding.BINARY, Encoding.UBINARY)

Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask for. Each field is a setting of the same name."""

    max_texts: int = 16384
    """Texts, or lists of token ids, in one request: many times a usual batch, and a few ms of our time at most."""
    max_text_bytes: int = 1 << 20
    """UTF-8 bytes of one text: far over any model's length, under what a tokenizer takes a second for."""
    max_send_message_bytes: int = 4 << 20
    """Bytes of one answer: what gRPC clients accept by default."""
    max_tenant_bytes: int = 64
    """Bytes of a tenant's name: tenants are keys of the scheduler's tables."""


class ValidCall(NamedTuple):
    """A request without transport, every default resolved. Exactly one of ``texts`` and ``tokens`` is given."""

    texts: list[str] | None
    """The good texts, in order. Empty where every text of a stream is bad."""
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

    def embed(self, request: Any, metadata: Metadata = ()) -> ValidCall:
        """Judge a message of ``wire.parse_embed_request``: all texts must be good and the answer fit one message.

        Raises ``UnknownModel``, ``RevisionMismatch`` or ``InvalidRequest`` with every violation.
        """
        return self._judge(request, metadata, stream=False)

    def embed_stream(self, request: Any, metadata: Metadata = ()) -> ValidCall:
        """Judge a message of ``wire.parse_embed_stream_request``: bad texts are set apart in ``bad_texts``.

        Raises as ``embed`` does for whatever is wrong with the whole request.
        """
        return self._judge(request, metadata, stream=True)

    def count_tokens(self, request: Any) -> ValidCount:
        """Judge a ``CountTokensRequest``. Raises ``UnknownModel`` or ``InvalidRequest``."""
        self.model(request.model)
        violations = Violations()
        self._count(len(request.texts), "texts", violations)
        violations.raise_if_any()
        _, prompt = self._prompt(request, violations, has_texts=True)
        texts = list(request.texts)
        violations.add_texts(self._bad_texts(texts), "texts")
        violations.raise_if_any()
        return ValidCount(texts, prompt)

    def model(self, name: str) -> None:
        """Raise ``UnknownModel`` unless ``name`` is empty or that of the model."""
        if name not in self._names:
            raise UnknownModel(name[:MAX_ECHO_CHARACTERS], (self._identity.name,))

    def _judge(self, request: Any, metadata: Metadata, *, stream: bool) -> ValidCall:
        self.model(request.model)
        if request.expected_revision not in self._revisions:
            raise RevisionMismatch(request.expected_revision[: 2 * MAX_ECHO_CHARACTERS], self._identity.revision)
        violations = Violations()
        texts_given, ids_given = len(request.texts), len(request.token_ids)
        given = texts_given or ids_given
        field = "token_ids" if ids_given and not texts_given else "texts"
        if texts_given and ids_given:
            violations.add("token_ids", "set as well as texts; set exactly one of the two", "TEXTS_AND_TOKEN_IDS")
        self._count(given, field, violations)
        # Nothing below is worth its time when the counts are wrong, and nothing above has touched a text.
        violations.raise_if_any()

        truncation = self._truncation(request.truncate, violations)
        encoding = self._encoding(request.encoding, violations)
        dimensions = self._dimensions(request, encoding, violations)
        normalize = request.normalize if request.HasField("normalize") else self._identity.normalize
        prompt_name, prompt = self._prompt(request, violations, has_texts=texts_given > 0)
        priority, tenant = caller_of(metadata, self._limits.max_tenant_bytes, violations)
        if not stream and dimensions:
            self._answer_size(given, encoding, dimensions, violations)

        texts, tokens, bad = self._content(request, truncation, violations)
        indexes: Sequence[int] = range(given)
        bad_texts: list[BadText] = []
        if not stream:
            violations.add_texts(bad, field)
        elif bad_texts := list(bad):
            indexes, texts, tokens = _without(bad_texts, given, texts, tokens)
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

    # Texts

    def _content(
        self, request: Any, truncation: Truncation, violations: Violations
    ) -> tuple[list[str] | None, TokenizedTexts | None, Iterable[BadText]]:
        """Texts or tokens, and the bad ones among them."""
        if request.texts:
            texts = list(request.texts)
            return texts, None, self._bad_texts(texts)
        try:
            tokens, bad = judge_token_ids(request, self._identity, truncation)
        except DecodeError as error:
            violations.add("token_ids", f"malformed: {error}", "TOKEN_IDS_MALFORMED")
            return None, None, ()
        return None, tokens, bad

    def _bad_texts(self, texts: list[str]) -> Iterable[BadText]:
        # A character is at most 4 bytes: in the common case two passes in C say that nothing needs a closer look.
        if all(texts) and max(map(len, texts)) * 4 <= self._limits.max_text_bytes:
            return ()
        return self._inspect(texts)

    def _inspect(self, texts: list[str]) -> Iterator[BadText]:
        limit = self._limits.max_text_bytes
        for index, text in enumerate(texts):
            if not text:
                yield BadText(index, "TEXT_EMPTY", "empty; a text needs at least one character")
            elif len(text) * 4 > limit and (size := len(text.encode())) > limit:
                message = f"{size} bytes in UTF-8, at most {limit} are allowed (limits.max_text_bytes)"
                yield BadText(index, "TEXT_TOO_LARGE", message)

    # Counts, sizes, options

    def _count(self, given: int, field: str, violations: Violations) -> None:
        most = self._limits.max_texts
        if given == 0:
            violations.add(field, "empty; give at least one text, or token_ids", "NO_TEXTS")
        elif given > most:
            violations.add(
                field, f"{given} given, at most {most} are allowed in one request (limits.max_texts)", "TOO_MANY_TEXTS"
            )

    def _answer_size(self, texts: int, encoding: Encoding, dimensions: int, violations: Violations) -> None:
        size = row_bytes(encoding, dimensions)
        limit = self._limits.max_send_message_bytes
        needed = wire.max_response_bytes(texts, size)
        if needed > limit:
            violations.add(
                "texts",
                f"{texts} vectors of {size} bytes ({dimensions} components, {encoding.name}) make an answer of up to "
                f"{needed} bytes, over server.max_send_message_bytes = {limit}, which "
                f"{wire.max_texts_unary(size, limit)} texts fit: send fewer, or use EmbedStream",
                "ANSWER_TOO_LARGE",
            )

    def _truncation(self, given: int, violations: Violations) -> Truncation:
        if 0 <= given < len(_TRUNCATIONS):
            return _TRUNCATIONS[given]
        violations.add("truncate", f"{given} is not a value of Truncate", "UNKNOWN_TRUNCATE")
        return Truncation.NONE

    def _encoding(self, given: int, violations: Violations) -> Encoding:
        if 0 <= given < len(_ENCODINGS):
            return _ENCODINGS[given]
        violations.add("encoding", f"{given} is not a value of Encoding", "UNKNOWN_ENCODING")
        return Encoding.FLOAT32

    def _dimensions(self, request: Any, encoding: Encoding, violations: Violations) -> int:
        """Components of each vector; 0 where the option is wrong."""
        most = self._identity.dimension
        dimensions: int = request.dimensions if request.HasField("dimensions") else most
        if not 1 <= dimensions <= most:
            message = f"{dimensions} given, the model has {most}: ask for 1 to {most}"
            violations.add("dimensions", message, "DIMENSIONS_OUT_OF_RANGE")
            return 0
        if encoding in _BINARY and dimensions % 8:
            message = f"{dimensions} is not a multiple of 8, which {encoding.name} needs"
            violations.add("dimensions", message, "DIMENSIONS_NOT_MULTIPLE_OF_8")
            return 0
        return dimensions

    def _prompt(self, request: Any, violations: Violations, *, has_texts: bool) -> tuple[str, str]:
        """Name and text of the prompt to use, both empty for none."""
        if not request.HasField("prompt_name"):
            return self._default_prompt if has_texts else ("", "")
        name = request.prompt_name
        if not has_texts:
            message = "not allowed with token_ids, which are used as they are"
            violations.add("prompt_name", message, "PROMPT_WITH_TOKEN_IDS")
        elif name and name not in self._prompts:
            known = ", ".join(map(echo, self._prompts)) or "none"
            message = f"{echo(name)} is not a prompt of this model; it has: {known}"
            violations.add("prompt_name", message, "UNKNOWN_PROMPT")
        return name, self._prompts.get(name, "")


def caller_of(metadata: Metadata, max_tenant_bytes: int, violations: Violations) -> tuple[Priority, str]:
    """A call's priority and tenant, by its headers."""
    priority, tenant = Priority.DEFAULT, ""
    for key, value in metadata:
        if key == PRIORITY_KEY:
            known = _PRIORITIES.get(str(value))
            if known is None:
                message = f"{echo(str(value))} given; use {', '.join(_PRIORITIES)}"
                violations.add(f"metadata.{PRIORITY_KEY}", message, "UNKNOWN_PRIORITY")
            else:
                priority = known
        elif key == TENANT_KEY:
            tenant = str(value)
            if len(tenant) > max_tenant_bytes or not (tenant.isascii() and tenant.isprintable()):
                message = f"must be printable ASCII of at most {max_tenant_bytes} bytes (limits.max_tenant_bytes)"
                violations.add(f"metadata.{TENANT_KEY}", message, "BAD_TENANT")
    return priority, tenant


def _without(
    bad_texts: list[BadText], given: int, texts: list[str] | None, tokens: TokenizedTexts | None
) -> tuple[Sequence[int], list[str] | None, TokenizedTexts | None]:
    """What is left of a stream's request without its bad texts."""
    keep = np.ones(given, dtype=np.bool_)
    keep[[bad.index for bad in bad_texts]] = False
    good = np.flatnonzero(keep).tolist()
    if texts is not None:
        texts = [texts[index] for index in good]
    if tokens is not None:
        ids = tokens.ids[np.repeat(keep, tokens.lengths)]
        tokens = TokenizedTexts(ids, tokens.lengths[keep], tokens.truncated[keep])
    return good, texts, tokens
