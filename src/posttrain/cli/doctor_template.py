"""Checks of a chat template: that it renders, ends its turns, shows the assistant's part, rewrites nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.cli.check import Check, ok, problem, warning
from posttrain.core import Message, RenderError, assistant, user

if TYPE_CHECKING:
    from posttrain.render import Renderer, Tokenizer

ASKED, ANSWERED = ("What is two and two?", "And three and three?"), ("It is four.", "It is six.")
THOUGHT = "Two more than two."


def check_template(renderer: Renderer, declared_eos: frozenset[int]) -> list[Check]:
    """All checks of a renderer's chat template.

    Args:
        renderer: with the template.
        declared_eos: ids that config.json and generation_config.json name, for the tools that know nothing else.
    """
    if not (renderer.template or renderer.tokenizer.chat_template):
        detail = "none: text prompts only, messages cannot be rendered"
        advice = "for conversations give one with --template, or save chat_template.jinja in the folder"
        return [warning("chat template", detail, advice)]
    rendered = check_renders(renderer)
    if rendered.status == "problem":
        return [rendered]
    return [
        rendered,
        check_end_of_turn(renderer, declared_eos),
        check_mask(renderer),
        check_prefix(renderer),
        check_bos(renderer),
    ]


def conversation(*, reasoning: bool = False) -> list[Message]:
    """Two questions and two answers."""
    first = assistant(ANSWERED[0])
    return [
        user(ASKED[0]),
        first.replace(reasoning=THOUGHT) if reasoning else first,
        user(ASKED[1]),
        assistant(ANSWERED[1]),
    ]


def check_renders(renderer: Renderer) -> Check:
    """A conversation and a prompt come out, with everybody's words in them."""
    name = "chat template"
    try:
        prompt = renderer.tokenizer.decode(renderer.prompt(conversation()[:3]), skip_special_tokens=False)
    except RenderError as error:
        return problem(name, f"cannot be rendered: {error}", "correct the template, or replace it with --template FILE")
    lost = [text for text in (ASKED[0], ANSWERED[0], ASKED[1]) if text not in prompt]
    if lost:
        return problem(name, f"leaves out what was said: {lost[0]!r}", "correct the template")
    return ok(name, f"renders; a prompt ends with {prompt[-30:]!r}")


def check_end_of_turn(renderer: Renderer, declared_eos: frozenset[int]) -> Check:
    """What ends an assistant's turn must exist, be a token of its own, and be where samplers stop."""
    name = "end of turn"
    tokenizer = renderer.tokenizer
    end = renderer.end_text()
    if not end:
        detail = (
            "the template writes nothing after an assistant's turn, so a model trained with it never learns to stop"
        )
        advice = f"end assistant turns with {_eos_text(tokenizer)!r} in the template"
        return problem(name, detail, advice)
    ids = tokenizer.encode(end)
    stops = [number for number in ids if number in renderer.stop_tokens]
    if not stops:
        detail = f"turns end with {end!r} ({len(ids)} tokens), at none of which a sampler stops"
        return problem(name, detail, "make it a special token of the tokenizer, or end turns with the eos token")
    shown = f"turns end with {end!r} (id {stops[0]})"
    if declared_eos and stops[0] not in declared_eos:
        advice = "posttrain stops there; add the id to eos_token_id in generation_config.json for other tools"
        return warning(name, f"{shown}, which config.json and generation_config.json do not name", advice)
    return ok(name, f"{shown}, where samplers stop")


def _eos_text(tokenizer: Tokenizer) -> str:
    return tokenizer.special_tokens.get("eos_token", "an eos token")


def check_mask(renderer: Renderer) -> Check:
    """What would be trained of a conversation: both answers with their ends, and nothing that the user said."""
    name = "assistant mask"
    try:
        rendered = renderer.render(conversation())
    except RenderError as error:
        advice = "correct the template, or mark the assistant's part with {% generation %}"
        return problem(name, f"the assistant's part cannot be told: {error}", advice)
    trained = [token for token, wanted in zip(rendered.tokens, rendered.mask, strict=True) if wanted]
    text = renderer.tokenizer.decode(trained, skip_special_tokens=False)
    share = f"{len(trained)} of {len(rendered.tokens)} tokens"
    if not all(answer in text for answer in ANSWERED):
        return problem(name, f"{share} would be trained: {text!r}, not both answers", "correct the template")
    if any(question in text for question in ASKED):
        return problem(name, f"{share} would be trained, the user's words too: {text!r}", "correct the template")
    if trained[-1] not in renderer.stop_tokens:
        detail = f"{share}; the last one trained is {renderer.tokenizer.token(trained[-1])!r}, no end of turn"
        return problem(name, detail, "end assistant turns with the eos token, or the model never learns to stop")
    return ok(name, f"{share} of a conversation are trained, ends of turns among them")


def check_prefix(renderer: Renderer) -> Check:
    """Whether a growing conversation keeps its earlier turns, with and without reasoning."""
    name = "stable turns"
    advice = "train on turns one by one (Renderer.render_turns); rollouts append tokens and are safe"
    for reasoning in (False, True):
        try:
            report = renderer.prefix_stable(conversation(reasoning=reasoning))
        except RenderError as error:
            if reasoning:
                return ok(name, "earlier turns stay as they were; the template does not write a turn's reasoning")
            return warning(name, f"cannot be told: {error}", advice)
        if not report.stable:
            what = "a turn with reasoning" if reasoning else "an earlier turn"
            return warning(name, f"the template rewrites {what}: {report.why()}", advice)
    return ok(name, "earlier turns stay as they were, with reasoning too")


def check_bos(renderer: Renderer) -> Check:
    """How many times a sequence begins."""
    name = "beginning of sequence"
    tokenizer = renderer.tokenizer
    bos = tokenizer.bos_id
    tokens = renderer.prompt([user(ASKED[0])])
    if bos is None:
        return ok(name, "no bos token")
    if tuple(tokens[:2]) == (bos, bos):
        detail = f"the template writes {tokenizer.token(bos)} twice"
        return problem(name, detail, "take one out of the template: models are trained with one")
    writes = tokens[:1] == (bos,)
    detail = f"{tokenizer.token(bos)} once at the head of a conversation" if writes else "none at a conversation's head"
    if writes and bos in tokenizer.prefix_ids:
        advice = "tools that tokenise the rendered text with special tokens would write it twice; posttrain does not"
        return ok(name, detail, advice)
    return ok(name, detail)
