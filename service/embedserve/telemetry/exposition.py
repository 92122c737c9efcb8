"""The metrics of several processes as one text.

Decides how series of the same name are told apart: by a first label ``process``. Must never know how the texts came
here. Nothing is added up: a sum over processes is the reader's, as it is over replicas, and a gauge has none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

__all__ = ["LABEL", "merge_expositions"]

LABEL: Final = "process"
_SAMPLE: Final = re.compile(rb"([a-zA-Z_:][a-zA-Z0-9_:]*)(\{)?(\})?")
_END: Final = b"# EOF"


def merge_expositions(parts: Sequence[tuple[str, bytes]]) -> bytes:
    """One text of ``(process, text)``, each as a ``PrometheusRenderer`` wrote it, all of one form.

    Without a name (``""``) a text is one that this function has made: its series have their label. A family has
    one head, that of the first process which has it, and the samples of all.
    """
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}
    ended = False
    for process, text in parts:
        label = f'{LABEL}="{process}"'.encode() if process else b""
        samples: list[bytes] = []
        head: list[bytes] | None = None
        for line in text.splitlines():
            if line == _END:
                ended = True
            elif line.startswith(b"# "):
                _, word, name = line.split(b" ", 3)[:3]
                if word == b"HELP":
                    new = name not in families
                    lines, samples = families.setdefault(name, ([], []))
                    head = lines if new else None
                if head is not None:
                    head.append(line)
            elif line:
                samples.append(_labelled(line, label) if label else line)
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    return b"\n".join([*lines, _END, b""] if ended else [*lines, b""])


def _labelled(sample: bytes, label: bytes) -> bytes:
    found = _SAMPLE.match(sample)
    assert found is not None, "a line that is no sample"
    name, opened, closed = found.groups()
    rest = sample[found.end() :]
    if not opened:
        return b"%s{%s}%s" % (name, label, rest)
    return b"%s{%s%s%s" % (name, label, b"}" if closed else b",", rest)
