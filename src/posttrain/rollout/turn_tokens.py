"""A chat template as an episode needs it: tokens are appended, never rendered again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.core import Completion, Message, RenderError, StopReason, ToolCall, ToolSpec, assistant, user
from posttrain.render import CALL_SYNTAXES, CallSyntax, ReadTurn, Renderer, call_syntax_of, read_turn
from posttrain.render.tool_calls import shows_calls

_ASKED, _TOLD = user("What is a cat?"), assistant("A small animal.")
_STAND_IN = Message(role="assistant", content="So.", train=False)
_MOST_KEPT = 4096  # answers whose tokens are kept
_CALL = ToolCall(name="look_up", arguments={"word": "cat"}, id="a1b2c3d4e")


@dataclass(frozen=True)
class _Asked:
    """One answer that is to be rendered."""

    messages: tuple[Message, ...]  # opening, a stand-in for the turn, answers; nothing is trained
    turn: int  # the stand-in's place
    tools: tuple[ToolSpec, ...]
    text: asyncio.Future[str]

    @property
    def key(self) -> bytes:
        """What its tokens depend on."""
        return b"\n".join(record.to_json() for record in (*self.messages, *self.tools))

    @property
    def form(self) -> tuple[object, ...]:
        """What the text of the stand-in's turn depends on."""
        answers = tuple(message.role for message in self.messages[self.turn + 1 :])
        return (self.messages[self.turn].to_json(), answers, bool(self.tools))


