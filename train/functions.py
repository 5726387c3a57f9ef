'''Small Python functions from a signature and a docstring, judged by running them.

    Complete the function.

    def total_scores(scores):
        """Return the sum of the even numbers in scores, each multiplied by 3.

        >>> total_scores([1, 2, 4])
        18
        """

The solution is the whole function in a fenced block, without its docstring. A family is a `Draft` maker: it composes
phrases, code and a Python callable for each from tables, so that wording, code and the expected values of the asserts
come from three independent places that must agree.
'''

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from train.problem import Problem, Task

VERBS = [
    "get", "find", "make", "compute", "build", "solve", "apply", "pick", "check", "process", "update", "handle",
    "run", "change", "measure", "create",
]  # fmt: skip
THINGS = [
    "result",
    "value",
    "output",
    "answer",
    "data",
    "report",
    "entry",
    "record",
    "amount",
    "batch",
    "order",
    "score",
]
LISTS = [
    ("values", "value"),
    ("numbers", "number"),
    ("items", "item"),
    ("scores", "score"),
    ("data", "x"),
    ("nums", "n"),
]
TEXTS = ["text", "word", "name", "line", "s"]
SCALARS = ["a", "b", "c", "x", "y", "n", "m", "width", "height", "price", "count"]
LETTERS = "aeiorstln"
SAMPLE_WORDS = ["banana", "Street", "hello", "Lantern", "Tree", "Mississippi", "apple", "Oslo", "river", "Notebook"]


@dataclass(slots=True)
class Draft:
    """One function before it is written out: ``body`` lines, unindented; ``call(*arguments)`` is its right result."""

    parameters: list[str]
    sentence: str
    body: list[str]
    call: Callable[..., Any]
    arguments: Callable[[Random], tuple]


def _numbers(rng: Random) -> list[int]:
    return [rng.randint(-9, 30) for _ in range(rng.randint(4, 7))]


def _small_list(rng: Random) -> tuple:
    return (_numbers(rng),)


FILTERS = [
    ("even numbers", "{x} % 2 == 0", lambda x, k: x % 2 == 0),
    ("odd numbers", "{x} % 2 == 1", lambda x, k: x % 2 == 1),
    ("positive numbers", "{x} > 0", lambda x, k: x > 0),
    ("negative numbers", "{x} < 0", lambda x, k: x < 0),
    ("numbers greater than {k}", "{x} > {k}", lambda x, k: x > k),
    ("numbers less than {k}", "{x} < {k}", lambda x, k: x < k),
    ("multiples of {k}", "{x} % {k} == 0", lambda x, k: x % k == 0),
    ("numbers other than {k}", "{x} != {k}", lambda x, k: x != k),
    ("numbers", "", lambda x, k: True),
]
MAPS = [
    ("", "{x}", lambda x, k: x),
    (", each squared", "{x} * {x}", lambda x, k: x * x),
    (", each doubled", "{x} * 2", lambda x, k: x * 2),
    (", each negated", "-{x}", lambda x, k: -x),
    (", each multiplied by {k}", "{x} * {k}", lambda x, k: x * k),
    (", each increased by {k}", "{x} + {k}", lambda x, k: x + k),
    (", each decreased by {k}", "{x} - {k}", lambda x, k: x - k),
]
REDUCTIONS = [
    ("the sum of the", "sum({body})", "{r} += {y}", "0", sum),
    ("a list of the", "[{body}]", "{r}.append({y})", "[]", list),
    ("a set of the", "set({body})", "{r}.add({y})", "set()", set),
]


def _list_pipeline(rng: Random) -> Draft:
    (name, x), k, m = rng.choice(LISTS), rng.randint(2, 12), rng.randint(2, 9)
    what, test, keep = rng.choice(FILTERS)
    how, change, move = rng.choice(MAPS)
    goal, whole, add, empty, reduce = rng.choice(REDUCTIONS)
    test, change = test.format(x=x, k=k), change.format(x=x, k=m)
    sentence = f"Return {goal} {what.format(k=k)} in {name}{how.format(k=m)}."
    if rng.random() < 0.4:
        sentence += " Use a loop."
        line = f"{add.format(r='result', y=change)}"
        inner = [f"    if {test}:", f"        {line}"] if test else [f"    {line}"]
        body = [f"result = {empty}", f"for {x} in {name}:", *inner, "return result"]
    else:
        body = [f"return {whole.format(body=f'{change} for {x} in {name}' + (f' if {test}' if test else ''))}"]
    return Draft([name], sentence, body, lambda v: reduce(move(i, m) for i in v if keep(i, k)), _small_list)


