"""What redaction finds, what it leaves, and that it is quick and settled."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.feedback import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail jane.doe+x@mail.example.co.uk now", "mail [EMAIL] now"),
        ("<a@b.de>, c@d.org.", "<[EMAIL]>, [EMAIL]."),
        ("call +49 171 1234567 today", "call [PHONE] today"),
        ("(555) 123-4567 or 555-123-4567 or +1-555-123-4567", "[PHONE] or [PHONE] or [PHONE]"),
        ("030 1234 5678", "[PHONE]"),
        ("card 4111 1111 1111 1111.", "card [CARD]."),
        ("378282246310005", "[CARD]"),
        ("sk-proj-abcdefghijklmnop1234", "[API_KEY]"),
        ("token=hf_abcdefghijklmnopqrstuvwxyz", "token=[API_KEY]"),
        ("ghp_0123456789abcdefghij0123456789abcdef", "[API_KEY]"),
        ("AKIAIOSFODNN7EXAMPLE", "[API_KEY]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nx\n-----END RSA PRIVATE KEY----- ok", "[API_KEY] ok"),
    ],
)
def test_found(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "3.14159265358979",
        "order 4111 1111 1111 1112",
        "2026-11-20 14:32:07",
        "x = a @ b",
        "@user",
        "1,234,567,890",
        "SELECT 123456789 FROM t",
        "192.168.100.200",
        "version 10.15.7",
        "0000000000000000",
        "sk-short",
        "ISBN 978-3-16-148410-0",
        "12 + 345 = 357",
        "",
    ],
)
def test_left_alone(text: str) -> None:
    assert redact(text) == text


@given(st.text(alphabet="ab@.-+ 0123456789()sk_hf\n", max_size=80))
def test_twice_is_once(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "1" * 200_000,
        "+1 " * 70_000,
        "a@" * 100_000,
        "a." * 100_000,
        "sk-" * 70_000,
        "1 " * 100_000,
        "-----BEGIN PRIVATE KEY-----" * 2_000,
        "eyJ" * 70_000,
        "a@b." * 50_000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    start = time.process_time()
    redact(text)
    assert time.process_time() - start < 3.0


def test_feedback_loads_no_torch() -> None:
    program = "import sys, posttrain.feedback; print('torch' in sys.modules, 'starlette' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
