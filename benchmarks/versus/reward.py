"""The reward function of the GRPO workloads: cheap, deterministic, different from sibling to sibling."""

from __future__ import annotations


def reward_of(text: str) -> float:
    """The share of vowels."""
    return sum(character in "aeiou" for character in text) / (len(text) + 1)
