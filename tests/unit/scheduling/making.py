"""Small schedulers and submissions for tests."""

from embedserve.scheduling.item import Submission, Succeeded
from embedserve.scheduling.scheduler import Scheduler
from embedserve.scheduling.settings import SchedulerSettings

MS = 1_000_000
S = 1_000_000_000

SMALL = {
    "bucket_edges": (8, 16, 32),
    "max_batch_tokens": 64,
    "max_batch_items": 8,
    "max_queue_items": 1_000,
    "max_queue_tokens": 10_000,
}


def small_settings(**changes):
    return SchedulerSettings(**(SMALL | changes))


def small_scheduler(policies=(), **changes):
    return Scheduler(small_settings(**changes), policies)


def submission(number, *tokens, **changes):
    return Submission(**({"id": number, "flow": number, "tokens": tokens, "arrived_ns": 0} | changes))


def items(batch):
    """(submission, index) of each row."""
    return [(s.submission_id, i) for s in batch.slices for i in s.indexes]


def run_all(scheduler, now_ns=0, elapsed_ns=1_000):
    """Runs good passes until nothing waits; the batches."""
    batches = []
    while (batch := scheduler.next_batch(now_ns)) is not None:
        batches.append(batch)
        scheduler.complete(batch.id, Succeeded(elapsed_ns), now_ns)
    return batches
