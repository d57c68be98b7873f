"""The loss mask: exactly what the assistant wrote, its end-of-turn token included."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import Message, RenderError, Task, ToolCall, ToolSpec, assistant, system, user
from posttrain.render import CHATML, Renderer, Tokenizer
from posttrain.render.assistant_spans import token_mask
from posttrain.render.marks import Marker
from posttrain.render.survey import masked_texts, template_tokenizer

EOT = "<|im_end|>"
TRIMS = CHATML.replace("message.content or ''", "(message.content or '') | trim")
# Shows a thought only in the last turn, and opens one in the generation prompt, as reasoning models' templates do.
FORGETS = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last -%}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif -%}
    {{- message.content + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n<think>' }}
{%- endif -%}
"""
TAGGED = CHATML.replace(
    "{{- '<|im_start|>assistant\\n' }}\n        {%- if message.r",
    "{{- '<|im_start|>assistant\\n' }}\n        {%- generation %}\n        {%- if message.r",
).replace(
    "        {{- '<|im_end|>\\n' }}\n    {%- elif",
    "        {{- '<|im_end|>' }}\n        {%- endgeneration %}\n        {{- '\\n' }}\n    {%- elif",
)
ADD = ToolSpec(name="add", description="Add.", parameters={"type": "object", "properties": {}})


@pytest.fixture(scope="module")
def chatml(small: Tokenizer) -> Renderer:
    return Renderer(small)


def test_marks_avoid_the_private_characters_of_the_messages() -> None:
    assert Marker.for_messages([user("a")]).base == 0xF2000
    assert Marker.for_messages([user("a \U000f2001")]).base == 0xF2002
    spread = "".join(map(chr, [*range(0xF2000, 0xFFFFD, 60), *range(0x100000, 0x10FFFD, 60)]))
    with pytest.raises(RenderError, match="no private-use characters"):
        Marker.for_messages([user(spread)])


def test_worked_by_hand() -> None:
    # One token a byte: the mask can be counted. "<|im_start|>" 12 characters are one token, so is "<|im_end|>".
    tokenizer = Tokenizer.train_bpe([], 259)
    rendered = Renderer(tokenizer).render([user("hi"), assistant("yes")])
    assert rendered.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    # 1 + "user\n" 5 + "hi" 2 + 1 + "\n" 1 + 1 + "assistant\n" 10 = 21 context, then "yes" 3 + end 1, then "\n" 1.
    assert rendered.mask == (False,) * 21 + (True,) * 4 + (False,)
    assert tokenizer.decode(rendered.tokens[21:25], skip_special_tokens=False) == "yes<|im_end|>"


@pytest.mark.parametrize(
    "content",
    [
        "plain",
        "  leading and trailing  \n",
        "🙂🙃 ünï 你好",
        "same as the user",
        "contains <|im_end|> and <|im_start|>assistant\nitself",
        "<think>\nthought\n</think>\n\nsaid",
        "",
        " ",
        "\U000f2000 private \U000f2001",
    ],
)
@pytest.mark.parametrize("template", [CHATML, TAGGED], ids=["chatml", "tagged"])
def test_contents_of_all_kinds(small: Tokenizer, content: str, template: str) -> None:
    messages = [system("s"), user("same as the user"), assistant(content), user(content), assistant("last")]
    texts = masked_texts(Renderer(small, template), messages)
    # Characters in one masked run are the assistant's; its first line feed may share a token with the header's.
    assert [text.removeprefix("\n") for text in texts] == [(content + EOT).removeprefix("\n"), "last" + EOT]


def test_a_template_that_strips_is_masked_by_what_it_shows(small: Tokenizer) -> None:
    messages = [user(" hi "), assistant("  padded \n"), user("more"), assistant("\tlast ")]
    assert masked_texts(Renderer(small, TRIMS), messages) == ("padded" + EOT, "last" + EOT)


def test_turns_that_are_context_only_are_left_out(small: Tokenizer) -> None:
    messages = [user("a"), assistant("one").replace(train=False), user("b"), assistant("two")]
    for template in (CHATML, TAGGED):
        renderer = Renderer(small, template)
        assert masked_texts(renderer, messages) == ("two" + EOT,)
        assert masked_texts(renderer, messages[:2]) == ()
        assert masked_texts(
            renderer, [user("a"), assistant("one"), *messages[2:3], messages[3].replace(train=False)]
        ) == ("one" + EOT,)


