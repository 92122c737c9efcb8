"""The document: one file with its style and its script in it, and a policy that lets a browser run nothing else.

Decides how the page is put together and what a browser may do with it. Must never know HTTP. The script asks for this
very page again and takes over what has changed, so that what is shown live and what is shown without a script are made
by the same code.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Final

from embedserve.http.statusz import sections
from embedserve.http.statusz.markup import Html, foreign, tag
from embedserve.http.statusz.verdict import Verdict, judge
from embedserve.http.statusz.words import clock, duration
from embedserve.snapshot import Snapshot

__all__ = ["CONTENT_SECURITY_POLICY", "render"]

_ASSETS = files(__package__)
STYLE: Final = Html(_ASSETS.joinpath("page.css").read_text(encoding="utf-8"))
SCRIPT: Final = Html(_ASSETS.joinpath("page.js").read_text(encoding="utf-8"))


def _hash(source: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"


CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash(SCRIPT)}",
        f"style-src {_hash(STYLE)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing but this page's own style and script, and questions to where it came from; ``data:`` is the empty icon."""

_SECTIONS: Final = (
    sections.load,
    sections.queue,
    sections.latency,
    sections.passes,
    sections.admission,
    sections.device,
    sections.requests,
    sections.process,
)
_NAMES: Final = (
    ("load", "Load"),
    ("queue", "Queue"),
    ("latency", "Latency"),
    ("passes", "Passes"),
    ("admission", "Admission"),
    ("device", "Device"),
    ("requests", "Requests"),
    ("process", "Process and model"),
)


def render(shown: Snapshot) -> str:
    """The page."""
    verdict = judge(shown)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{verdict.headline} · {shown.process.host} · embedserve"),
        tag("link", rel="icon", href="data:,"),
        tag("style", STYLE),
    )
    body = tag("body", _top(shown), _live(shown, verdict), tag("script", SCRIPT))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en")


def _top(shown: Snapshot) -> Html:
    """What stays while the rest is refreshed."""
    links = tag("ul", [tag("li", tag("a", title, href=f"#{name}")) for name, title in _NAMES])
    return tag(
        "header",
        tag("a", "Skip to the state", href="#verdict", class_="skip"),
        tag("p", tag("strong", "embedserve"), " ", foreign(shown.process.host), class_="brand"),
        tag("nav", links, aria_label="Sections"),
        tag(
            "div",
            tag("span", f"As of {clock(shown.at_s, shown.at_s)} UTC", id="fresh"),
            tag("button", "Pause", type="button", id="pause", hidden=True),
            tag("noscript", tag("a", "Refresh", href="statusz")),
            class_="controls",
        ),
        tag("p", id="stale", role="status", hidden=True),
        tag("p", id="announce", role="status", class_="unseen"),
    )


def _live(shown: Snapshot, verdict: Verdict) -> Html:
    model, process = shown.model, shown.process
    about = [
        foreign(model.name),
        f" · {process.state} · up {duration(process.uptime_s)} · version {process.version} · pid {process.pid}",
    ]
    answers = [
        tag("div", tag("dt", answer.question), tag("dd", answer.answer, class_=answer.level))
        for answer in verdict.answers
    ]
    return tag(
        "main",
        tag(
            "section",
            tag("h1", verdict.sentence, id="verdict", tabindex=-1),
            tag("p", about, class_="about"),
            class_=f"verdict {verdict.level}",
            aria_labelledby="verdict",
        ),
        tag(
            "section", tag("h2", "In short", id="short"), tag("dl", answers, class_="answers"), aria_labelledby="short"
        ),
        [build(shown) for build in _SECTIONS],
        id="live",
        data_headline=verdict.headline,
        data_at=clock(shown.at_s, shown.at_s),
    )
