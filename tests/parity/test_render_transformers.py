"""Tokenizers, rendered texts, ids and masks against transformers."""

from __future__ import annotations

import functools
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Message, ToolCall, ToolSpec, assistant, system, user
from posttrain.render import CHATML, Renderer, Tokenizer
from posttrain.render.conversation import template_message, template_tool
from posttrain.render.survey import CONVERSATIONS, read_templates
from posttrain.render.template_process import RenderedText, render_template

transformers = pytest.importorskip("transformers")
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "tokenizers").exists(), reason=f"no data at {DATA}")
NAMES = ("gpt2", "qwen2.5", "phi-3", "mistral-v3")
TAGGED = CHATML.replace(
    "{{- '<|im_start|>assistant\\n' }}\n        {%- if message.r",
    "{{- '<|im_start|>assistant\\n' }}\n        {%- generation %}\n        {%- if message.r",
).replace(
    "        {{- '<|im_end|>\\n' }}\n    {%- elif",
    "        {{- '<|im_end|>' }}\n        {%- endgeneration %}\n        {{- '\\n' }}\n    {%- elif",
)


@functools.cache
def ours(name: str) -> Tokenizer:
    return Tokenizer.from_folder(DATA / "tokenizers" / name)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizers")

    @functools.cache
    def load(name: str) -> Any:
        source = DATA / "tokenizers" / name
        file = folder / f"{name}.json"
        file.write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
        config = json.loads((source / "tokenizer_config.json").read_text())
        config.pop("tokenizer_class")
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **config)

    return load


def random_texts(count: int) -> list[str]:
    draw = random.Random(5)
    pieces = [
        "the ",
        "<|im_end|>",
        "<s>",
        " ",
        "\n",
        "é",
        "🙂",
        "你好",
        "x1",
        "\u0301",
        "don't",
        "\t",
        "…",
        "[INST]",
        "<|end|>",
    ]
    return ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_texts_are_the_same(theirs: Any, name: str) -> None:
    reference, tokenizer = theirs(name), ours(name)
    for text in random_texts(200):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=True) == reference.encode(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )
    assert tokenizer.vocab_size == 1 + max(reference.get_vocab().values())


@pytest.mark.parametrize("name", ["qwen2.5", "phi-3", "mistral-v3"])
def test_chats_are_the_same_ids(theirs: Any, name: str) -> None:
    reference, renderer = theirs(name), Renderer(ours(name))
    for kind in ("one turn", "turns", "system"):
        messages, _ = CONVERSATIONS[kind]
        plain = [{"role": message.role, "content": message.content} for message in messages]
        rendered = renderer.render(messages)
        assert rendered.text == reference.apply_chat_template(plain, tokenize=False)
        assert list(rendered.tokens) == reference.apply_chat_template(plain, return_dict=False)
        prompt = reference.apply_chat_template(plain[:-1], add_generation_prompt=True, return_dict=False)
        assert list(renderer.prompt(messages[:-1])) == prompt


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "phi-3"])
def test_masks_of_marked_templates_are_the_same(theirs: Any, name: str) -> None:
    reference, renderer = theirs(name), Renderer(ours(name), TAGGED)
    unmarked = Renderer(ours(name), CHATML)
    texts = random_texts(40)
    for at in range(0, 36, 4):
        messages = [
            system(texts[at]),
            user(texts[at + 1]),
            assistant(texts[at + 2]),
            user("?"),
            assistant(texts[at + 3]),
        ]
        plain = [{"role": message.role, "content": message.content} for message in messages]
        answer = reference.apply_chat_template(
            plain, chat_template=TAGGED, return_assistant_tokens_mask=True, return_dict=True
        )
        rendered = renderer.render(messages)
        assert list(rendered.tokens) == answer["input_ids"]
        assert [int(trained) for trained in rendered.mask] == answer["assistant_masks"]
        assert unmarked.render(messages) == rendered  # found without the marks, too


def test_every_published_template_renders_the_same_text_or_fails_in_both() -> None:
    count = failed = 0
    for template in read_templates(DATA / "chat_templates").values():
        for messages, tools in CONVERSATIONS.values():
            values = [template_message(message) for message in messages]
            specs = [template_tool(tool) for tool in tools] or None
            for prompt in (False, True):
                try:
                    expected = render_jinja_template(
                        [values], tools=specs, chat_template=template, add_generation_prompt=prompt,
                        bos_token="<s>", eos_token="</s>",
                    )[0][0]  # fmt: skip
                except Exception:  # noqa: BLE001 - templates raise what they like; ours must fail as well
                    expected = None
                variables = {"messages": values, "tools": specs, "documents": None, "add_generation_prompt": prompt}
                result = render_template(template, [{**variables, "bos_token": "<s>", "eos_token": "</s>"}])[0]
                assert (result.text if isinstance(result, RenderedText) else None) == expected
                count += 1
                failed += expected is None
    assert count == 67 * len(CONVERSATIONS) * 2
    assert failed < count // 10


def test_mistrals_own_encodings_of_chats_with_tools() -> None:
    """Three of six sample chats exactly; the others hold tool results that mistral-common parses and the template does
    not, and agree up to the first of these."""
    renderer = Renderer(ours("mistral-v3"))
    exact = {"no_tools", "parallel_calls", "several_calls"}
    files = sorted((DATA / "tokenizers" / "mistral-v3" / "chat_vectors").glob("*.json"))
    assert len(files) == 6
    for file in files:
        vector = json.loads(file.read_text(encoding="utf-8"))
        tools = [ToolSpec(**tool["function"]) for tool in vector["request"].get("tools") or ()]
        ids = list(renderer.prompt([mistral_message(each) for each in vector["request"]["messages"]], tools))
        if file.stem in exact:
            assert ids == vector["ids"], file.stem
        else:
            at = next(at for at, (one, other) in enumerate(zip(ids, vector["ids"], strict=False)) if one != other)
            shown = renderer.tokenizer.decode(ids[:at], skip_special_tokens=False)
            assert shown.endswith('[TOOL_RESULTS] {"content":'), file.stem


def mistral_message(values: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(name=call["function"]["name"], arguments=json.loads(call["function"]["arguments"]), id=call["id"])
        for call in values.get("tool_calls") or ()
    )
    return Message(
        role=values["role"],
        content=values.get("content") or "",
        tool_calls=calls,
        tool_call_id=values.get("tool_call_id"),
        name=values.get("name"),
    )


def test_transformers_loads_a_tokenizer_made_here(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(["the cat sat", "é 🙂 12"] * 3, 320)
    tokenizer.save(tmp_path)
    for loaded in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        for text in random_texts(100):
            assert loaded.encode(text) == tokenizer.encode(text)
            assert loaded.decode(loaded.encode(text)) == tokenizer.decode(
                tokenizer.encode(text), skip_special_tokens=False
            )
        assert loaded.eos_token_id == tokenizer.eos_id
        assert loaded.pad_token_id == tokenizer.pad_id
        plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        ids = loaded.apply_chat_template(plain, return_dict=False)
        assert ids == list(Renderer(tokenizer).render([user("hi"), assistant("yo")]).tokens)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert set(generation.eos_token_id) == tokenizer.eos_ids
