"""Checkpoints in the Hugging Face layout, read with this repository's own classes: safetensors only, no remote code."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from shared.errors import UserError
from shared.family import shipped_folder, shipped_names
from shared.network.configuration import DTYPES, DecoderConfig, named_dtype
from shared.network.kv_cache import BlockCache
from shared.network.memory import bytes_of, check_room

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer*", "*.model"]
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # one tensor when the config ties them
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer, in the name of a module
_WEIGHT_DTYPES = ("F32", "BF16", "F16", "F64")  # by their names in safetensors
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Names of tokenizers that are nothing but their tokenizer.json; the last is transformers 5's.
_PLAIN_TOKENIZERS = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
PIECE = 1 << 25  # bytes of a weight file that may be mapped at a time: 32 MB


def checkpoint_folder(path_or_id: str | Path, revision: str | None = None, holds: str = "config.json") -> Path:
    """A local checkpoint folder, else the folder of a shipped checkpoint (``SDAR/tiny``); a hub id (``organisation/name``) is downloaded into the
    Hugging Face cache first, at a ``revision`` (a branch, a tag, a commit) where one is given. A folder has none. ``holds``: the file that makes it one."""
    if not isinstance(path_or_id, str | Path):
        raise UserError(f"model is {path_or_id!r}. Allowed: a checkpoint folder, one that ships here, a hub id")
    if not str(path_or_id).strip():
        raise UserError("model '' is empty. Allowed: a checkpoint folder, one that ships here, a hub id")
    folder = Path(path_or_id)
    if revision is not None and (folder.is_dir() or shipped_folder(str(path_or_id)) is not None):
        raise UserError(f"revision is {revision!r}, but {str(path_or_id)!r} is a folder. Allowed: with a hub id alone")
    if folder.is_dir():
        if not (folder / holds).is_file():
            raise UserError(f"model {str(path_or_id)!r}: the folder has no {holds}")
        return folder
    name = str(path_or_id)
    if (shipped := shipped_folder(name)) is not None:
        return checkpoint_folder(shipped, holds=holds)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        ships = ", ".join(shipped_names())
        raise UserError(
            f"model {name!r}: no such folder. Give a checkpoint folder, one that ships here ({ships}) or a hub id like JetLM/SDAR-8B-Chat"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        of = "" if revision is None else f" of revision {revision!r}"
        raise UserError(
            f"model {name!r}: not a folder here, and the hub did not give it{of} ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """What kind of error it is, and the beginning of its message if it has one."""
    line = " ".join(str(error).strip().splitlines()[:1])
    return textwrap.shorten(
        f"{type(error).__name__}: {line}" if line else type(error).__name__, 200, placeholder=" ..."
    )


def read_json(path: Path) -> dict:
    """The object a file of the checkpoint holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({_reason(error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object is needed, {type(found).__name__} found")
    return found


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (UserError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not a readable safetensors index ({_reason(error)})") from error
        absent = [n for n in names if not (folder / n).is_file()]
        if absent:
            raise UserError(f"{folder}: the index lists shards that are not there: {', '.join(absent)}")
        return [folder / n for n in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise UserError(f"{folder}: no model.safetensors (other weight formats are not loaded; convert with safetensors)")


def checked_shards(
    folder: Path,
    expected: Mapping[str, torch.Size],
    ignored: Collection[str] = (),
    rename: Callable[[str], str] = str,
) -> list[Path]:
    """The weight files of a checkpoint that holds the tensors of ``expected`` in their shapes, and no others but those of ``ignored``.

    ``rename(key)``: what the checkpoint calls a tensor (default: the same).
    """
    shards, shapes = _shards(folder), {}
    dtypes: dict[str, str] = {}
    expected = {rename(key): shape for key, shape in expected.items()}
    ignored = [rename(key) for key in ignored]
    with naming_damage(folder):
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                shapes |= {key: tuple(part.get_shape()) for key, part in slices.items()}
                dtypes |= {key: part.get_dtype() for key, part in slices.items()}
    _check_names(folder, expected, {k: shape for k, shape in shapes.items() if k not in ignored})
    for key, dtype in dtypes.items():
        if key in expected and dtype not in _WEIGHT_DTYPES:
            raise UserError(f"{folder}: {key} is of dtype {dtype}. Allowed: {', '.join(_WEIGHT_DTYPES)}")
    return shards


def read_tensors(
    shards: Iterable[Path],
    keys: Collection[str],
    part: Callable[[str, object], torch.Tensor] | None = None,
    rename: Callable[[str], str] = str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """``(key, tensor)`` for ``keys``, one after the other, on the host. ``part(key, weight)``: what to read of a tensor, where ``weight`` is an unread
    safetensors slice (None: all). ``rename(key)``: what the checkpoint calls a tensor (default: the same).

    A weight file is mapped into memory, where what was read of it stays until it is closed. So it is opened anew for every ``PIECE`` bytes.
    """
    key_of = {rename(key): key for key in keys}
    for shard in shards:
        with naming_damage(shard.parent):
            with safe_open(shard, framework="pt") as file:
                left = [name for name in reversed(list(file.keys())) if name in key_of]
            while left:
                size = 0
                with safe_open(shard, framework="pt") as file:
                    while left and size < PIECE:
                        name = left.pop()
                        key = key_of[name]
                        tensor = part(key, file.get_slice(name)) if part else file.get_tensor(name)
                        size += tensor.nbytes
                        yield key, tensor


def read_state_dict(
    folder: Path,
    expected: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    part: Callable[[str, object], torch.Tensor],
    ignored: Collection[str] = (),
    rename: Callable[[str], str] = str,
) -> dict[str, torch.Tensor]:
    """The ``part`` of every tensor of a checkpoint (see `read_tensors`) on ``device``, checked as a whole before any is read.

    Parts are cut on the host: the device never sees the rest.
    """
    state = {}
    for key, tensor in read_tensors(checked_shards(folder, expected, ignored, rename), expected, part, rename):
        tensor = tensor.to(device)
        state[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """A damaged weight file is the user's business, told with its folder."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{folder}: a weight file is damaged ({error})") from error


def _check_names(folder: Path, expected: Mapping[str, torch.Size], found: Mapping[str, tuple[int, ...]]) -> None:
    def some(names: Iterable[str]) -> str:
        names = sorted(names)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    if missing := set(expected) - set(found):
        raise UserError(f"{folder}: the checkpoint lacks {some(missing)}")
    if extra := {k for k in set(found) - set(expected) if not k.endswith("inv_freq")}:
        raise UserError(f"{folder}: the checkpoint has tensors this model does not know: {some(extra)}")
    for key, shape in expected.items():
        if tuple(shape) != found[key]:
            raise UserError(f"{folder}: {key} is {list(found[key])}, the config asks for {list(shape)}")


def check_layers(folder: Path, config: DecoderConfig) -> None:
    """Raise `UserError` where the config asks for more layers than the weight files have tensors: such a network is not even begun."""
    found = 0
    with naming_damage(folder):
        for shard in _shards(folder):
            with safe_open(shard, framework="pt") as file:
                found += len(file.keys())
    if config.num_hidden_layers > found:
        name = config.name_of("num_hidden_layers")
        raise UserError(
            f"{folder}: config.json has {name} {config.num_hidden_layers}, the weight files hold {found} tensors. Allowed: as many layers as they hold"
        )


class _NoDraws(TorchFunctionMode):
    """Leaves out the initial values of weights: on ``meta`` there are none, and torch imports its compiler, for seconds, to draw them there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def on_meta(kind: type[CheckpointModel], config: DecoderConfig, where: str) -> CheckpointModel:
    """The network without its weights; `UserError` for sizes beyond what torch can count."""
    try:
        with torch.device("meta"), _NoDraws():
            return kind(config)
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{where}: no network can be made of this config ({_reason(error)})") from error


def network_bytes(model: nn.Module) -> int:
    """Of its parameters and buffers."""
    return bytes_of([*model.parameters(), *model.buffers()])


class CheckpointModel(nn.Module):
    """A module that loads itself from a checkpoint folder or hub id. Subclasses set ``config_class``, the special ids of the family's released
    checkpoints, ``checkpoint_keys`` where these name things otherwise, and ``divides`` where `shared.scripts.tensor_parallel` cannot cut them.

    ``checkpoint_keys``: module -> the checkpoint's name of it, ``*`` for each number in both, as in
    ``{"model.layers.*.mlp.gate_proj": "model.transformer.blocks.*.ff_proj"}``. A module that is not listed keeps its name.
    """

    config_class: type[DecoderConfig]
    checkpoint_keys: Mapping[str, str] = {}
    family_mask: int | None = None
    family_stop: tuple[int, ...] = ()
    divides: bool = True
    config: Any
    folder: Path | None = None  # where it was loaded from
    engine: Any = None  # the engine its last decode left here, with its graphs; whoever owns the model owns it
    fast_class: str = "shared.gpu.fast:FastForward"  # "module:Class" that runs it on a GPU
    last_fast: object | None = None  # kept by `shared.gpu.fast.fast_forward_of`

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def special_ids(self, mask_id: int | None = None, stop_ids=None, tokenizer=None) -> tuple[int, tuple[int, ...]]:
        """``(mask id, stop ids)``: those given, else the checkpoint's, else the released family's; checked against the vocabulary."""
        return special_ids(
            vocab_size=self.config.vocab_size,
            mask_id=mask_id,
            stop_ids=stop_ids,
            config=self.config,
            folder=self.folder,
            tokenizer=tokenizer,
            family_mask=self.family_mask,
            family_stop=self.family_stop,
        )

    def new_cache(self, rows: int, slots: int) -> BlockCache:
        """An empty cache for ``rows`` sequences of at most ``slots`` tokens, on the model's device and in its dtype."""
        c = self.config
        return BlockCache(
            c.num_hidden_layers, rows, c.num_key_value_heads, slots, c.head_dim, dtype=self.dtype, device=self.device
        )

    @classmethod
    def checkpoint_key(cls, key: str) -> str:
        """What the checkpoint calls the tensor that is ``key`` in a state dict."""
        module, _, tensor = key.rpartition(".")
        pattern = _NUMBER.sub("*", module)
        if pattern not in cls.checkpoint_keys:
            return key
        numbers = iter(_NUMBER.findall(module))
        return re.sub(r"\*", lambda star: next(numbers), cls.checkpoint_keys[pattern]) + "." + tensor

    @classmethod
    def read_config(cls, path_or_id: str | Path) -> tuple[Path, DecoderConfig]:
        """``(checkpoint folder, its config)``; refused if the folder holds another kind of model, or one that cannot be built."""
        folder, wanted = checkpoint_folder(path_or_id), cls.config_class.model_type
        found = read_json(folder / "config.json").get("model_type", wanted)
        if found != wanted:
            raise UserError(f"{folder}: config.json is of model_type {found!r}. Allowed: {wanted!r}")
        try:
            config = cls.config_class.from_pretrained(folder)
        except (AttributeError, TypeError, ValueError) as error:  # transformers looks up what it finds
            raise UserError(f"{folder}: config.json cannot be used ({_reason(error)})") from error
        if problem := config.problem():
            raise UserError(f"{folder}: {problem}")
        check_layers(folder, config)
        return folder, config

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
    ):
        """Weights of ``path_or_id`` on ``device`` in eval mode.

        ``dtype="auto"`` keeps the checkpoint's (float32 on a CPU); ``device="auto"`` is the GPU when there is one.
        """
        device = resolve_device(device)
        model, shards, tied = cls._planned(path_or_id, dtype, device)
        # As `to_empty`, which looks for symbolic sizes and imports sympy for it.
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
        # The tensors of a state dict are views of the parameters, so each is copied to where it belongs, a slice of a stack among others.
        targets = model.state_dict()
        for key, tensor in read_tensors(shards, targets, rename=cls.checkpoint_key):
            targets[key].copy_(tensor)
        if tied:
            model.get_submodule("lm_head").weight = model.get_parameter(_EMBEDDING)
        return model.eval().requires_grad_(False)

    @classmethod
    def check_pretrained(
        cls, path_or_id: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
    ) -> CheckpointModel:
        """Raise the `UserError` that `from_pretrained` would, without reading a weight; the network on meta."""
        return cls._planned(path_or_id, dtype, resolve_device(device))[0]

    @classmethod
    def _planned(cls, path_or_id: str | Path, dtype: torch.dtype | str, device: torch.device) -> tuple:
        """``(network on meta, weight files, is its head the embedding?)``, checked."""
        folder, config = cls.read_config(path_or_id)
        dtype = resolve_dtype(dtype, getattr(config, "torch_dtype", None), device)
        model = on_meta(cls, config, str(folder)).to(dtype)
        tied = config.tie_word_embeddings and _HEAD in model.state_dict()
        if tied:
            model.get_submodule("lm_head").weight = None  # not allocated: it is the embedding
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        shards = checked_shards(folder, shapes, [_HEAD] if tied else [], cls.checkpoint_key)
        allowed = "a smaller checkpoint, or another device or dtype"
        check_room(f"{folder}: the network", network_bytes(model), device, allowed)
        model.folder = folder
        return model, shards, tied

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the layout `from_pretrained` reads. ``dtype`` is that of the weights; buffers keep theirs."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.torch_dtype = dtype or self.dtype
        config.save_pretrained(folder)
        tied, buffers = config.tie_word_embeddings, dict(self.named_buffers())
        state = {}
        for key, tensor in self.state_dict().items():
            kept = tensor.dtype if dtype is None or key in buffers else dtype
            if not (tied and key == _HEAD):
                state[self.checkpoint_key(key)] = tensor.detach().to(kept).contiguous().cpu()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def resolve_device(device: torch.device | str) -> torch.device:
    """``auto`` is the GPU when there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not one torch knows. Allowed: auto, cpu, cuda, cuda:N") from error
    if resolved.type not in ("cpu", "cuda"):
        raise UserError(f"device {device!r} is not served. Allowed: auto, cpu, cuda, cuda:N")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this torch sees no GPU. Allowed here: auto, cpu")
    return resolved


def resolve_dtype(
    dtype: torch.dtype | str, checkpoint: torch.dtype | str | None, device: torch.device | str
) -> torch.dtype:
    """``auto``: the checkpoint's own dtype on a GPU, float32 on a CPU (faster there, and exact for bfloat16 weights)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if (named := named_dtype(dtype)) is None:
            raise UserError(f"dtype {dtype!r} is unknown. Allowed: auto, {', '.join(DTYPES)}")
        return named
    if torch.device(device).type == "cpu":
        return torch.float32
    return named_dtype(checkpoint) or torch.bfloat16


def load_tokenizer(path_or_id: str | Path):
    """The checkpoint's own tokenizer with its chat template (never remote code)."""
    folder = checkpoint_folder(path_or_id)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{folder}: no usable tokenizer, none of its files is there ({', '.join(_TOKENIZER_FILES)})")
    config = folder / "tokenizer_config.json"
    saved = read_json(config) if config.is_file() else {}
    renamed = {}
    if isinstance(saved.get("extra_special_tokens"), list):  # transformers 5, whose names for these two are new
        renamed = {"additional_special_tokens": saved["extra_special_tokens"], "extra_special_tokens": {}}
    plain = saved.get("tokenizer_class") in _PLAIN_TOKENIZERS and (folder / "tokenizer.json").is_file()
    try:
        tokenizer = _tokenizer_class(plain).from_pretrained(folder, trust_remote_code=False, **renamed)
        tokenizer.decode(tokenizer("a word")["input_ids"], skip_special_tokens=True)
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare exceptions for a damaged file
        raise UserError(f"{folder}: no usable tokenizer ({_reason(error)})") from error


def _tokenizer_class(plain: bool):
    """transformers' `AutoTokenizer`, which knows the configs of this repository; it takes seconds to import, a ``plain`` tokenizer needs none of it."""
    if plain:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoConfig, AutoTokenizer

    for config_class in DecoderConfig.__subclasses__():
        if config_class.model_type:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    return AutoTokenizer


def special_ids(
    *,
    vocab_size: int,
    mask_id: int | None,
    stop_ids: Iterable[int] | None,
    config,
    folder: Path | None = None,
    tokenizer=None,
    family_mask: int | None = None,
    family_stop: Iterable[int] = (),
) -> tuple[int, tuple[int, ...]]:
    """``(mask id, stop ids)``, each from the first that names it: flag, config, tokenizer, family table.

    The generation config's eos ids count as the config's. Every id is checked against the vocabulary; the family's, which are those of its
    released checkpoints, do not count where they lie outside it. The mask id ends no text: given as a stop id it is refused, elsewhere left out.
    """
    if family_mask is not None and family_mask >= vocab_size:
        family_mask = None
    mask = _mask_id(mask_id, config, tokenizer, family_mask)
    if stop_ids is None:
        stop_ids = _stop_ids(mask, config, folder, tokenizer, [i for i in family_stop if i < vocab_size])
    stops = tuple(stop_ids)
    for value in stops:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UserError(f"stop ids hold {value!r} (generation config, config or tokenizer). Allowed: whole numbers")
    stops = tuple(map(int, stops))
    for field, value in [("mask_id", mask), *(("stopping_criteria_idx", i) for i in stops)]:
        if not 0 <= value < vocab_size:
            raise UserError(f"{field} {value} is outside the vocabulary. Allowed: 0 to {vocab_size - 1}")
    if mask in stops:
        raise UserError(f"mask_id {mask} is also a stop id")
    return mask, stops


def _mask_id(given: int | None, config, tokenizer, family: int | None) -> int:
    """The first of them that is not None."""
    candidates = (given, getattr(config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None), family)
    found = next((c for c in candidates if c is not None), None)
    if found is None:
        raise UserError("mask_id: neither the flag, the config nor the tokenizer names a mask token; give --mask_id")
    return int(found)


def _stop_ids(mask: int, config, folder: Path | None, tokenizer, family: list[int]) -> list[int]:
    """The eos ids of the first that has any: generation config, config, tokenizer, family table.

    A checkpoint may list its mask token among them, which no text ends with; one that lists nothing else has none.
    """
    generation = folder / "generation_config.json" if folder else None
    listed = read_json(generation).get("eos_token_id") if generation and generation.is_file() else None
    for found in (listed, config.eos_token_id, getattr(tokenizer, "eos_token_id", None), family):
        ids = found if isinstance(found, list | tuple) else [] if found is None else [found]
        stops = [i for i in ids if i != mask]
        if stops or (found is not None and not ids):
            return stops
    return []
