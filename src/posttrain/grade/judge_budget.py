"""What judging may cost: prices, and a budget that concurrent calls cannot overdraw."""

from __future__ import annotations

import threading

import msgspec

from posttrain.core import ConfigError, GradeError


class BudgetSpent(GradeError):
    """The next call could cost more than is left."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What a judge's tokens cost, in US dollars per million."""

    input: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars of one call."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


class Budget:
    """So many US dollars and so many calls, shared by any number of judges and threads.

    A call first reserves the most that it can cost and gives back what it did not use, so that calls under way at the
    same time stay within the budget together.

    Args:
        dollars: at most; None: no limit.
        calls: at most, further attempts included; None: no limit.

    Raises:
        ConfigError: a limit below 0.
    """

    def __init__(self, dollars: float | None = None, calls: int | None = None) -> None:
        if (dollars is not None and dollars < 0) or (calls is not None and calls < 0):
            raise ConfigError(f"a budget cannot be below 0, and this one is {dollars} dollars and {calls} calls")
        self.dollars, self.calls = dollars, calls
        self._spent, self._made, self._reserved = 0.0, 0, 0.0
        self._lock = threading.Lock()

    @property
    def spent(self) -> float:
        """US dollars spent so far, without what is reserved."""
        return self._spent

    @property
    def made(self) -> int:
        """Calls made so far."""
        return self._made

    def reserve(self, dollars: float) -> None:
        """Set aside what one call may cost, and count it.

        Raises:
            BudgetSpent: that is more than is left; nothing is set aside.
        """
        with self._lock:
            if self.calls is not None and self._made >= self.calls:
                raise BudgetSpent(
                    f"the judges' budget of {self.calls} calls is spent; raise it, or judge fewer answers"
                )
            committed = self._spent + self._reserved
            if self.dollars is not None and committed + dollars > self.dollars + 1e-12:
                raise BudgetSpent(
                    f"the judges' budget of ${self.dollars:g} is spent: ${self._spent:.4g} paid, ${self._reserved:.4g} "
                    f"for calls under way, and the next may cost ${dollars:.4g}; raise it, or judge fewer answers"
                )
            self._made += 1
            self._reserved += dollars

    def settle(self, reserved: float, paid: float) -> None:
        """Give back what was set aside and book what the call did cost."""
        with self._lock:
            self._reserved -= reserved
            self._spent += paid
