"""The typed rows that leave this room, one class for each kind of training data.

A prompt or completion is either text, used as it stands, or a tuple of messages, which goes through a chat template.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from posttrain.core import Message, Record, ToolSpec

Content: TypeAlias = str | tuple[Message, ...]

Kind: TypeAlias = Literal["text", "prompt", "completion", "preference", "unpaired", "steps"]
KINDS: tuple[Kind, ...] = ("text", "prompt", "completion", "preference", "unpaired", "steps")


class TextRow(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="text_row/1"):
    """Plain text to continue training on."""

    id: str
    text: str


class PromptRow(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="prompt_row/1"):
    """A prompt, with the reference answer and whatever else a grader may want."""

    id: str
    prompt: Content
    answer: str | None = None
    facts: dict[str, Any] = {}  # the columns that are neither prompt nor answer
    tools: tuple[ToolSpec, ...] = ()


class CompletionRow(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="completion_row/1"
):
    """A prompt and what should follow it.

    Of a conversation, `prompt` is what comes before the first assistant turn and `completion` the rest: later user and
    tool turns are context, assistant turns with `train=True` are targets.
    """

    id: str
    prompt: Content
    completion: Content
    tools: tuple[ToolSpec, ...] = ()


class PreferenceRow(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="preference_row/1"
):
    """Two answers to one prompt, the better one first."""

    id: str
    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None = None  # how much better, in the data set's own scale
    tools: tuple[ToolSpec, ...] = ()


class LabelRow(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="label_row/1"):
    """One answer and whether it is good."""

    id: str
    prompt: Content
    completion: Content
    label: bool
    tools: tuple[ToolSpec, ...] = ()


class StepsRow(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="steps_row/1"):
    """An answer in steps, each labelled right or wrong."""

    id: str
    prompt: Content
    completions: tuple[str, ...]  # the steps, in order
    labels: tuple[bool, ...]  # as many


TypedRow: TypeAlias = TextRow | PromptRow | CompletionRow | PreferenceRow | LabelRow | StepsRow


class BadRow(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="bad_row/1"):
    """A row that cannot be used, as it is written to the quarantine file."""

    file: str
    line: int  # 1-based; the row's number in Parquet and Arrow files and in JSON arrays
    field: str  # "" where the whole row is at fault
    cause: str  # the same words for the same fault, so that causes can be counted
    detail: str = ""  # what is particular to this row
    raw: str = ""  # the row as it stood in the file, or as JSON where the file is not text

    @property
    def reason(self) -> str:
        """Cause and detail as one phrase."""
        return f"{self.cause}: {self.detail}" if self.detail else self.cause

    def describe(self) -> str:
        """`file:line: field: reason`."""
        field = f"{self.field}: " if self.field else ""
        return f"{self.file}:{self.line}: {field}{self.reason}"


class LoadReport(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="load_report/1"
):
    """What became of the rows that were read: `num_read == num_clean + num_bad`."""

    files: tuple[str, ...]
    formats: tuple[str, ...]  # in the order they were met
    kind: str
    num_read: int  # source rows
    num_clean: int  # source rows that were used
    num_bad: int  # source rows that were not
    num_rows: int  # typed rows given out; more than num_clean where one source row makes several
    causes: dict[str, int]  # "field: cause" → how many
    bad: tuple[BadRow, ...]  # the first of them; the quarantine file has all

    def summary(self) -> str:
        """One line with the counts, and one for each cause with its lines."""
        share = 100 * self.num_bad / self.num_read if self.num_read else 0.0
        head = f"{self.num_read} rows read, {self.num_clean} used, {self.num_bad} bad ({share:.1f} %)"
        parts = []
        for cause, count in sorted(self.causes.items(), key=lambda item: -item[1]):
            lines = [f"{bad.file}:{bad.line}" for bad in self.bad if cause_key(bad) == cause][:5]
            more = ", …" if count > len(lines) else ""
            parts.append(f"  {count} × {cause} ({', '.join(lines)}{more})")
        return "\n".join([head, *parts])


def cause_key(bad: BadRow) -> str:
    """The key under which a bad row is counted."""
    return f"{bad.field}: {bad.cause}" if bad.field else bad.cause


class RowFault(Exception):
    """Raised by converters for one row; the loader turns it into a `BadRow`."""

    def __init__(self, field: str, cause: str, detail: str = "") -> None:
        super().__init__(f"{field}: {cause}" + (f": {detail}" if detail else ""))
        self.field = field
        self.cause = cause
        self.detail = detail
