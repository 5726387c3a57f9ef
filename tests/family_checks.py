"""The standard of proof every family passes. A family's tests call these; nothing here knows a family."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.policy.uniforms import request_uniforms
from tests.standin import see_only_what_was_staged

HERE = Path(__file__).parent


def golden_folder(family: str) -> Path:
    """Recorded behaviour of ``family``. ``GOLDEN_DIR`` overrides the parent folder; missing data is a failure, not a skip."""
    folder = Path(os.environ.get("GOLDEN_DIR", HERE / "golden")) / family
    if not (folder / "decode.json").is_file():
        raise FileNotFoundError(f"golden data of {family} is missing: {folder / 'decode.json'}")
    return folder


@dataclass(frozen=True)
class Family:
    """What a family brings to its proofs.

    ``model``: a small model (float64, so that ties and rounding play no part). ``decoders``: name -> (generate function, options class).
    ``reference(model, prompt, options, uniforms)``: the slow definition; returns ``tokens``, ``order`` and ``forwards``. ``plain`` and
    ``speculative`` name the two decoders that the checks relate.
    """

    model: object
    decoders: dict[str, tuple[Callable, type]]
    reference: Callable
    plain: str = "plain"
    speculative: str = "speculative"
    one: dict = field(default_factory=lambda: {"block_length": 1, "denoising_steps": 1})  # block size one, as keywords
    one_block_a_step: bool = True

    def run(self, decoder: str, prompts: list[list[int]], flat: dict, **call):
        return self.decoders[decoder][0](self.model, prompts, **flat, **call)


def draw_prompts(count: int, *, low: int = 1, high: int = 40, vocab: int = 250, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of different lengths."""
    rng = random.Random(seed)
    lengths = rng.sample(range(low, high), k=count) if count <= high - low else rng.choices(range(low, high), k=count)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]


def check_equals_reference(family: Family, decoder: str, flat: dict, prompts: list[list[int]]) -> None:
    """The batched, cached decoder gives each text the reference gives it: ids, order inside every step, edits, forwards, uniforms."""
    options = family.decoders[decoder][1].from_flat(flat)
    seed = 11
    batched = family.run(decoder, prompts, flat, seed=seed)
    for k, (prompt, text) in enumerate(zip(prompts, batched.completions, strict=True)):
        numbers = iter(request_uniforms(seed, k, 20_000).tolist())
        want = family.reference(family.model, prompt, options, numbers)
        assert text.tokens == want.tokens, f"text {k}"
        assert text.trace.order() == want.order, f"text {k}"
        assert text.trace.edits == getattr(want, "edits", []), f"text {k}"
        assert {k: v for k, v in text.trace.forwards.items() if v} == {k: v for k, v in want.forwards.items() if v}
        rest = request_uniforms(seed, k, text.uniforms_used + 1)[text.uniforms_used]
        assert next(numbers) == pytest.approx(float(rest)), "uniforms consumed"


def check_batch_equals_alone(
    family: Family, decoder: str, flat: dict, prompts: list[list[int]], *rows: int, texts: Iterable[int] | None = None
) -> None:
    """In a batch of so many ``rows``, or several, whatever joins or leaves beside it, a text gets the tokens and the trace it gets alone.

    ``texts``: which are compared, all by default. Only the first batch holds the others too.
    """
    texts = list(range(len(prompts)) if texts is None else texts)
    whole = family.run(decoder, prompts, flat, batch_size=rows[0], seed=3)
    batches = [{k: whole.completions[k] for k in texts}]
    for size in rows[1:]:
        part = family.run(decoder, [prompts[k] for k in texts], flat, requests=texts, batch_size=size, seed=3)
        batches.append(dict(zip(texts, part.completions, strict=True)))
    for k in texts:
        (alone,) = family.run(decoder, [prompts[k]], flat, requests=[k], seed=3).completions
        for together in batches:
            assert together[k].tokens == alone.tokens, f"text {k}"
            assert together[k].trace.order() == alone.trace.order()
            assert together[k].trace.edits == alone.trace.edits
            assert together[k].trace.forwards == alone.trace.forwards
    assert sum(whole.batch_forwards.values()) < sum(whole.forwards.values()) or rows[0] == 1


