"""``python -m tests.simulation SEED SCENARIO``: prints the timeline and a verdict on every invariant.

``--rewrite`` writes the golden traces anew, on purpose only: commit a change only if you know what caused it.
"""

import sys

from tests.simulation.checkers import INVARIANTS, Violation
from tests.simulation.simulator import Simulator
from tests.simulation.traces import GOLDEN, golden_path, golden_text
from tests.simulation.workloads import SCENARIOS


def main(arguments):
    if arguments == ["--rewrite"]:
        for name in GOLDEN:
            golden_path(name).write_text(golden_text(name))
        return 0
    if len(arguments) != 2 or not arguments[0].isdigit() or arguments[1] not in SCENARIOS:
        sys.stderr.write(f"usage: python -m tests.simulation SEED SCENARIO\nscenarios: {' '.join(SCENARIOS)}\n")
        return 2
    simulator = Simulator(int(arguments[0]), arguments[1])
    broken = None
    try:
        simulator.run()
    except (Violation, AssertionError) as violation:
        broken = str(violation)
    lines = [*simulator.lines, "", f"{dict(sorted(simulator.outcomes().items()))} in {simulator.batches} batches"]
    for name, promise in INVARIANTS.items():
        checks = simulator.scheduler.checks[name]
        verdict = "BROKEN" if broken and broken.startswith(f"{name}:") else "holds" if checks else "not checked"
        lines.append(f"{name:4} {verdict:12} {checks:8} checks  {promise}")
    sys.stdout.write("\n".join([*lines, *([broken] if broken else [])]) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
