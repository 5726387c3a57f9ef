"""Judges of answers: by the ``check`` of a generated problem, or by the answer that a record of a prompt file brings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

_FENCE = re.compile(r"```(?:python)?\n(.*?)(?:```|\Z)", re.DOTALL)


def is_solved(record: Mapping, text: str, run: Callable[[str], bool] | None = None) -> bool | None:
    """Does ``text`` solve what ``record`` asks? None where the record does not say, or where a program has to be run and ``run`` is missing.

    A generated problem has a ``check``: an answer, rules, or tests, for which ``run(program)`` says whether a program exits with 0. Any other record may
    have an ``answer`` (the text ends in it: what stands after ``####`` in either) or an ``expected`` text.
    """
    if "check" in record:
        return meets_check(record["check"], text, run)
    if "answer" in record:
        said, wanted = (str(words).split("####")[-1].strip() for words in (text, record["answer"]))
        return said == wanted
    return text.strip() == str(record["expected"]).strip() if "expected" in record else None


def meets_check(check: Mapping, text: str, run: Callable[[str], bool] | None = None) -> bool | None:
    """The same for the ``check`` of a generated problem."""
    if "answer" in check:
        return gives_answer(check, text)
    if "rules" in check:
        return meets_rules(check, text)
    return None if run is None else run(test_program(check, text))


def needs_run(check: Mapping) -> bool:
    """Does judging mean running a program?"""
    return "tests" in check


def gives_answer(check: Mapping, text: str) -> bool:
    """Whether the last ``#### n`` of ``text`` is the answer."""
    answers = re.findall(r"#### *(-?\d+)", text)
    return bool(answers) and int(answers[-1]) == check["answer"]


def extract_code(text: str) -> str:
    """The first fenced block of ``text``, or all of it when nothing is fenced."""
    found = _FENCE.search(text)
    return found.group(1) if found else text


def test_program(check: Mapping, text: str) -> str:
    """Python source: the code in ``text``, then the asserts. It exits with 0 when they hold. Model-written: run it confined."""
    return "\n".join([extract_code(text), *check["tests"], ""])


def _items(text: str, separator: str, items: list[str]) -> bool:
    return [part.strip() for part in text.split(separator)] == items


def _contains(text: str, words: list[str]) -> bool:
    return all(word in text.lower() for word in words)


def _one_sentence(text: str) -> bool:
    return text.endswith(".") and text.count(".") == 1 and "\n" not in text


def _last_word(text: str, word: str) -> bool:
    return text.rstrip(".!? ").split(" ")[-1] == word


def _lines_rule(text: str, count: int, start: str, word: str) -> bool:
    lines = text.split("\n")
    return len(lines) == count and all(line.startswith(start) and word in line for line in lines)


def _json_rule(text: str, value: dict) -> bool:
    try:
        return json.loads(text) == value
    except json.JSONDecodeError:
        return False


RULES: dict[str, Callable[..., bool]] = {
    "items": _items,
    "contains": _contains,
    "one_sentence": _one_sentence,
    "last_word": _last_word,
    "lines": _lines_rule,
    "json": _json_rule,
}


def meets_rules(check: Mapping, text: str) -> bool:
    """Whether ``text`` meets every rule. Opening and closing lines are taken off before the body is judged."""
    text = text.strip()
    for rule in check["rules"]:
        arguments = {key: value for key, value in rule.items() if key != "rule"}
        if rule["rule"] == "opening":
            if not text.startswith(rule["text"] + "\n"):
                return False
            text = text[len(rule["text"]) + 1 :]
        elif rule["rule"] == "closing":
            if not text.endswith("\n" + rule["text"]):
                return False
            text = text[: -len(rule["text"]) - 1]
        elif not RULES[rule["rule"]](text, **arguments):
            return False
    return True
