"""Served answers and what was said about them, as a data set of one of TRL's types.

| kind                  | rows                                                                                        |
|-----------------------|---------------------------------------------------------------------------------------------|
| `prompt_completion`   | corrected texts; answers that the majority of sources found good                             |
| `preference`          | corrected over served; preferred over rejected; good over bad, or better rated over worse,   |
|                       | among the choices of one completion                                                          |
| `unpaired_preference` | answers with the majority's label                                                           |
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from posttrain.core import ConfigError, Feedback, Interaction, Message, Record, StopReason
from posttrain.feedback.redact import redact_counted
from posttrain.feedback.signals import Key, Preference, Rules, Verdict, preferences, verdict
from posttrain.feedback.store import FeedbackStore

Kind = Literal["prompt_completion", "preference", "unpaired_preference"]
Format = Literal["conversational", "standard"]
_UNFINISHED = (StopReason.CANCELLED, StopReason.TIMEOUT, StopReason.ERROR)


class ExportReport(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an export wrote and what it left out."""

    kind: Kind
    format: Format
    rows: int
    path: str | None
    signals: dict[str, int]  # rows by the signal they come from: correction, vote, preferred, choices
    conflicts: dict[str, int]  # sources that disagreed, by what about: vote, correction, preferred
    skipped: dict[str, int]  # rows left out, by reason
    redactions: dict[str, int]  # replaced in the rows, by kind
    records: tuple[dict[str, Any], ...] = ()  # the rows themselves, where no file was asked for


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    """A row before it is put in its format. Texts are the assistant's."""

    signal: str
    source: Interaction  # gives the prompt
    completion: str | Interaction  # chosen, or the only one
    rejected: Interaction | None = None
    label: bool | None = None
    feedback_ids: tuple[str, ...] = ()


class _Skip(Exception):
    """A row is left out; the text is the reason."""


def export(
    store: FeedbackStore,
    kind: Kind = "prompt_completion",
    *,
    out: Path | None = None,
    model: str | None = None,
    since_s: float | None = None,
    format: Format = "conversational",
    redact: bool = True,
    rules: Rules | None = None,
    keep_clipped: bool = False,
) -> ExportReport:
    """Write a data set of what people said about served answers.

    The latest signal of each (source, kind, name) counts; where sources disagree the majority decides, a tie gives no
    row, and both are counted. The order is that of the completions' creation, the same on every run. Each row carries
    where it comes from in `metadata`.

    Args:
        store: the interactions and their feedback.
        kind: type of data set.
        out: JSONL file, replaced whole or not at all; None gives the rows in the report.
        model: only answers of this model, by card id or by name.
        since_s: only answers created at or after this Unix time (not: feedback given after it).
        format: "conversational" has messages and leaves out answers to plain-text prompts; "standard" has the exact
            text that was sampled from, and the answer as text.
        redact: replace e-mail addresses, telephone and card numbers and API keys in all texts.
        rules: what counts as good or bad.
        keep_clipped: also use answers as good examples that were cut off at `max_tokens`.

    Raises:
        ConfigError: no such kind or format.
    """
    for name, value, allowed in (("kind", kind, get_args(Kind)), ("format", format, get_args(Format))):
        if value not in allowed:
            raise ConfigError(f"export: {name} must be one of {', '.join(allowed)}, not {value!r}")
    work = _Export(store, kind, format, redact, rules or Rules(), keep_clipped)
    rows = work.rows(model, since_s)
    records: tuple[dict[str, Any], ...] = ()
    if out is None:
        records = tuple(rows)
        number = len(records)
    else:
        number = _write(out, rows)
    return ExportReport(
        kind=kind,
        format=format,
        rows=number,
        path=None if out is None else str(out),
        signals=_sorted(work.signals),
        conflicts=_sorted(work.conflicts),
        skipped=_sorted(work.skipped),
        redactions=_sorted(work.redactions),
        records=records,
    )


