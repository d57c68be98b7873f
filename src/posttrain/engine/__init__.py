"""engine: tokens → tokens.

Takes a decoder (or a server's address, or a script) and sample requests; gives completions with exact tokens, their
logprobs and the version of the weights that wrote them. `LocalEngine` samples here, with continuous batching;
`RemoteEngine` from an OpenAI-compatible server; `ScriptedEngine` says what it is told. May import: core, models, torch.
"""

from posttrain.engine.chat import EngineChat, HasTokens, NamesStopTokens, RemoteChat, RendersMessages
from posttrain.engine.generation import Generation, StreamEvent
from posttrain.engine.http import RemoteFailure
from posttrain.engine.local import LocalEngine
from posttrain.engine.remote import RemoteEngine
from posttrain.engine.scoring import Encoded, LocalScorer
from posttrain.engine.scripted import ScriptedEngine
from posttrain.engine.stats import EngineStats

__all__ = [
    "Encoded",
    "EngineChat",
    "EngineStats",
    "Generation",
    "HasTokens",
    "LocalEngine",
    "LocalScorer",
    "NamesStopTokens",
    "RemoteChat",
    "RemoteEngine",
    "RemoteFailure",
    "RendersMessages",
    "ScriptedEngine",
    "StreamEvent",
]
