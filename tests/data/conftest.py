"""Tokenizers made on the spot: byte-level BPE, with the specials and template a test needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.absent import absent_packages_skip  # noqa: F401

SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eom|>"]
SENTENCES = [
    "The sky is blue and the sea is blue as well.",
    "What colour is the sky? The sky is green at night.",
    "Question: which one is better? Answer: the first one is better than the second.",
    "user assistant system tool hello there, how are you today? I like it. I liked that.",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml_bare": (
        "{% for m in messages %}{{ '' if loop.first else '\n' }}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}<|im_start|>assistant\n{% endif %}"
    ),
    "bos": "{{ bos_token }}" + CHATML,
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{% if loop.index0 % 2 %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    # Phi-3's: an EOS after the end of turn, but only where no answer is awaited.
    "phi": (CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")),
    "generation": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "generation_text": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # DeepSeek-R1's: opens an answer with <think> and drops the reasoning of a finished one.
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # Earlier answers are rewritten once a conversation goes on.
    "rewriting": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}(earlier) {% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Qwen3's: the last answer alone begins with an empty thought.
    "last_thought": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The number of turns stands at the top, so a prompt changes when an answer follows.
    "counting": "{{ messages | length }} turns\n" + CHATML,
    "plain": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    template: str | None = None, *, adds: str = "$A", pad: str = "<pad>", bos: str | None = "<s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer with one of TEMPLATES; `adds` is what its post-processor writes round a text."""
    backend = Tokenizer.from_str(_trained())
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="</s>",
        pad_token=pad,
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eom|>"],
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@pytest.fixture
def tokenizers() -> Callable[..., PreTrainedTokenizerFast]:
    """`tokenizers(template, adds=..., pad=...)` -> a new tokenizer."""
    return make_tokenizer