def _counting(rng: Random) -> Draft:
    (name, x), k = rng.choice(LISTS), rng.randint(2, 12)
    what, test, keep = rng.choice(FILTERS[:-1])
    test = test.format(x=x, k=k)
    if rng.random() < 0.5:
        sentence, body = f"Count the {what.format(k=k)} in {name}.", [f"return sum(1 for {x} in {name} if {test})"]
        return Draft([name], sentence, body, lambda v: sum(keep(i, k) for i in v), _small_list)
    word, default, function = rng.choice([("largest", k, max), ("smallest", k, min)])
    sentence = f"Return the {word} of the {what.format(k=k)} in {name}, or {default} if there is none."
    body = [f"return {function.__name__}([{x} for {x} in {name} if {test}], default={default})"]
    return Draft([name], sentence, body, lambda v: function([i for i in v if keep(i, k)], default=default), _small_list)


TEXT_STEPS = [
    ("make it upper case", "{s}.upper()", lambda s, k, c, d: s.upper()),
    ("make it lower case", "{s}.lower()", lambda s, k, c, d: s.lower()),
    ("reverse it", "{s}[::-1]", lambda s, k, c, d: s[::-1]),
    ("keep the first {k} characters", "{s}[:{k}]", lambda s, k, c, d: s[:k]),
    ("keep the last {k} characters", "{s}[-{k}:]", lambda s, k, c, d: s[-k:]),
    ("drop the first {k} characters", "{s}[{k}:]", lambda s, k, c, d: s[k:]),
    ("repeat it {k} times", "{s} * {k}", lambda s, k, c, d: s * k),
    ("replace every {c} with {d}", '{s}.replace("{c}", "{d}")', lambda s, k, c, d: s.replace(c, d)),
    ("remove every {c}", '{s}.replace("{c}", "")', lambda s, k, c, d: s.replace(c, "")),
    ("add {c} at the end", '{s} + "{c}"', lambda s, k, c, d: s + c),
    ("add {c} at the start", '"{c}" + {s}', lambda s, k, c, d: c + s),
]


def _steps_in_words(steps: list[str]) -> str:
    return ", then ".join(steps)


def _text_pipeline(rng: Random) -> Draft:
    name, words, body, calls = rng.choice(TEXTS), [], [], []
    for phrase, code, call in rng.sample(TEXT_STEPS, rng.choices([1, 2, 3], [20, 50, 30])[0]):
        k, (c, d) = rng.randint(2, 5), rng.sample(LETTERS, 2)
        words.append(phrase.format(k=k, c=c, d=d))
        body.append(f"{name} = {code.format(s=name, k=k, c=c, d=d)}")
        calls.append((call, k, c, d))

    def run(text: str) -> str:
        for call, k, c, d in calls:
            text = call(text, k, c, d)
        return text

    sentence = f"Take {name}, {_steps_in_words(words)}, and return it."
    return Draft([name], sentence, [*body, f"return {name}"], run, lambda r: (r.choice(SAMPLE_WORDS),))


LIST_STEPS = [
    ("sort it from small to large", "sorted({v})", lambda v, k: sorted(v)),
    ("sort it from large to small", "sorted({v}, reverse=True)", lambda v, k: sorted(v, reverse=True)),
    ("reverse it", "{v}[::-1]", lambda v, k: v[::-1]),
    ("keep the first {k} items", "{v}[:{k}]", lambda v, k: v[:k]),
    ("keep the last {k} items", "{v}[-{k}:]", lambda v, k: v[-k:]),
    ("drop the first {k} items", "{v}[{k}:]", lambda v, k: v[k:]),
    ("keep every second item", "{v}[::2]", lambda v, k: v[::2]),
    ("remove repeated items", "list(dict.fromkeys({v}))", lambda v, k: list(dict.fromkeys(v))),
    ("add {k} at the end", "{v} + [{k}]", lambda v, k: [*v, k]),
    ("add {k} at the start", "[{k}] + {v}", lambda v, k: [k, *v]),
]


def _list_steps(rng: Random) -> Draft:
    (name, _), words, body, calls = rng.choice(LISTS), [], [], []
    for phrase, code, call in rng.sample(LIST_STEPS, rng.choices([1, 2, 3], [20, 50, 30])[0]):
        k = rng.randint(2, 5)
        words.append(phrase.format(k=k))
        body.append(f"{name} = {code.format(v=name, k=k)}")
        calls.append((call, k))

    def run(values: list[int]) -> list[int]:
        for call, k in calls:
            values = call(values, k)
        return values

    sentence = f"Take the list {name}, {_steps_in_words(words)}, and return it."
    return Draft([name], sentence, [*body, f"return {name}"], run, _small_list)


ARITHMETIC = [
    ("add {k}", "+ {k}", lambda r, k: r + k),
    ("subtract {k}", "- {k}", lambda r, k: r - k),
    ("multiply by {k}", "* {k}", lambda r, k: r * k),
]


