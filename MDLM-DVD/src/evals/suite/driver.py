"""Runs a configuration: every method with every setting on every data set with every seed. Texts are on disk as they finish, and a second run goes on."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from mdlm_dvd.src.evals.suite import metrics, report
from mdlm_dvd.src.evals.suite.config import Config, as_data, grid
from mdlm_dvd.src.evals.suite.decoders import Method, Pair
from mdlm_dvd.src.evals.suite.likelihood import generative_perplexity, load_causal, masked_log_likelihood
from mdlm_dvd.src.evals.suite.problems import Problem
from shared.errors import UserError
from shared.scripts.claims import claimed
from shared.scripts.identity import code_version
from shared.scripts.store import Store

FAMILY = Path(__file__).parents[3]


@dataclass(frozen=True)
class Setting:
    """A method with one choice of its parameters."""

    method: Method
    params: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Short, for keys and tables."""
        return ", ".join(f"{k}={v}" for k, v in self.params.items())

    def key(self, *more: Any) -> str:
        return " | ".join(map(str, (self.method.name, self.label, *more)))


def settings_of(config: Config, pair: Pair) -> list[Setting]:
    """The method under test and the baselines, each with its grid. Baselines take ``gen_length`` from the method where they do not say."""
    found = [Setting(pair.method(config.algorithm), params) for params in grid(config.model_params)]
    given = {"model_params": (found[0].method, config.model_params)}
    given |= {f"baselines: {role}": (pair.baseline(role), params) for role, params in config.baselines.items()}
    for where, (method, params) in given.items():
        for name in params:
            if not method.takes(name):
                raise UserError(
                    f"config {where}: {name} is nothing that {method.name} asks for. Allowed: its own keywords"
                )
    length = {"gen_length": config.model_params["gen_length"]} if "gen_length" in config.model_params else {}
    for role, params in config.baselines.items():
        found += [Setting(pair.baseline(role), chosen) for chosen in grid({**length, **params})]
    return found


