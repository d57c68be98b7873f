"""What a check of `posttrain doctor` found."""

from __future__ import annotations

from typing import Literal

from posttrain.core import Record

Status = Literal["ok", "warning", "problem"]


class Check(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was looked at."""

    name: str  # short: "weights", "end of turn"
    status: Status
    detail: str  # what was found, with figures
    advice: str = ""  # what to do about it


def ok(name: str, detail: str, advice: str = "") -> Check:
    """As it should be."""
    return Check(name=name, status="ok", detail=detail, advice=advice)


def warning(name: str, detail: str, advice: str) -> Check:
    """Works here, and may surprise."""
    return Check(name=name, status="warning", detail=detail, advice=advice)


def problem(name: str, detail: str, advice: str) -> Check:
    """Training, sampling or serving would go wrong."""
    return Check(name=name, status="problem", detail=detail, advice=advice)
