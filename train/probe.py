"""Is a checkpoint any good? Greedy decoding of held-out problems by slow loops without a cache.

These loops only judge a training run. They recompute the whole sequence at every step and count one forward for each
step of a row, plus one commit per block; the decoders proper live with their family.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.network.masks import block_causal, token_causal
from train.problem import Problem
from train.tasks import TASKS, held_out
from train.tokenizer import TURN_END, chat_prompt

WIDTH = 288
DECODERS = ("ar", "static 16", "dynamic 16 0.6", "dynamic 16 0.9", "static 8", "static 32", "dynamic 32 0.9")
EDITING_DECODERS = (
    "edited 16 0.6 0.6",
    "edited 16 0.6 0.9",
    "edited 16 0.9 0.9",
    "edited 32 0.6 0.9",
    "edited 32 0.9 0.9",
)


@dataclass(slots=True)
class Canvas:
    """``tokens [B, WIDTH]``: prompts, then masks. ``steps [B]`` counts each row's forwards until its text ended."""

    tokens: Tensor
    prompt: Tensor
    steps: Tensor
    mask_id: int
    stop_ids: Tensor

    def ended(self, where: int) -> Tensor:
        """``[B]``: rows whose text has a stop id before position ``where``."""
        position = torch.arange(where, device=self.tokens.device)
        stop = torch.isin(self.tokens[:, :where], self.stop_ids) & (position >= self.prompt[:, None])
        return stop.any(1)


