"""Render conversations to tokens, with a mask of what the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from posttrain.core import Message, Record, RenderError, Task, ToolSpec
from posttrain.render.assistant_spans import token_mask
from posttrain.render.conversation import Conversation, as_messages
from posttrain.render.prefix import PrefixReport, TurnPrefix, first_difference
from posttrain.render.template_facts import TemplateFacts
from posttrain.render.template_process import RenderedText, TemplateFailure, render_template
from posttrain.render.tokenizer import Tokenizer
from posttrain.render.turns import Dropped, TurnFinder

Prompt = Task | Sequence[Message] | Message | str


class Rendered(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A conversation as tokens."""

    tokens: tuple[int, ...]  # T
    text: str  # what was tokenised
    mask: tuple[bool, ...]  # T, True where the assistant wrote the token, its end-of-turn token included


class Renderer:
    """Messages to tokens with one tokenizer and one chat template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        end_of_turn: str | None = None,
        dropped: Dropped = "refuse",
    ) -> None:
        """
        Args:
            tokenizer: turns the rendered text into ids.
            template: Jinja text; default the tokenizer's own ("tool_use" where it has one and there are tools).
            template_kwargs: further variables for the template, such as {"enable_thinking": False}.
            end_of_turn: the text that ends an assistant's turn, for a template that writes none; put after a
                conversation that ends with such a turn.
            dropped: what to do with a trained turn whose reasoning or end the template rewrites once other messages
                follow: "refuse" it, or "cover" what is shown.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.template_kwargs = dict(template_kwargs or {})
        self.end_of_turn = end_of_turn
        self._added = tokenizer.added_tokens
        self._added_ids = frozenset(self._added.values())
        eos = sorted(tokenizer.eos_ids)
        self._eos_texts = tuple(text for text in (tokenizer.token(number) for number in eos) if text)
        self._dropped: Dropped = dropped
        self._known: dict[str, TemplateFacts] = {}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[ToolSpec] = (), add_generation_prompt: bool = False
    ) -> Rendered:
        """One conversation as tokens, text and mask.

        Args:
            messages: the turns; assistant turns with train=False are left out of the mask.
            tools: what the assistant may call.
            add_generation_prompt: end with the header of an assistant's turn.

        Raises:
            RenderError: the template refuses the messages, overruns its time or memory, or does not let the
                assistant's part be told exactly.
        """
        return self.render_many([messages], tools=tools, add_generation_prompt=add_generation_prompt)[0]

    def render_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        tools: Sequence[ToolSpec] | Sequence[Sequence[ToolSpec]] = (),
        add_generation_prompt: bool = False,
    ) -> list[Rendered]:
        """`render` of many conversations at a fraction of the cost.

        Args:
            tools: the same tools for all, or one sequence for each conversation.

        Raises:
            RenderError: as `render`, for the first row that fails; the message names the row.
        """
        results = self.try_render_many(conversations, tools=tools, add_generation_prompt=add_generation_prompt)
        rendered = []
        for row, result in enumerate(results):
            if isinstance(result, RenderError):
                raise RenderError(f"conversation {row}: {result}" if len(results) > 1 else str(result)) from result
            rendered.append(result)
        return rendered

    def try_render_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        tools: Sequence[ToolSpec] | Sequence[Sequence[ToolSpec]] = (),
        add_generation_prompt: bool = False,
    ) -> list[Rendered | RenderError]:
        """`render_many` where a row that cannot be rendered is an error in its place, to be counted by the caller."""
        tools_each = _tools_each(tools, len(conversations))
        wanted = [
            self._conversation(messages, own, add_generation_prompt)
            for messages, own in zip(conversations, tools_each, strict=True)
        ]
        results: list[Rendered | RenderError] = [RenderError("not rendered")] * len(wanted)
        for template in dict.fromkeys(self._template(bool(conversation.tools)) for conversation in wanted):
            rows = [row for row, each in enumerate(wanted) if self._template(bool(each.tools)) == template]
            found = self._render_with(template, [wanted[row] for row in rows])
            for row, result in zip(rows, found, strict=True):
                results[row] = result
        return results

    def render_turns(self, messages: Sequence[Message], *, tools: Sequence[ToolSpec] = ()) -> list[Rendered]:
        """Each trained assistant turn as the last of its own conversation, as the sampler met it.

        The way to train on conversations that a template rewrites as they grow; `prefix_stable` says whether it does.
        """
        conversation = Conversation(tuple(messages), tuple(tools))
        context = [
            message.replace(train=False) if message.role == "assistant" else message
            for message in conversation.messages
        ]
        parts = [[*context[:turn], conversation.messages[turn]] for turn in conversation.trained_turns()]
        return self.render_many(parts, tools=tools)

    def prompt(self, prompt: Prompt, tools: Sequence[ToolSpec] = ()) -> tuple[int, ...]:
        """The tokens to sample from.

        Args:
            prompt: text is tokenised as it stands, with what the tokenizer puts before a sequence (bos) exactly once;
                messages go through the chat template with the generation prompt; of a task, its prompt and tools.
            tools: what the assistant may call; default the task's.
        """
        return self.prompt_many([prompt], tools)[0]

    def prompt_many(self, prompts: Sequence[Prompt], tools: Sequence[ToolSpec] = ()) -> list[tuple[int, ...]]:
        """`prompt` of many at a fraction of the cost."""
        texts: list[str | None] = []
        chats: list[Conversation] = []
        for prompt in prompts:
            own = tuple(tools) or (prompt.tools if isinstance(prompt, Task) else ())
            plain = prompt.prompt if isinstance(prompt, Task) else prompt
            texts.append(plain if isinstance(plain, str) else None)
            if not isinstance(plain, str):
                chats.append(self._conversation(as_messages(plain), own, True))
        rendered = iter(self._chat_texts(chats))
        ids = self.tokenizer.encode_batch([next(rendered) if text is None else text for text in texts])
        return [tuple(row) if text is None else self._with_prefix(row) for row, text in zip(ids, texts, strict=True)]

    def completion_pair(self, prompt: Prompt, completion: Message | Sequence[Message] | str) -> Rendered:
        """A prompt and the completion to learn, for the dataset type "prompt–completion" and its preference pairs.

        Args:
            prompt: as for `Renderer.prompt`.
            completion: after a text prompt a text, which the eos token follows; after messages, messages or the
                assistant's text. Only the completion's assistant turns are targets.

        Returns:
            The tokens begin with `self.prompt(prompt)` for texts; the mask covers the completion and eos.
        """
        tools = prompt.tools if isinstance(prompt, Task) else ()
        plain = prompt.prompt if isinstance(prompt, Task) else prompt
        if isinstance(plain, str):
            if not isinstance(completion, str):
                raise RenderError("after a text prompt the completion must be text; give the prompt as messages")
            return self._text_pair(plain, completion)
        if isinstance(completion, str):
            completion = (Message(role="assistant", content=completion),)
        context = [
            message.replace(train=False) if message.role == "assistant" else message for message in as_messages(plain)
        ]
        return self.render([*context, *as_messages(completion)], tools=tools)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Ids at which a sampler should stop: the tokenizer's eos ids and the token that ends the template's turns."""
        stops = set(self.tokenizer.eos_ids)
        for name in ("default", "tool_use"):
            template = self.template or self.tokenizer.chat_templates.get(name)
            if template is not None:
                ids = self.tokenizer.encode(self._facts(template).turn_end.at_end)
                stops.update(number for number in ids[-1:] if number in self._added_ids)
        return frozenset(stops)

    def end_text(self, with_tools: bool = False) -> str:
        """The text that ends an assistant's turn in this template; "" where that cannot be told."""
        return self._facts(self._template(with_tools)).turn_end.at_end

    def prefix_stable(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> PrefixReport:
        """Whether rendering the whole conversation keeps what sampler and policy wrote at each turn.

        For each assistant turn: the sampler's prompt followed by the turn's own text must begin the whole rendering,
        as text and as tokens. Where it does not, a policy must not be trained on the whole rendering: its tokens are
        not those that were sampled. Use `render_turns`, or append tokens.
        """
        conversation = self._conversation(messages, tools)
        turns = conversation.turns()
        template = self._template(bool(tools))
        whole, *prompts = self._texts_or_raise(
            template, [conversation.variables(), *(conversation.prompt(turn).variables() for turn in turns)]
        )
        whole_ids = self.tokenizer.encode(whole)
        finder = self._finder(template)
        reports = []
        for turn, prompt in zip(turns, prompts, strict=True):
            target = conversation.messages[turn].replace(train=True)
            context = [message.replace(train=False) for message in conversation.messages[:turn]]
            alone = replace(conversation, messages=(*context, target))
            as_last, *needed = self._facts(template).texts([alone.variables(), *finder.needed(alone)])
            if isinstance(as_last, TemplateFailure):
                raise as_last.error()
            end = finder.spans(alone, as_last.text, needed)[0][1]
            reports.append(self._turn_prefix(turn, prompt, as_last.text[:end], whole, whole_ids))
        return PrefixReport(turns=tuple(reports))

    def _turn_prefix(self, turn: int, prompt: str, written: str, whole: str, whole_ids: list[int]) -> TurnPrefix:
        ids = self.tokenizer.encode(prompt)
        at = first_difference(written, whole)
        return TurnPrefix(
            turn=turn,
            prompt_kept=whole.startswith(prompt),
            text_kept=whole.startswith(written),
            tokens_kept=whole_ids[: len(ids)] == ids,
            sampled=written[at : at + 60],
            rendered=whole[at : at + 60],
        )

    def _render_with(self, template: str, conversations: Sequence[Conversation]) -> list[Rendered | RenderError]:
        finder = self._finder(template)
        tagged = finder.facts.tagged
        rows: list[dict[str, Any]] = []
        sizes: list[int] = []
        problems: dict[int, RenderError] = {}
        for row, conversation in enumerate(conversations):
            # Marks say where each turn lies; with the author's own {% generation %} tags and all turns trained, or with
            # none trained, there is nothing to find.
            trained = conversation.trained_turns()
            plain = not trained or (tagged and trained == conversation.turns())
            try:
                needed = [] if plain else finder.needed(conversation)
            except RenderError as error:
                problems[row], needed = error, []
            rows.extend([conversation.variables(), *needed])
            sizes.append(1 + len(needed))
        rendered = self._facts(template).texts(rows)
        found: list[tuple[str, list[tuple[int, int]]] | RenderError] = []
        at = 0
        for row, (conversation, size) in enumerate(zip(conversations, sizes, strict=True)):
            try:
                if row in problems:
                    raise problems[row]
                found.append(self._spans_of(finder, tagged, conversation, rendered[at : at + size]))
            except RenderError as error:
                found.append(error)
            at += size
        return self._tokenised(found)

    def _spans_of(
        self,
        finder: TurnFinder,
        tagged: bool,
        conversation: Conversation,
        rendered: Sequence[RenderedText | TemplateFailure],
    ) -> tuple[str, list[tuple[int, int]]]:
        whole = rendered[0]
        if isinstance(whole, TemplateFailure):
            raise whole.error()
        if not conversation.trained_turns():
            return whole.text, []
        spans = list(whole.generation) if len(rendered) == 1 else finder.spans(conversation, whole.text, rendered[1:])
        if tagged:
            spans = finder.tagged_spans(whole, spans)
            if not spans:
                raise RenderError(
                    "the chat template's {% generation %} marks cover none of the assistant's turns; correct the "
                    "marks, or take them out and let the turns be found"
                )
        return whole.text, spans

    def _tokenised(
        self, found: Sequence[tuple[str, list[tuple[int, int]]] | RenderError]
    ) -> list[Rendered | RenderError]:
        texts = [each[0] for each in found if not isinstance(each, RenderError)]
        encoded = iter(self.tokenizer.offsets_batch(texts))
        results: list[Rendered | RenderError] = []
        for each in found:
            if isinstance(each, RenderError):
                results.append(each)
                continue
            text, spans = each
            ids, offsets = next(encoded)
            mask = token_mask(offsets, spans, [number in self._added_ids for number in ids])
            results.append(Rendered(tokens=tuple(ids), text=text, mask=mask))
        return results

    def _text_pair(self, prompt: str, completion: str) -> Rendered:
        eos = self.tokenizer.eos_id
        if eos is None:
            raise RenderError("the tokenizer has no eos_token, so a completion could not be taught to end; set one")
        start = self._with_prefix(self.tokenizer.encode(prompt))
        both = self._with_prefix(self.tokenizer.encode(prompt + completion))
        # Tokenised together where that leaves the prompt as the sampler has it; else apart, as the sampler would go on.
        joined = both[: len(start)] == start
        rest = both[len(start) :] if joined else tuple(self.tokenizer.encode(completion))
        if rest[-1:] != (eos,):
            rest = (*rest, eos)
        mask = (False,) * len(start) + (True,) * len(rest)
        return Rendered(tokens=start + rest, text=prompt + completion, mask=mask)

    def _with_prefix(self, ids: Sequence[int]) -> tuple[int, ...]:
        prefix = self.tokenizer.prefix_ids
        return tuple(ids) if tuple(ids[: len(prefix)]) == prefix else (*prefix, *ids)

    def _chat_texts(self, chats: Sequence[Conversation]) -> list[str]:
        texts: dict[int, str] = {}
        for template in dict.fromkeys(self._template(bool(chat.tools)) for chat in chats):
            rows = [row for row, chat in enumerate(chats) if self._template(bool(chat.tools)) == template]
            found = self._texts_or_raise(template, [chats[row].variables() for row in rows])
            texts.update(zip(rows, found, strict=True))
        return [texts[row] for row in range(len(chats))]

    def _template(self, with_tools: bool) -> str:
        templates = self.tokenizer.chat_templates
        template = self.template or (with_tools and templates.get("tool_use")) or templates.get("default")
        if not template:
            raise RenderError(
                "this tokenizer has no chat template, so it cannot render messages; give Renderer(tokenizer, template) "
                "one (posttrain.render.CHATML is built in), or use text prompts"
            )
        return template

    def _facts(self, template: str) -> TemplateFacts:
        if template not in self._known:

            def render(rows: Sequence[dict[str, Any]]) -> list[RenderedText | TemplateFailure]:
                constants = {**self.tokenizer.special_tokens, "documents": None, **self.template_kwargs}
                return render_template(template, [{**constants, **row} for row in rows])

            self._known[template] = TemplateFacts(template, render, list(self._added), self._eos_texts)
            self._known[template].end_of_turn = self.end_of_turn
        return self._known[template]

    def _finder(self, template: str) -> TurnFinder:
        return TurnFinder(self._facts(template), self._dropped)

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], add_generation_prompt: bool = False
    ) -> Conversation:
        if not any(message.tool_calls for message in messages):
            return Conversation(tuple(messages), tuple(tools), add_generation_prompt)
        form = self._facts(self._template(bool(tools))).call_form
        return Conversation(tuple(messages), tuple(tools), add_generation_prompt, form)

    def _texts_or_raise(self, template: str, rows: Sequence[dict[str, Any]]) -> list[str]:
        texts = []
        for result in self._facts(template).texts(rows):
            if isinstance(result, TemplateFailure):
                raise result.error()
            texts.append(result.text)
        return texts


def _tools_each(tools: Sequence[Any], count: int) -> list[Sequence[ToolSpec]]:
    if all(isinstance(tool, ToolSpec) for tool in tools):
        return [tools] * count
    if len(tools) != count:
        raise RenderError(f"{count} conversations, but {len(tools)} sets of tools")
    return list(tools)
