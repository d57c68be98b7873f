"""The masks of published chat templates, proven by a second method, and the page that says what is supported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Message, assistant, user
from posttrain.render import Renderer
from posttrain.render.conversation import Conversation
from posttrain.render.survey import (
    CONVERSATIONS,
    TemplateReport,
    masked_texts,
    read_templates,
    survey,
    survey_page,
    template_tokenizer,
)
from posttrain.render.template_process import RenderedText, render_template

PAGE = Path(__file__).resolve().parents[2] / "docs" / "chat_templates.md"

# Turns that are not prompt + text in these templates: the prompt opens a thought that a turn without one does not show.
# Read off the templates by eye: (one turn, before the text), after the header that prompt and turn have in common.
OPENED = {
    "Cohere2MoE": "<|START_TEXT|>",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "</think>",
    "Qwen-QwQ-32B": "",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "",
    "deepseek-ai-DeepSeek-V3.2": "</think>",
    "google-gemma-4-31B-it": "",
    "google-gemma-4-31B-it-interleaved": "",
    "llama-cpp-deepseek-r1": "",
}


@pytest.fixture(scope="module")
def templates(data: Path) -> dict[str, str]:
    found = read_templates(data / "chat_templates")
    assert len(found) == 67
    return found


@pytest.fixture(scope="module")
def reports(templates: dict[str, str]) -> dict[str, TemplateReport]:
    return {report.name: report for report in survey(templates)}


def raw(template: str, messages: tuple[Message, ...], **extra: Any) -> str:
    """The template's text, without anything of the mask's machinery."""
    row = {**Conversation(messages).variables(), "bos_token": "<s>", "eos_token": "</s>", **extra}
    result = render_template(template, [row])[0]
    assert isinstance(result, RenderedText)
    return result.text


def test_most_templates_are_supported(reports: dict[str, TemplateReport]) -> None:
    for kind, least in [("one turn", 55), ("turns", 54), ("system", 54), ("tools", 44), ("reasoning", 11)]:
        assert sum(kind in report.supported for report in reports.values()) >= least


def test_one_turn_is_what_the_prompt_lacks(templates: dict[str, str], reports: dict[str, TemplateReport]) -> None:
    """Second method: the conversation's text minus the prompt's, but for white space and eos at the very end."""
    checked = 0
    for name, report in reports.items():
        if "one turn" not in report.supported:
            continue
        messages = CONVERSATIONS["one turn"][0]
        prompt = raw(templates[name], messages[:1], add_generation_prompt=True)
        whole = raw(templates[name], messages)
        (written,) = report.masked["one turn"]
        if name in OPENED:
            assert not whole.startswith(prompt)
            assert written == OPENED[name] + messages[1].content + report.end_of_turn
            assert whole.count(written) == 1
        else:
            assert whole.startswith(prompt + written), name
            assert whole[len(prompt) + len(written) :].strip() in ("", "</s>"), name
        assert written.endswith(messages[1].content + report.end_of_turn), name
        checked += 1
    assert checked >= 55


def test_masks_follow_the_contents(templates: dict[str, str], reports: dict[str, TemplateReport]) -> None:
    """Third method: other contents, one of them the user's own words, change the masked texts in them alone."""
    hello, first, more, second = CONVERSATIONS["turns"][0]
    other = {first.content: "Hello.", second.content: "QZ <b>ü</b> 🙂\nand 12 lines; more?"}
    for name, report in reports.items():
        if "turns" not in report.supported:
            continue
        renderer = Renderer(template_tokenizer(templates[name]))
        changed = (hello, assistant(other[first.content]), more, assistant(other[second.content]))
        expected = []
        for text in report.masked["turns"]:
            assert sum(content in text for content in other) == 1, name
            expected.append(re.sub("|".join(map(re.escape, other)), lambda match: other[match.group()], text))
        assert masked_texts(renderer, changed) == tuple(expected), name


def test_no_other_text_is_ever_masked(reports: dict[str, TemplateReport]) -> None:
    for report in reports.values():
        for kind, texts in report.masked.items():
            messages, _ = CONVERSATIONS[kind]
            assert len(texts) == sum(message.role == "assistant" for message in messages)
            for text in texts:
                for message in messages:
                    assert message.role == "assistant" or message.content not in text, (report.name, kind)
                assert text.rstrip() == text
            assert report.end_of_turn, (report.name, kind)
            assert texts[-1].endswith(report.end_of_turn), (report.name, kind)


def test_turns_of_templates_that_rewrite_are_exact_one_by_one(templates: dict[str, str]) -> None:
    messages, _ = CONVERSATIONS["reasoning in turns"]
    for name, end in [("Qwen-Qwen3-0.6B", "<|im_end|>"), ("openai-gpt-oss-120b", "<|return|>")]:
        renderer = Renderer(template_tokenizer(templates[name]))
        assert not renderer.prefix_stable(messages).stable
        each = renderer.render_turns(messages)
        assert len(each) == 2
        for turn, rendered in zip((1, 3), each, strict=True):
            prompt = renderer.prompt(messages[:turn])
            assert rendered.tokens[: len(prompt)] == prompt
            masked = [token for token, trained in zip(rendered.tokens, rendered.mask, strict=True) if trained]
            text = renderer.tokenizer.decode(masked, skip_special_tokens=False)
            assert messages[turn].content in text
            assert (messages[turn].reasoning or "?") in text
            assert text.endswith(end)


def test_templates_without_an_end_of_turn_work_once_told(templates: dict[str, str]) -> None:
    messages = CONVERSATIONS["turns"][0]
    for name, end in [
        ("GLM-4.6", "<|user|>"),
        ("Apertus-8B-Instruct", "<|assistant_end|>"),
        ("llama-cpp-rwkv-world", "\n\n"),
    ]:
        renderer = Renderer(template_tokenizer(templates[name]), end_of_turn=end)
        texts = masked_texts(renderer, messages)
        assert [text[-len("one." + end) :] for text in texts] == ["one." + end, "two." + end], name


def test_a_switch_of_the_template_makes_prompt_and_turn_agree(templates: dict[str, str]) -> None:
    template = templates["NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]
    renderer = Renderer(template_tokenizer(template), template_kwargs={"enable_thinking": False})
    assert masked_texts(renderer, [user("a"), assistant("b")]) == ("b<|im_end|>",)


def test_the_page_says_what_is_so(reports: dict[str, TemplateReport]) -> None:
    page = survey_page(list(reports.values()))
    assert PAGE.read_text(encoding="utf-8") == page, (
        "run python -m posttrain.render.survey FOLDER > docs/chat_templates.md"
    )
