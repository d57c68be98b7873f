"""What graders of programs ask of a place to run them in: here, in a container, or on another machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from posttrain.grade.sandbox import JudgedTests, SandboxRun


class RunsPrograms(Protocol):
    """Runs code that nobody has read where it can do no harm. `Sandbox`, `DockerSandbox` and `RemoteSandbox` do.

    A place that is not to be had raises `SandboxUnavailable` and runs nothing; one that was lost raises `GradeError`.
    What the code itself does (crashes, hangs, floods) is in the record that comes back.
    """

    def start(self) -> None:
        """See that it is to be had; graders call it before the first program."""
        ...

    async def run(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program to its end or its limits."""
        ...

    async def judge(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Run tests on a program's functions where the program cannot reach the verdict."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...
