"""Makes the PrometheusRule of ``deploy/kubernetes/monitoring`` from ``dashboards/rules``.

Decides how groups of rules become one object of the Prometheus operator. Must never know what a rule says. Kustomize
may not read files outside its folder, so that the rules have to lie there a second time; this keeps both alike.

    python -m tests.contract.prometheus_rule --write     # or --check
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards" / "rules"
MANIFEST = ROOT / "deploy" / "kubernetes" / "monitoring" / "prometheusrule.yaml"
HEAD = "# Made by `make dashboards` from dashboards/rules: change those.\n"


def rule_object(rules: Path = RULES) -> dict[str, Any]:
    """All groups of all files in ``rules``, by the files' names. Raises ``ValueError`` where there are none."""
    groups = [
        group
        for path in sorted(rules.glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    if not groups:
        raise ValueError(f"{rules} holds no rules")
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "embedserve", "labels": {"app.kubernetes.io/name": "embedserve"}},
        "spec": {"groups": groups},
    }


def rendered(rules: Path = RULES) -> str:
    """The manifest's text."""
    return HEAD + yaml.safe_dump(rule_object(rules), sort_keys=False, width=120, allow_unicode=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """``--check`` returns 1 when the manifest is not what the rules say; ``--write`` makes it so."""
    parser = argparse.ArgumentParser(description="The PrometheusRule that is made from dashboards/rules.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--write", action="store_true")
    if parser.parse_args(arguments).write:
        MANIFEST.write_text(rendered(), encoding="utf-8")
        return 0
    if MANIFEST.read_text(encoding="utf-8") == rendered():
        return 0
    print(f"{MANIFEST.relative_to(ROOT)} is not what dashboards/rules say: make dashboards", file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