class Suite:
    """One run of a configuration into a folder."""

    def __init__(self, config: Config, pair: Pair, problems: Mapping[str, Sequence[Problem]], store: Store):
        self.config, self.pair, self.problems, self.store = config, pair, problems, store
        self.settings = settings_of(config, pair)

    def run(self) -> dict[str, Any]:
        """Everything that the configuration asks for, as ``full_evaluation_results.json`` holds it."""
        asked = self.config.metrics
        return {
            "experiment_name": self.config.experiment_name,
            "config": as_data(self.config),
            "parameters": self.pair.parameters(),
            "all_runs": self.runs(),
            "speed": self.speed() if asked.speed else [],
            "robustness": self.robustness() if asked.robustness else [],
            "held_out_bound": self.held_out() if asked.held_out_bound else [],
        }

    def runs(self) -> list[dict[str, Any]]:
        """A run for every setting, data set and seed."""
        chosen = [(s, task, seed) for s in self.settings for task in self.problems for seed in self.config.seeds]
        texts = {
            (s.key(task, seed)): self._texts(s, task, seed) for s, task, seed in tqdm(chosen, desc="runs", disable=None)
        }
        judge = self._causal() if self.config.metrics.generative_perplexity else None
        return [self._run(s, task, seed, texts[s.key(task, seed)], judge) for s, task, seed in chosen]

    def _causal(self) -> tuple:
        return load_causal(self.config.metrics.generative_perplexity.model, self.pair.device)

    def _texts(self, setting: Setting, task: str, seed: int) -> list[dict[str, Any]]:
        """The text of every problem, decoded in whole batches; those that an earlier run left are not decoded again."""
        problems, size = self.problems[task], self.config.batch_size
        for first in range(0, len(problems), size):
            part = problems[first : first + size]
            keys = [setting.key(task, seed, p.id) for p in part]
            if all(k in self.store.found for k in keys):
                continue
            with metrics.peak_memory(self.pair.device) as peak:
                decoded = setting.method.decode(
                    [p.prompt for p in part], setting.params, first=first, batch_size=size, seed=seed
                )
            for key, problem, text in zip(keys, part, decoded, strict=True):
                if key not in self.store.found:
                    self._keep(
                        {"key": key, **asdict(text), "correct": problem.judge(text.text), "peak_memory": peak.bytes}
                    )
        return [self.store.found[setting.key(task, seed, p.id)] for p in problems]

    def _keep(self, record: dict[str, Any]) -> None:
        self.store.append(record)
        self.store.found[record["key"]] = record

    def _run(self, setting: Setting, task: str, seed: int, texts: list[dict], judge: tuple | None) -> dict[str, Any]:
        asked, outputs = self.config.metrics, [t["text"] for t in texts]
        correct = [float(t["correct"]) for t in texts]
        share, margin = metrics.confidence_interval(correct, asked.accuracy.confidence)
        found = {
            "method": setting.method.name,
            "params": dict(setting.params),
            "setting": setting.label,
            "task": task,
            "seed": seed,
            "problems": len(texts),
            "accuracy": share,
            "margin": margin,
            "solved": "".join("01"[t["correct"]] for t in texts),
            **costs(texts, self.pair.parameters()),
        }
        if asked.diversity:
            found["diversity"] = diversity(outputs, asked.diversity.distinct_n, asked.diversity.self_bleu)
        if judge is not None:
            found["generative_perplexity"] = generative_perplexity(*judge, outputs).record()
        return found

    def speed(self) -> list[dict[str, Any]]:
        """The same problems with several batch sizes, nothing else inside the clock. A batch of each is decoded once before."""
        asked, found = self.config.metrics.speed, []
        for setting in self._one_of_each():
            for task, problems in self.problems.items():
                prompts = [p.prompt for p in problems[: asked.problems]]
                for size in asked.batch_sizes:
                    key = setting.key("speed", task, size)
                    if key not in self.store.found:
                        self._keep(
                            {"key": key, **self._timed(setting, prompts, size), "task": task, "setting": setting.label}
                        )
                    found.append({k: v for k, v in self.store.found[key].items() if k != "key"})
        return found

    def _timed(self, setting: Setting, prompts: list[str], size: int) -> dict[str, Any]:
        seed = self.config.seeds[0]
        setting.method.decode(prompts[:size], setting.params, batch_size=size, seed=seed)
        with metrics.peak_memory(self.pair.device) as peak:
            began = time.perf_counter()
            decoded = setting.method.decode(prompts, setting.params, batch_size=size, seed=seed)
            seconds = time.perf_counter() - began
        tokens = sum(d.tokens for d in decoded)
        return {
            "method": setting.method.name,
            "batch_size": size,
            "texts_at_a_time": min(size, len(prompts)),
            "texts": len(prompts),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory": peak.bytes,
        }

    def _one_of_each(self) -> Iterator[Setting]:
        """The first setting of every method."""
        seen: set[str] = set()
        for setting in self.settings:
            if setting.method.name not in seen:
                seen.add(setting.method.name)
                yield setting

    def robustness(self) -> list[dict[str, Any]]:
        """How alike the outputs of a prompt's variants are, and the outputs of adversarial prompts, for every method and seed."""
        asked, found = self.config.metrics.robustness, []
        prompts = [p for group in asked.prompts for p in group] + asked.adversarial
        for setting in self._one_of_each():
            for seed in self.config.seeds:
                outputs = self._answers(setting, seed, prompts)
                groups, at = [], 0
                for group in asked.prompts:
                    groups.append(outputs[at : at + len(group)])
                    at += len(group)
                similarity, variance = metrics.prompt_sensitivity(groups)
                found.append(
                    {
                        "method": setting.method.name,
                        "setting": setting.label,
                        "seed": seed,
                        "groups": sum(len(g) > 1 for g in groups),
                        "mean_similarity": similarity,
                        "variance": variance,
                        "adversarial": [
                            {"prompt": p, "output": o} for p, o in zip(asked.adversarial, outputs[at:], strict=True)
                        ],
                    }
                )
        return found

    def _answers(self, setting: Setting, seed: int, prompts: list[str]) -> list[str]:
        for number, prompt in enumerate(prompts):
            key = setting.key("robustness", seed, number)
            if key not in self.store.found:
                (decoded,) = setting.method.decode([prompt], setting.params, first=number, seed=seed)
                self._keep({"key": key, **asdict(decoded)})
        return [self.store.found[setting.key("robustness", seed, n)]["text"] for n in range(len(prompts))]

    def held_out(self) -> list[dict[str, Any]]:
        """The bound of both models on the solutions of every data set, in nats a token, with the seeds' mean."""
        asked, found = self.config.metrics.held_out_bound, []
        for role in ("verifier", "drafter"):
            scorer = self.pair.scorer(role)
            for task, problems in self.problems.items():
                chosen, nats = problems[: asked.problems], []
                answers = [scorer.ids(p.solution) for p in chosen]
                for seed in self.config.seeds:
                    for number, (problem, ids) in enumerate(zip(chosen, answers, strict=True)):
                        key = f"held_out | {role} | {task} | {seed} | {problem.id}"
                        if key not in self.store.found:
                            logits_of = scorer.logits_of(problem.prompt, len(ids))
                            said = masked_log_likelihood(
                                logits_of, ids, scorer.mask_id, draws=asked.draws, seed=(seed, number)
                            )
                            self._keep({"key": key, "nats": -said, "tokens": len(ids)})
                        nats.append(self.store.found[key]["nats"])
                tokens = sum(map(len, answers))
                found.append(
                    {
                        "model": role,
                        "task": task,
                        "texts": len(chosen),
                        "tokens": tokens,
                        "nats_per_token": sum(nats) / len(self.config.seeds) / tokens,
                    }
                )
        return found


