"""Checks of a data file: which rows are good, what of them would be trained, and whether they end and fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.cli.check import Check, ok, problem, warning
from posttrain.core import DataError, RenderError, Task

if TYPE_CHECKING:
    from posttrain.data import CompletionRow, LabelRow, LoadReport, PreferenceRow, PromptRow, TypedRow
    from posttrain.render import Rendered, Renderer

T = TypeVar("T")
MAX_BAD = 0.05  # above it, recipes stop
NUM_EXAMPLES = 2
EXAMPLE_CHARACTERS = 600
OPEN, CLOSE = "⟦", "⟧"  # around what is trained


def check_data(
    path: Path,
    *,
    renderer: Renderer | None = None,
    max_positions: int | None = None,
    columns: str | None = None,
    kind: Any = None,
    chat: bool = False,
    limit: int | None = None,
) -> list[Check]:
    """All checks of one file.

    Args:
        path: file, folder or saved data set.
        renderer: of the model that is to be trained; without one, only the rows themselves are looked at.
        max_positions: of that model.
        columns: which columns to read.
        kind: what rows to make of them.
        chat: make text a conversation.
        limit: rows to look at.
    """
    from posttrain import data

    stream = data.stream(path, kind=kind, columns=columns, limit=limit, max_bad=1.0)
    try:
        rows = list(stream)
    except DataError as error:
        return [problem("rows", str(error), "see `posttrain data inspect`, and name the columns with --columns")]
    checks = [check_rows(stream.report)]
    if not rows:
        return checks
    checks.append(check_duplicates(rows))
    if chat:
        rows = [row if isinstance(row, data.TextRow) else data.as_chat(row) for row in rows]
    prompts = [row for row in rows if isinstance(row, data.PromptRow)]
    if prompts:
        checks.append(check_answers(prompts))
    if renderer is not None:
        checks += _check_rendered(rows, renderer, max_positions)
    return checks


def check_rows(report: LoadReport) -> Check:
    """How many rows can be used."""
    detail = f"{', '.join(report.formats)}, read as {report.kind}; {report.summary()}"
    if not report.num_clean:
        return problem("rows", detail, "name the columns with --columns, see `posttrain data inspect`")
    if report.num_bad > MAX_BAD * report.num_read:
        return problem("rows", detail, f"correct them: recipes stop when more than {MAX_BAD:.0%} of the rows are bad")
    if report.num_bad:
        return warning("rows", detail, "recipes leave these rows out, and list them in bad_rows.jsonl")
    return ok("rows", detail)


def check_duplicates(rows: Sequence[TypedRow]) -> Check:
    """Rows that are equal but for case and white space."""
    from posttrain import data

    found = data.dedup_exact(rows).duplicates
    if not found:
        return ok("duplicates", f"none among {len(rows)} rows")
    first = found[0]
    detail = f"{len(found)} of {len(rows)} rows stand there before, as {first.id} and {first.kept_id}"
    return warning("duplicates", detail, "take them out (data.dedup_exact), or they count several times")


def check_answers(rows: Sequence[PromptRow]) -> Check:
    """Prompts without a reference answer, which most graders need."""
    without = [row.id for row in rows if row.answer is None]
    if not without:
        return ok("answers", f"every one of {len(rows)} prompts has a reference answer")
    detail = f"{len(without)} of {len(rows)} prompts have no reference answer, {without[0]} for one"
    return warning("answers", detail, "graders that compare with it fail on them: map a column with --columns answer=…")


def _check_rendered(rows: Sequence[TypedRow], renderer: Renderer, max_positions: int | None) -> list[Check]:
    """What the recipes would make of the rows."""
    rendered: list[Rendered] = []
    lengths: list[int] = []
    refused: list[str] = []
    for row in rows:
        try:
            found = render_row(row, renderer)
        except RenderError as error:
            refused.append(f"{row.id}: {error}")
            continue
        lengths += [len(tokens) for tokens in found.lengths_of]
        rendered += found.trained
    checks = [check_refused(refused, len(rows))]
    if lengths:
        checks.append(check_lengths(lengths, max_positions))
    if rendered:
        checks += [check_trained_share(rendered), check_ends(rendered, renderer), show_examples(rendered, renderer)]
    return checks


class _RenderedRow:
    """The token sequences of one row: all of them, and those with a part to train."""

    def __init__(self, lengths_of: Sequence[Sequence[int]], trained: Sequence[Rendered] = ()) -> None:
        self.lengths_of, self.trained = lengths_of, trained


def render_row(row: TypedRow, renderer: Renderer) -> _RenderedRow:
    """A row as the recipes render it.

    Raises:
        RenderError: the chat template refuses it.
    """
    from posttrain import data

    if isinstance(row, data.TextRow):
        return _RenderedRow([renderer.tokenizer.encode(row.text)])
    if isinstance(row, data.PromptRow):
        return _RenderedRow([renderer.prompt(Task(id=row.id, prompt=row.prompt, tools=row.tools))])
    if isinstance(row, data.StepsRow):
        row = data.CompletionRow(id=row.id, prompt=row.prompt, completion="".join(row.completions))
    pairs = [_pair(row, answer, renderer) for answer in _answers(row)]
    return _RenderedRow([pair.tokens for pair in pairs], pairs)


def _answers(row: CompletionRow | LabelRow | PreferenceRow) -> list[Any]:
    from posttrain import data

    return [row.chosen, row.rejected] if isinstance(row, data.PreferenceRow) else [row.completion]


def _pair(row: CompletionRow | LabelRow | PreferenceRow, answer: Any, renderer: Renderer) -> Rendered:
    return renderer.completion_pair(Task(id=row.id, prompt=row.prompt, tools=row.tools), answer)


def check_refused(refused: Sequence[str], num_rows: int) -> Check:
    """Rows that the chat template does not take."""
    if not refused:
        return ok("rendering", f"all of {num_rows} rows can be rendered")
    detail = f"{len(refused)} of {num_rows} rows cannot be rendered; first: {refused[0]}"
    if len(refused) > MAX_BAD * num_rows:
        return problem("rendering", detail, f"recipes stop when more than {MAX_BAD:.0%} of the rows are refused")
    return warning("rendering", detail, "recipes leave them out and count them")


def check_lengths(lengths: Sequence[int], max_positions: int | None) -> Check:
    """How long the sequences are, and whether they fit the model."""
    ordered = sorted(lengths)
    p50, p95 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95))
    detail = f"{len(ordered)} sequences, tokens: p50 {p50}, p95 {p95}, max {ordered[-1]}"
    if max_positions is None:
        return ok("lengths", detail)
    long = sum(length > max_positions for length in ordered)
    detail += f"; {long} ({long / len(ordered):.1%}) are longer than the model's {max_positions} positions"
    if long == len(ordered):
        return problem("lengths", detail, "nothing would be left to train on: shorten the rows")
    if long:
        return warning("lengths", detail, "recipes leave them out: shorten or split them if they matter")
    return ok("lengths", detail)


def check_trained_share(rendered: Sequence[Rendered]) -> Check:
    """The share of tokens with a loss: neither nothing nor everything is what a conversation is for."""
    name = "trained tokens"
    total, trained = (sum(map(len, parts)) for parts in ([r.tokens for r in rendered], [_trained(r) for r in rendered]))
    empty = sum(not any(each.mask) for each in rendered)
    detail = f"{trained} of {total} tokens are trained ({trained / max(1, total):.1%})"
    if trained == 0:
        return problem(
            name, f"{detail}: nothing would be learned", "look at the mask: is every turn marked train=false?"
        )
    if trained == total:
        return problem(name, f"{detail}: the prompts too", "give prompts and answers apart (--columns), not one text")
    if empty:
        return warning(name, f"{detail}; {empty} sequences have none", "leave them out: they only cost time")
    return ok(name, detail)


def _trained(rendered: Rendered) -> list[int]:
    return [token for token, wanted in zip(rendered.tokens, rendered.mask, strict=True) if wanted]


def check_ends(rendered: Sequence[Rendered], renderer: Renderer) -> Check:
    """Whether the last trained token is one at which samplers stop."""
    name = "trained ends"
    last = [trained[-1] for each in rendered if (trained := _trained(each))]
    if not last:
        return problem(name, "no token is trained, so no end is", "see trained tokens")
    ending = sum(token in renderer.stop_tokens for token in last)
    detail = f"{ending} of {len(last)} sequences teach the end of the turn"
    if ending == 0:
        return problem(name, f"{detail}: the model would never stop", "end turns with the eos token in the template")
    if ending < len(last):
        return warning(name, detail, "look at the rows that end otherwise")
    return ok(name, detail)


def show_examples(rendered: Sequence[Rendered], renderer: Renderer) -> Check:
    """Two sequences, what is trained between ⟦ and ⟧."""
    shown = [marked_text(each, renderer) for each in rendered[:NUM_EXAMPLES]]
    detail = "\n".join(line for text in shown for line in ("----", *text.split("\n")))
    return ok("examples", f"what is trained stands between {OPEN} and {CLOSE}\n{detail}")


def marked_text(rendered: Rendered, renderer: Renderer) -> str:
    """A sequence as text, special tokens written out, what is trained between marks."""
    tokens, mask = rendered.tokens, rendered.mask
    parts: list[str] = []
    start = 0
    for at in range(1, len(tokens) + 1):
        if at == len(tokens) or mask[at] != mask[start]:
            text = renderer.tokenizer.decode(tokens[start:at], skip_special_tokens=False)
            parts.append(f"{OPEN}{text}{CLOSE}" if mask[start] else text)
            start = at
    whole = "".join(parts)
    return whole if len(whole) <= EXAMPLE_CHARACTERS else f"{whole[:EXAMPLE_CHARACTERS]}…"