def new_canvas(prompts: Sequence[list[int]], tokenizer, device: torch.device) -> Canvas:
    """Prompts of different lengths on the left, all else masked."""
    tokens = torch.full((len(prompts), WIDTH), tokenizer.mask_token_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    stop = torch.tensor([tokenizer.convert_tokens_to_ids(TURN_END), tokenizer.eos_token_id])
    lengths = torch.tensor([len(p) for p in prompts])
    return Canvas(
        tokens.to(device), lengths.to(device), torch.zeros_like(lengths, device=device),
        tokenizer.mask_token_id, stop.to(device),
    )  # fmt: skip


def _logits(model, canvas: Canvas, end: int, mask: Tensor, at: slice) -> Tensor:
    positions = torch.arange(end, device=mask.device).expand(len(canvas.tokens), -1)
    return model(canvas.tokens[:, :end], positions, None, mask, logits_at=at).float()


def decode_one_by_one(model, canvas: Canvas) -> None:
    """Block size one: each token is predicted by a mask query at its own position over token-causal context."""
    for where in range(int(canvas.prompt.min()), WIDTH):
        ended = canvas.ended(where)
        if ended.all():
            break
        live = (canvas.prompt <= where) & ~ended
        mask = token_causal(where + 1, canvas.tokens.device)
        best = _logits(model, canvas, where + 1, mask, slice(where, where + 1)).argmax(-1)[:, 0]
        canvas.tokens[:, where] = torch.where(live, best, canvas.tokens[:, where])
        canvas.steps += live.long()


def decode_blocks(
    model, canvas: Canvas, block_length: int, threshold: float | None, editing: float | None = None
) -> None:
    """Block diffusion: the surest masked position a step, and with ``threshold`` every position surer than that.

    With ``editing`` a step also replaces the block's known answer tokens where the model is surer than that of another one.
    """
    for start in range(int(canvas.prompt.min()) // block_length * block_length, WIDTH, block_length):
        end = start + block_length
        ended = canvas.ended(start)
        if ended.all():
            break
        working = (canvas.prompt < end) & ~ended
        canvas.steps += working.long()
        mask = block_causal(end, block_length, canvas.tokens.device)
        for _ in range(block_length):
            masked = (canvas.tokens[:, start:end] == canvas.mask_id) & working[:, None]
            if not masked.any():
                break
            canvas.steps += masked.any(1).long()
            surest, best = _logits(model, canvas, end, mask, slice(start, end)).softmax(-1).max(-1)
            sure = surest.masked_fill(~masked, -1.0)
            chosen = torch.zeros_like(masked).scatter(1, sure.argmax(1, keepdim=True), True)
            if threshold is not None:
                chosen |= sure > threshold
            known = canvas.tokens[:, start:end]
            take = chosen & masked
            if editing is not None:
                answer = torch.arange(start, end, device=mask.device) >= canvas.prompt[:, None]
                take |= (surest > editing) & answer & ~masked & masked.any(1, keepdim=True) & (best != canvas.mask_id)
            canvas.tokens[:, start:end] = torch.where(take, best, known)


def run_decoder(model, canvas: Canvas, decoder: str) -> None:
    """``decoder`` is ``ar``, ``static L``, ``dynamic L threshold`` or ``edited L threshold editing``."""
    kind, *numbers = decoder.split()
    if kind == "ar":
        decode_one_by_one(model, canvas)
    else:
        decode_blocks(model, canvas, int(numbers[0]), *map(float, numbers[1:]) if kind != "static" else (None,))


def texts_of(canvas: Canvas, tokenizer) -> tuple[list[str], Tensor]:
    """Each row's answer up to its stop token, and the number of tokens ``[B]`` generated up to and with it."""
    texts, counts, stop = [], [], set(canvas.stop_ids.tolist())
    for row, prompt in zip(canvas.tokens.tolist(), canvas.prompt.tolist(), strict=True):
        answer = row[prompt:]
        length = next((i for i, token in enumerate(answer) if token in stop), len(answer))
        texts.append(tokenizer.decode(answer[:length]))
        counts.append(min(length + 1, len(answer)))
    return texts, torch.tensor(counts)


def runs(program: str, seconds: float = 5.0) -> bool:
    """Whether ``program`` exits with 0 in a fresh interpreter. Model-written code: for machines that may run it."""
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=seconds, check=False)
    except (subprocess.TimeoutExpired, ValueError):
        return False
    return done.returncode == 0


def judge(problems: Sequence[Problem], texts: Sequence[str]) -> list[bool]:
    """Which of ``texts`` solve their problem."""
    task = TASKS[problems[0].task]
    if task.is_correct:
        return [task.is_correct(p, t) for p, t in zip(problems, texts, strict=True)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(runs, (task.test_program(p, t) for p, t in zip(problems, texts, strict=True))))


@torch.inference_mode()
def probe(model, tokenizer, *, count: int, seed: int, run_code: bool, decoders: Sequence[str] = DECODERS) -> list[dict]:
    """One row per task and decoder: accuracy in percent and forwards per token. Functions only when ``run_code``."""
    rows = []
    for name, task in TASKS.items():
        if task.is_correct is None and not run_code:
            continue
        problems = held_out(name, count, seed)
        prompts = tokenizer([chat_prompt(p.prompt) for p in problems]).input_ids
        reference = None
        for decoder in decoders:
            canvas = new_canvas(prompts, tokenizer, model.device)
            run_decoder(model, canvas, decoder)
            texts, counts = texts_of(canvas, tokenizer)
            reference = reference or texts
            rows.append(
                {
                    "task": name,
                    "decoder": decoder,
                    "accuracy": round(100 * sum(judge(problems, texts)) / count, 1),
                    "forwards_per_token": round(float(canvas.steps.sum() / counts.sum()), 3),
                    "same_as_first": round(100 * sum(a == b for a, b in zip(texts, reference, strict=True)) / count, 1),
                }
            )
    return rows


def table(rows: Sequence[dict]) -> str:
    """Decoders down, tasks across: accuracy @ forwards per token."""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    cell = {(r["decoder"], r["task"]): f"{r['accuracy']:.1f} @ {r['forwards_per_token']:.3f}" for r in rows}
    lines = [f"| decoder | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    decoders = dict.fromkeys(r["decoder"] for r in rows)
    return "\n".join(lines + [f"| {d} | {' | '.join(cell[d, t] for t in tasks)} |" for d in decoders])
