"""Arithmetic word problems in two to five worked steps, rarely six.

    Mia has 24 marbles. She buys 3 bags with 12 marbles in each. How many marbles does Mia have now?

    First, the 3 bags hold <<3*12=36>>36 marbles.
    Finally, after buying them Mia has <<24+36=60>>60 marbles.
    #### 60

A story is a number and a list of events that change it. Everything in the solution follows from the prompt except its
style (worded or terse, `TERSE` of them terse), which the first tokens finish_step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from train.problem import Problem, Task

TERSE = 0.15
LARGEST = 999

PEOPLE = [
    ("Mia", "She"), ("Tom", "He"), ("Anna", "She"), ("Ben", "He"), ("Lily", "She"), ("Sam", "He"), ("Nora", "She"),
    ("Leo", "He"), ("Emma", "She"), ("Max", "He"), ("Ruth", "She"), ("Omar", "He"), ("Tara", "She"), ("Paul", "He"),
    ("Jane", "She"), ("Ivan", "He"),
]  # fmt: skip
ITEMS = [
    "marbles", "books", "apples", "stamps", "coins", "cards", "shells", "pencils", "stickers", "buttons", "eggs",
    "cookies", "beads", "tickets", "flowers", "rocks", "oranges", "toys", "photos", "candles",
]  # fmt: skip
BOXES = ["bags", "boxes", "jars", "packs", "trays", "baskets"]
GAINS = [("buys", "buying"), ("finds", "finding"), ("wins", "winning"), ("gets", "getting"), ("makes", "making")]
LOSSES = [("sells", "selling"), ("loses", "losing"), ("gives away", "giving away"), ("uses", "using")]
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
SHARERS = ["friends", "children", "cousins", "pupils"]


@dataclass
class Story:
    """A story being told: the hero has ``value`` of the ``items``; ``steps`` are (expression, result, sentence)."""

    rng: Random
    value: int = 0
    sentences: list[str] = field(default_factory=list)
    steps: list[tuple[str, int, str]] = field(default_factory=list)

    def __post_init__(self):
        (self.hero, self.she), (self.other, _) = self.rng.sample(PEOPLE, 2)
        self.items = self.rng.choice(ITEMS)

    def tell(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def work(self, left: int, sign: str, right: int, sentence: str) -> int:
        """Add the step ``left sign right``; ``sentence`` has ``{}`` where the worked result stands."""
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
        self.steps.append((f"{left}{sign}{right}", result, sentence))
        return result


def _begin_with(story: Story) -> None:
    story.value = story.rng.randint(10, 400)
    story.tell(f"{story.hero} has {story.value} {story.items}.")


def _begin_with_boxes(story: Story) -> None:
    count, each, box = story.rng.randint(2, 9), story.rng.randint(3, 60), story.rng.choice(BOXES)
    story.tell(f"{story.hero} has {count} {box} with {each} {story.items} in each.")
    story.value = story.work(count, "*", each, f"the {count} {box} hold {{}} {story.items}")


def _gain(story: Story) -> bool:
    if story.value > LARGEST - 5:
        return False
    amount, (verb, doing) = story.rng.randint(3, min(300, LARGEST - story.value)), story.rng.choice(GAINS)
    story.tell(f"{story.she} {verb} {amount} more {story.items}.")
    sentence = f"after {doing} {amount} more {story.hero} has {{}} {story.items}"
    story.value = story.work(story.value, "+", amount, sentence)
    return True


def _lose(story: Story) -> bool:
    if story.value < 12:
        return False
    amount, (verb, doing) = story.rng.randint(3, story.value - 5), story.rng.choice(LOSSES)
    story.tell(f"{story.she} {verb} {amount} {story.items}.")
    sentence = f"after {doing} {amount} there are {{}} {story.items} left"
    story.value = story.work(story.value, "-", amount, sentence)
    return True


def _gain_boxes(story: Story) -> bool:
    count = story.rng.randint(2, 9)
    most = min(50, (LARGEST - story.value) // count)
    if most < 3:
        return False
    each, box, (verb, doing) = story.rng.randint(3, most), story.rng.choice(BOXES), story.rng.choice(GAINS)
    story.tell(f"{story.she} {verb} {count} {box} with {each} {story.items} in each.")
    more = story.work(count, "*", each, f"the {count} {box} hold {{}} {story.items}")
    story.value = story.work(story.value, "+", more, f"after {doing} them {story.hero} has {{}} {story.items}")
    return True


def _lose_boxes(story: Story) -> bool:
    count = story.rng.randint(2, 9)
    most = min(50, (story.value - 3) // count)
    if most < 3:
        return False
    each, box, (verb, doing) = story.rng.randint(3, most), story.rng.choice(BOXES), story.rng.choice(LOSSES)
    story.tell(f"{story.she} {verb} {count} {box} with {each} {story.items} in each.")
    fewer = story.work(count, "*", each, f"the {count} {box} hold {{}} {story.items}")
    story.value = story.work(story.value, "-", fewer, f"after {doing} them there are {{}} {story.items} left")
    return True


def _multiply(story: Story) -> bool:
    factor = story.rng.choice(list(TIMES))
    if story.value * factor > LARGEST:
        return False
    story.tell(f"A week later {story.she.lower()} has {TIMES[factor]} as many {story.items}.")
    story.value = story.work(story.value, "*", factor, f"a week later {story.hero} has {{}} {story.items}")
    return True


def _share(story: Story) -> bool:
    ways = [n for n in range(2, 10) if story.value % n == 0 and story.value // n > 2]
    if not ways:
        return False
    count, who = story.rng.choice(ways), story.rng.choice(SHARERS)
    story.tell(f"{story.she} shares the {story.items} equally among {count} {who}, one of them {story.hero}.")
    story.value = story.work(story.value, "/", count, f"each of the {count} {who} gets {{}} {story.items}")
    return True


EVENTS = [_gain, _lose, _gain_boxes, _lose_boxes, _multiply, _share]
EVENT_WEIGHTS = [28, 28, 14, 12, 10, 8]


def _ask_plain(story: Story) -> None:
    story.tell(f"How many {story.items} does {story.hero} have now?")


def _ask_other(story: Story) -> None:
    """Ask about a second person who has more or fewer, or about both together."""
    more = story.value < LARGEST - 60 and (story.value < 15 or story.rng.random() < 0.6)
    amount = story.rng.randint(2, 60) if more else story.rng.randint(2, min(60, story.value - 3))
    story.tell(f"{story.other} has {amount} {'more' if more else 'fewer'} {story.items} than {story.hero}.")
    sentence = f"{story.other} has {{}} {story.items}"
    theirs = story.work(story.value, "+" if more else "-", amount, sentence)
    if story.value + theirs <= LARGEST and story.rng.random() < 0.4:
        story.tell(f"How many {story.items} do they have together?")
        story.value = story.work(story.value, "+", theirs, f"together they have {{}} {story.items}")
    else:
        story.tell(f"How many {story.items} does {story.other} have?")
        story.value = theirs


def _ask_money(story: Story) -> None:
    price = story.rng.randint(2, min(9, LARGEST // story.value))
    story.tell(f"Each of the {story.items} is worth {price} dollars. How many dollars are they worth in all?")
    story.value = story.work(story.value, "*", price, "in all they are worth {} dollars")


def _worded(steps: list[tuple[str, int, str]]) -> str:
    lines = []
    for i, (expression, result, sentence) in enumerate(steps):
        opening = "First," if i == 0 else "Then" if i < len(steps) - 1 else "Finally,"
        lines.append(f"{opening} {sentence.format(f'<<{expression}={result}>>{result}')}.")
    return "\n".join(lines)


def _terse(steps: list[tuple[str, int, str]]) -> str:
    return "\n".join(
        f"Step {i}: {expression} = <<{expression}={result}>>{result}"
        for i, (expression, result, _) in enumerate(steps, start=1)
    )


def sample(rng: Random) -> Problem:
    """A story of two to five steps, long ones less often; asking for both persons together can add one."""
    story, wanted = Story(rng), rng.choices([2, 3, 4, 5], [25, 33, 27, 15])[0]
    ending = rng.choices([_ask_plain, _ask_other, _ask_money], [60, 25, 15])[0]
    (_begin_with if rng.random() < 0.7 else _begin_with_boxes)(story)
    last = wanted if ending is _ask_plain else wanted - 1
    while len(story.steps) < last:
        room = last - len(story.steps)
        event = rng.choices(EVENTS, EVENT_WEIGHTS)[0]
        if room > 1 or event not in (_gain_boxes, _lose_boxes):
            event(story)
    if (ending is _ask_other and story.value < 6) or (ending is _ask_money and story.value * 2 > LARGEST):
        return sample(rng)
    ending(story)
    style = _terse if rng.random() < TERSE else _worded
    solution = f"{style(story.steps)}\n#### {story.value}"
    return Problem("word_problems", " ".join(story.sentences), solution, {"answer": story.value})


TASK = Task("word_problems", sample)
