"""`posttrain feedback`: what people said about served answers, added, listed, counted and made into data sets."""

from __future__ import annotations

import argparse
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.printing import print_json, print_table, shortened, show_time
from posttrain.core import DataError, Feedback, Interaction, UsageError

if TYPE_CHECKING:
    from posttrain.feedback import FeedbackStore

KINDS = ("prompt_completion", "preference", "unpaired_preference")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    group = commands.add_parser("feedback", help="what people said about served answers, and data sets of it")
    group.set_defaults(parser=group)
    parts = group.add_subparsers(metavar="COMMAND", title="commands")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--db", type=Path, default=Path("runs/feedback.db"), help="store (default: runs/feedback.db)")
    _add_export(parts, shared)
    _add_add(parts, shared)
    listing = parts.add_parser("list", parents=[shared], help="served answers and what was said about them")
    listing.add_argument("--model", help="only answers of this model: card id or name")
    listing.add_argument("--limit", type=int, default=20, help="the newest so many (default: 20)")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(action=list_answers)
    counts = parts.add_parser("counts", parents=[shared], help="how much there is, and how far sources agree")
    counts.add_argument("--json", action="store_true", help="print JSON")
    counts.set_defaults(action=count)


def _add_export(parts: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    parser = parts.add_parser("export", parents=[shared], help="write a data set of TRL's types (JSONL)")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help=f"type of data set (default: {KINDS[0]})")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write; replaced whole or not at all")
    parser.add_argument("--model", help="only answers of this model: card id or name")
    parser.add_argument(
        "--format", choices=("conversational", "standard"), default="conversational", help="messages, or plain text"
    )
    parser.add_argument("--no-redact", action="store_true", help="leave addresses, numbers and keys as they are")
    parser.add_argument("--keep-clipped", action="store_true", help="also answers that were cut off at max_tokens")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(action=export)


def _add_add(parts: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser) -> None:
    parser = parts.add_parser("add", parents=[shared], help="say what you think of an answer")
    parser.add_argument("completion_id", help="the id that the client got: chatcmpl-…")
    parser.add_argument("--choice", type=int, default=0, help="which of several choices (default: 0)")
    signal = parser.add_mutually_exclusive_group(required=True)
    signal.add_argument("--thumb", choices=("up", "down"), help="good or bad")
    signal.add_argument("--rating", type=float, help="a number; 4 and more is good, 2 and less is bad")
    signal.add_argument("--correction", metavar="TEXT", help="the right answer")
    signal.add_argument("--label", metavar="NAME=VALUE", help="true, false, a number or a text under a name")
    parser.add_argument("--source", default="user", help="who says it; the latest of a source counts (default: user)")
    parser.add_argument("--comment", default="", help="in words")
    parser.set_defaults(action=add)


def open_store(path: Path) -> FeedbackStore:
    """A store that is there; reading does not make one.

    Raises:
        DataError: there is none.
    """
    from posttrain.feedback import FeedbackStore

    if not path.is_file():
        raise DataError(f"{path}: no feedback store here; `posttrain serve` makes one, --db names another")
    return FeedbackStore(path)


def export(chosen: argparse.Namespace) -> int:
    """`posttrain feedback export`."""
    from posttrain import feedback

    with open_store(chosen.db) as store:
        report = feedback.export(
            store,
            chosen.kind,
            out=chosen.out,
            model=chosen.model,
            format=chosen.format,
            redact=not chosen.no_redact,
            keep_clipped=chosen.keep_clipped,
        )
    if chosen.json:
        print_json(report)
        return 0
    print(f"{report.rows} rows in {report.path}")
    for what, counts in (
        ("from", report.signals),
        ("sources disagreed", report.conflicts),
        ("left out", report.skipped),
        ("redacted", report.redactions),
    ):
        if counts:
            print(f"{what}: {', '.join(f'{number} × {name}' for name, number in counts.items())}")
    return 0


def add(chosen: argparse.Namespace) -> int:
    """`posttrain feedback add`."""
    kind, value, name = _signal(chosen)
    signal = Feedback(
        id=f"fb-{uuid.uuid4().hex}",
        completion_id=chosen.completion_id,
        choice=chosen.choice,
        kind=kind,
        value=value,
        name=name,
        comment=chosen.comment,
        source=chosen.source,
        created_s=time.time(),
    )
    with open_store(chosen.db) as store:
        store.add(signal)
    print(f"stored {signal.id}: {_said(signal)} about {signal.completion_id}, choice {signal.choice}")
    return 0


