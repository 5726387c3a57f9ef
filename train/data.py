"""From problems to batches: prompt and solution as token ids, grouped by length, padded on the right."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from shared.errors import UserError
from train.problem import Problem
from train.tasks import train_problems
from train.tokenizer import TURN_END

TRAINED_TO = 32
WIDTH_STEP = 64
TURN_ENDS = (TURN_END, "<|eot_id|>")  # as tokenizers call it
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """``tokens [B, T]`` and ``trained [B, T]``: True on the solution, its end of turn and some padding after it."""

    tokens: Tensor
    trained: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device, non_blocking=True), self.trained.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Row:
    """One exercise as ids; training covers ``[start, stop)``."""

    ids: list[int]
    start: int
    stop: int

    @property
    def width(self) -> int:
        """The padded length of the batches this row belongs to."""
        return -(-self.stop // WIDTH_STEP) * WIDTH_STEP


def around_prompt(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """What the chat template puts before a user's words, and after them up to where the answer begins."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template. Allowed: one that has")
    place = "{the prompt}"
    turn = [{"role": "user", "content": place}]
    before, _, after = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).partition(place)
    return before, after


def turn_end(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that ends an answer: of the turn where the tokenizer has one, else of the text."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TURN_ENDS}
    return next((t for t, i in ids.items() if i not in (None, tokenizer.unk_token_id)), tokenizer.eos_token)


def encode_rows(
    problems: Iterable[Problem],
    tokenizer: PreTrainedTokenizerFast,
    from_prompt: bool = False,
    more: Callable[[], int] = lambda: 0,
) -> list[Row]:
    """Prompt in the chat template, solution, end of turn. Padding is trained until the row, or with ``from_prompt`` its answer, has a multiple of
    `TRAINED_TO` tokens, and for ``more()`` times as many."""
    problems, (before, after), end = list(problems), around_prompt(tokenizer), turn_end(tokenizer)
    prompts = tokenizer([before + p.prompt + after for p in problems], add_special_tokens=False).input_ids
    solutions = tokenizer([p.solution + end for p in problems], add_special_tokens=False).input_ids
    rows = []
    for prompt, solution in zip(prompts, solutions, strict=True):
        counted_from = len(prompt) if from_prompt else 0
        counted = len(prompt) + len(solution) - counted_from
        blocks = -(-counted // TRAINED_TO) + more()
        rows.append(Row(prompt + solution, len(prompt), counted_from + blocks * TRAINED_TO))
    return rows


def collate(rows: list[Row], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """``tokens [B, width]`` and ``trained [B, width]`` of rows that fit into ``width``."""
    tokens = np.full((len(rows), width), pad_id, dtype=np.int32)
    trained = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = row.ids
        trained[i, row.start : row.stop] = True
    return tokens, trained


class ProblemStream(IterableDataset):
    """Endless batches of rows of one width, about ``batch_tokens`` tokens each. Workers draw different problems."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        weights: Mapping[str, float],
        batch_tokens: int,
        seed: int,
        from_prompt: bool = False,
        most_more: int = 0,
    ):
        self.tokenizer, self.weights, self.batch_tokens, self.seed = tokenizer, dict(weights), batch_tokens, seed
        self.from_prompt, self.most_more = from_prompt, most_more

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = get_worker_info()
        number = worker.id if worker else 0
        problems, random = train_problems(self.weights, f"{self.seed}/{number}"), Random(f"{self.seed}/{number}")
        waiting: dict[int, list[Row]] = {}
        while True:
            chunk, more = islice(problems, CHUNK), partial(random.randint, 0, self.most_more)
            for row in encode_rows(chunk, self.tokenizer, self.from_prompt, more):
                pool = waiting.setdefault(row.width, [])
                pool.append(row)
                if len(pool) * row.width >= self.batch_tokens:
                    yield collate(waiting.pop(row.width), row.width, self.tokenizer.pad_token_id)


def _as_is(batch):
    """Workers send numpy arrays through a pipe: shared-memory tensors would need room in /dev/shm."""
    return batch


def batches(
    tokenizer: PreTrainedTokenizerFast,
    weights: Mapping[str, float],
    *,
    batch_tokens: int,
    seed: int,
    workers: int,
    from_prompt: bool = False,
    most_more: int = 0,
) -> Iterator[Batch]:
    """Endless training batches, generated by ``workers`` processes (0: in this one) while the model trains. ``from_prompt``: see `encode_rows`;
    ``most_more``: up to so many times `TRAINED_TO` more tokens of padding are trained, drawn for each row."""
    if workers:
        # Each worker is a fork of one process; the tokenizer's own threads would only compete with the others.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    stream = ProblemStream(tokenizer, weights, batch_tokens, seed, from_prompt, most_more)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=16 if workers else None,
    )
    for tokens, trained in loader:
        yield Batch(torch.from_numpy(tokens).long(), torch.from_numpy(trained))
