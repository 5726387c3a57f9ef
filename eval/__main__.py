"""lm-eval's own command line with this repository's models, offline tasks and code runner in it.

python -m eval --model dllm --model_args pretrained=SDAR/tiny,preset=tiny --tasks word_problems --apply_chat_template

One flag more than lm-eval's: ``--resume`` goes on with what a killed run of the same command left under
``--output_path``.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.errors import end_on_interrupt

    end_on_interrupt()

import importlib
import logging
import sys
from pathlib import Path

from shared.errors import UserError, run_main

TASKS = Path(__file__).parent / "tasks"
OURS = ("custom_generate", "custom_model_class", "family")


def prepared(args):
    """lm-eval's parsed arguments; ``hf`` becomes ``dllm`` where a key of ours asks for it, and our tasks are found."""
    from lm_eval.utils import simple_parse_args_string

    if getattr(args, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        for key, value in EvaluatorConfig.load_yaml_config(args.config).items():
            if getattr(args, key, None) is None:
                setattr(args, key, value)
    for key in ("model_args", "gen_kwargs"):
        if isinstance(getattr(args, key, None), str):  # of a file
            setattr(args, key, simple_parse_args_string(getattr(args, key)))
    model_args = dict(getattr(args, "model_args", None) or {})
    if args.model in (None, "hf") and any(key in model_args for key in OURS):
        args.model = "dllm"
    args.include_path = [str(TASKS), *([args.include_path] if args.include_path else [])]
    if args.model == "dllm":
        args.device = args.device or "auto"  # lm-eval's own default is cuda:0
        if getattr(args, "use_cache", None):
            raise UserError(
                f"use_cache is {args.use_cache!r}: lm-eval's cache knows no model, "
                "so it would give the texts of another. "
                "Allowed: --output_path PATH with --resume, which knows what made each text"
            )
        seed = getattr(args, "seed", None)
        seed = (
            seed[2] if isinstance(seed, list) and len(seed) > 2 else seed
        )  # of random, numpy, torch, few-shot examples
        if seed is not None and not isinstance(seed, list):
            model_args.setdefault("seed", seed)
        if getattr(args, "gen_kwargs", None):
            model_args["gen_kwargs"] = dict(args.gen_kwargs)
        if args.output_path:
            model_args |= {
                "predictions": str(predictions_of(args.output_path)),
                "resume": args.resume,
            }
        elif args.resume:
            raise UserError("resume needs a place where predictions are. Allowed: --output_path PATH with it")
        args.model_args = model_args
    elif args.resume:
        raise UserError(f"resume is given with --model {args.model}. Allowed: with --model dllm")
    del args.resume
    return args


def predictions_of(output_path: str) -> Path:
    """Where the texts of a run go. Only ``.json`` is a suffix, as for lm-eval: ``thr0.85`` is a folder."""
    path = Path(output_path)
    return (path.with_suffix("") if path.suffix == ".json" else path) / "predictions"


def told_when_unsaved(record: logging.LogRecord) -> bool:
    """A filter of lm-eval's log: it would only warn where results cannot be written, and end as if all were well."""
    if record.msg.startswith("Could not save"):
        error = sys.exc_info()[1]
        raise UserError(
            f"the results are not saved ({error}). Allowed: the same command with --resume, which decodes nothing again"
        )
    return True


def main() -> None:
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    logging.getLogger("lm_eval.loggers.evaluation_tracker").addFilter(told_when_unsaved)
    importlib.import_module("lm_eval.models")  # the stock ones: lm-eval looks for them only where no model is known
    importlib.import_module("eval.model")
    importlib.import_module("eval.code_eval").install()
    early = importlib.import_module("eval.early")
    early.install()
    resume = "--resume" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--resume"]
    cli = HarnessCLI()
    args = early.in_one_line(cli.parse_args)()
    if getattr(args, "command", None) == "run":
        args.resume = resume
        args = early.in_one_line(prepared)(args)
    elif args.command == "ls" and not getattr(args, "include_path", None):
        args.include_path = str(TASKS)
    cli.execute(args)


if __name__ == "__main__":
    run_main(main)