def _signal(chosen: argparse.Namespace) -> tuple[Any, bool | float | str, str]:
    """Kind, value and name of the signal that the options give."""
    if chosen.thumb is not None:
        return "thumb", chosen.thumb == "up", ""
    if chosen.rating is not None:
        return "rating", chosen.rating, ""
    if chosen.correction is not None:
        return "correction", chosen.correction, ""
    name, equals, text = chosen.label.partition("=")
    if not name or not equals:
        raise UsageError(f"--label {chosen.label!r}: write NAME=VALUE, as --label resolved=true")
    if text.lower() in ("true", "false"):
        return "label", text.lower() == "true", name
    try:
        return "label", float(text), name
    except ValueError:
        return "label", text, name


def list_answers(chosen: argparse.Namespace) -> int:
    """`posttrain feedback list`: the newest answers, newest last."""
    if chosen.limit < 1:
        raise UsageError(f"--limit must be at least 1, not {chosen.limit}")
    with open_store(chosen.db) as store:
        answers = _newest(store, chosen.model, chosen.limit)
        signals: dict[str, list[Feedback]] = defaultdict(list)
        for answer in answers:
            if answer.id not in signals:
                signals[answer.id] = store.feedback_for(answer.id)
    if chosen.json:
        print_json([{"interaction": answer, "feedback": _about(answer, signals[answer.id])} for answer in answers])
        return 0
    rows = [
        (
            answer.id,
            answer.choice,
            answer.model_name,
            show_time(answer.created_s),
            shortened(answer.messages[-1].content if answer.messages else answer.prompt, 40),
            shortened(answer.text, 40),
            ", ".join(_said(signal) for signal in _about(answer, signals[answer.id])),
        )
        for answer in answers
    ]
    print_table(("completion", "choice", "model", "when", "asked", "answered", "feedback"), rows)
    return 0


def _newest(store: FeedbackStore, model: str | None, limit: int) -> list[Interaction]:
    newest: list[Interaction] = []
    cursor: int | None = None
    while True:
        page = store.interactions(model, limit=1000, cursor=cursor)
        newest = [*newest, *page.items][-limit:]
        cursor = page.next_cursor
        if cursor is None:
            return newest


def _about(answer: Interaction, signals: list[Feedback]) -> list[Feedback]:
    """The signals that speak of one choice, as the one meant or as the one that lost."""
    key = (answer.id, answer.choice)
    return [
        signal
        for signal in signals
        if key in ((signal.completion_id, signal.choice), (signal.rejected_id, signal.rejected_choice))
    ]


def _said(signal: Feedback) -> str:
    """One signal in a few words, with who said it."""
    if signal.kind == "thumb":
        said = "thumb up" if signal.value else "thumb down"
    elif signal.kind == "label":
        said = f"{signal.name}={signal.value}"
    elif signal.kind == "correction":
        said = f"correction {shortened(str(signal.value), 30)!r}"
    elif signal.kind == "preferred":
        over = f"{signal.rejected_id}, choice {signal.rejected_choice}"
        said = str(signal.value) if signal.value else f"choice {signal.choice} preferred over {over}"
    else:
        said = f"rating {signal.value:g}" if isinstance(signal.value, int | float) else f"rating {signal.value}"
    return f"{said} ({signal.source})"


def count(chosen: argparse.Namespace) -> int:
    """`posttrain feedback counts`."""
    from posttrain.feedback import agreement

    with open_store(chosen.db) as store:
        counts, agreements = store.counts(), agreement(store)
    if chosen.json:
        print_json({**counts.to_dict(), "agreement": agreements})
        return 0
    print(f"{counts.interactions} answers, {counts.feedback} signals")
    print_table(("signal", "how many"), list(counts.kinds.items()))
    if agreements:
        rows = [
            (found.name, " and ".join(found.sources), found.n, f"{found.agreement:.1%}", _kappa(found.kappa))
            for found in agreements
        ]
        print_table(("both judged", "sources", "answers", "agree", "kappa"), rows)
    return 0


def _kappa(kappa: float | None) -> str:
    return "–" if kappa is None else f"{kappa:.2f}"