def _arithmetic(rng: Random) -> Draft:
    """A running result over two or three parameters, each used once, with constants between them."""
    names = rng.sample(SCALARS, rng.choices([2, 3], [60, 40])[0])
    operands: list[int | str] = [*names[1:], *(rng.randint(2, 20) for _ in range(rng.choice([1, 1, 2])))]
    rng.shuffle(operands)
    words, body, calls = [], [f"result = {names[0]}"], []
    for operand in operands:
        phrase, code, call = rng.choice(ARITHMETIC)
        words.append(phrase.format(k=operand))
        body.append(f"result = result {code.format(k=operand)}")
        calls.append((call, operand))

    def run(*arguments: int) -> int:
        given, result = dict(zip(names, arguments, strict=True)), arguments[0]
        for call, operand in calls:
            result = call(result, given.get(operand, operand))
        return result

    sentence = f"Start with {names[0]}, {_steps_in_words(words)}, and return the result."
    order = sorted(names) if rng.random() < 0.3 else names
    return Draft(
        order,
        sentence,
        [*body, "return result"],
        lambda *given: run(*(dict(zip(order, given, strict=True))[n] for n in names)),
        lambda r: tuple(r.randint(1, 20) for _ in names),
    )


LABELS = ["high", "low", "big", "small", "good", "bad", "yes", "no", "hot", "cold", "pass", "fail", "ok", "late"]


def _branches(rng: Random) -> Draft:
    name, low, high = rng.choice(SCALARS), rng.randint(1, 20), rng.randint(21, 60)
    above, below, between = rng.sample(LABELS, 3)
    if rng.random() < 0.6:
        first, second = (f"{name} > {high}", above), (f"{name} < {low}", below)
        said = (f"{name} is greater than {high}", f"{name} is less than {low}")
    else:
        first, second = (f"{name} < {low}", below), (f"{name} > {high}", above)
        said = (f"{name} is less than {low}", f"{name} is greater than {high}")
    sentence = f"Return {first[1]} if {said[0]}, {second[1]} if {said[1]}, and {between} otherwise."
    body = []
    for test, label in (first, second):
        body += [f"if {test}:", f'    return "{label}"']
    return Draft(
        [name],
        sentence,
        [*body, f'return "{between}"'],
        lambda v: above if v > high else below if v < low else between,
        lambda r: (r.choice([low - 1, low, high, high + 1, r.randint(0, 70)]),),
    )


def _ranges(rng: Random) -> Draft:
    (low, high), k = rng.choice([("low", "high"), ("start", "end"), ("first", "last"), ("a", "b")]), rng.randint(2, 12)
    goal, whole, _, _, reduce = rng.choice(REDUCTIONS)
    what, test, keep = rng.choice(FILTERS[:2] + FILTERS[6:8])
    how, change, move = rng.choice(MAPS[:4])
    sentence = f"Return {goal} {what.format(k=k)} from {low} up to and including {high}{how}."
    inside = f"{change.format(x='i')} for i in range({low}, {high} + 1) if {test.format(x='i', k=k)}"
    return Draft(
        [low, high],
        sentence,
        [f"return {whole.format(body=inside)}"],
        lambda lo, hi: reduce(move(i, k) for i in range(lo, hi + 1) if keep(i, k)),
        lambda r: (r.randint(1, 9), r.randint(10, 26)),
    )


FAMILIES = [_list_pipeline, _counting, _text_pipeline, _list_steps, _arithmetic, _branches, _ranges]
FAMILY_WEIGHTS = [22, 13, 17, 15, 15, 9, 9]


def _call(name: str, arguments: tuple) -> str:
    return f"{name}({', '.join(map(repr, arguments))})"


def sample(rng: Random) -> Problem:
    """A function of a random family and name, with an example in the docstring in seven of ten."""
    draft = rng.choices(FAMILIES, FAMILY_WEIGHTS)[0](rng)
    name = f"{rng.choice(VERBS)}_{rng.choice(THINGS)}"
    head = f"def {name}({', '.join(draft.parameters)}):"
    lines = [head, f'    """{draft.sentence}']
    if rng.random() < 0.7:
        example = draft.arguments(rng)
        lines += ["", f"    >>> {_call(name, example)}", f"    {draft.call(*example)!r}", '    """']
    else:
        lines[-1] += '"""'
    code = "\n".join([head, *(f"    {line}" for line in draft.body)])
    cases = [draft.arguments(rng) for _ in range(4)]
    check = {"name": name, "tests": [f"assert {_call(name, c)} == {draft.call(*c)!r}" for c in cases]}
    return Problem("functions", "Complete the function.\n\n" + "\n".join(lines), f"```python\n{code}\n```", check)


TASK = Task("functions", sample)
