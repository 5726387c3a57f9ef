"""A family in miniature, made of the shared leaves: an autoregressive target, a drafter, and branches that share a prefix. For tests alone.

Every step the drafter begins ``branches`` drafts with its likeliest tokens. The target verifies them in one forward, each in a row of its own
behind the text's prefix. The branch with the longest accepted prefix becomes the text's."""

import torch

from sdar.options import StandardOptions
from shared.decode.calls import Call, Job
from shared.decode.cursor import Cursor, first_stop
from shared.decode.lanes import Lane
from shared.decode.run import Run, canvas_of, inference
from shared.decode.steps import emit, prefill
from shared.gpu.engine import Engine, Inputs
from shared.network.masks import token_causal
from shared.output import Output, losslessness
from shared.policy.accept import sample_and_match
from shared.policy.draft import Choice
from shared.policy.routing import Never
from shared.policy.uniforms import Uniforms
from shared.trace import How


class Anchor(Cursor):
    """``at[i]``: the newest token of row ``i``, known and not yet in any cache."""

    def begin(self, rows):
        self.at = getattr(self, "at", {}) | {i: len(self.canvas.rows[i].prompt) - 1 for i in rows}

    def prefilled(self, i):
        return self.at[i]

    def end(self, i):
        return self.at[i] + 1


@inference
def decode(target, drafter, prompts, options: StandardOptions, call: Call, *, drafts=3, branches=2) -> Output:
    job = Job(prompts, options, call, 0.0)
    wide = max(map(len, prompts)) + options.blocks.max_new_tokens + drafts + 2
    models, rows = {"target": target, "drafter": drafter}, job.rows * (1 + branches)
    engines = {name: Engine(model, rows, wide, (), options.runtime) for name, model in models.items()}
    canvas = canvas_of(job, Uniforms(job.rows, wide, seed=call.seed), width=wide, iterations=wide)
    run = Run(job, canvas, Anchor(canvas), {n: Lane(n, e, canvas) for n, e in engines.items()}, Never())
    while prefill(run, encode_prompts) or canvas.active:
        emit(run, step(run, canvas.active, drafts, branches))
    return run.output(losslessness({}, "text", "the target's own decoding"))


def encode_prompts(run: Run, rows: list[int]) -> None:
    counts = [run.cursor.prefilled(i) for i in rows]
    for lane in run.lanes.values():
        window = lane.cache.window(max(counts), rows)
        ids = run.canvas.tokens[window.where.rows, : window.tokens]
        inputs = Inputs(ids, torch.arange(window.tokens).expand_as(ids), token_causal(window.tokens), slice(0, 0))
        lane.forward("prefill", rows, inputs, window)
        lane.cache.commit(counts, rows)


def forward(lane: Lane, kind: str, rows: list[int], own: list[int], ids, offset: int, width: int):
    """Logits of ``ids [b * K, T]``, which stand ``offset`` tokens behind the anchors of ``rows``, each branch in its ``own`` row."""
    window = lane.cache.window(ids.shape[1], rows, offset=offset, width=width, write_rows=own)
    positions = window.prefix[:, None] + offset + torch.arange(ids.shape[1])
    mask = token_causal(width)[offset : offset + ids.shape[1]]
    return lane.forward(kind, rows, Inputs(ids, positions, mask), window)


def step(run: Run, rows: list[int], drafts: int, branches: int) -> list[int]:
    canvas, cursor, index = run.canvas, run.cursor, run.canvas.index(rows)
    anchor, places = torch.tensor([cursor.at[i] for i in rows]), torch.arange(drafts + 1)
    entries = [i for i in rows for _ in range(branches)]
    own = [len(canvas.rows) + i * branches + k for i in rows for k in range(branches)]
    ids = canvas.tokens[index, anchor].repeat_interleave(branches)[:, None]
    for j in places.tolist():  # the last of these only writes
        logits = forward(run.lanes["drafter"], "draft", entries, own, ids[:, j:], j, drafts + 1)
        rank = torch.arange(len(ids)) % branches if j == 0 else torch.zeros(len(ids), dtype=torch.long)
        ids = torch.cat([ids, logits[:, -1].topk(branches).indices.gather(1, rank[:, None])], 1)
    logits = forward(run.lanes["target"], "verify", entries, own, ids[:, :-1], 0, drafts + 1)
    numbers = (anchor - canvas.prompt_length[index] + 1)[:, None] + places
    uniforms = canvas.uniforms.at(index, numbers).repeat_interleave(branches, 0)
    accepted, tokens = sample_and_match(ids[:, 1:-1], logits, uniforms, run.options.sampling)
    best = accepted.view(-1, branches).argmax(-1) + branches * torch.arange(len(rows))
    count, positions = accepted[best, None], anchor[:, None] + 1 + places
    how = torch.where(places < count, int(How.ACCEPTED), int(How.RESAMPLED)) * (places <= count)
    how[count[:, 0] == drafts, drafts] = int(How.BONUS)
    choice = Choice(tokens[best], how, places.expand_as(how), count[:, 0] + 1)
    new = canvas.write(index, positions, canvas.tokens[index[:, None], positions], choice, torch.ones(how.shape))
    sent = torch.full_like(index, drafts)
    canvas.note_verify(index, sent > 0, sent * branches, sent * branches, count[:, 0])
    canvas.step(index)
    gained, ended = (count[:, 0] + 1).tolist(), []
    for lane in run.lanes.values():
        lane.cache.keep(rows, [own[k] for k in best.tolist()], gained)
    for i, n, text in zip(rows, gained, new.tolist(), strict=True):
        canvas.rows[i].iterations += 1
        cursor.at[i] += n
        left = len(canvas.rows[i].prompt) + canvas.max_new_tokens - cursor.end(i)
        ended += [i] if left <= 0 or first_stop(text[:n], canvas.stop_ids) < n else []
    return ended
