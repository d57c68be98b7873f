"""Write interactions behind the requests: many in one transaction, off the event loop, waited for before the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from posttrain.core import Interaction, PosttrainError
from posttrain.serve.metrics import ServeMetrics
from posttrain.serve.model import InteractionStore

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_PAUSE_S = 0.2


class InteractionLog:
    """A queue in front of the store, emptied by one task.

    Requests that end at the same time share a transaction. `write` returns when its interactions are on disk, so that
    feedback sent right after an answer finds it; a caller that is cancelled meanwhile loses nothing.

    An interaction that the store will not take, after a few attempts, is counted and logged, and the answer is still
    given: a full disk stops the learning, not the service.
    """

    def __init__(self, store: InteractionStore, metrics: ServeMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._queue: list[tuple[Sequence[Interaction], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def put(self, interactions: Sequence[Interaction]) -> asyncio.Future[None]:
        """Queue interactions; the future is done when they are written (or given up)."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((interactions, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._drain())
        return written

    async def flush(self) -> None:
        """Wait until everything queued is written."""
        while self._writer is not None and not self._writer.done():
            await asyncio.shield(self._writer)

    async def _drain(self) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            interactions = [interaction for group, _ in batch for interaction in group]
            try:
                alone = len(batch) == 1
                if not await self._write(interactions, last=alone) and not alone:
                    for group, _ in batch:  # one that is refused must not take its neighbours with it
                        await self._write(group, last=True)
            except Exception:
                logger.exception("the interaction store failed; %d interactions may be lost", len(interactions))
                self._metrics.count("interactions_lost_total", len(interactions))
            finally:
                for _, written in batch:
                    if not written.done():
                        written.set_result(None)

    async def _write(self, interactions: Sequence[Interaction], last: bool = False) -> bool:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await asyncio.to_thread(self._store.log_many, interactions)
            except (PosttrainError, OSError) as error:
                if attempt < _ATTEMPTS:
                    await asyncio.sleep(_PAUSE_S)
                    continue
                logger.error("%d interactions were not stored: %s", len(interactions), error)
            else:
                self._metrics.count("interactions_logged_total", len(interactions))
                return True
        if last:
            self._metrics.count("interactions_lost_total", len(interactions))
        return False
