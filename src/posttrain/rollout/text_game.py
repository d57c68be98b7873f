"""Games in words: the simplest environments, for tests, for examples, and to copy from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from posttrain.core import Message, StepResult, Task, generator, user


class GuessNumber:
    """The policy guesses a number and is told whether it is higher or lower.

    The number is the task's `facts["number"]`, or drawn from the seed. A hit is worth 1, any other guess nothing.

    Args:
        low: the least number.
        high: the greatest number.
        guesses: after so many the game is lost.
    """

    def __init__(self, low: int = 1, high: int = 10, guesses: int = 4) -> None:
        self.low, self.high, self.guesses = low, high, guesses
        self._number = low
        self._left = guesses

    def seed(self, seed: int) -> None:
        """Draw the number."""
        self._number = generator(seed, "guess").randint(self.low, self.high)

    async def reset(self, task: Task) -> Sequence[Message]:
        """Say the rules."""
        self._number = int(task.facts.get("number", self._number))
        self._left = self.guesses
        return (user(f"Guess my number from {self.low} to {self.high}."),)

    async def step(self, action: Message) -> StepResult:
        """Compare the first number in the policy's turn."""
        self._left -= 1
        found = re.search(r"-?\d{1,9}", action.content)
        guess = int(found.group()) if found else None
        if guess == self._number:
            return StepResult(messages=(user("Right!"),), reward=1.0, done=True, info={"won": 1})
        told = "Say a number." if guess is None else "Higher." if guess < self._number else "Lower."
        return StepResult(messages=(user(told),), done=self._left == 0)

    async def close(self) -> None:
        """Nothing to free."""


class Hangman:
    """The policy guesses a word letter by letter, or whole.

    The word is the task's `answer`. The reward is the share of its letters that a guess uncovers, and 1 more for the
    whole word.

    Args:
        misses: wrong guesses that are allowed.
    """

    def __init__(self, misses: int = 6) -> None:
        self.misses = misses
        self._word = ""
        self._open: set[str] = set()

    async def reset(self, task: Task) -> Sequence[Message]:
        """Show how many letters there are."""
        self._word = (task.answer or "").lower()
        self._open, self._left = set(), self.misses
        return (user(f"Guess the word, a letter at a time: {self._shown()}"),)

    async def step(self, action: Message) -> StepResult:
        """Uncover what the guess hits."""
        guess = action.content.strip().lower()
        if len(guess) != 1:
            hit = set(self._word) - self._open if guess == self._word else set()
        else:
            hit = {guess} & (set(self._word) - self._open)
        self._open |= hit
        self._left -= not hit
        solved = self._open >= set(self._word)
        reward = sum(self._word.count(letter) for letter in hit) / len(self._word) + solved
        told = self._shown() if solved else f"{self._shown()} ({self._left} misses left)"
        return StepResult(messages=(user(told),), reward=reward, done=solved or self._left == 0)

    async def close(self) -> None:
        """Nothing to free."""

    def _shown(self) -> str:
        return " ".join(letter if letter in self._open else "_" for letter in self._word)
