"""render: messages ↔ tokens.

Takes messages, tools and a tokenizer folder; gives token ids, text and a mask of what the assistant wrote.
May import: core. Never torch.
"""

from posttrain.render.chatml import CHATML
from posttrain.render.prefix import PrefixReport, TurnPrefix
from posttrain.render.renderer import Rendered, Renderer
from posttrain.render.tokenizer import Tokenizer
from posttrain.render.tool_calls import CALL_SYNTAXES, CallSyntax, ReadTurn, call_syntax_of, read_turn
from posttrain.render.tool_calls_json import MalformedCall

__all__ = [
    "CALL_SYNTAXES",
    "CHATML",
    "CallSyntax",
    "MalformedCall",
    "PrefixReport",
    "ReadTurn",
    "Rendered",
    "Renderer",
    "Tokenizer",
    "TurnPrefix",
    "call_syntax_of",
    "read_turn",
]
