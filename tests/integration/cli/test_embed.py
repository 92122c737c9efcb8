"""``embedserve embed`` through a server: formats, order, patience, and what a text that fails does."""

import asyncio
import fcntl
import json
import os
import signal
import stat
import struct
import sys
import termios

import grpc
import numpy as np
import pytest

from embedserve.bulk import remote
from embedserve.bulk.job import Job, run_job
from embedserve.bulk.outcome import BulkError, Failure, Options, Vector
from embedserve.bulk.remote import Remote, Retry
from tests.integration.server.calls import until

from .conftest import DIMENSIONS, SERVICE_ROOT, Refuse, vector_of

SHED = grpc.StatusCode.RESOURCE_EXHAUSTED
AWAY = grpc.StatusCode.UNAVAILABLE


def waiting_bytes(pipe):
    """What was written to ``pipe`` and not read."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


class Waits:
    """A retry that waits no time and remembers how long it was to wait."""

    def __init__(self, patience_ms=10_000):
        self.seconds = []
        self.retry = Retry(patience_ms=patience_ms, sleep=self._sleep, random=lambda: 0.0)

    async def _sleep(self, seconds):
        self.seconds.append(seconds)


@pytest.fixture
def job(service, tmp_path):
    """A job of ``texts``, one a line, to a JSONL file; gives the job and a way to read what it wrote."""

    def make(texts, **changes):
        source = tmp_path / "in.txt"
        source.write_text("".join(f"{text}\n" for text in texts))
        given = {
            "files": (str(source),),
            "input_format": "lines",
            "field": "text",
            "id_field": None,
            "output": tmp_path / "out.jsonl",
            "output_format": "jsonl",
            "options": Options(),
            "batch_texts": 4,
            "concurrency": 3,
            "on_error": "fail",
            "server": service.address,
        }
        return Job(**(given | changes))

    return make


@pytest.fixture
async def client(service):
    """Make a ``Remote`` that is closed after the test."""
    made = []

    def make(**arguments):
        made.append(Remote(service.address, **({"options": Options()} | arguments)))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def rows(job):
    return [json.loads(line) for line in job.output.read_text().splitlines()]


TEXTS = [f"text {number}" for number in range(50)]


class TestFormats:
    async def test_jsonl_has_a_row_a_text_with_exact_floats(self, job):
        run = job([*TEXTS, "cut off"])
        tally = await run_job(run)
        written = rows(run)
        assert tally.embedded == 51
        assert [row["index"] for row in written] == list(range(51))
        for row, text in zip(written, [*TEXTS, "cut off"], strict=True):
            assert np.array_equal(np.array(row["embedding"], dtype=np.float32), vector_of(text))
            assert row["token_count"] == len(text)
        assert [row["truncated"] for row in written] == [False] * 50 + [True]

    async def test_npy_is_one_array(self, job, tmp_path):
        await run_job(job(TEXTS, output=tmp_path / "out.npy", output_format="npy"))
        array = np.load(tmp_path / "out.npy")
        assert array.dtype == np.float32
        assert np.array_equal(array, np.stack([vector_of(text) for text in TEXTS]))

    async def test_parquet_has_a_column_a_field(self, job, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        await run_job(job([*TEXTS, "bad"], output=tmp_path / "out.parquet", output_format="parquet", on_error="null"))
        table = parquet.read_table(tmp_path / "out.parquet")
        assert table.column_names == ["index", "id", "embedding", "token_count", "truncated", "error"]
        assert table.schema.field("embedding").type.list_size == DIMENSIONS
        assert np.array_equal(np.array(table["embedding"][7].as_py(), dtype=np.float32), vector_of(TEXTS[7]))
        assert table["embedding"][50].as_py() is None
        assert table["error"].to_pylist() == [None] * 50 + ["TEXT_TOO_LONG: bad is too long"]

    async def test_parquet_without_pyarrow_is_refused_in_a_sentence(self, job, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(
            BulkError, match=r"needs pyarrow, which is not installed: pip install 'embedserve\[parquet\]'"
        ):
            await run_job(job(TEXTS, output=tmp_path / "out.parquet", output_format="parquet"))
        assert not list(tmp_path.glob("out*"))

    @pytest.mark.parametrize("form", ["jsonl", "npy", "parquet"])
    async def test_no_text_gives_a_whole_empty_file(self, job, tmp_path, form):
        output = tmp_path / f"out.{form}"
        await run_job(job([], output=output, output_format=form))
        if form == "npy":
            assert np.load(output).shape == (0, DIMENSIONS)
        elif form == "parquet":
            assert pytest.importorskip("pyarrow.parquet").read_table(output).num_rows == 0
        else:
            assert output.read_bytes() == b""

    async def test_jsonl_in_gives_its_ids_out(self, job, tmp_path):
        source = tmp_path / "in.jsonl"
        source.write_text('{"body": "a", "key": "x1"}\n\n{"body": "b", "key": {"n": 2}}\n{"body": "c"}\n')
        run = job([], files=(str(source),), input_format="jsonl", field="body", id_field="key")
        await run_job(run)
        assert [(row["index"], row.get("id")) for row in rows(run)] == [(0, "x1"), (1, {"n": 2}), (2, None)]

    async def test_options_reach_the_server(self, job, service):
        options = Options(truncate="end", dimensions=3, normalize=False, prompt_name="query")
        run = job(["a"], options=options, model="m", revision="r", priority="interactive")
        await run_job(run)
        (request,) = service.requests
        sent = (request.model, request.truncate, request.dimensions, request.normalize, request.prompt_name)
        assert sent == ("m", 2, 3, False, "query")
        assert request.expected_revision == "r"
        assert service.metadata[0]["x-embedserve-priority"] == "interactive"
        assert len(rows(run)[0]["embedding"]) == 3

    async def test_options_that_are_not_given_are_left_to_the_model(self, job, service):
        await run_job(job(["a"]))
        (request,) = service.requests
        assert not request.HasField("dimensions")
        assert not request.HasField("normalize")
        assert not request.HasField("prompt_name")


class TestOrder:
    async def test_rows_keep_the_order_of_the_texts_when_calls_end_backwards(self, job, service):
        """Three calls run at once, and each waits for the one after it."""
        waiting = []

        async def last_first(request):
            waiting.append(asyncio.Event())
            mine = len(waiting) - 1
            if mine % 3 == 2 or mine == 12:  # the third of each three, and the last call of all, set the others free
                for event in waiting[::-1]:
                    event.set()
                    await asyncio.sleep(0)
            await waiting[mine].wait()

        service.hold = last_first
        run = job(TEXTS)
        await run_job(run)
        assert [row["index"] for row in rows(run)] == list(range(50))
        assert len(service.requests) == 13

    async def test_no_more_calls_run_at_once_than_asked_for(self, job, service):
        await run_job(job(TEXTS, concurrency=2))
        assert service.running_max <= 2

    async def test_a_run_reads_no_further_ahead_than_it_may(self, job, service):
        """While the first call hangs, reading stops: memory is bounded whatever the length of the input."""
        stuck, free = asyncio.Event(), asyncio.Event()

        async def first_hangs(request):
            if "text 0" in request.texts:
                stuck.set()
                await free.wait()

        service.hold = first_hangs
        running = asyncio.create_task(run_job(job([f"text {n}" for n in range(400)], batch_texts=1, concurrency=3)))
        await stuck.wait()
        await settled(lambda: len(service.requests))
        assert len(service.requests) <= 2 * 3 + 3
        free.set()
        assert (await running).embedded == 400

    async def test_a_long_text_travels_with_few_others(self, job, service):
        await run_job(job(["x" * 3_000_000] * 3, batch_texts=100))
        assert [len(request.texts) for request in service.requests] == [1, 1, 1]


async def settled(measure, quiet=50):
    """Wait until ``measure()`` has been the same over ``quiet`` turns of the loop with a little time each."""
    last, same = measure(), 0
    while same < quiet:
        await asyncio.sleep(0.002)
        same, last = (same + 1, last) if measure() == last else (0, measure())


class TestFailingTexts:
    async def test_fail_names_file_line_and_reason_and_keeps_what_was_written(self, job, tmp_path):
        run = job([*TEXTS[:9], "bad one", *TEXTS[9:]])
        with pytest.raises(BulkError, match=r"in\.txt:10: TEXT_TOO_LONG: bad one is too long"):
            await run_job(run)
        assert not run.output.exists()
        assert (tmp_path / "out.jsonl.partial").exists()

    async def test_skip_leaves_it_out(self, job):
        run = job(["a", "bad", "c"], on_error="skip")
        tally = await run_job(run)
        assert [row["index"] for row in rows(run)] == [0, 2]
        assert (tally.embedded, tally.failed) == (2, 1)

    async def test_null_keeps_its_place(self, job):
        run = job(["a", "bad", "c"], on_error="null")
        await run_job(run)
        failed = rows(run)[1]
        assert failed == {
            "index": 1,
            "embedding": None,
            "error": {"reason": "TEXT_TOO_LONG", "message": "bad is too long"},
        }

    async def test_null_is_nan_in_npy(self, job, tmp_path):
        await run_job(job(["a", "bad"], on_error="null", output=tmp_path / "o.npy", output_format="npy"))
        array = np.load(tmp_path / "o.npy")
        assert np.isnan(array[1]).all()
        assert np.array_equal(array[0], vector_of("a"))

    async def test_a_line_that_cannot_be_read_is_a_text_that_fails(self, job, tmp_path):
        source = tmp_path / "in.jsonl"
        source.write_bytes(b'{"text": "a"}\n{"text": 3, "id": 1}\n[]\n{\n\xff\n{"text": "b"}\n')
        run = job([], files=(str(source),), input_format="jsonl", on_error="null")
        await run_job(run)
        reasons = [row.get("error", {}).get("reason") for row in rows(run)]
        assert reasons == [None, "UNREADABLE", "UNREADABLE", "UNREADABLE", "UNREADABLE", None]
        assert rows(run)[1]["error"]["message"] == "its field 'text' is no text; fields: 'text', 'id'"

    async def test_an_existing_file_is_replaced_only_by_a_whole_one(self, job):
        run = job(["bad"])
        run.output.write_text("precious")
        with pytest.raises(BulkError):
            await run_job(run)
        assert run.output.read_text() == "precious"

    async def test_an_output_that_cannot_be_written_is_a_sentence(self, job, tmp_path):
        with pytest.raises(BulkError, match="cannot be written: No such file or directory"):
            await run_job(job(["a"], output=tmp_path / "none" / "o.jsonl"))


class TestPatience:
    async def test_pushback_says_when_to_come_back(self, service, client):
        service.plan = [Refuse(SHED, pushback="300", retry_info_ms=9000), Refuse(SHED, pushback="0")]
        waits = Waits()
        (outcome,) = await client(retry=waits.retry).embed(["a"])
        assert np.array_equal(outcome.values, vector_of("a"))
        assert waits.seconds == [0.3, 0.0]

    async def test_retry_info_does_where_there_is_no_pushback(self, service, client):
        service.plan = [Refuse(SHED, retry_info_ms=1234)]
        waits = Waits()
        await client(retry=waits.retry).embed(["a"])
        assert waits.seconds == [1.234]

    async def test_backoff_doubles_where_there_is_no_hint(self, service, client):
        service.plan = [Refuse(AWAY) for _ in range(8)]
        waits = Waits(patience_ms=60_000)
        await client(retry=waits.retry).embed(["a"])
        assert waits.seconds == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]

    @pytest.mark.parametrize("pushback", ["-1", "soon", ""])
    async def test_pushback_can_forbid_a_retry(self, service, client, pushback):
        service.plan = [Refuse(SHED, "too large for here", pushback=pushback)]
        with pytest.raises(BulkError, match="RESOURCE_EXHAUSTED: too large for here"):
            await client(retry=Waits().retry).embed(["a"])
        assert len(service.requests) == 1

    async def test_a_wait_is_stretched_by_a_fifth_at_most(self, service, client):
        service.plan = [Refuse(SHED, pushback="100")]
        waits = Waits()
        retry = Retry(sleep=waits.retry.sleep, random=lambda: 1.0)
        await client(retry=retry).embed(["a"])
        assert waits.seconds == [pytest.approx(0.12)]

    async def test_only_what_is_missing_is_sent_again(self, service, client):
        service.plan = [Refuse(AWAY, after=6)]
        outcomes = await client(retry=Waits().retry).embed(TEXTS[:10])
        assert [list(request.texts) for request in service.requests] == [TEXTS[:10], TEXTS[6:10]]
        assert all(np.array_equal(o.values, vector_of(t)) for o, t in zip(outcomes, TEXTS[:10], strict=True))

    async def test_patience_ends_without_progress(self, service, client):
        service.plan = [Refuse(SHED, pushback="400") for _ in range(100)]
        with pytest.raises(BulkError, match="no progress for 1000 ms"):
            await client(retry=Waits(patience_ms=1000).retry).embed(["a"])
        assert len(service.requests) == 4

    async def test_progress_renews_patience(self, service, client):
        service.plan = [Refuse(SHED, pushback="900", after=1) for _ in range(9)]
        await client(retry=Waits(patience_ms=1000).retry).embed(TEXTS[:10])
        assert len(service.requests) == 10

    @pytest.mark.parametrize(
        "code", ["INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "INTERNAL", "UNIMPLEMENTED"]
    )
    async def test_other_statuses_are_not_retried(self, service, client, code):
        service.plan = [Refuse(grpc.StatusCode[code], "no")]
        with pytest.raises(BulkError, match=f"{code}: no"):
            await client(retry=Waits().retry).embed(["a"])

    async def test_a_message_that_is_too_large_is_halved(self, service, client):
        too_large = "Received message larger than max (5000 vs. 4000)"
        service.plan = [Refuse(SHED, too_large)]
        outcomes = await client().embed(TEXTS[:5])
        assert [len(request.texts) for request in service.requests] == [5, 2, 3]
        assert all(isinstance(outcome, Vector) for outcome in outcomes)

    async def test_a_single_text_that_is_too_large_fails_alone(self, service, client):
        service.plan = [Refuse(SHED, "Received message larger than max (5000 vs. 4000)")]
        (outcome,) = await client().embed(["a"])
        assert isinstance(outcome, Failure)
        assert outcome.reason == "MESSAGE_TOO_LARGE"

    async def test_a_server_that_is_not_up_yet_is_waited_for(self, service, client):
        service.model_plan = [Refuse(AWAY, "loading")]
        waits = Waits()
        assert await client(retry=waits.retry).dimensions() == DIMENSIONS
        assert len(waits.seconds) == 1

    async def test_a_stream_that_ends_well_without_all_its_texts_is_an_error(self, service, client, monkeypatch):
        monkeypatch.setattr(remote, "_halves", None)
        service._message = lambda request, indexes: type(service)._message(service, request, [i for i in indexes if i])
        with pytest.raises(BulkError, match="without 1 of its 3 texts"):
            await client().embed(TEXTS[:3])


def private_device(path, major, minor):
    """A device node of the test's own, so that nothing can go wrong with the machine's."""
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
        path.open("rb").close()
    except OSError:
        pytest.skip("no device nodes can be made or opened here")
    return path


class TestCommand:
    """The same as a process: what goes where, and the exit code."""

    async def test_lines_from_standard_input_to_standard_output(self, service, command):
        code, output, errors = await command("embed", "--server", service.address, stdin=b"a\nb\n")
        assert (code, errors) == (0, "")
        assert [json.loads(line)["index"] for line in output.splitlines()] == [0, 1]

    async def test_the_format_follows_the_name_of_the_output(self, service, command, tmp_path):
        target = str(tmp_path / "o.npy")
        code, output, errors = await command("embed", "--server", service.address, "-o", target, stdin=b"a\nb\n")
        assert (code, output, errors) == (0, b"", "")
        assert np.load(target).shape == (2, DIMENSIONS)

    async def test_a_text_that_fails_is_exit_1_and_one_sentence(self, service, command):
        code, output, errors = await command("embed", "--server", service.address, stdin=b"a\nbad\n")
        assert code == 1
        assert output == b""
        assert errors == "embedserve: <stdin>:2: TEXT_TOO_LONG: bad is too long\n"

    async def test_skipped_texts_are_counted(self, service, command):
        code, _, errors = await command("embed", "--server", service.address, "--on-error", "skip", stdin=b"a\nbad\n")
        assert (code, errors) == (0, "embedserve: 1 of 2 texts have no vector\n")

    async def test_npy_needs_a_file(self, command):
        code, _, errors = await command("embed", "--server", "x:1", "--format", "npy")
        assert code == 2
        assert "--format npy needs --output FILE" in errors

    async def test_nobody_there(self, command):
        code, _, errors = await command("embed", "--server", "127.0.0.1:1", "--max-retry-ms", "0", stdin=b"a\n")
        assert code == 1
        assert errors.startswith("embedserve: 127.0.0.1:1: UNAVAILABLE: ")
        assert "Traceback" not in errors

    @pytest.mark.parametrize(
        ("closing", "code", "sentence"),
        [
            (">&-", 1, "standard output is closed: nobody would have the vectors; name a file by --output"),
            ("<&-", 1, "standard input is closed; name a file to read texts from"),
            ("2>&-", 0, ""),
        ],
    )
    async def test_a_standard_stream_that_was_closed_is_told_or_not_needed(self, service, closing, code, sentence):
        embed = f"echo a | {sys.executable} -m embedserve embed --server {service.address} {closing}"
        process = await asyncio.create_subprocess_shell(
            f"bash -c '{embed}'",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SERVICE_ROOT)},
        )
        output, errors = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, errors.decode()) == (code, f"embedserve: {sentence}\n" if sentence else "")
        assert output.count(b"\n") == (0 if code else 1)
        assert b"Traceback" not in output

    async def test_a_full_disk_is_a_sentence(self, service, command, tmp_path):
        full = private_device(tmp_path / "full", 1, 7)
        code, _, errors = await command("embed", "--server", service.address, "-o", str(full), stdin=b"a\n")
        assert (code, errors) == (1, f"embedserve: {full}: No space left on device\n")

    async def test_a_named_pipe_is_written_to_and_not_replaced(self, service, command, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reading = asyncio.create_task(asyncio.to_thread(pipe.read_bytes))
        code, _, errors = await command("embed", "--server", service.address, "-o", str(pipe), stdin=b"a\n")
        assert (code, errors) == (0, "")
        assert json.loads(await reading)["index"] == 0
        assert pipe.is_fifo()

    async def test_npy_into_a_device_is_refused(self, service, command, tmp_path):
        os.mkfifo(tmp_path / "pipe.npy")
        code, _, errors = await command("embed", "--server", service.address, "-o", str(tmp_path / "pipe.npy"))
        assert code == 1
        assert "is a device or a pipe" in errors

    async def test_an_interrupt_ends_a_run_that_waits_for_input(self, service):
        """Reading a pipe that nobody writes to must not keep the process."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "embedserve", "embed", "--server", service.address),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SERVICE_ROOT)},
        )
        process.stdin.write(b"a\n" * 4096)  # more than one call: an answer shows that the run is under way
        await asyncio.wait_for(process.stdout.readline(), 30)
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.stdout.read(), 30), await process.stderr.read()
        assert (await process.wait(), errors.strip()) == (130, b"")

    @pytest.mark.parametrize("named", [False, True])
    async def test_an_interrupt_ends_a_run_whose_reader_has_stopped(self, service, tmp_path, named):
        """The thread that writes waits for ever, and must hold nothing that the end of the process needs."""
        reading, writing, output = *os.pipe(), "-"
        if named:
            output = str(tmp_path / "pipe")
            os.mkfifo(output)
            os.close(reading)
            reading = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
        one_page = fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, os.sysconf("SC_PAGESIZE"))
        (tmp_path / "texts").write_text("a\n" * 4096)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "embedserve", "embed", "--server", service.address, "-o", output, str(tmp_path / "texts")),
            stdout=writing,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SERVICE_ROOT)},
        )
        os.close(writing)
        await until(lambda: waiting_bytes(reading) == one_page, 30)
        process.send_signal(signal.SIGINT)
        errors = await asyncio.wait_for(process.stderr.read(), 30)
        assert (await process.wait(), errors.strip()) == (130, b"")
        os.close(reading)

    async def test_a_reader_that_leaves_ends_the_run_quietly(self, service, tmp_path):
        source = tmp_path / "many.txt"
        source.write_text("".join(f"text {number}\n" for number in range(20_000)))
        embed = f"{sys.executable} -m embedserve embed --server {service.address} {source}"
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            f"{embed} | head -n 1 >/dev/null; echo ${{PIPESTATUS[0]}}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SERVICE_ROOT)},
        )
        output, errors = await process.communicate()
        assert (output, errors) == (b"0\n", b"")
        assert len(service.requests) < 79