def costs(texts: Sequence[Mapping[str, Any]], parameters: Mapping[str, int]) -> dict[str, Any]:
    """What a run's texts cost, a text where it does not say otherwise."""
    nfe = {role: mean(t[f"{role}_nfe"] for t in texts) for role in ("drafter", "verifier")}
    drafted, seconds, tokens = (sum(t[k] for t in texts) for k in ("drafted", "seconds", "tokens"))
    peaks = [t["peak_memory"] for t in texts if t["peak_memory"] is not None]
    return {
        "drafter_nfe": nfe["drafter"],
        "verifier_nfe": nfe["verifier"],
        "flops_estimate": sum(metrics.flops_estimate(parameters[role], n) for role, n in nfe.items()),
        "acceptance_rate": sum(t["accepted"] for t in texts) / drafted if drafted else None,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory": max(peaks, default=None),
    }


def diversity(outputs: Sequence[str], orders: Sequence[int], most: int) -> dict[str, Any]:
    """Of a run's outputs; self-BLEU of the first ``most``."""
    found: dict[str, Any] = {f"distinct_{n}": metrics.distinct_n(outputs, n) for n in orders}
    found["entropy_bits"] = metrics.token_entropy(outputs)
    if most:
        found |= {"self_bleu": metrics.self_bleu(outputs[:most]), "self_bleu_samples": min(most, len(outputs))}
    return found


def machine(device: torch.device) -> dict[str, str]:
    """Where a run was made."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "sacrebleu")},
    }


def evaluate(
    config: Config, pair: Pair, problems: Mapping[str, Sequence[Problem]], folder: Path, command: str
) -> dict[str, Any]:
    """Run ``config`` into ``folder`` and write every report there. Raises `UserError` where the folder holds another run."""
    made_by = {
        "config": as_data(config),
        "code": code_version(FAMILY),
        "problems": {task: len(p) for task, p in problems.items()},
    }
    with claimed(folder), Store(folder, "records", "key", run=made_by) as store:
        results = Suite(config, pair, problems, store).run()
        results["reproducibility"] = {
            "command": command,
            "code": made_by["code"],
            "seeds": config.seeds,
            **machine(pair.device),
        }
        report.write(results, folder)
    return results
