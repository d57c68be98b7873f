"""render: messages ↔ tokens.

Takes messages, tools and a tokenizer folder; gives token ids, text and a mask of what the assistant wrote.
May import: core. Never torch.
"""

from posttrain.render.chatml import CHATML
from posttrain.render.prefix import PrefixReport, TurnPrefix
from posttrain.render.renderer import Rendered, Renderer
from posttrain.render.tokenizer import Tokenizer

__all__ = ["CHATML", "PrefixReport", "Rendered", "Renderer", "Tokenizer", "TurnPrefix"]
