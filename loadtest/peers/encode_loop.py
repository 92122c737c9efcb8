"""What a user without a server does: one process that calls ``model.encode``, behind a socket so that it can be timed.

Runs in the peer's own environment with nothing but sentence-transformers. Decides the smallest protocol there is: a
frame is its length (4 bytes, big-endian) and JSON; the answer is a length and float32 rows, or JSON. One thread reads a
frame, does it and answers before it reads the next: the lock that such a program has around its model.

    {"texts": [...]}                                one encode call
    {"echo": [...]}                                 as many zeros, without the model: what the socket costs
    {"offline": [...], "batch_size": n}             one encode call over all of them, timed here; the answer is JSON
"""

import json
import selectors
import socket
import struct
import sys
import time
from typing import Any

import numpy as np

FRAME_BYTES_MAX = 64 << 20


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """One frame, or ``None`` where the peer has gone."""
    head = exactly(connection, 4)
    if head is None:
        return None
    (size,) = struct.unpack("!I", head)
    if size > FRAME_BYTES_MAX:
        return None
    body = exactly(connection, size)
    if body is None:
        return None
    frame: dict[str, Any] = json.loads(body)
    return frame


def exactly(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes, or ``None`` at the end."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def answer(model: Any, frame: dict[str, Any], batch_size: int) -> bytes:
    """What a frame asks for, as bytes."""
    if "echo" in frame:
        return bytes(4 * 384 * len(frame["echo"]))
    texts = frame.get("texts") or frame["offline"]
    begun = time.perf_counter()
    # Texts are sorted by length inside encode.
    vectors = model.encode(
        texts, batch_size=frame.get("batch_size", batch_size), show_progress_bar=False, convert_to_numpy=True
    )
    took = time.perf_counter() - begun
    if "offline" in frame:
        return json.dumps({"texts": len(texts), "seconds": took}).encode()
    return np.ascontiguousarray(vectors, dtype="<f4").tobytes()


def main() -> None:
    """``encode_loop.py MODEL PORT DTYPE``."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds, which a test of the rest can save

    folder, port, dtype = sys.argv[1:4]
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
    listener = socket.create_server(("127.0.0.1", int(port)), backlog=256)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                newcomer, _ = listener.accept()
                newcomer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(newcomer, selectors.EVENT_READ)
                continue
            connection: Any = key.fileobj
            try:
                frame = receive(connection)
                if frame is not None:
                    body = answer(model, frame, 32)
                    connection.sendall(struct.pack("!I", len(body)) + body)
                    continue
            except ConnectionError:
                pass
            selector.unregister(connection)
            connection.close()


if __name__ == "__main__":
    main()
