"""What to say when a name is not known: the ones that look like it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def unknown(what: str, ref: str, known: Sequence[str], *, several: bool = False) -> str:
    """A message that `ref` is not known, with near ones; or, with `several`, that it fits all of `known`."""
    if several:
        return f"{what} {ref!r} is ambiguous: {', '.join(known[:8])}"
    near = difflib.get_close_matches(ref, known, n=5, cutoff=0.4) or list(known[-5:])
    return f"no {what} {ref!r}. " + (f"Near ones: {', '.join(near)}" if near else "There is none yet")
