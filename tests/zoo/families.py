"""Tiny random models with the chat templates and the tokenizer habits of the families that people use.

The templates are short ones in the shape of the families' own. The tokenizers are trained on the texts of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 320
"""Tokens of a vocabulary; byte-level ones have 256 bytes and more of them."""
CONTEXT = 512


def byte_level(
    texts: Sequence[str], special: list[str], line_ends: bool = False, **given: Any
) -> PreTrainedTokenizerFast:
    """GPT-2's habit: a space belongs to the word behind it. With `line_ends` those of Llama 3: they stand alone."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = [pre_tokenizers.Split(words, "isolated")] if line_ends else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not line_ends)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE + 256, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)  # type: ignore[no-untyped-call]


def sentencepiece(
    texts: Sequence[str], special: list[str], dummy_prefix: bool = True, **given: Any
) -> PreTrainedTokenizerFast:
    """Llama 2's habit: every text begins with a space that decoding takes away. Gemma's has no such `dummy_prefix`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if dummy_prefix else spaces
    back: list[Any] = [decoders.Replace("▁", " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if dummy_prefix else back)
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=["<unk>", *special], show_progress=False)
    # merges stay inside of words, as in vocabularies that are trained on more than a few texts
    tokenizer.train_from_iterator((word for text in texts for word in text.replace(" ", " ▁").split(" ")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **given)  # type: ignore[no-untyped-call]


def unigram(texts: Sequence[str], special: list[str], **given: Any) -> PreTrainedTokenizerFast:
    """A unigram vocabulary with Metaspace: the first word of a text alone begins with a space of its own."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **given)  # type: ignore[no-untyped-call]


LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system }}"
    "<|eot_id|>{% for m in turns %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set answer = m.content.split('</think>')[-1] %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ answer.lstrip('\n') }}<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|User|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% for m in turns %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | upper + ': ' + m.content | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""Trims, ends no turn, and its generation prompt ends with a space."""
SMOLLM_3 = (
    "<|im_start|>system\n{{ 'Today: ' + strftime_now('%d %B %Y') }}<|im_end|>\n"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Writes the day of its clock, and a thinking block in the prompt alone."""

BASE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": CONTEXT, "initializer_range": 0.05,
}  # fmt: skip
HEADS = BASE | {"head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


@dataclass(frozen=True)
class Family:
    """A member of the zoo: what its tokenizer is made by, which tokens it has, how it writes a chat."""

    model: str
    """The name of a class of transformers."""
    sizes: dict[str, Any]
    tokenizer: Callable[..., PreTrainedTokenizerFast]
    special: tuple[str, ...]
    template: str | None
    named: dict[str, str]
    """bos, eos and pad token: one that is not there is not named."""
    end: str
    """The token that a training row must end with."""

    def build(self, texts: Sequence[str]) -> tuple[Any, PreTrainedTokenizerFast]:
        """The model with random weights, and its tokenizer."""
        tokenizer = self.tokenizer(texts, list(self.special), chat_template=self.template, **self.named)
        kind = getattr(transformers, self.model)
        sizes = self.sizes | {"vocab_size": len(tokenizer), "pad_token_id": None}
        torch.manual_seed(0)
        return kind(kind.config_class(**sizes)).eval(), tokenizer


no_prefix, llama_lines = partial(sentencepiece, dummy_prefix=False), partial(byte_level, line_ends=True)
ST, END_OF_TEXT = {"bos_token": "<s>", "eos_token": "</s>"}, "<|endoftext|>"
IM = ("<|im_start|>", "<|im_end|>", END_OF_TEXT)
TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>")
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
HEADER = ("<|begin_of_text|>", END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "initializer_range": 0.05}
NEOX = {key: BASE[key] for key in BASE if key != "num_key_value_heads"}
OPT = {
    "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 128,
    "max_position_embeddings": CONTEXT, "init_std": 0.05,
}  # fmt: skip
ONE = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}

ZOO = {
    "llama-2": Family("LlamaForCausalLM", BASE, sentencepiece, ("<s>", "</s>"), LLAMA_2, ST, "</s>"),
    # a base model's eos beside the template's own end of a turn
    "llama-3": Family("LlamaForCausalLM", BASE, llama_lines, HEADER, LLAMA_3,
                      {"bos_token": HEADER[0], "eos_token": END_OF_TEXT}, "<|eot_id|>"),
    "qwen-2.5": Family("Qwen2ForCausalLM", BASE, llama_lines, IM, CHATML,
                       {"eos_token": "<|im_end|>", "pad_token": END_OF_TEXT}, "<|im_end|>"),
    "qwen-3": Family("Qwen3ForCausalLM", HEADS, llama_lines, IM, QWEN_3, {"eos_token": "<|im_end|>"}, "<|im_end|>"),
    "r1-distill": Family("Qwen2ForCausalLM", BASE, llama_lines, ("<bos>", "<eos>", "<|User|>", "<|Assistant|>"), R1,
                         {"bos_token": "<bos>", "eos_token": "<eos>"}, "<eos>"),
    "gemma-2": Family("Gemma2ForCausalLM", HEADS, no_prefix, TURNS,
                      GEMMA_2, GEMMA, "<end_of_turn>"),
    "gemma-3": Family("Gemma3ForCausalLM", HEADS | {"sliding_window": 64}, unigram, TURNS, GEMMA_3, GEMMA,
                      "<end_of_turn>"),
    "mistral": Family("MistralForCausalLM", BASE, sentencepiece, ("<s>", "</s>"), MISTRAL, ST, "</s>"),
    "phi-3": Family("Phi3ForCausalLM", BASE, sentencepiece, ("<|user|>", "<|assistant|>", "<|end|>", END_OF_TEXT),
                    PHI_3, {"eos_token": END_OF_TEXT}, "<|end|>"),
    "smollm-3": Family("LlamaForCausalLM", BASE | {"tie_word_embeddings": True}, llama_lines, IM, SMOLLM_3,
                       {"eos_token": "<|im_end|>"}, "<|im_end|>"),
    "vicuna": Family("LlamaForCausalLM", BASE, sentencepiece, ("<s>", "</s>"), VICUNA, ST, "</s>"),
    "vicuna-bytes": Family("LlamaForCausalLM", BASE, byte_level, ("<s>", "</s>"), VICUNA, ST, "</s>"),
    "gpt-2": Family("GPT2LMHeadModel", GPT, byte_level, (END_OF_TEXT,), None, ONE, END_OF_TEXT),
    "pythia": Family("GPTNeoXForCausalLM", NEOX, byte_level, (END_OF_TEXT, "<|padding|>"), None, ONE, END_OF_TEXT),
    "opt": Family("OPTForCausalLM", OPT, byte_level, ("<pad>", "</s>"), None,
                  {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, "</s>"),
    "mixtral": Family("MixtralForCausalLM", BASE | EXPERTS, sentencepiece, ("<s>", "</s>"), MISTRAL, ST, "</s>"),
    # no eos and no bos: the end of a turn is all that there is
    "no-eos": Family("Qwen2ForCausalLM", BASE, byte_level, IM, CHATML, {}, "<|im_end|>"),
}  # fmt: skip