class _Export:
    def __init__(
        self, store: FeedbackStore, kind: Kind, format: Format, redact: bool, rules: Rules, keep_clipped: bool
    ) -> None:
        self.store, self.kind, self.format, self.redact = store, kind, format, redact
        self.rules, self.keep_clipped = rules, keep_clipped
        self.signals: Counter[str] = Counter()
        self.conflicts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.redactions: Counter[str] = Counter()
        self.pairs: Mapping[frozenset[Key], Preference] = {}
        self.compared: dict[str, list[Preference]] = {}  # by completion id

    def rows(self, model: str | None, since_s: float | None) -> Iterator[dict[str, Any]]:
        if self.kind == "preference":
            self._read_preferences()
        for completion_id in self.store.judged(model, since_s):
            answers = self.store.choices(completion_id)
            signals = self.store.feedback_for(completion_id)
            verdicts = {answer.choice: self._verdict(answer, signals) for answer in answers}
            for row in self._make(answers, verdicts):
                try:
                    record = self._record(row)
                except _Skip as reason:
                    self.skipped[str(reason)] += 1
                    continue
                self.signals[row.signal] += 1
                yield record

    def _read_preferences(self) -> None:
        self.pairs = preferences(self.store.all_feedback("preferred"))
        for pair, preference in self.pairs.items():
            # A pair is seen once, with its winner's completion, or with the first of the two where there is none.
            (anchor, _), *_ = [preference.result[0]] if preference.result else sorted(pair)
            self.compared.setdefault(anchor, []).append(preference)
        for compared in self.compared.values():
            compared.sort(key=lambda preference: preference.result or ())

    def _verdict(self, answer: Interaction, signals: list[Feedback]) -> Verdict:
        found = verdict((answer.id, answer.choice), signals, self.rules)
        self.conflicts.update(found.disputed)
        if "vote" in found.disputed and found.good is None:
            self.skipped["tie between sources"] += 1
        return found

    def _make(self, answers: list[Interaction], verdicts: dict[int, Verdict]) -> Iterator[_Row]:
        if self.kind == "preference":
            yield from self._preference_rows(answers, verdicts)
            return
        for answer in answers:
            found = verdicts[answer.choice]
            if self.kind == "prompt_completion" and found.correction is not None:
                yield _Row(
                    signal="correction",
                    source=answer,
                    completion=found.correction,
                    feedback_ids=found.correction_ids,
                )
            elif found.good is not None and (found.good or self.kind == "unpaired_preference"):
                label = found.good if self.kind == "unpaired_preference" else None
                yield _Row(signal="vote", source=answer, completion=answer, label=label, feedback_ids=found.vote_ids)

    def _preference_rows(self, answers: list[Interaction], verdicts: dict[int, Verdict]) -> Iterator[_Row]:
        for answer in answers:
            found = verdicts[answer.choice]
            if found.correction is not None:
                yield _Row(
                    signal="correction",
                    source=answer,
                    completion=found.correction,
                    rejected=answer,
                    feedback_ids=found.correction_ids,
                )
        by_choice = {answer.choice: answer for answer in answers}
        for preference in self.compared.get(answers[0].id, ()):
            self.conflicts["preferred"] += preference.disputed
            if preference.result is None:
                self.skipped["tie between sources"] += 1
                continue
            (_, choice), rejected_key = preference.result
            chosen, rejected = by_choice[choice], self.store.interaction(*rejected_key)
            assert rejected is not None  # `add` lets no signal in that names an unknown answer
            yield _Row(
                signal="preferred",
                source=chosen,
                completion=chosen,
                rejected=rejected,
                feedback_ids=preference.feedback_ids,
            )
        for chosen in answers:
            for rejected in answers:
                if self._outdoes(chosen, rejected, verdicts):
                    ids = {*verdicts[chosen.choice].vote_ids, *verdicts[rejected.choice].vote_ids}
                    yield _Row(
                        signal="choices",
                        source=chosen,
                        completion=chosen,
                        rejected=rejected,
                        feedback_ids=tuple(sorted(ids)),
                    )

    def _outdoes(self, one: Interaction, other: Interaction, verdicts: dict[int, Verdict]) -> bool:
        """True where votes or ratings put one choice above another of the same prompt that were not compared."""
        pair = frozenset(((one.id, one.choice), (other.id, other.choice)))
        if len(pair) < 2 or pair in self.pairs or one.prompt_tokens != other.prompt_tokens:
            return False
        mine, its = verdicts[one.choice], verdicts[other.choice]
        if mine.good is not None and its.good is not None and mine.good != its.good:
            return mine.good
        return mine.rating is not None and its.rating is not None and mine.rating > its.rating

    def _record(self, row: _Row) -> dict[str, Any]:
        good = row.label is not False
        if isinstance(row.completion, Interaction):
            self._require_whole(row.completion, good)
        if row.rejected is not None:
            self._require_whole(row.rejected, False)
            if row.rejected.prompt_tokens != row.source.prompt_tokens:
                raise _Skip("different prompts")
        prompt = self._prompt(row.source)
        counts: Counter[str] = Counter()
        chosen = self._answer(row.completion, counts)
        record: dict[str, Any] = {"prompt": self._clean(prompt, counts)}
        if row.rejected is None:
            record["completion"] = chosen
        else:
            record["chosen"], record["rejected"] = chosen, self._answer(row.rejected, counts)
            if record["chosen"] == record["rejected"]:
                raise _Skip("identical answers")
        if row.label is not None:
            record["label"] = row.label
        tools = row.source.metadata.get("tools")
        if tools and self.format == "conversational":
            record["tools"] = self._clean(tools, counts)
        record["metadata"] = _provenance(row)
        self.redactions.update(counts)
        return record

    def _require_whole(self, answer: Interaction, good: bool) -> None:
        if answer.stop_reason in _UNFINISHED:
            raise _Skip(f"unfinished ({answer.stop_reason})")
        if good and answer.stop_reason is StopReason.LENGTH and not self.keep_clipped:
            raise _Skip("clipped at max_tokens")

    def _prompt(self, source: Interaction) -> Any:
        if self.format == "standard":
            return source.prompt
        if source.messages is None:
            raise _Skip("plain-text prompt in a conversational data set")
        return [chat_dict(message) for message in source.messages]

    def _answer(self, answer: str | Interaction, counts: Counter[str]) -> Any:
        text = answer if isinstance(answer, str) else answer.text
        if self.format == "standard":
            if not text.strip():
                raise _Skip("empty answer")
            return self._clean(text, counts)
        parsed = None if isinstance(answer, str) else answer.metadata.get("response")
        if not text.strip() and not (parsed or {}).get("tool_calls"):
            raise _Skip("empty answer")
        message = Message.from_dict(parsed) if parsed else Message(role="assistant", content=text)
        return self._clean([chat_dict(message)], counts)

    def _clean(self, value: Any, counts: Counter[str]) -> Any:
        """Redact every string in a JSON-like value, keys and roles aside."""
        if not self.redact:
            return value
        if isinstance(value, str):
            text, found = redact_counted(value)
            counts.update(found)
            return text
        if isinstance(value, list):
            return [self._clean(item, counts) for item in value]
        if isinstance(value, dict):
            return {key: self._clean(item, counts) for key, item in value.items()}
        return value


def chat_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates and TRL's conversational types write it; empty fields are left out."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        plain["reasoning_content"] = message.reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id else {}),
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _provenance(row: _Row) -> dict[str, Any]:
    source = row.source
    metadata: dict[str, Any] = {
        "interaction_id": source.id,
        "choice": source.choice,
        "model": source.model,
        "model_name": source.model_name,
        "weight_version": source.weight_version,
        "signal": row.signal,
        "feedback_ids": list(row.feedback_ids),
    }
    if row.rejected is not None and row.rejected is not source:
        metadata["rejected_interaction_id"] = row.rejected.id
        metadata["rejected_choice"] = row.rejected.choice
        metadata["rejected_model"] = row.rejected.model
    return metadata


def _write(out: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write JSON lines to a neighbour file and rename it into place."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
    number = 0
    try:
        with partial.open("xb") as lines:
            for row in rows:
                lines.write(msgspec.json.encode(row) + b"\n")
                number += 1
            lines.flush()
            os.fsync(lines.fileno())
        partial.replace(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return number


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return {name: number for name, number in sorted(counts.items()) if number}