class TurnTokens:
    """Opening, turns and answers as tokens, with one renderer.

    The tokens that the policy wrote stay as they were sampled. What answers a turn is taken from the template's
    rendering of opening, turn and answer: everything after the token that ends the turn. Templates that show earlier
    turns otherwise once others follow (leaving out reasoning, moving the list of tools) are therefore not followed in
    that: the policy goes on seeing what it wrote, and is trained on what it saw. `rewrites` says whether a template is
    one of these.

    Args:
        renderer: tokenizer and chat template.
        syntax: of tool calls: one of `render.CALL_SYNTAXES` or its name; None: the template's own, found out when
            first needed.
        rewritten: "refuse" episodes with a template that rewrites earlier turns, or "keep" them as they were sampled.
    """

    def __init__(
        self,
        renderer: Renderer,
        *,
        syntax: CallSyntax | str | None = None,
        rewritten: Literal["keep", "refuse"] = "keep",
    ) -> None:
        self.renderer = renderer
        self.rewritten = rewritten
        self._syntax = CALL_SYNTAXES[syntax] if isinstance(syntax, str) else syntax
        self._shows_calls: bool | None = None
        self._checked: set[bool] = set()
        # An end that the template writes otherwise before another turn is no reason to refuse: it is kept as sampled.
        self._lenient = Renderer(
            renderer.tokenizer,
            renderer.template,
            template_kwargs=renderer.template_kwargs,
            end_of_turn=renderer.end_of_turn,
            dropped="cover",
        )
        self._gathering: list[_Asked] = []
        # By form, the text of a stand-in's turn, its end included: found out once, then looked for.
        self._shown: dict[tuple[object, ...], str] = {}
        self._kept: dict[bytes, tuple[int, ...]] = {}  # siblings often get the same answer
        self._added = renderer.tokenizer.added_tokens

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end the policy's turn."""
        return tuple(sorted(self.renderer.stop_tokens))

    @property
    def syntax(self) -> CallSyntax:
        """How the policy writes tool calls.

        Raises:
            RenderError: the template does not tell.
        """
        if self._syntax is None:
            self._syntax = call_syntax_of(self.renderer)
        return self._syntax

    def opening(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> tuple[int, ...]:
        """The tokens of an episode's first prompt.

        Raises:
            RenderError: the template refuses the messages, or rewrites earlier turns and that is to be refused.
        """
        if self.rewritten == "refuse" and bool(tools) not in self._checked:
            if why := self.rewrites(tools):
                raise RenderError(
                    f"the chat template rewrites earlier turns ({why}), so that a policy that is served with it does "
                    'not see what it was trained on; use another template, or TurnTokens(rewritten="keep")'
                )
            self._checked.add(bool(tools))
        return self.renderer.prompt(messages, tools)

    def rewrites(self, tools: Sequence[ToolSpec] = ()) -> str:
        """How the template changes earlier turns of a sample conversation, in words; "" where it keeps them."""
        turn, answer = _TOLD, user("And a dog?")
        if tools and shows_calls(self.renderer):
            turn = Message(role="assistant", tool_calls=(_CALL,))
            answer = Message(role="tool", content="small", tool_call_id=_CALL.id, name=_CALL.name)
        why = ""
        for reasoning in ("Hmm, so.", None):
            turns = [each.replace(reasoning=reasoning) for each in (turn, _TOLD)]
            try:
                why = self.renderer.prefix_stable([_ASKED, turns[0], answer, turns[1]], tools).why()
            except RenderError as error:  # a template that shows no reasoning says nothing about it
                why = str(error)
                continue
            return why
        return why

    def read(self, completion: Completion, tools: Sequence[ToolSpec], stops: Sequence[str] = ()) -> ReadTurn:
        """The policy's turn as a message; without tools everything that it wrote is content."""
        if not tools:
            return ReadTurn(message=assistant(completion.text))
        tokenizer, tokens, end = self.renderer.tokenizer, completion.tokens, self.renderer.end_text(True)
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        if end and text.endswith(end):
            text = text.removesuffix(end)
        elif completion.stop_reason is StopReason.EOS:
            text = tokenizer.decode(tokens[:-1], skip_special_tokens=False)
        for stop in stops if completion.stop_reason is StopReason.STOP else ():
            text = text.partition(stop)[0]
        return read_turn(text, self.syntax, tools)

    async def answer(
        self,
        opening: Sequence[Message],
        turn: Message,
        answers: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        *,
        ended: bool = True,
    ) -> tuple[int, ...]:
        """The tokens between the policy's turn and its next: the answers, and the header of the next turn.

        Calls that are made in the same turn of the event loop are rendered together.

        Args:
            opening: the messages that opened the episode.
            turn: what the policy wrote; of it only the tool calls matter here.
            answers: messages of tools or users.
            tools: those offered.
            ended: whether the policy wrote the token that ends its turn; if not, it comes first.

        Raises:
            RenderError: the template refuses the answers, does not show them, or its turns cannot be told apart.
        """
        context = [message.replace(train=False) if message.role == "assistant" else message for message in opening]
        loop = asyncio.get_running_loop()
        messages = (*context, self._stand_in(turn), *answers)
        asked = _Asked(messages, len(context), tuple(tools), loop.create_future())
        tokens = self._kept.get(asked.key)
        if tokens is None:
            if not self._gathering:
                loop.call_soon(self._render_gathered)
            self._gathering.append(asked)
            tokens = self._after_turn(asked, await asked.text)
            self._check_shown(tokens, answers)
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[asked.key] = tokens
        if not ended:
            end = self.renderer.end_text(bool(tools))
            tokens = (*self.renderer.tokenizer.encode(end), *tokens)
        return tokens

    def _stand_in(self, turn: Message) -> Message:
        """A short turn of the same form: what follows a turn depends on its calls, not on its text."""
        if turn.tool_calls:
            if self._shows_calls is None:
                self._shows_calls = shows_calls(self.renderer)
            if self._shows_calls:
                calls = tuple(call.replace(arguments={}) for call in turn.tool_calls)
                return Message(role="assistant", tool_calls=calls, train=False)
        return _STAND_IN

    def _render_gathered(self) -> None:
        waiting, self._gathering = self._gathering, []
        results = self.renderer.try_render_many(
            [asked.messages for asked in waiting],
            tools=[asked.tools for asked in waiting],
            add_generation_prompt=True,
        )
        for asked, result in zip(waiting, results, strict=True):
            if asked.text.done():
                continue
            if isinstance(result, RenderError):
                asked.text.set_exception(result)
            else:
                asked.text.set_result(result.text)

    def _after_turn(self, asked: _Asked, text: str) -> tuple[int, ...]:
        """The tokens after the stand-in's turn."""
        shown = self._shown.get(asked.form)
        if shown is not None and text.count(shown) == 1:
            found = self._encoded_after(shown, text)
            if found is not None:
                return found
        messages = list(asked.messages)
        messages[asked.turn] = messages[asked.turn].replace(train=True)
        rendered = self._lenient.render(messages, tools=asked.tools, add_generation_prompt=True)
        own = [place for place, wrote in enumerate(rendered.mask) if wrote]
        if not own:
            raise RenderError("the chat template does not show the assistant's turn, so what follows it is unknown")
        tokens = rendered.tokens[own[-1] + 1 :]
        shown = self.renderer.tokenizer.decode(rendered.tokens[own[0] : own[-1] + 1], skip_special_tokens=False)
        if rendered.text.count(shown) == 1 and self._encoded_after(shown, rendered.text) == tokens:
            self._shown[asked.form] = shown
        return tokens

    def _encoded_after(self, shown: str, text: str) -> tuple[int, ...] | None:
        """The tokens of what follows `shown`; None unless that ends with a token of its own, which no other joins."""
        mark = next((mark for mark in self._added if shown.endswith(mark)), None)
        if mark is None:
            return None
        first, *rest = self.renderer.tokenizer.encode(mark + text.partition(shown)[2])
        return tuple(rest) if first == self._added[mark] else None

    def _check_shown(self, tokens: Sequence[int], answers: Sequence[Message]) -> None:
        text = self.renderer.tokenizer.decode(tokens, skip_special_tokens=False)
        for message in answers:
            content = message.content.strip()
            if content not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                raise RenderError(
                    f"the chat template does not show a {message.role}'s message after the assistant's turn "
                    f"({content[:60]!r} is not in {text[:120]!r}); use a template for tools"
                )