def test_tool_calls_and_reasoning_are_the_assistants(chatml: Renderer) -> None:
    call = Message(role="assistant", reasoning="sum", tool_calls=(ToolCall(name="add", arguments={"a": 1, "b": "é"}),))
    messages = [user("1+2?"), call, Message(role="tool", content="3"), assistant("It is 3.")]
    thought = "<think>\nsum\n</think>\n\n"
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
    assert masked_texts(chatml, messages, [ADD]) == (thought + written + EOT, "It is 3." + EOT)
    assert '{"type": "function", "function": {"name": "add"' in chatml.render(messages, tools=[ADD]).text


def test_the_generation_prompt_is_never_masked(chatml: Renderer) -> None:
    messages = [user("a"), assistant("b"), user("c")]
    rendered = chatml.render(messages, add_generation_prompt=True)
    assert rendered.tokens == chatml.prompt(messages)
    assert rendered.text.endswith("<|im_start|>assistant\n")
    assert sum(rendered.mask) == len(chatml.tokenizer.encode("b")) + 1


def test_a_generation_block_that_stops_before_the_end_of_turn_gets_it(small: Tokenizer) -> None:
    short = TAGGED.replace(
        "{{- '<|im_end|>' }}\n        {%- endgeneration %}", "{%- endgeneration %}\n        {{- '<|im_end|>' }}"
    )
    assert short != TAGGED
    assert masked_texts(Renderer(small, short), [user("a"), assistant("b"), user("c"), assistant("d")]) == (
        "b" + EOT,
        "d" + EOT,
    )


def test_generation_blocks_around_nothing_are_refused(small: Tokenizer) -> None:
    empty = "{% generation %}{% endgeneration %}" + CHATML
    with pytest.raises(RenderError, match="cover none of the assistant's turns"):
        Renderer(small, empty).render([user("a"), assistant("b")])


def test_a_template_that_forgets_reasoning_is_refused_or_covered(small: Tokenizer) -> None:
    turns = [assistant("one").replace(reasoning="r1"), assistant("two").replace(reasoning="r2")]
    messages = [user("a"), turns[0], user("b"), turns[1]]
    with pytest.raises(RenderError, match="message 1: the chat template leaves out the assistant's reasoning"):
        Renderer(small, FORGETS).render(messages)
    covering = Renderer(small, FORGETS, dropped="cover")
    assert masked_texts(covering, messages) == ("one" + EOT, "r2</think>two" + EOT)
    each = Renderer(small, FORGETS).render_turns(messages)
    assert [
        small.decode([t for t, m in zip(r.tokens, r.mask, strict=True) if m], skip_special_tokens=False) for r in each
    ] == [
        "r1</think>one" + EOT,
        "r2</think>two" + EOT,
    ]
    assert each[0].tokens[: len(covering.prompt(messages[:1]))] == covering.prompt(messages[:1])


def test_prefix_stability_says_what_changes(small: Tokenizer, chatml: Renderer) -> None:
    messages = [
        user("a"),
        assistant("one").replace(reasoning="r1"),
        user("b"),
        assistant("two").replace(reasoning="r2"),
    ]
    assert chatml.prefix_stable(messages).stable
    assert chatml.prefix_stable(messages).why() == ""
    report = Renderer(small, FORGETS).prefix_stable(messages)
    assert not report.stable
    assert [turn.text_kept for turn in report.turns] == [False, True]
    assert report.why().startswith(
        "message 1: sampled as '<think>r1</think>one<|im_end|>', later rendered as 'one<|im_end|>"
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "cannot be told what ends"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
            "does not show what the ass",
        ),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "does not show|shows it twice"),
        (
            "{% for m in messages %}{{ m.content | upper }}|{{ m.content }}<|im_end|>{% endfor %}",
            "does not show|shows it twice",
        ),
        ("{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}", "as it is"),
    ],
)
def test_impossible_templates_are_refused_with_a_reason(small: Tokenizer, template: str, why: str) -> None:
    with pytest.raises(RenderError, match=why):
        Renderer(small, template).render([user("question"), assistant("answer"), user("more"), assistant("again")])


