"""EngineStats: the engine's counters and gauges."""

from __future__ import annotations

from posttrain.core import Record


class EngineStats(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine is doing and has done."""

    num_running: int  # rows that decode
    num_waiting: int  # requests with siblings that have not started
    num_slots: int
    prompt_tokens_total: int  # prompt tokens of requests taken on, once per request
    prefill_tokens_total: int  # prompt tokens run through the model; siblings and kept prefixes save the rest
    generation_tokens_total: int
    kv_usage: float  # part of the slot cache that holds tokens, 0 … 1
    prefix_hits: int
    prefix_hit_tokens: int
    num_steps: int
    weight_version: int
