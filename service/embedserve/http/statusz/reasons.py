"""What each reason of a refusal means, in a few words, and the setting that it is about.

Decides the words. Must never know how a policy decides; OPERATIONS.md says more of each. A test holds this list and
that page to one another.
"""

from __future__ import annotations

__all__ = ["POLICIES", "REASONS"]

REASONS = {
    "QUEUE_FULL": "the queue is at scheduling.max_queue_items or max_queue_tokens",
    "SUBMISSION_EXCEEDS_QUEUE": "the request alone is larger than the whole queue",
    "ITEM_EXCEEDS_BATCH": "one text alone is larger than a batch",
    "DEADLINE_PASSED": "the caller's deadline had passed on arrival",
    "DEADLINE_TOO_SHORT": "the caller's deadline is shorter than one pass, even on an idle server",
    "DEADLINE_UNREACHABLE": "the queue ahead takes longer than the caller's deadline allows",
    "DRAIN_TIME_EXCEEDED": "the work that is here takes longer than admission.throughput.max_drain_ms",
    "PREDICTED_WAIT_EXCEEDS_SLO": "the call would take longer than admission.latency_p95.slo_ms",
    "P95_EXCEEDED": "recent calls took longer than admission.latency_p95.soft_ms",
    "TOKENS_IN_FLIGHT_EXCEEDED": "more tokens are here than the gradient policy's own limit",
    "TOO_MANY_REQUESTS_IN_FLIGHT": "limits.max_requests_in_flight calls are here",
    "FRONTEND_MEMORY_FULL": "ids and vectors of a front end's calls fill server.frontend_memory_bytes",
    "TOKENIZER_QUEUE_FULL": "tokenizer.max_pending calls wait for a tokenizer thread",
    "TOKENIZER_TIME_EXCEEDED": "one request took the tokenizer longer than tokenizer.max_request_ms",
    "DRAINING": "the process is stopping",
    "NOT_SERVING": "the process is starting or stopping",
    "ENGINE_STALLED": "the device is silent",
    "ENGINE_FAILED": "the engine has failed",
}

POLICIES = {
    "queue": "texts and tokens that are here",
    "too_large": "what never fits",
    "deadline": "the caller's own deadline",
    "throughput": "time to work off what is here",
    "latency_p95": "recent P95, and predicted wait",
    "gradient": "tokens in flight, a limit that finds itself",
    "in_flight": "calls in the process",
    "memory": "a front end's calls in flight",
    "tokenizer": "calls at the tokenizer",
    "draining": "the process stops",
    "not serving": "the process starts, stops or is stalled",
}
