"""Read a request's body, up to a limit."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from posttrain.serve.api_error import ApiError


async def read_body(request: Request, limit: int) -> bytes:
    """The request's body.

    Raises:
        ApiError: 413, it is larger than `limit` bytes.
    """
    parts: list[bytes] = []
    size = 0
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > 8 * limit:
                raise too_large
            # Up to eight times the limit the rest is read and dropped, so that the client lives to read the answer.
    except ClientDisconnect:
        raise ApiError(499, "the client left") from None
    if size > limit:
        raise too_large
    return b"".join(parts)
