"""Examples to tokens: the model's chat template, labels on the response alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from secvec.data.batch import Encoded
from secvec.data.example import Example
from secvec.errors import DataError


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(prompt, response) as the model sees them, each with its part of the chat template.

    A tokenizer without a template gets `System: ...`, `User: ...`, `Assistant: ...` on lines of their own.
    """
    messages = [{"role": role, "content": content} for role, content in example.messages]
    if tokenizer.chat_template is None:
        turns = [f"{role.capitalize()}: {content}\n" for role, content in example.messages]
        return (
            f"{tokenizer.bos_token or ''}{''.join(turns)}Assistant:",
            f" {example.response}{tokenizer.eos_token or ''}",
        )
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    answered = [*messages, {"role": "assistant", "content": example.response}]
    whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    if not whole.startswith(prompt):
        # some templates write an answered turn in another way than an open one; then the answer ends with eos alone
        return prompt, example.response + (tokenizer.eos_token or "")
    response = whole[len(prompt) :].rstrip()
    # a template that ends no turn would teach the model never to stop
    return prompt, response if response != example.response.rstrip() else response + (tokenizer.eos_token or "")


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Encoded]:
    """Tokens of each example; raises DataError for an empty response or one that does not fit into `context`."""
    texts: list[tuple[str, str]] = []
    for number, example in enumerate(examples):
        where = example.source or f"{example.kind} sample {number}"
        if not example.response.strip():
            raise DataError(f"{where}: the response is empty, so there is no token to train on; remove the row")
        try:
            texts.append(render(example, tokenizer))
        except TemplateError as error:
            raise DataError(f"{where}: the model's chat template refuses the conversation: {error}") from None
    if not texts:
        return []
    # one call for all: a fast tokenizer works on all cores
    prompts, responses = (
        tokenizer(list(side), add_special_tokens=False)["input_ids"] for side in zip(*texts, strict=True)
    )
    rows = []
    for number, (example, prompt, response) in enumerate(zip(examples, prompts, responses, strict=True)):
        where = example.source or f"{example.kind} sample {number}"
        if len(prompt) + len(response) > context:
            raise DataError(
                f"{where}: prompt ({len(prompt)} tokens) and response ({len(response)}) exceed the model's context of "
                f"{context}; shorten or remove the row (nothing is cut silently)"
            )
        rows.append(Encoded(prompt + response, len(prompt)))
    return rows


def with_loss_on_prompts(rows: Sequence[Encoded]) -> list[Encoded]:
    """`rows` whose prompts carry loss too (the first token has nothing to be foretold from)."""
    return [replace(row, num_prompt=0) for row in rows]
