"""engine: tokens → tokens.

Takes a decoder (or the address of a server) and sample requests, gives completions with exact tokens and logprobs.
`LocalEngine` samples here, with continuous batching.
May import: core, models, torch.
"""

from posttrain.engine.generation import Generation, StreamEvent
from posttrain.engine.local import EngineStats, LocalEngine
from posttrain.engine.scripted import ScriptedEngine

__all__ = ["EngineStats", "Generation", "LocalEngine", "ScriptedEngine", "StreamEvent"]
