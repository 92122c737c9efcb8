"""The names of attributes, as OpenTelemetry's conventions or we ourselves define them.

Decides spelling, once. Must never know values that are computed. They are our own constants because the Python package
marks the GenAI names as moved and the RPC names as incubating, and both churn:

* RPC: release candidate of semantic-conventions 1.44. The status attribute is ``rpc.response.status_code`` there; the
  main
  branch has since renamed it ``rpc.status_code`` (semantic-conventions#3921, not released). When that is released,
  ``RPC_STATUS_CODE`` below is the only line to change.
* GenAI embeddings: last text before the move to semantic-conventions-genai (1.41); status Development.
* ``embedserve.*``: ours, stable from 1.0 on. Attributes of metrics are short words (``stage``, ``bucket``), because
  they become
  Prometheus labels; attributes of spans carry the namespace.
"""

from __future__ import annotations

from typing import Final

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"

RPC_SYSTEM_NAME: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_METHOD_ORIGINAL: Final = "rpc.method_original"
RPC_STATUS_CODE: Final = "rpc.response.status_code"
RPC_DURATION: Final = "rpc.server.call.duration"
GRPC: Final = "grpc"
OTHER: Final = "_OTHER"
"""What the conventions write for a value outside the known set."""

ERROR_TYPE: Final = "error.type"
ERROR_KIND: Final = "embedserve.error.kind"
EXPECTED: Final = "expected"
"""What the service is made to say: the request is wrong, refused, too late, or its caller has gone."""
UNEXPECTED: Final = "unexpected"
"""A fault of ours: somebody should look."""
ERROR_KINDS: Final = (EXPECTED, UNEXPECTED)
NETWORK_PEER_ADDRESS: Final = "network.peer.address"
NETWORK_PEER_PORT: Final = "network.peer.port"

GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_DIMENSION_COUNT: Final = "gen_ai.embeddings.dimension.count"
GEN_AI_ENCODING_FORMATS: Final = "gen_ai.request.encoding_formats"
EMBEDDINGS: Final = "embeddings"
PROVIDER: Final = "embedserve"

TEXTS: Final = "embedserve.texts"
TOKENS: Final = "embedserve.tokens"
TENANT: Final = "embedserve.tenant"
FORCED: Final = "embedserve.trace.forced"
DEADLINE_MS: Final = "embedserve.deadline_ms"
"""What the caller had left when its call arrived."""
BUCKET: Final = "embedserve.bucket"
PREDICTED_MS: Final = "embedserve.predicted_ms"
QUEUE_ITEMS: Final = "embedserve.queue.items"
QUEUE_TOKENS: Final = "embedserve.queue.tokens"
ADMISSION_STAGE: Final = "embedserve.admission.stage"
ADMISSION_POLICY: Final = "embedserve.admission.policy"
ADMISSION_REASON: Final = "embedserve.admission.reason"
ADMISSION_FIGURE: Final = "embedserve.admission.figure."
"""Prefix of the numbers that decided a refusal."""
BATCH_ID: Final = "embedserve.batch.id"
BATCH_SHAPE: Final = "embedserve.batch.shape"
BATCH_EDGE: Final = "embedserve.batch.edge"
BATCH_ROWS: Final = "embedserve.batch.rows"
BATCH_TOKENS: Final = "embedserve.batch.tokens"
BATCH_PADDED_TOKENS: Final = "embedserve.batch.padded_tokens"
BATCH_REQUESTS: Final = "embedserve.batch.requests"
BATCH_REQUESTS_SAMPLED: Final = "embedserve.batch.requests.sampled"
BATCH_ATTEMPT: Final = "embedserve.batch.attempt"
BATCH_OUTCOME: Final = "embedserve.batch.outcome"
COMPILE_OUTCOME: Final = "embedserve.model.compile.outcome"
BATCH_PREDICTED_MS: Final = "embedserve.batch.predicted_ms"
LINK_FIRST_INDEX: Final = "embedserve.link.first_index"
LINK_ROWS: Final = "embedserve.link.rows"
LINK_TOKENS: Final = "embedserve.link.tokens"

SERVICE: Final = "embedserve.v1.EmbeddingService"
EMBEDDING_METHODS: Final = (f"{SERVICE}/Embed", f"{SERVICE}/EmbedStream", f"{SERVICE}/CountTokens")
"""RPCs that carry texts: they can be refused, expire and fail in the engine."""
INFORMATION_METHODS: Final = (f"{SERVICE}/ListModels", f"{SERVICE}/GetModel", f"{SERVICE}/GetLoad")
METHODS: Final = (*EMBEDDING_METHODS, *INFORMATION_METHODS)

STATUSES: Final = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
"""All of gRPC's status names, in the order of their numbers."""

SERVER_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""Statuses for which a SERVER span is an ERROR (RPC conventions, gRPC page); the others are the caller's doing."""
