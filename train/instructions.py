"""Format-following instructions, judged by rules.

    Here are some words: river, lamp, stone, piano. List the first 3 in upper case, separated by semicolons.
    Begin with "Answer:" on its own line.

    Answer:
    RIVER; LAMP; STONE

Each exercise is a body (one of `BODIES`) with an optional opening and closing line; ``check["rules"]`` lists the rules
an answer must meet, each ``{"rule": name, ...arguments}`` of `shared.scripts.judging.RULES`. The answer is determined by the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from train.problem import Problem, Task

WORDS = [
    "river", "lamp", "stone", "piano", "garden", "bridge", "tiger", "candle", "window", "silver", "ocean", "pepper",
    "rocket", "forest", "castle", "button", "mirror", "orange", "planet", "ladder", "winter", "basket", "copper",
    "violin", "harbor", "pencil", "meadow", "engine", "island", "cotton", "summer", "camel", "tower", "paper",
    "market", "honey", "cloud", "train", "salad", "drum",
]  # fmt: skip
TRAITS = ["old", "bright", "quiet", "large", "useful", "small", "strange", "famous"]
SEPARATORS = {"semicolons": "; ", "commas": ", ", "dashes": " - ", "slashes": "/"}
CASES: dict[str, Callable[[str], str]] = {"upper": str.upper, "lower": str.lower, "title": str.title}
NAMES = ["Mia", "Tom", "Anna", "Ben", "Lily", "Sam", "Nora", "Leo"]
CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi"]
OPENINGS = ["Answer:", "Sure:", "Here you go:"]
CLOSINGS = ["Done.", "The end.", "That is all."]

Body = tuple[str, str, list[dict]]


def _listing(rng: Random) -> Body:
    words, separator, case = rng.sample(WORDS, rng.randint(4, 6)), rng.choice(list(SEPARATORS)), rng.choice(list(CASES))
    end, count = rng.choice(["first", "last"]), rng.randint(2, len(words))
    chosen = [CASES[case](w) for w in (words[:count] if end == "first" else words[-count:])]
    prompt = (
        f"Here are some words: {', '.join(words)}. List the {end} {count} in {case} case, separated by {separator}."
    )
    return (
        prompt,
        SEPARATORS[separator].join(chosen),
        [{"rule": "items", "separator": SEPARATORS[separator].strip(), "items": chosen}],
    )


def _repeat(rng: Random) -> Body:
    word, count, separator = rng.choice(WORDS), rng.randint(2, 8), rng.choice(list(SEPARATORS))
    prompt = f"Repeat the word {word} {count} times, separated by {separator}."
    items = [word] * count
    return (
        prompt,
        SEPARATORS[separator].join(items),
        [{"rule": "items", "separator": SEPARATORS[separator].strip(), "items": items}],
    )


def _ends_with(rng: Random) -> Body:
    topic, place, word = rng.sample(WORDS, 3)
    trait = rng.choice(TRAITS)
    prompt = f"Write one sentence about the {trait} {topic} and the {place} that ends with the word {word}."
    return (
        prompt,
        f"The {trait} {topic} and the {place} are behind the {word}.",
        [
            {"rule": "contains", "words": [topic, place]},
            {"rule": "one_sentence"},
            {"rule": "last_word", "word": word},
        ],
    )


def _lines(rng: Random) -> Body:
    topic, count, mark = rng.choice(WORDS), rng.randint(2, 8), rng.choice(["-", "*", "+", ">"])
    prompt = (
        f"Write exactly {count} lines about the {topic}. Start every line with {mark} and use the word {topic} in it."
    )
    lines = [f"{mark} The {topic} is {trait}." for trait in TRAITS[:count]]
    return prompt, "\n".join(lines), [{"rule": "lines", "count": count, "start": mark, "word": topic}]


def _json_object(rng: Random) -> Body:
    values = {
        "name": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "age": rng.randint(10, 99),
        "item": rng.choice(WORDS),
        "count": rng.randint(2, 999),
    }
    keys = rng.sample(list(values), rng.randint(2, 4))
    wanted = {key: values[key] for key in keys}
    said = ", ".join(f"{key} is {value}" for key, value in wanted.items())
    return (
        f"Give a JSON object with these keys and values: {said}.",
        json.dumps(wanted),
        [{"rule": "json", "value": wanted}],
    )


def _sorting(rng: Random) -> Body:
    numbers, rising = rng.sample(range(10, 1000), rng.randint(3, 6)), rng.random() < 0.6
    order = "from small to large" if rising else "from large to small"
    items = [str(n) for n in sorted(numbers, reverse=not rising)]
    return (
        f"Sort these numbers {order}: {', '.join(map(str, numbers))}.",
        ", ".join(items),
        [{"rule": "items", "separator": ",", "items": items}],
    )


def _counting(rng: Random) -> Body:
    first, step, count = rng.randint(1, 300), rng.randint(2, 9), rng.randint(4, 9)
    items = [str(first + step * i) for i in range(count)]
    return (
        f"Count from {first} to {items[-1]} in steps of {step}.",
        ", ".join(items),
        [{"rule": "items", "separator": ",", "items": items}],
    )


def _numbered(rng: Random) -> Body:
    words = rng.sample(WORDS, rng.randint(3, 6))
    prompt = f"Write these words in reverse order, one per line, each with its number: {', '.join(words)}."
    items = [f"{i}. {word}" for i, word in enumerate(reversed(words), start=1)]
    return prompt, "\n".join(items), [{"rule": "items", "separator": "\n", "items": items}]


BODIES = [_listing, _repeat, _ends_with, _lines, _json_object, _sorting, _counting, _numbered]
BODY_WEIGHTS = [18, 12, 12, 10, 15, 15, 8, 10]


def sample(rng: Random) -> Problem:
    """A body, with an opening line in a quarter of the exercises and a closing line in another quarter or both."""
    prompt, solution, rules = rng.choices(BODIES, BODY_WEIGHTS)[0](rng)
    if rng.random() < 0.25:
        opening = rng.choice(OPENINGS)
        prompt, solution = f'{prompt} Begin with "{opening}" on its own line.', f"{opening}\n{solution}"
        rules = [{"rule": "opening", "text": opening}, *rules]
    if rng.random() < 0.25:
        closing = rng.choice(CLOSINGS)
        prompt, solution = f'{prompt} End with "{closing}" on its own line.', f"{solution}\n{closing}"
        rules = [{"rule": "closing", "text": closing}, *rules]
    return Problem("instructions", prompt, solution, {"rules": rules})


TASK = Task("instructions", sample)
