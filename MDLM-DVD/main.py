"""Decode with a drafter and a verifier. Models and algorithms are names of registry.yaml; any further flag reaches whatever function asks for it by name.

python main.py                                                   # the shipped pair, cascade, on six problems
python main.py --algorithm threshold_verifier --steps 64         # a published algorithm
python main.py --drafter tiny_drafter --verifier tiny_verifier --algorithm cascade --prompt "..." --gen_length 128 --verbose

  --drafter NAME, --verifier NAME, --algorithm NAME   of registry.yaml
  --prompt TEXT | --prompt_file PATH                  one prompt; or a file, JSONL ('prompt' a line) or one prompt a line
  --output_dir DIR                                    append results to DIR/output.jsonl; a second run resumes
  --gen_length N (128), --steps N, --batch_size N (1), --seed N (0), --device D (auto), --dtype D (auto)
  --registry FILE, --strict (flags that nobody takes are errors), --verbose (every step), --compute_divergence
  --ROLE.NAME VALUE                                   for one role alone: drafter, verifier, algorithm
  --KEY VALUE, --KEY=VALUE, --KEY, --no-KEY           anything an algorithm or an adapter asks for
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdlm_dvd.src.flags import parse, pool_of
from mdlm_dvd.src.model import ModelBroker, Pool
from mdlm_dvd.src.registry import HOME, Algorithm, ModelRegistry
from mdlm_dvd.src.runtime import Event, Result, run
from shared.errors import UserError, run_main
from shared.scripts.claims import claimed
from shared.scripts.identity import code_version
from shared.scripts.prompts import as_typed, read_prompt_file
from shared.scripts.store import Store

DEFAULTS = {"drafter": "tiny_drafter", "verifier": "tiny_verifier", "algorithm": "cascade"}
TINY = {"gen_length": 128, "block_length": 32}  # of the shipped pair, where no flag says otherwise
OWN = ("drafter", "verifier", "algorithm", "prompt", "prompt_file", "output_dir", "registry", "strict", "verbose",
       "compute_divergence", "gen_length", "steps", "batch_size", "seed", "help")  # fmt: skip


@dataclass
class Session:
    """A pair of models, an algorithm, and the values that flags gave."""

    drafter: ModelBroker
    verifier: ModelBroker
    algorithm: Algorithm
    pool: Pool
    names: dict[str, str]


def load(flags: dict[str, Any], pool: Pool) -> Session:
    """What the flags name. An algorithm and both entries are checked before a model is loaded."""
    registry = ModelRegistry(flags.get("registry"))
    names = {role: str(flags.get(role) or name) for role, name in DEFAULTS.items()}
    algorithm = registry.algorithm(names["algorithm"])
    for role in ("drafter", "verifier"):
        registry.model(names[role])
    pool.shared.setdefault("device", "auto")
    pool.shared.setdefault("dtype", "auto")
    pool.used.update(("device", "dtype"))
    models = [registry.load(names[role], role, pool) for role in ("drafter", "verifier")]
    return Session(*models, algorithm, pool, names)


def prompts_of(flags: dict[str, Any]) -> list[dict]:
    """The prompts as records."""
    if flags.get("prompt") is not None and flags.get("prompt_file") is not None:
        raise UserError("prompt and prompt_file are both given. Allowed: one of them")
    if flags.get("prompt") is not None:
        text = as_typed(str(flags["prompt"]))
        if not text.strip():
            raise UserError("the prompt is empty. Allowed: some text")
        return [{"prompt": text}]
    return read_prompt_file(flags.get("prompt_file") or HOME / "prompts.jsonl")


def narrator(session: Session, output_dir: str | None) -> Callable[[Event], None]:
    """Prints every step, and keeps it in trace.jsonl."""
    path = None if output_dir is None else Path(output_dir) / "trace.jsonl"

    def listen(event: Event) -> None:
        shown = " ".join(f"{k}={v}" for k, v in event.metrics.items())
        print(f"[it={event.number}] {shown} {1e3 * event.seconds:.1f}ms")
        regions = []
        if event.texts is not None:
            for i in event.rows:
                regions.append(_rendered(event.texts, i, session.verifier.tokenizer))
                print(f"    {regions[-1]!r}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            line = {"batch": event.batch, "iteration": event.number, **event.metrics, "ms": 1e3 * event.seconds}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "regions": regions}) + "\n")

    return listen


def _rendered(texts: Any, i: int, tokenizer: Any) -> str:
    """A region, masks as ``_``, up to its last token that is none."""
    ids = texts.region([i])[0].tolist()
    while ids and ids[-1] == texts.mask_id:
        ids.pop()
    return "".join("_" if k == texts.mask_id else tokenizer.decode([k]) for k in ids)


def show(result: Result) -> None:
    """A text, and what it took."""
    print(f"> {result.prompt}\n{result.text}")
    stats = result.stats()
    forwards = [f"{stats[k]} of the {k.removesuffix('_nfe')}" for k in ("verifier_nfe", "drafter_nfe") if k in stats]
    print(f"--- {len(result.token_ids)} tokens, forwards: {', '.join(forwards)}\n", flush=True)


def summary(session: Session, results: Sequence[Result]) -> None:
    """All texts together."""
    stats, tokens = [r.stats() for r in results], sum(len(r.token_ids) for r in results)
    total = {k: sum(s.get(k) or 0 for s in stats) for k in ("verifier_nfe", "drafter_nfe", "drafted", "accepted")}
    per_token = "  ".join(f"{total[f'{r}_nfe'] / max(tokens, 1):.3f} {r}" for r in ("verifier", "drafter"))
    print(f"{session.names['algorithm']}: {tokens} tokens, forwards/token: {per_token}", end="")
    if total["drafted"]:
        print(f", {total['accepted']} of {total['drafted']} drafts accepted", end="")
    print()
    if all(r.completion for r in results):
        from mdlm_dvd.decoding import lossless_named

        if said := lossless_named(session.algorithm, results[0].kwargs):
            print(f"lossless: {said}")


def told_unused(pool: Pool, strict: bool) -> None:
    """What no function took: a note, or with ``--strict`` an error."""
    unused = [name for name in pool.unused() if name not in OWN]
    if unused:
        said = f"no function takes {', '.join('--' + n for n in unused)}"
        if strict:
            raise UserError(f"{said}. Allowed: names that the algorithm or an adapter asks for")
        print(f"note: {said}", file=sys.stderr)


def divergence(session: Session, results: Sequence[Result]) -> float:
    """Mean entropy in nats of the verifier's predictions over the regions, one more pass each (published, there always run)."""
    import torch

    from mdlm_dvd.algorithms._common import special_ids
    from mdlm_dvd.options import Region
    from mdlm_dvd.src.texts import Ask, Texts

    mask_id, _ = special_ids(session.verifier, Region())
    values = []
    for result in results:
        if not result.token_ids:
            continue
        device = torch.device(getattr(session.verifier.model_state["model"], "device", "cpu"))
        prompt = session.verifier.prompt_ids(result.prompt)
        with torch.inference_mode():
            texts = Texts([prompt], Ask(len(result.token_ids), mask_id, device=device))
            region = torch.tensor([result.token_ids], device=device)
            log_p = session.verifier.logits(texts, [0], region, "verify").log_softmax(-1)
        values.append(float(-(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1).mean()))
    return sum(values) / max(len(values), 1)


