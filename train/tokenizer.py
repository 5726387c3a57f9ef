"""The small tokenizer every tiny checkpoint shares: byte-level BPE, each digit a token, every string decodes back.

It is trained on the generated tasks and written as the files `AutoTokenizer` reads. The chat template is ChatML without
a default system turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from train.tasks import train_problems

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"
SPECIAL = [END_OF_TEXT, TURN_START, TURN_END, MASK]
VOCAB_SIZE = 1024
TRAINING_PROBLEMS = 40_000

# One digit, or a word with the space before it, or a run of line breaks and indentation, or a run of signs.
PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*\n\s*|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def training_text(seed: int) -> Iterable[str]:
    """Texts the merges are learnt from: training problems in equal shares, and the words of the chat template."""
    equal = dict.fromkeys(("word_problems", "functions", "instructions"), 1.0)
    yield from ["system\n", "user\n", "assistant\n"] * 1000
    for problem in islice(train_problems(equal, f"tokenizer/{seed}"), TRAINING_PROBLEMS):
        yield problem.prompt
        yield problem.solution


def build_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly ``vocab_size`` ids, the four special ones last; by default trained on `training_text`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(training_text(0) if texts is None else texts, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_prompt(prompt: str) -> str:
    """``prompt`` as a user turn followed by the opening of the assistant's: what the chat template renders."""
    return f"{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}assistant\n"


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write ``tokenizer.json``, ``special_tokens_map.json`` and ``tokenizer_config.json`` with the template inside."""
    tokenizer.save_pretrained(folder, legacy_format=False, save_jinja_files=False)