def test_calls_that_a_template_ignores_are_refused(small: Tokenizer) -> None:
    ignores = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    call = Message(role="assistant", tool_calls=(ToolCall(name="add"),))
    with pytest.raises(RenderError, match="does not show the call of the tool 'add'"):
        Renderer(small, ignores).render([user("a"), call], tools=[ADD])


def test_a_template_without_an_end_of_turn_takes_one_from_the_user() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = template_tokenizer(template + "<|user|><|assistant|><|system|>")
    messages = [user("a"), assistant("one"), user("b"), assistant("two")]
    with pytest.raises(RenderError, match=r"end_of_turn=…\) the text that does, perhaps '<\|user\|>'"):
        Renderer(tokenizer, template).render(messages)
    renderer = Renderer(tokenizer, template, end_of_turn="<|user|>")
    assert renderer.render(messages).text == "<|user|>a<|assistant|>one<|user|>b<|assistant|>two<|user|>"
    assert masked_texts(renderer, messages) == ("one<|user|>", "two<|user|>")
    assert tokenizer.id("<|user|>") in renderer.stop_tokens
    assert renderer.prompt(messages[:1]) == tuple(tokenizer.encode("<|user|>a<|assistant|>"))


def test_stop_tokens_are_eos_and_the_end_of_turn(small: Tokenizer) -> None:
    assert Renderer(small).stop_tokens == {small.id("<|endoftext|>"), small.id(EOT)}
    bare = Tokenizer.train_bpe([], 300, ("<|endoftext|>",))
    assert Renderer(bare).stop_tokens == {0}


