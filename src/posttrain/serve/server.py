"""Run an application: in the foreground with a graceful end, or in a thread for recipes and tests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

import uvicorn
from starlette.applications import Starlette

from posttrain.core import ServeError
from posttrain.serve.state import ServeState

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Draining(uvicorn.Server):
    """Uvicorn that goes on listening while it drains, so that /ready can say 503 and late requests get an answer."""

    def __init__(self, app: Starlette, drain_s: float, grace_s: float) -> None:
        # After the drain only what is stuck is left: one second, then it is cancelled (and logged as such).
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1, server_header=False
        )
        super().__init__(config)
        self._state: ServeState = app.state.serve
        self._drain_s, self._grace_s = drain_s, grace_s
        self._asked_s: float | None = None
        self._signals = 0

    def drain(self) -> None:
        """Begin to end: not ready from now on, no new generation; exit when nothing is in work, or at the deadline."""
        self._state.draining = True
        if self._asked_s is None:
            self._asked_s = time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: at once."""
        self._signals += 1
        self.drain()
        if self._signals > 1:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's question, ten times a second: is it time to exit?"""
        if self._asked_s is not None:
            waited_s = time.monotonic() - self._asked_s
            if waited_s >= self._grace_s and not self._state.num_requests:
                return True
            if waited_s >= self._drain_s:
                logger.warning(
                    "%d requests are still in work at the deadline; cancelling them", self._state.num_requests
                )
                return True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while serving. Unlike uvicorn's, it does not raise them again: the end was clean."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot serve on {host}:{port}: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ServeError(f"cannot serve on {host}:{port}: {error}. Choose another port, or 0 for a free one") from error
    return bound


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """Serves an application from a background thread.

    with Server(app) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="…")

    Args:
        app: of `create_app`.
        host: address to bind.
        port: 0 takes a free one; `url` tells.
        drain_s: how long `stop` lets requests finish, seconds.
    """

    def __init__(self, app: Starlette, host: str = "127.0.0.1", port: int = 0, *, drain_s: float = 30.0) -> None:
        self._app, self._host, self._port, self._drain_s = app, host, port, drain_s
        self._server: _Draining | None = None
        self._thread: threading.Thread | None = None
        self._url = ""
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """`http://host:port`, without a path; known once started."""
        return self._url

    def start(self, timeout_s: float = 30.0) -> Server:
        """Begin to serve; returns when requests are taken.

        Raises:
            ServeError: the address is taken, or the application does not start.
        """
        if self._thread is not None:
            raise ServeError("the server has been started already; make a new one to serve again")
        bound = _bind(self._host, self._port)
        self._url = _url(bound)
        self._server = _Draining(self._app, self._drain_s, grace_s=0.0)
        self._thread = threading.Thread(target=self._serve, args=(self._server, bound), name="serve", daemon=True)
        self._thread.start()
        deadline_s = time.monotonic() + timeout_s
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline_s:
                raise ServeError(f"the server at {self._url} did not start: {self._failure or 'no answer in time'}")
            time.sleep(0.005)
        return self

    def _serve(self, server: _Draining, bound: socket.socket) -> None:
        try:
            asyncio.run(server.serve(sockets=[bound]))
        except BaseException as error:
            self._failure = error
            logger.exception("the server at %s ended", self._url)

    def stop(self) -> None:
        """Let requests finish, up to `drain_s`, log everything and end the thread."""
        if self._server is None or self._thread is None:
            return
        self._server.drain()
        self._thread.join(self._drain_s + 30.0)
        if self._thread.is_alive():
            raise ServeError(f"the server at {self._url} does not end")

    def __enter__(self) -> Server:
        return self if self._thread is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run(
    app: Starlette, host: str = "127.0.0.1", port: int = 8000, *, drain_s: float = 30.0, grace_s: float = 0.0
) -> None:
    """Serve until SIGTERM or SIGINT, then end gracefully.

    At the first signal /ready answers 503 and new generation requests are refused (503, Retry-After); those in work go
    on until they are done or `drain_s` has passed, then are cancelled. A second signal ends at once. Every answer, also
    a cancelled one, is in the store when this returns.

    Args:
        app: of `create_app`.
        host: address to bind; "0.0.0.0" only with API keys.
        port: 0 takes a free one, which is logged.
        drain_s: how long requests may go on after the signal, seconds.
        grace_s: stay up at least so long after the signal, for load balancers to see that /ready changed, seconds.

    Raises:
        ServeError: the address is taken.
    """
    bound = _bind(host, port)
    logger.info("serving on %s", _url(bound))
    asyncio.run(_Draining(app, drain_s, grace_s).serve(sockets=[bound]))
