"""One run: puts source, embedder, sink and progress bar together.

Decides who is built and closed when. Must never know how a text is read, embedded or written.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from embedserve.bulk.outcome import BulkError, Embedder, Options
from embedserve.bulk.pipeline import OnError, Tally, embed_all
from embedserve.bulk.sink import OutputFormat, open_sink
from embedserve.bulk.source import InputFormat, chunked, read_texts
from embedserve.config import Config
from embedserve.errors import InvariantBroken

__all__ = ["Job", "run_job"]


@dataclass(frozen=True, slots=True)
class Job:
    """What one run is to do."""

    files: tuple[str, ...]
    input_format: InputFormat
    field: str
    id_field: str | None
    output: Path | None
    """``None``: standard output, for JSONL only."""
    output_format: OutputFormat
    options: Options
    batch_texts: int
    concurrency: int
    on_error: OnError
    server: str | None
    """A gRPC target; ``None`` embeds in this process."""
    config: Config | None = None
    """For embedding in this process; needed there only."""
    model: str = ""
    """Name of one of the server's models; empty: its default."""
    revision: str = ""
    priority: Literal["interactive", "default", "bulk"] = "bulk"
    timeout_ms: int = 300_000
    max_retry_ms: int = 120_000


async def run_job(job: Job) -> Tally:
    """Run it to its end.

    Raises ``BulkError``, ``StartupError`` where no model can be loaded here, and ``BrokenPipeError`` when nobody reads
    standard output any more.
    """
    try:
        return await _run(job)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BulkError(f"{error.filename or job.output or 'standard output'}: {error.strerror or error}") from error


async def _run(job: Job) -> Tally:
    texts = read_texts(job.files, job.input_format, field=job.field, id_field=job.id_field)
    async with AsyncExitStack() as stack:
        embedder = await _embedder(job, stack)
        sink = open_sink(job.output_format, job.output, await embedder.dimensions())
        stack.callback(sink.abandon)
        # disable=None: shown on a terminal only. Standard output belongs to the results.
        bar = stack.enter_context(tqdm(unit=" texts", file=sys.stderr, disable=None, dynamic_ncols=True))
        tally = await embed_all(
            chunked(texts, job.batch_texts),
            embedder,
            sink,
            concurrency=job.concurrency,
            on_error=job.on_error,
            progress=bar.update,
        )
        sink.close()
    return tally


async def _embedder(job: Job, stack: AsyncExitStack) -> Embedder:
    if job.server is None:
        if job.config is None:
            raise InvariantBroken("a run in this process without settings")
        from embedserve.bulk.local import Local  # noqa: PLC0415 (brings torch)

        return await stack.enter_async_context(Local(job.config, job.options))
    from embedserve.bulk.remote import Remote, Retry  # noqa: PLC0415 (brings gRPC)

    remote = Remote(
        job.server,
        model=job.model,
        options=job.options,
        revision=job.revision,
        priority=job.priority,
        timeout_ms=job.timeout_ms,
        retry=Retry(patience_ms=job.max_retry_ms),
    )
    stack.push_async_callback(remote.close)
    return remote
