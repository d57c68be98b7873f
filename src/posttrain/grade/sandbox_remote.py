"""The sandbox on another machine: `SandboxServer` there, `RemoteSandbox` here, and JSON over HTTP between them.

    python -m posttrain.grade.sandbox_remote --port 8900      # the token is read from POSTTRAIN_SANDBOX_TOKEN

Graders run untrusted programs far from the weights and the keys of a training machine, and on as many cores as that
machine has.
"""

from __future__ import annotations

import argparse
import hmac
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from posttrain.core import ConfigError, GradeError
from posttrain.grade.combine import in_daemon_thread
from posttrain.grade.judge_model import retry_after_s
from posttrain.grade.sandbox import JudgedTests, Sandbox, SandboxRun
from posttrain.grade.sandbox_process import SandboxUnavailable

VERSION = "posttrain-sandbox/1"
TOKEN = "POSTTRAIN_SANDBOX_TOKEN"
_MAX_BODY = 64_000_000
_PASSING = frozenset({429, 502, 503, 504})


class SandboxJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A program to run, or with `tests` one to judge: the body of a request."""

    version: str
    program: str
    stdin: str = ""
    files: dict[str, str] = {}
    tests: list[str] | None = None
    setup: str = ""
    names: list[str] = []


class SandboxReply(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended, or why it was not run."""

    run: SandboxRun | None = None
    judged: JudgedTests | None = None
    error: str | None = None
    unavailable: bool = False


class RemoteSandbox:
    """Runs programs at a `SandboxServer`. Its limits are the server's.

    Args:
        url: of the server, as `https://sandbox.internal:8900`.
        token: the server's; None: from the environment variable POSTTRAIN_SANDBOX_TOKEN, where there is one.
        timeout_s: seconds for one request.
        attempts: of a request that finds no server, or a busy one.

    Raises:
        ConfigError: the URL is none of HTTP.
    """

    waits = True

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = 120.0, attempts: int = 4) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"remote sandbox: {url!r} is no http or https address")
        self.url = url.rstrip("/") + "/run"
        self._token = os.environ.get(TOKEN) if token is None else token
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._opener = urllib.request.build_opener(_NoRedirects)

    def start(self) -> None:
        """Run a program of one line there.

        Raises:
            SandboxUnavailable: nobody answers, or the server has no sandbox.
        """
        try:
            run = self.run_now("print('in')")
        except GradeError as error:
            raise SandboxUnavailable(str(error)) from error
        if run.stdout != "in\n":
            raise SandboxUnavailable(f"{self.url}: a program of one line did not run: {run.stderr.strip()[-300:]}")

    async def run(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program; see `Sandbox.run_now`."""
        run: SandboxRun = await in_daemon_thread(self.run_now, program, stdin, files)
        return run

    def run_now(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program to its end or the server's limits."""
        reply = self._ask(SandboxJob(version=VERSION, program=program, stdin=stdin, files=dict(files or {})))
        if reply.run is None:
            raise GradeError(f"{self.url}: it answered without a run")
        return reply.run

    async def judge(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Test a program; see `Sandbox.judge_now`."""
        judged: JudgedTests = await in_daemon_thread(lambda: self.judge_now(program, tests, setup=setup, names=names))
        return judged

    def judge_now(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Tests in one sandbox there, the program in another."""
        job = SandboxJob(version=VERSION, program=program, tests=list(tests), setup=setup, names=list(names))
        reply = self._ask(job)
        if reply.judged is None:
            raise GradeError(f"{self.url}: it answered without a verdict")
        return reply.judged

    def close(self) -> None:
        """Nothing is held between runs."""

    def _ask(self, job: SandboxJob) -> SandboxReply:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        body = msgspec.json.encode(job)
        for attempt in range(1, self._attempts + 1):
            request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
            wait_s = min(8.0, 0.25 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                with self._opener.open(request, timeout=self._timeout_s) as answer:
                    reply = msgspec.json.decode(answer.read(_MAX_BODY), type=SandboxReply)
                break
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in _PASSING:
                    raise GradeError(f"{self.url}: {reason}: {error.read(300)!r}") from error
                wait_s = retry_after_s(error.headers.get("Retry-After")) or wait_s
            except (OSError, msgspec.DecodeError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt == self._attempts:
                raise SandboxUnavailable(f"{self.url}: no answer after {attempt} attempts ({reason}), nothing was run")
            time.sleep(wait_s)
        if reply.error is not None:
            raise (SandboxUnavailable if reply.unavailable else GradeError)(f"{self.url}: {reply.error}")
        return reply


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The programs and the token go to the named server and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """Never."""


class SandboxServer:
    """Serves a sandbox to `RemoteSandbox`. Programs beyond `concurrency` are asked to come again.

    Args:
        sandbox: where programs run; its limits hold for every caller.
        host: address to listen at. Other machines reach it only where this says so.
        port: 0: any that is free.
        token: what callers must show; None: whoever reaches the port may run programs.
        concurrency: programs at the same time; None: as many as there are cores.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        concurrency: int | None = None,
    ) -> None:
        places = threading.BoundedSemaphore(concurrency or max(1, os.cpu_count() or 1))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                """A job comes, its end goes."""
                given = self.headers.get("Authorization", "")
                if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                    self._say(401, b"the token is missing or wrong")
                    return
                length = int(self.headers.get("Content-Length") or 0)
                if self.path != "/run" or not 0 < length <= _MAX_BODY:
                    self._say(404 if self.path != "/run" else 413, b"POST a job to /run")
                    return
                body = self.rfile.read(length)
                if not places.acquire(timeout=30.0):
                    self._say(503, b"too many programs are running", {"Retry-After": "1"})
                    return
                try:
                    self._say(200, msgspec.json.encode(_done(sandbox, body)))
                finally:
                    places.release()

            def _say(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Programs are nobody's business."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self.url = f"http://{host}:{self._server.server_port}"

    def serve(self) -> None:
        """Serve until `close` is called."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def _done(sandbox: Sandbox, body: bytes) -> SandboxReply:
    try:
        job = msgspec.json.decode(body, type=SandboxJob)
        if job.version != VERSION:
            return SandboxReply(error=f"version {job.version!r}; this server speaks {VERSION!r}")
        if job.tests is None:
            return SandboxReply(run=sandbox.run_now(job.program, job.stdin, job.files))
        return SandboxReply(judged=sandbox.judge_now(job.program, job.tests, setup=job.setup, names=job.names))
    except SandboxUnavailable as error:
        return SandboxReply(error=str(error), unavailable=True)
    except (GradeError, msgspec.DecodeError) as error:
        return SandboxReply(error=str(error))


def main() -> None:
    """Serve a sandbox of this machine."""
    parser = argparse.ArgumentParser(description="Serve a sandbox to RemoteSandbox.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8900)
    parser.add_argument("--concurrency", type=int)
    chosen = parser.parse_args()
    token = os.environ.get(TOKEN)
    if token is None and chosen.host not in ("127.0.0.1", "::1", "localhost"):
        sys.exit(f"without {TOKEN} everybody who reaches {chosen.host} could run programs here: set it")
    sandbox = Sandbox()
    sandbox.start()
    server = SandboxServer(sandbox, host=chosen.host, port=chosen.port, token=token, concurrency=chosen.concurrency)
    print(f"serving at {server.url}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