def main_run(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(__doc__)
        return
    flags = parse(words)
    records = prompts_of(flags)
    pool = pool_of({k: v for k, v in flags.items() if k not in OWN})
    session = load(flags, pool)
    if {session.names["drafter"], session.names["verifier"]} <= {"tiny_drafter", "tiny_verifier"}:
        for name, value in TINY.items():
            if name not in OWN and name not in pool.shared:
                pool.shared[name] = value
                pool.used.add(name)
    how = {
        "steps": flags.get("steps"),
        "gen_length": flags.get("gen_length", TINY["gen_length"]),
        "batch_size": flags.get("batch_size", 1),
        "seed": flags.get("seed", 0),
    }
    folder = flags.get("output_dir")
    made_by = {"models": session.names, "flags": {**pool.shared, **pool.by_role}, **how, "code": code_version(HOME)}
    with claimed(folder), Store(folder, "output", "id", run=made_by) as store:
        new = [k for k, r in enumerate(records) if r.get("id", k) not in store.found]
        if len(new) < len(records):
            print(f"{len(records) - len(new)} of {len(records)} prompts are done in {folder}", file=sys.stderr)
        done: list[Result] = []

        def finished(result: Result) -> None:
            record = records[new[len(done)]]
            result.id = record.get("id", new[len(done)])
            done.append(result)
            show(result)
            extra = {k: v for k, v in record.items() if k not in ("prompt", "messages", "id")}
            store.append({**result.record(), **extra})

        listen = narrator(session, folder) if flags.get("verbose") else lambda event: None
        prompts = [records[k]["prompt"] for k in new]
        run(session.drafter, session.verifier, session.algorithm, prompts, **how, listen=listen, on_result=finished)
    if done:
        summary(session, done)
    if done and flags.get("compute_divergence"):
        print(f"divergence: {divergence(session, done):.4f} nats")
    told_unused(pool, bool(flags.get("strict")))


def main(argv: Sequence[str] | None = None) -> None:
    """Run; bad input is one line on standard error and exit code 2."""
    run_main(lambda: main_run(argv))


if __name__ == "__main__":
    main()
