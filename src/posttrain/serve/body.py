"""Read a request's body, up to a size and a time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from posttrain.serve.api_error import ApiError
from posttrain.serve.state import ServeSettings


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413, it is larger than `max_body_bytes`; 408, it took longer than `read_timeout_s` to arrive.
    """
    limit = settings.max_body_bytes
    parts: list[bytes] = []
    size = 0
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    try:
        async with asyncio.timeout(settings.read_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > 8 * limit:
                    raise too_large
                # Up to eight times the limit the rest is read and dropped, so that the client lives to read the answer.
    except ClientDisconnect:
        raise ApiError(499, "the client left") from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.read_timeout_s:g} s") from None
    if size > limit:
        raise too_large
    return b"".join(parts)
