"""Take personal data and secrets out of text, as far as patterns can.

Limits. What is found has a recognisable form: e-mail addresses, telephone numbers in usual notations, payment card
numbers (Luhn's checksum must hold), and API keys of well-known shapes. Names, postal addresses, birthdays, account
numbers, passwords in prose and anything spelled out in words pass through. A number of nine or more digits written
like a telephone number is taken for one. Redaction lowers risk; it does not make a data set anonymous.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

# Every quantifier is bounded or over a class that the next part cannot match, so time is linear in the text.
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_KEY = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      sk-[A-Za-z0-9_-]{16,256}                              # OpenAI, Anthropic and look-alikes
    | (?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10,128}        # Stripe
    | hf_[A-Za-z0-9]{20,64}                                 # Hugging Face
    | gh[pousr]_[A-Za-z0-9]{20,255} | github_pat_\w{20,255} # GitHub
    | glpat-[\w-]{20,64}                                    # GitLab
    | xox[abeoprs]-[A-Za-z0-9-]{10,256}                     # Slack
    | (?:AKIA|ASIA)[0-9A-Z]{16}                             # Amazon
    | AIza[\w-]{35}                                         # Google
    | eyJ[\w-]{8,2048}\.eyJ[\w-]{8,4096}\.[\w-]{8,1024}     # JSON web token
    )(?![A-Za-z0-9])""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----.{0,16384}?-----END [A-Z ]{0,32}PRIVATE KEY-----", re.DOTALL
)
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]?\d)")
_PHONE = re.compile(
    r"""(?<![\w.+-])(?:
      \+\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}                # international
    | \(\d{2,5}\)[ ./-]?\d{2,5}(?:[ ./-]?\d{2,5}){1,3}      # (area) number
    | \d{3}[ .-]\d{3}[ .-]\d{4}                             # 555-123-4567
    | 0\d{1,4}[ /-]\d{3,5}(?:[ -]?\d{2,5}){1,3}             # national, trunk zero
    )(?![\w-])""",
    re.VERBOSE,
)


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _is_phone(text: str) -> bool:
    return 9 <= sum(character.isdigit() for character in text) <= 15


def _always(text: str) -> bool:
    return True


# Keys before numbers: digits within a key are part of it. Cards before telephones: a card is the stricter form.
_RULES: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("API_KEY", _PRIVATE_KEY, _always),
    ("API_KEY", _KEY, _always),
    ("EMAIL", _EMAIL, _always),
    ("CARD", _CARD, _is_card),
    ("PHONE", _PHONE, _is_phone),
)


def redact(text: str) -> str:
    """The text with what was recognised replaced by `[EMAIL]`, `[PHONE]`, `[CARD]`, `[API_KEY]`.

    Applying it twice changes nothing more. See the module's text for what it does not find.
    """
    return redact_counted(text)[0]


def redact_counted(text: str) -> tuple[str, Counter[str]]:
    """`redact`, and how many of each kind were replaced."""
    counts: Counter[str] = Counter()
    for name, pattern, holds in _RULES:

        def replace(match: re.Match[str], name: str = name, holds: Callable[[str], bool] = holds) -> str:
            if not holds(match.group()):
                return match.group()
            counts[name] += 1
            return f"[{name}]"

        text = pattern.sub(replace, text)
    return text, counts
