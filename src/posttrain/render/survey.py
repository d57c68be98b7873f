"""What each of a set of chat templates allows: a table, made by rendering sample conversations with every one of them.

python -m posttrain.render.survey FOLDER > docs/chat_templates.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.core import Message, Record, RenderError, ToolCall, ToolSpec, assistant, system, user
from posttrain.render.assistant_spans import MARKER
from posttrain.render.renderer import Renderer
from posttrain.render.tokenizer import Tokenizer

TOOL = ToolSpec(
    name="get_weather",
    description="The weather of a city.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Its name."}},
        "required": ["city"],
    },
)
CALL = ToolCall(name="get_weather", arguments={"city": "Paris"}, id="a1b2c3d4e")
FIRST, SECOND = assistant("Alpha one."), assistant("Beta two.")
CONVERSATIONS: dict[str, tuple[tuple[Message, ...], tuple[ToolSpec, ...]]] = {
    "one turn": ((user("Hello."), FIRST), ()),
    "turns": ((user("Hello."), FIRST, user("More?"), SECOND), ()),
    "system": ((system("Be kind."), user("Hello."), FIRST), ()),
    "reasoning": ((user("Hello."), FIRST.replace(reasoning="Hmm so.")), ()),
    "reasoning in turns": (
        (user("Hello."), FIRST.replace(reasoning="Hmm so."), user("More?"), SECOND.replace(reasoning="Yes.")),
        (),
    ),
    "tools": (
        (
            user("Weather?"),
            Message(role="assistant", tool_calls=(CALL,)),
            Message(role="tool", content="Cloudy, 18 C", tool_call_id=CALL.id, name=CALL.name),
            assistant("It is mild there."),
        ),
        (TOOL,),
    ),
}


class TemplateReport(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one template allows."""

    name: str
    end_of_turn: str  # after a plain turn that is the last message; "" where it cannot be told
    supported: tuple[str, ...]  # names of the sample conversations whose mask is exact
    refused: dict[str, str]  # name of the sample conversation → why it is refused
    masked: dict[str, tuple[str, ...]]  # name of the sample conversation → the texts of its trained spans
    rewrites: bool  # whether plain earlier turns are shown differently from how they were sampled


def control_tokens(template: str) -> tuple[str, ...]:
    """The control tokens that a template writes, after "<s>" and "</s>", which stand in for bos and eos."""
    found = {*MARKER.findall(template), *re.findall(r"<[|｜][^|｜<>]*[|｜]>", template)} - {"<s>", "</s>"}
    return ("<s>", "</s>", *sorted(found))


def template_tokenizer(template: str) -> Tokenizer:
    """A byte-level tokenizer in which every control token of the template is one token."""
    tokens = control_tokens(template)
    tokenizer = Tokenizer.train_bpe([], 256 + len(tokens), tokens, template, eos_token="</s>")
    tokenizer.special_tokens["bos_token"] = "<s>"
    return tokenizer


def masked_texts(renderer: Renderer, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> tuple[str, ...]:
    """The texts of the runs of trained tokens."""
    rendered = renderer.render(messages, tools=tools)
    runs: list[list[int]] = []
    for at, (token, trained) in enumerate(zip(rendered.tokens, rendered.mask, strict=True)):
        if trained and not (at and rendered.mask[at - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return tuple(renderer.tokenizer.decode(run, skip_special_tokens=False) for run in runs)


def survey_template(name: str, template: str) -> TemplateReport:
    """Render every sample conversation with one template."""
    renderer = Renderer(template_tokenizer(template))
    masked: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    for kind, (messages, tools) in CONVERSATIONS.items():
        try:
            masked[kind] = masked_texts(renderer, messages, tools)
        except RenderError as error:
            refused[kind] = str(error)
    rewrites = "turns" in masked and not renderer.prefix_stable(CONVERSATIONS["turns"][0]).stable
    return TemplateReport(
        name=name,
        end_of_turn=renderer.end_text(),
        supported=tuple(masked),
        refused=refused,
        masked=masked,
        rewrites=rewrites,
    )


def survey(templates: Mapping[str, str]) -> list[TemplateReport]:
    """Survey templates: name → Jinja text."""
    return [survey_template(name, template) for name, template in sorted(templates.items())]


def survey_page(reports: Sequence[TemplateReport]) -> str:
    """The survey as a Markdown page."""
    kinds = list(CONVERSATIONS)
    reasons: dict[str, int] = {}
    lines = [
        "# Chat templates",
        "",
        "What `posttrain.render.Renderer` does with each chat template: “yes” where tokens and mask are exact, a",
        "number where it refuses (the reasons are below), and whether plain earlier turns are shown otherwise than",
        "they were sampled (`Renderer.prefix_stable`). Made by `python -m posttrain.render.survey FOLDER`; a test",
        "keeps it true.",
        "",
        f"| template | end of turn | {' | '.join(kinds)} | earlier turns |",
        f"|---|---|{'---|' * len(kinds)}---|",
    ]
    for report in reports:
        cells = []
        for kind in kinds:
            # The place and the excerpt differ from sample to sample; the reason does not.
            why = re.sub(r"^message \d+: | \(its text is followed by .*?\)(?=, so)", "", report.refused.get(kind, ""))
            cells.append(f"[{reasons.setdefault(why, len(reasons) + 1)}]" if why else "yes")
        end = f"`{report.end_of_turn}`".replace("|", "\\|").replace("\n", "⏎") if report.end_of_turn else "?"
        earlier = "" if "turns" in report.refused else "rewritten" if report.rewrites else "kept"
        lines.append(f"| {report.name} | {end} | {' | '.join(cells)} | {earlier} |")
    lines.extend(["", "## Why refused", ""])
    lines.extend(f"{number}. {_escaped(why)}" for why, number in reasons.items())
    return "\n".join(lines) + "\n"


def read_templates(folder: Path) -> dict[str, str]:
    """All `.jinja` files under a folder: relative name without the ending → text."""
    files = sorted(folder.rglob("*.jinja"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file.read_text(encoding="utf-8") for file in files}


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("{%", "{&#37;").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(survey_page(survey(read_templates(Path(sys.argv[1])))))
