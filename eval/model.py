"""`dllm`: a model of lm-eval that decodes with any decoder of any family."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Sequence
from itertools import takewhile
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from eval import shares
from eval.families import decoder_in_file, family_of_class, split_target
from eval.records import lanes_of, lossless_as_json, record_of
from eval.shares import filled, is_stand_in
from shared.decode.calls import Stop
from shared.decode.stop_strings import StopStrings
from shared.errors import ToldElsewhere, UserError, unknown_name
from shared.family import Network, family_named, imported
from shared.network.loading import checkpoint_folder, load_tokenizer
from shared.network.sizes import sizes_of
from shared.options import ALIASES, coerce
from shared.output import Lossless, Output
from shared.scripts import sandbox
from shared.scripts.claims import check_fresh, claim, join, release
from shared.scripts.distributed import World
from shared.scripts.identity import code_version, difference, files_of, note
from shared.scripts.models import (
    check_roles,
    checkpoints_of,
    family_of_checkpoint,
    load_models,
    network_of,
    other_models,
)
from shared.scripts.prompts import check_text, spell_out, templated
from shared.scripts.store import Store

log = logging.getLogger(__name__)

LOADER_KEYS = (
    "pretrained", "family", "decoder", "preset", "dtype", "device", "batch_size", "seed", "predictions", "resume",
    "traces", "custom_generate", "custom_model_class", "trust_remote_code", "gen_kwargs", "max_batch_size", "revision",
    "enable_thinking",
)  # fmt: skip
_NOT_OPTIONS = ("until", "max_length")
# What public tasks and commands write though it changes nothing here: the only value that our decoders can take.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
DTYPES = {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}
MADE_BY = "made_by.json"  # beside the texts: what made them
AUTO_BATCH = 32  # texts in flight where nobody says how many: their number changes no text


@register_model("dllm")
class DraftAndVerifyLM(TemplateLM):
    """See README.md for the keys. Options of the decoder are keys too. ``gen_kwargs`` win over them, they over the
    task's, the task's over ``preset``.

    ``pretrained`` is the checkpoint of the family's first network, or one that ships with it (``SDAR/tiny``). The
    checkpoint of another network goes by the key of its role (``drafter=...``). ``predictions``: a folder to which
    every finished text is appended as one JSON line, with ``traces`` also how it was decoded; with ``resume`` those
    found there are not decoded again.
    """

    def __init__(
        self, pretrained=None, family=None, decoder=None, preset=None, *, dtype="auto", device="auto", batch_size=None,
        max_batch_size=None, seed=0, predictions=None, resume=False, traces=False, custom_generate=None,
        custom_model_class=None, trust_remote_code=None, gen_kwargs=None, revision=None, enable_thinking=None,
        **options,
    ):  # fmt: skip
        super().__init__()
        if not pretrained:
            raise UserError(
                "pretrained is missing. Allowed: a checkpoint folder or a hub id (model_args pretrained=...)"
            )
        if trust_remote_code:
            log.warning("trust_remote_code is ignored: the code of this repository is used")
        self.batch_size = batch_of(batch_size, max_batch_size)
        self._thinking = None if enable_thinking is None else coerce("enable_thinking", enable_thinking, bool)
        dtype = DTYPES.get(str(dtype), dtype)
        self.pretrained = str(pretrained)
        if revision not in (None, "main"):  # main is what is there without it
            pretrained = str(checkpoint_folder(pretrained, str(revision)))
        self._choose(pretrained, family, decoder, custom_generate, custom_model_class)
        roles = {role: options.pop(role) for role in self._family.networks if role in options}
        self.checkpoints = checkpoints_of(self._family, pretrained, roles)
        self.use(
            self.decoder_name, preset, gen_kwargs, **options
        )  # what is wrong with it is told before anything is loaded
        world = World.from_environment()
        if world.size > 1:
            shares.install()
        self._rank, self._world_size, self._seed = world.rank, world.size, coerce("seed", seed, int)
        self._store, self._dtype = Store(None, "predictions", "key"), str(dtype)
        self.keep(predictions, bool(resume))  # a folder that cannot be used is told before the work
        device = world.device(device or "auto")
        self.models = load_models(self._family, self.checkpoints, dtype=dtype, device=device)
        self.model, source = self.models[self._family.first], self.checkpoints[self._family.first]
        self._device, self.tokenizer = self.model.device, load_tokenizer(source)
        self.sizes = {role: sizes_of(model) for role, model in self.models.items()}  # a lane has the name of its role
        self._traces = bool(traces)
        self._deaths: list[str] = []
        self.accept_rule = None  # replaces `shared.policy.accept.accept_span`, to look on while it decides

    def use(self, decoder: str, preset: str | None = None, gen_kwargs: dict | None = None, **options) -> None:
        """Decode like this from now on. Raises `UserError` for unknown names and impossible values."""
        if decoder not in self._family.decoders:
            raise unknown_name("decoder", decoder, self._family.decoders)
        check_roles(self._family, decoder, self.checkpoints)
        self.decoder_name, self._decoder = decoder, self._family.decoders[decoder]
        self._preset = dict(self._decoder.preset(preset)) if preset else {}
        self._gen_kwargs, self._flat = without_neutral(gen_kwargs or {}), without_neutral(options)
        self._max_length = (gen_kwargs or {}).get("max_length", options.get("max_length"))
        self.options_for({})

    def keep(self, predictions: str | Path | None, resume: bool) -> None:
        """Finished texts go to this folder from now on; what was spent is counted anew. Raises `UserError` in every
        process if one must not use it."""
        self._store.close()
        if predictions is not None:
            if self._store.root is not None and Path(predictions).resolve() != self._store.root.resolve():
                release(self._store.root)
            refused = [message for message in _collect(self._refusal(predictions, resume), self._world_size) if message]
            if refused:
                raise (UserError if self._rank == 0 else ToldElsewhere)(refused[0])
            if self._rank == 0:
                note(Path(predictions) / MADE_BY, self._made_by)
            join(predictions)
        self._store = Store(predictions, "predictions", "key", rank=self._rank, resume=resume)
        self.spent: list[dict] = []
        self.lossless: Lossless | None = None
        self._used: dict[str, dict] = {}

    def _refusal(self, predictions: str | Path, resume: bool) -> str | None:
        """Why this process must not write there; rank 0 claims the folder for all."""
        try:
            if self._rank == 0:
                claim(predictions, several=self._world_size > 1)
            made_by = self.made_by(as_flat(self.options_for({})))
            if resume:
                check_same(Path(predictions), made_by)
            else:
                check_fresh(predictions, "predictions")
            if self._rank == 0:
                self._made_by = made_by
        except UserError as error:
            return str(error)
        return None

    def _choose(self, pretrained, family, decoder, custom_generate, custom_model_class) -> None:
        """Family and decoder from whatever names them; they must agree."""
        own = decoder_in_file(custom_generate) if custom_generate else None
        names = [family, own and own[0], family_of_class(custom_model_class) if custom_model_class else None]
        named = list(dict.fromkeys(n for n in names if n)) or [family_of_checkpoint(pretrained)]
        if len(named) > 1:
            raise UserError(
                f"family, custom_generate and custom_model_class name {' and '.join(named)}. Allowed: one family"
            )
        self.family_name, self._family = named[0], family_named(named[0])
        self._user_generate = None
        if custom_generate and own is None:
            self._user_generate, self._custom = load_function(custom_generate), custom_generate
        name = decoder or (own[1] if own else next(iter(self._family.decoders)))
        if own and own[1] != name:
            raise UserError(f"decoder {name!r} is not the one of custom_generate, {own[1]!r}. Allowed: one of them")
        self.decoder_name = name

    def options_for(self, task_kwargs: dict):
        """The decoder's options for a task: ``--gen_kwargs`` over ``model_args`` over the task over preset over
        defaults."""
        task = {k: v for k, v in without_neutral(task_kwargs).items() if k not in self._gen_kwargs}
        layers = (self._preset, task, self._flat, self._gen_kwargs)
        if self._user_generate:
            return self._user_options(layers)
        kind = self._decoder.options_class
        try:
            return kind.from_layers(*layers)
        except UserError as error:
            if "unknown option" not in str(error):
                raise
            key = next(k for layer in layers for k in layer if repr(k) in str(error))
            raise unknown_name(
                "model_args key or gen kwarg", key, [*kind.names(), *LOADER_KEYS, *self._family.networks]
            ) from None

    def limit_for(self, task_kwargs: dict) -> int | None:
        """``max_length``, the tokens of prompt and answer together, where the user or the task sets it."""
        found = task_kwargs.get("max_length") if self._max_length is None else self._max_length
        return None if found is None else coerce("max_length", found, int)

    def _user_options(self, layers: Sequence[dict]) -> dict:
        """Keywords for ``custom_generate``: its length as ``max_new_tokens``, and those of the task that it knows."""
        flat: dict = {}
        for layer in layers:
            length = next((layer[k] for k in ALIASES["max_new_tokens"] if layer.get(k) is not None), None)
            flat |= {k: v for k, v in layer.items() if k not in ALIASES["max_new_tokens"]}
            flat |= {} if length is None else {"max_new_tokens": length}
        flat["max_new_tokens"] = coerce("max_new_tokens", flat.get("max_new_tokens", 512), int)
        if flat["max_new_tokens"] < 1:
            raise UserError(f"max_new_tokens is {flat['max_new_tokens']}. Allowed: at least 1")
        known = inspect.signature(self._user_generate).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            flat = {k: v for k, v in flat.items() if k in known or k in self._flat or k in self._gen_kwargs}
            for key in set(flat) - set(known):
                raise unknown_name("keyword of custom_generate", key, known)
        return flat

    # Generation.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            if is_stand_in(request):
                continue
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(k)
        seen, texts = Counter(), [""] * len(requests)
        for members in groups.values():
            kwargs = requests[members[0]].args[1]
            options, until = self.options_for(kwargs), kwargs.get("until") or []
            stop = [s for s in ([until] if isinstance(until, str) else until) if s]
            limit = self.limit_for(kwargs)
            flat = as_flat(options) | ({} if limit is None else {"max_length": limit})
            self._used[requests[members[0]].task_name or "task"] = {**flat, "stop": stop}
            mark = json.dumps([self.made_by(flat), str(self.model.dtype), stop], sort_keys=True, default=str)
            places = {self._key(mark, requests[k], seen): k for k in members}
            for key, record in self._decode(
                {key: requests[k] for key, k in places.items()}, options, stop, limit
            ).items():
                self.spent.append(record)
                texts[places[key]] = record["text"]
                self.cache_hook.add_partial("generate_until", requests[places[key]].args, record["text"])
        return texts

    def made_by(self, flat: dict) -> dict:
        """All that decides what a prompt's text is: options, files, code. The names are those that messages use."""
        own = {}
        if self._user_generate:
            file, name = split_target("custom_generate", self._custom)
            own = {"custom_generate": f"{name} of {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"}
        return {
            "family": self.family_name, "decoder": self.decoder_name, **own, "dtype": self._dtype, "seed": self._seed,
            "checkpoint": dict(self.checkpoints), "options": flat, "file": files_of(self.checkpoints),
            "code version": code_version(self._family.folder),
        }  # fmt: skip

    def _key(self, mark: str, request: Instance, seen: Counter) -> str:
        """The name of a text among all that this model could be asked for."""
        place = (request.task_name, request.doc_id, request.args[0])
        seen[place] += 1
        return hashlib.sha256(json.dumps([mark, *place, seen[place]]).encode()).hexdigest()

    def _decode(self, todo: dict[str, Instance], options, stop: list[str], limit: int | None) -> dict[str, dict]:
        """A record for every key of ``todo``; those in the store are taken from there."""
        records = {key: self._store.found[key] for key in todo if key in self._store.found}
        keys = [key for key in todo if key not in records]
        if not keys:
            if todo and self.lossless is None and not self._user_generate:
                self.lossless = self._losslessness(options)
            return records
        mask_id = options.get("mask_id") if isinstance(options, dict) else options.blocks.mask_id
        asked = [self._spelled(self.tok_encode(todo[key].args[0]), mask_id) for key in keys]
        prompts = [self._fit(ids, options, limit) for ids in asked]
        began, call = time.perf_counter(), uuid.uuid4().hex[:12]
        about = {"process": self._rank, "call": call}
        with tqdm(total=len(keys), unit="text", desc=self.decoder_name, disable=self._rank > 0) as bar:

            def keep(key: str, record: dict) -> None:
                place = {"key": key, "task": todo[key].task_name, "doc": todo[key].doc_id}
                records[key] = {**place, **about, **record, "at": time.perf_counter() - began}
                self._store.append(records[key])
                bar.update()

            decode = self._decode_by_user if self._user_generate else self._decode_here
            decode(keys, prompts, options, stop, keep)
        return records

    def _losslessness(self, options) -> Lossless:
        """What the decoder says of these options, where no text is left to decode: by a text of one token."""
        one = options.replace(max_new_tokens=1)
        others = other_models(self._family, self.decoder_name, self.models)
        return self._decoder.generate(
            self.model, [[self.prefix_token_id]], one, tokenizer=self.tokenizer, **others
        ).lossless

    def _spelled(self, ids: list[int], mask_id: int | None = None) -> list[int]:
        """``ids`` of a given text, in which a mask token that was written out is words, as in the scripts."""
        return spell_out(self.tokenizer, ids, self.model.special_ids(mask_id, tokenizer=self.tokenizer)[0])

    def _decode_here(self, keys, prompts, options, stop: list[str], keep: Callable[[str, dict], None]) -> None:
        """Texts of the chosen decoder, kept as they finish."""
        numbers = [int(key[:14], 16) for key in keys]  # randomness belongs to the request, not to its place in a batch
        by_number = dict(zip(numbers, keys, strict=True))
        rule = {"accept_rule": self.accept_rule} if self.accept_rule else {}
        output = self._decoder.generate(
            self.model, prompts, options, tokenizer=self.tokenizer, batch_size=min(self.batch_size, len(prompts)),
            seed=self._seed, requests=numbers, stop=stop, **rule,
            on_finish=lambda completion: keep(by_number[completion.request], record_of(completion, self._traces)),
            **other_models(self._family, self.decoder_name, self.models),
        )  # fmt: skip
        self.lossless = output.lossless
        self.sizes |= output.sizes

    def _decode_by_user(self, keys, prompts, options: dict, stop: list[str], keep: Callable[[str, dict], None]) -> None:
        """A user's own ``custom_generate``, batch by batch, left-padded; see `new_ids` for what it may return."""
        _, ends = self.model.special_ids(tokenizer=self.tokenizer)
        text_of = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        stops = StopStrings(Stop.of(stop, self.tokenizer), text_of)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eot_token_id
        for at in range(0, len(keys), self.batch_size):
            part = prompts[at : at + self.batch_size]
            wide = max(map(len, part))
            ids = torch.tensor([[pad] * (wide - len(p)) + p for p in part], device=self.model.device)
            mask = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in part], device=self.model.device)
            out = self._user_generate(
                self.model, ids, attention_mask=mask, stop=stop, tokenizer=self.tokenizer, **options
            )
            rows = out.tokens if isinstance(out, Output) else new_ids(out, ids.tolist(), part, {*ends, pad})
            for key, row in zip(keys[at : at + self.batch_size], rows, strict=True):
                tokens, text = stops.kept(row) or (row, text_of(row))
                keep(key, {"text": text, "tokens": len(tokens), "forwards": {}, "seconds": None})

    def _fit(self, ids: list[int], options, limit: int | None = None) -> list[int]:
        """The prompt's last tokens, where all of them leave no room for the answer."""
        room = prompt_room(as_flat(options), self.model.config, limit)
        if len(ids) > room:
            log.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
        return ids[-room:]

    # Scoring.

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        mask_id, _ = self.model.special_ids(tokenizer=self.tokenizer)
        scores_of = self._scores()
        order = sorted(range(len(requests)), key=lambda k: -len(requests[k][1]) - len(requests[k][2]))
        found: dict[int, tuple[float, bool]] = {}
        cut = 0
        for at in range(0, len(order), self.batch_size):
            part = order[at : at + self.batch_size]
            texts = []
            for k in part:
                context, continuation = (self._spelled(ids) for ids in requests[k][1:])
                room = self.max_length - len(continuation)
                if room < 1:
                    raise UserError(
                        f"a continuation has {len(continuation)} tokens. Allowed: less than {self.max_length}"
                    )
                cut += len(context) > room
                texts.append((context[-room:], continuation))
            for k, (scores, greedy) in zip(part, scores_of(self.model, texts, mask_id), strict=True):
                found[k] = (scores.sum().item(), bool(greedy.all()))
                if requests[k][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[k][0], found[k])
        if cut:
            log.warning(
                "%d of %d contexts are cut to the last tokens that fit (%d with the answer)",
                cut,
                len(requests),
                self.max_length,
            )
        return [found[k] for k in range(len(requests))]

    def _scores(self) -> Callable:
        """The function of `shared.network.scoring` that fits the network."""
        first: Network = self._family.networks[self._family.first]
        scoring = network_of(first, self.checkpoints[self._family.first]).scoring
        if scoring is None:
            raise UserError(f"family {self.family_name!r} gives no log-likelihoods. Allowed: tasks that generate text")
        return imported(scoring)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(w)) for w in windows])
            results.append(sum(score for score, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    # What lm-eval asks of a model.

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        check_text(string, "a prompt")
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens)).input_ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.pretrained} has no chat template. Allowed: a checkpoint with one, or no --apply_chat_template"
            )
        thinking = {} if self._thinking is None else {"enable_thinking": self._thinking}
        return templated(
            self.tokenizer,
            chat_history,
            **thinking,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.get_chat_template() if chat_template else ""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's own count for every process. lm-eval asks for the counts of requests to make them even, by its
        last request again and again; here nobody waits for the others, and repeated requests would be recorded as
        further texts of that document."""
        return tensor.reshape(1).repeat(self._world_size)

    def gather_object(self, obj, dst: int = 0):
        parts = _collect((obj, self.spent, sandbox.DEATHS), self._world_size)
        self.spent = list({r["key"]: r for _, spent, _ in parts for r in spent}.values())
        self._deaths = [how for *_, deaths in parts for how in deaths]
        return filled([o for o, *_ in parts]) if self._rank == dst else None

    @property
    def deaths(self) -> list[str]:
        """How the programs died that took their interpreter with them, in all processes (`shared.scripts.sandbox`)."""
        return sandbox.DEATHS if self._world_size == 1 else self._deaths

    def barrier(self) -> None:
        _collect(None, self._world_size)

    def get_model_info(self) -> dict:
        """For the results file: every option of every task, and what was spent."""
        if self.deaths and self._rank == 0:
            log.warning(sandbox.told(self.deaths))
        forwards, lanes = Counter(), lanes_of(self.spent)
        for record in self.spent:
            forwards.update(record["forwards"])
        seconds = [r["seconds"] for r in self.spent if r["seconds"] is not None]
        verifies = sum(r.get("verifies", 0) for r in self.spent)
        gained = sum(r.get("gained", 0) for r in self.spent)
        return {
            "decoding": {
                "family": self.family_name, "checkpoints": self.checkpoints, "decoder": self.decoder_name,
                "dtype": str(self.model.dtype)[6:], "seed": self._seed, "batch_size": self.batch_size,
                "processes": self._world_size, "options": self._used,
                "texts": len(self.spent), "tokens": sum(r["tokens"] for r in self.spent), "forwards": dict(forwards),
                "lane_forwards": {lane: sum(s.forwards for s in kinds.values()) for lane, kinds in lanes.items()},
                "mean_acceptance_length": gained / verifies if verifies else None,
                "programs_died": dict(Counter(self.deaths)), "seconds_in_flight": round(sum(seconds), 3),
                **lossless_as_json(self.lossless),
            }
        }  # fmt: skip


def check_same(folder: Path, made_by: dict) -> None:
    """Raise `UserError`, naming the setting, unless what an earlier run left in ``folder`` was made by the same."""
    if differ := difference(folder / MADE_BY, made_by):
        key, now, before = differ
        raise UserError(
            f"{key} is {now}; the texts in {str(folder)!r} were made with {before}. "
            "Allowed with --resume: the same, or another folder"
        )


def without_neutral(kwargs: dict) -> dict:
    """``kwargs`` less what is no option here; `UserError` for a value that no decoder of this repository has."""
    for key, only in NEUTRAL.items():
        if kwargs.get(key) is not None and coerce(key, kwargs[key], float) != only:
            raise UserError(f"{key} is {kwargs[key]!r}. Allowed: {only}")
    return {k: v for k, v in kwargs.items() if k not in (*_NOT_OPTIONS, *NEUTRAL)}


def batch_of(asked, most) -> int:
    """Texts in flight from ``--batch_size`` (a number, ``auto``, ``auto:N``) and ``--max_batch_size``."""
    auto = str(asked).partition(":")[0] == "auto"
    if asked is not None and not auto and not (str(asked).isdigit() and int(asked)):
        raise UserError(f"batch_size is {asked!r}. Allowed: a number of at least 1, or auto")
    if most is not None and not (str(most).isdigit() and int(most)):
        raise UserError(f"max_batch_size is {most!r}. Allowed: a number of at least 1")
    return min(AUTO_BATCH if auto else int(asked or 1), int(most or AUTO_BATCH) if auto else int(asked or 1))


def prompt_room(flat: dict, config, limit: int | None = None) -> int:
    """How many tokens a prompt may have beside an answer by the options ``flat``; `UserError` where none may."""
    new, length = flat["max_new_tokens"], flat.get("block_length")
    length = length or getattr(config, "block_size", None) or getattr(config, "bd_size", 1)
    room = config.max_position_embeddings // length * length - new
    if limit is not None and limit - new < 1:
        raise UserError(f"max_length is {limit} with max_new_tokens {new}. Allowed: more, so that a prompt has room")
    room = room if limit is None else min(room, limit - new)
    if room < 1:
        raise UserError(
            f"max_new_tokens is {new}. Allowed: less than the model's {config.max_position_embeddings} positions"
        )
    return room


def as_flat(options) -> dict:
    """Options of a decoder, or keywords of a user's own, as plain data."""
    return options if isinstance(options, dict) else options.to_flat()


def load_function(target: str):
    path, name = split_target("custom_generate", target)
    spec = importlib.util.spec_from_file_location(f"custom_generate_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise unknown_name(f"function of {path.name}", name, [n for n in vars(module) if not n.startswith("_")])
    return getattr(module, name)


def new_ids(returned, padded: list[list[int]], prompts: list[list[int]], ends: Container[int]) -> list[list[int]]:
    """What ``custom_generate`` has generated, row by row, up to the first of ``ends`` (stop tokens and padding).

    It may return ids with the prompts, as transformers does (``padded``, or each without its padding), or the new ones
    alone.
    """
    try:
        rows = [[int(i) for i in row] for row in (returned.tolist() if hasattr(returned, "tolist") else returned)]
    except (TypeError, ValueError):
        rows = None
    if rows is None or len(rows) != len(prompts):
        what = type(returned).__name__ if rows is None else f"{len(rows)} rows"
        raise UserError(
            f"custom_generate returned {what} for {len(prompts)} prompts. "
            "Allowed: ids [B, L], with the prompts or without, or an Output"
        )
    for begins in (padded, prompts):
        if all(row[: len(b)] == b for row, b in zip(rows, begins, strict=True)):
            rows = [row[len(b) :] for row, b in zip(rows, begins, strict=True)]
            break
    return [list(takewhile(lambda i: i not in ends, row)) for row in rows]


def _collect(value, size: int) -> list:
    """``value`` of every process, in order of rank."""
    if size == 1:
        return [value]
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parts = [None] * size
    dist.all_gather_object(parts, value)
    return parts