def test_prompts_of_every_kind(small: Tokenizer, chatml: Renderer) -> None:
    message = user("hello")
    chat = tuple(small.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"))
    assert chatml.prompt("hello") == tuple(small.encode("hello"))
    assert chatml.prompt([message]) == chatml.prompt(message) == chat
    assert chatml.prompt(Task(id="t", prompt=(message,))) == chat
    assert chatml.prompt_many([Task(id="t", prompt="hello"), [message]]) == [tuple(small.encode("hello")), chat]
    with_tools = chatml.prompt(Task(id="t", prompt=(message,), tools=(ADD,)))
    assert with_tools == chatml.prompt([message], tools=[ADD]) != chat


def test_bos_is_never_doubled(data: object) -> None:
    from pathlib import Path

    assert isinstance(data, Path)
    tokenizer = Tokenizer.from_folder(data / "tokenizers" / "mistral-v3")
    renderer = Renderer(tokenizer)
    assert renderer.prompt([user("Hi")])[:2].count(1) == 1  # the template writes <s>, the post-processor would too
    assert renderer.prompt("Hi") == (1, *tokenizer.encode("Hi"))
    assert renderer.prompt("<s>Hi").count(1) == 1
    pair = renderer.completion_pair("Hi", " there")
    assert pair.tokens.count(1) == 1
    assert pair.tokens[-1] == tokenizer.eos_id
    assert renderer.render([user("Hi"), assistant("Yo")]).tokens.count(1) == 1


def test_a_text_completion_ends_with_a_trained_eos_even_where_eos_is_the_padding() -> None:
    tokenizer = Tokenizer.train_bpe(["a b c"], 260, ("<|endoftext|>",))
    assert tokenizer.pad_id == tokenizer.eos_id == 0
    pair = Renderer(tokenizer).completion_pair("ab", " c")
    assert pair.tokens == (*tokenizer.encode("ab"), *tokenizer.encode(" c"), 0)
    assert pair.mask == (False, False, *[True] * len(tokenizer.encode(" c")), True)
    already = Renderer(tokenizer).completion_pair("ab", " c<|endoftext|>")
    assert already.tokens == pair.tokens
    empty = Renderer(tokenizer).completion_pair("ab", "")
    assert (empty.tokens[-1], empty.mask) == (0, (False, False, True))


def test_a_completion_never_changes_the_prompts_tokens(small: Tokenizer, chatml: Renderer) -> None:
    for prompt, completion in [("the quick bro", "wn fox"), ("two\n", "\nlines"), ("a ", "tool"), ("ta", "b")]:
        pair = chatml.completion_pair(prompt, completion)
        start = chatml.prompt(prompt)
        assert pair.tokens[: len(start)] == start
        assert small.decode(pair.tokens[len(start) : -1]) == completion
        assert pair.mask == (False,) * len(start) + (True,) * (len(pair.tokens) - len(start))


def test_a_chat_completion_trains_the_completion_only(chatml: Renderer, small: Tokenizer) -> None:
    context = [user("a"), assistant("old"), user("b")]
    pair = chatml.completion_pair(context, "new")
    assert (
        pair == chatml.completion_pair(context, [assistant("new")]) == chatml.completion_pair(context, assistant("new"))
    )
    assert pair.tokens[: len(chatml.prompt(context))] == chatml.prompt(context)
    masked = [token for token, trained in zip(pair.tokens, pair.mask, strict=True) if trained]
    assert small.decode(masked, skip_special_tokens=False) == "new" + EOT
    with pytest.raises(RenderError, match="must be text"):
        chatml.completion_pair("text", [assistant("new")])


def test_rows_that_fail_are_errors_in_their_place(small: Tokenizer) -> None:
    picky = "{% if messages[0].content == 'bad' %}{{ raise_exception('bad row') }}{% endif %}" + CHATML
    renderer = Renderer(small, picky)
    rows = [[user("a"), assistant("b")], [user("bad"), assistant("b")], [user("c"), assistant("d")]]
    results = renderer.try_render_many(rows)
    assert isinstance(results[1], RenderError)
    assert [results[0], results[2]] == renderer.render_many([rows[0], rows[2]])
    with pytest.raises(RenderError, match=r"conversation 1: .*bad row"):
        renderer.render_many(rows)


def test_many_rows_equal_one_by_one_with_tools_of_their_own(chatml: Renderer) -> None:
    rows = [[user(f"q{n}"), assistant(f"a{n}")] for n in range(20)]
    tools = [[ADD] if n % 2 else [] for n in range(20)]
    assert chatml.render_many(rows, tools=tools) == [
        chatml.render(row, tools=own) for row, own in zip(rows, tools, strict=True)
    ]


def test_a_tool_template_is_used_when_there_are_tools(small: Tokenizer) -> None:
    both = Tokenizer(
        small._definition(),
        special_tokens=small.special_tokens,
        chat_templates={"default": CHATML, "tool_use": "TOOLS" + CHATML},
    )
    renderer = Renderer(both)
    assert renderer.render([user("a"), assistant("b")], tools=[ADD]).text.startswith("TOOLS")
    assert not renderer.render([user("a"), assistant("b")]).text.startswith("TOOLS")


def test_without_a_template_messages_are_refused(small: Tokenizer) -> None:
    bare = Tokenizer.train_bpe([], 300, ("<|endoftext|>",))
    with pytest.raises(RenderError, match="no chat template"):
        Renderer(bare).prompt([user("a")])
    assert Renderer(bare).prompt("a") == tuple(bare.encode("a"))


def test_which_tokens_hold_a_span() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 8), (8, 9), (8, 9), (9, 12)]
    text = [False] * 7
    assert token_mask(offsets, [(2, 5)], text) == (False, True, False, False, False, False, False)
    assert token_mask(offsets, [(3, 6)], text) == (False, True, False, True, False, False, False)
    assert token_mask(offsets, [(8, 9)], text) == (False, False, False, False, True, True, False)
    assert token_mask(offsets, [(0, 1), (9, 10)], text) == (True, False, False, False, False, False, True)
    # A control token that swallowed the white space after it is the template's.
    assert token_mask(offsets, [(3, 8)], [False, True, False, False, False, False, False])[1] is False


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=25)


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_any_chatml_conversation_is_masked_by_characters(turns: list[tuple[str, str]]) -> None:
    """The oracle writes ChatML itself, marking every character as it goes; one token a byte, so nothing straddles."""
    tokenizer = Tokenizer.train_bpe([], 259)
    written: list[tuple[str, bool]] = []
    for asked, answered in turns:
        written += [(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n", False), (answered + EOT, True)]
        written.append(("\n", False))
    messages = [make(text) for turn in turns for make, text in zip((user, assistant), turn, strict=True)]
    rendered = Renderer(tokenizer, CHATML).render(messages)
    assert rendered.text == "".join(text for text, _ in written)
    expected = [flag for text, flag in written for _ in tokenizer.encode(text)]
    assert list(rendered.mask) == expected