def check_graphs_change_nothing(
    family: Family, decoder: str, flat: dict, prompts: list[list[int]], rows: int, monkeypatch
) -> None:
    """A device that sees only what was staged for its graphs, forwards and phases alike, decodes the same: ids, order, edits, verifies, forwards. So does
    a second decode in the same graphs, whose state has to move to where they look."""
    run = lambda: family.run(decoder, prompts, flat, seed=6, batch_size=rows)  # noqa: E731
    plain, phases = run(), see_only_what_was_staged(monkeypatch)
    try:
        staged, runner, again = run(), family.model.engine.runner, run()
    finally:
        family.model.engine = None
    assert len(phases) == 1, "the second decode was not adopted"
    spent = Counter(staged.batch_forwards) + Counter(again.batch_forwards)
    if runner.captured:
        assert sum(runner.replays.values()) >= sum(spent.values()) - spent["prefill"], "a forward had no graph"
    assert phases[0]._captured, "no phase was captured"
    for one, other in zip(plain.completions * 2, staged.completions + again.completions, strict=True):
        assert other.tokens == one.tokens
        assert other.trace.order() == one.trace.order()
        assert other.trace.edits == one.trace.edits
        assert other.trace.verifies == one.trace.verifies
        assert other.trace.forwards == one.trace.forwards


def check_never_is_plain(family: Family, flat: dict, prompts: list[list[int]]) -> None:
    """Speculation that never verifies is plain decoding."""
    plain = family.run(family.plain, prompts, flat)
    never = family.run(family.speculative, prompts, {**flat, "do_verify_policy": "never"})
    assert plain.tokens == never.tokens
    assert [c.trace.order() for c in plain.completions] == [c.trace.order() for c in never.completions]


def check_exact_greedy_is_block_size_one(family: Family, flat: dict, prompts: list[list[int]]) -> None:
    """Exact acceptance, always verifying, on a token-causal cache: token for token the greedy text of block size one, in fewer forwards."""
    lossless = {"acceptance": "exact", "do_verify_policy": "always", "cache_ver": True}
    fast = family.run(family.speculative, prompts, {**flat, **lossless}, seed=1)
    again = family.run(family.speculative, prompts, {**flat, **lossless}, seed=2)
    one = family.run(family.plain, prompts, {**flat, **family.one})
    assert fast.lossless
    assert fast.tokens == one.tokens
    assert again.tokens == one.tokens, "exact greedy decoding ignores the seed"
    assert all(c.uniforms_used == 0 for c in fast.completions)
    # Some text must really have drafted several tokens at once, or nothing was put to the test.
    assert max(max(c.trace.accepted) for c in fast.completions) > 1


def check_trace_covers(family: Family, decoder: str, flat: dict, prompts: list[list[int]]) -> None:
    """Every generated position is decided exactly once, after the prompt, in the block that holds it."""
    for text in family.run(decoder, prompts, flat).completions:
        trace = text.trace
        decided = [p for step in trace.order() for p in step]
        assert sorted(decided) == list(range(trace.prompt_length, len(trace.token_ids)))
        assert trace.token_ids[trace.prompt_length :][: len(text.tokens)] == text.tokens
        if family.one_block_a_step:
            assert all(len({p // trace.block_length for p in step}) == 1 for step in trace.order() if step)
        assert sum(trace.counts().values()) == len(decided)


def check_stop_trims(family: Family, decoder: str, flat: dict, prompts: list[list[int]]) -> None:
    """A stop id ends the text before its first occurrence and spares the forwards of later blocks."""
    whole = family.run(decoder, prompts, {**flat, "stopping_criteria_idx": ()})
    stop = whole.tokens[0][len(whole.tokens[0]) // 2]
    cut = family.run(decoder, prompts, {**flat, "stopping_criteria_idx": (stop,)})
    for full, short in zip(whole.tokens, cut.tokens, strict=True):
        assert short == full[: full.index(stop) if stop in full else len(full)]
    assert sum(cut.forwards.values()) < sum(whole.forwards.values())


def check_unknown_option(family: Family, decoder: str) -> None:
    """A misspelt option raises with a suggestion, before any forward."""
    with pytest.raises(UserError, match="block_length"):
        family.run(decoder, [[1, 2]], {"block_lenght": 4})
