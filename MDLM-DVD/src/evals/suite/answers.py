"""Answers in texts: numbers and lettered choices, by rules of ours, and by those of the published suite."""

from __future__ import annotations

import re
from decimal import Decimal

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?"
_NUMBER = re.compile(rf"(?<![\w.])-?[$€£]?-?{_UNSIGNED}")
# Behind "Answer:" there may be brackets, stars, a currency sign.
_ANSWER_NUMBER = re.compile(rf"answer\s*:[^\w\n.-]{{0,6}}(-?[$€£]?-?{_UNSIGNED})", re.IGNORECASE)
_ANSWER_CHOICE = re.compile(r"answer\s*:[^\w\n]{0,6}([A-Z]|\d)(?!\w)", re.IGNORECASE)
LETTERS = "ABCDEFGHIJ"


def as_number(text: str) -> str | None:
    """A number in its shortest form, without thousands separators and currency: ``1,234.0`` is ``1234``. None for anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    digits = re.sub(r"[^\d.-]", "", match[0])
    value = Decimal(digits.replace("-", "")) * (-1 if "-" in digits else 1)
    shortest = f"{value:f}"
    shortest = shortest.rstrip("0").rstrip(".") if "." in shortest else shortest
    return "0" if shortest in ("-0", "") else shortest


def extract_number(text: str) -> str | None:
    """The number behind ``Answer:``, else the last one of the text, in its shortest form."""
    said = _ANSWER_NUMBER.search(text)
    numbers = [said[1]] if said else _NUMBER.findall(text)
    return as_number(numbers[-1]) if numbers else None


def as_choice(key: str, count: int = 4) -> str | None:
    """The letter of one of ``count`` choices by its key, a letter or a number from 1 on (some answers of ARC). None for anything else."""
    key = key.strip().upper()
    if key.isascii() and key.isdigit():
        return LETTERS[int(key) - 1] if 1 <= int(key) <= count else None
    return key if len(key) == 1 and key in LETTERS[:count] else None


def extract_choice(text: str, count: int = 4) -> str | None:
    """The choice behind ``Answer:``, else the one that is the last line but for brackets and a full stop."""
    said = _ANSWER_CHOICE.search(text)
    if said:
        return as_choice(said[1], count)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return as_choice(lines[-1].strip("()[]*.: "), count) if lines else None


def extract_published(task: str, text: str) -> str | None:
    """What the published suite takes for the answer: ``1,234`` is 234 there, ``18.0`` is not 18, and only a bare capital counts as a last line."""
    if task == "gsm8k":
        said = re.search(r"answer:\s*(-?\d+(?:\.\d+)?)", text, re.IGNORECASE)
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
        return said[1] if said else numbers[-1] if numbers else None
    said = re.search(r"answer:\s*([A-D])", text, re.IGNORECASE)
    if said:
        return said[1].upper()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines and re.fullmatch("[A-D]", lines[-1]) else None
