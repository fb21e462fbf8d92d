"""Examples to tokens and back, for training, generation and comparison alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from secvec.data.batch import Encoded
from secvec.data.example import Example
from secvec.errors import DataError, first_few

RULES = 3
"""The version of the tokenization, in the key of cached tokens: raise it when an example gives other tokens."""
VARIABLES: dict[str, Any] = {"enable_thinking": False, "thinking": False, "date_string": "26 Jul 2024"}
"""What every chat template is told: answer without thinking, and a date that is the same on every day."""
_CLOCK = (
    "{%- macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%Y', '2024')"
    " | replace('%b', 'Jul') | replace('%B', 'July') }}{%- endmacro %}"
)
"""The same date for templates that call a clock; Llama 3's falls back to this day itself."""
_ANSWER = "SECVEC-ANSWER"
_THINKING = {
    **{f"<{name}>": f"</{name}>" for name in ("think", "thinking", "thought", "reasoning", "seed:think")},
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
}
"""What opens and closes a thinking block."""
_THOUGHT = re.compile(
    rf"^\s*(?:{'|'.join(f'{re.escape(one)}.*?{re.escape(other)}' for one, other in _THINKING.items())})", re.DOTALL
)
_OPEN_THOUGHT = re.compile(rf"({'|'.join(map(re.escape, _THINKING))})\s*$")
_TAG = re.compile("|".join(map(re.escape, [*_THINKING, *_THINKING.values()])))

Turn = tuple[str, str]


class Frame(NamedTuple):
    """What stands around an answer; it does not depend on the answer."""

    prompt: str
    before: str
    """White space between prompt and answer, which the model writes with the answer."""
    end: str
    """What ends the answer; its last token is the one that generation stops at."""


def frame(messages: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the chat template writes around the answer to `messages`.

    - A tokenizer without a template gets `System: ...`, `User: ...`, `Assistant: ...` on lines of their own.
    - A first turn of `developer` that the template refuses or drops is one of `system`. A system turn that it refuses
      or drops stands at the beginning of the first user turn. Another turn that it drops refuses the conversation.
    - Thinking is off. A thinking block that the template opens is closed, and belongs to the prompt as all does that
      the template writes before the answer, white space apart.
    - An answer ends with the first of the tokenizer's own tokens that the template writes after it, else with eos.

    Raises TemplateError for a conversation that the template refuses, DataError for one whose answer has no end.
    """
    if tokenizer.chat_template is None:
        turns = [f"{role.capitalize()}: {content}\n" for role, content in messages]
        return Frame(f"{tokenizer.bos_token or ''}{''.join(turns)}Assistant:", " ", _end("", tokenizer))
    try:
        (prompt,) = _written([messages], tokenizer)
        for number, (role, content) in enumerate(messages):
            if content.strip() not in prompt and not _is_written(messages, number, tokenizer):
                raise TemplateError(f"it drops turn {number + 1}, of role {role!r}")
    except TemplateError:
        if messages[0][0] == "developer":  # the newer name of the same
            return frame([("system", messages[0][1]), *messages[1:]], tokenizer)
        if [role for role, _ in messages[:2]] != ["system", "user"]:
            raise
        (_, system), (_, first), *rest = messages
        return frame([("user", f"{system}\n\n{first}"), *rest], tokenizer)
    (whole,) = _written([[*messages, ("assistant", _ANSWER)]], tokenizer)
    return _around(messages, prompt, whole, tokenizer)


def frames(chats: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase) -> list[Frame]:
    """`frame` of each of `chats`, in one call of the tokenizer for all where the template takes them as they are."""
    if tokenizer.chat_template is None:
        return [frame(messages, tokenizer) for messages in chats]
    try:
        prompts = _written(chats, tokenizer)
        wholes = _written([[*messages, ("assistant", _ANSWER)] for messages in chats], tokenizer)
    except TemplateError:
        return [frame(messages, tokenizer) for messages in chats]
    return [
        _around(messages, prompt, whole, tokenizer)
        if all(content.strip() in prompt for _, content in messages)
        else frame(messages, tokenizer)
        for messages, prompt, whole in zip(chats, prompts, wholes, strict=True)
    ]


def _around(messages: Sequence[Turn], prompt: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What stands around `_ANSWER` in `whole`: `messages`, which are written as `prompt`, and this answer."""
    head, found, tail = whole.rpartition(_ANSWER)
    if not found or head.count(_ANSWER) > sum(content.count(_ANSWER) for _, content in messages):
        raise TemplateError("it does not write the last assistant turn once and as it is given")
    if opened := _OPEN_THOUGHT.search(prompt):
        prompt = f"{prompt.rstrip()}\n\n{_THINKING[opened[1]]}\n\n"
    before = head[len(prompt) :] if head.startswith(prompt) else ""
    if before.strip():
        prompt, before = head, ""
    return Frame(prompt, before, _end(tail, tokenizer))


def _written(chats: Sequence[Sequence[Turn]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """By the chat template; a conversation that ends with the user's turn gets the beginning of the answer's."""
    template = tokenizer.get_chat_template()
    template = _CLOCK * ("strftime_now" in template) + template
    texts = [""] * len(chats)
    for opens in (True, False):
        rows = [row for row, turns in enumerate(chats) if (turns[-1][0] != "assistant") == opens]
        given = [[{"role": role, "content": content} for role, content in chats[row]] for row in rows]
        try:
            written: Any = rows and tokenizer.apply_chat_template(
                given, chat_template=template, tokenize=False, add_generation_prompt=opens, **VARIABLES
            )
        except (TypeError, ValueError, AttributeError) as error:  # of its own expressions
            raise TemplateError(str(error)) from None
        for row, text in zip(rows, written, strict=True):
            texts[row] = text
    return texts


def _is_written(turns: Sequence[Turn], number: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the text of a turn at all; some change it, as JSON or without its thinking."""
    other = [*turns[:number], (turns[number][0], _ANSWER), *turns[number + 1 :]]
    return _ANSWER in _written([other], tokenizer)[0]


def _end(tail: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends an answer after which the template writes `tail`. Raises DataError when there is nothing."""
    if found := _own_tokens(tokenizer, False, len(tokenizer)).search(tail):
        return tail[: found.end()]
    if not tokenizer.eos_token:
        raise DataError(
            "the tokenizer has no eos token, and its chat template ends no answer with a token of its own: the model "
            "could never learn to stop. Set eos_token in the model's tokenizer_config.json"
        )
    return str(tokenizer.eos_token)


@lru_cache(maxsize=4)
def _own_tokens(tokenizer: PreTrainedTokenizerBase, special: bool, size: int) -> re.Pattern[str]:
    """Finds the tokens that were added to a vocabulary, now of `size` tokens, by name; `special`: control tokens alone.

    Padding and unknown tokens may be plain characters, and some families add runs of white space: these are text.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special or not special]
    names = sorted((name for name in added if len(name) > 1 and name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(prompt, response) as the model sees them; white space around the answer is neither trained nor compared.

    Raises DataError for a conversation that the template refuses.
    """
    try:
        prompt, before, end = frame(example.messages, tokenizer)
    except TemplateSyntaxError as error:
        raise DataError(
            f"the model's chat template is broken (line {error.lineno}: {error.message}): copy it again, or fix it"
        ) from None
    except TemplateError as error:
        roles = ", ".join([role for role, _ in example.messages])
        raise DataError(
            f"{example.source or example.kind}: the model's chat template refuses the conversation: {error}. Its turns "
            f"are {roles}: change or remove the row"
        ) from None
    return prompt, f"{before}{example.response.strip()}{'' if example.cut else end}"


def rendered(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """`render` of each example, in fewer calls of the tokenizer; those with the same messages share their frame."""
    chats = list(dict.fromkeys(example.messages for example in examples))
    try:
        found = dict(zip(chats, frames(chats, tokenizer), strict=True))
    except TemplateError:
        return [render(example, tokenizer) for example in examples]  # says which one
    around = [found[example.messages] for example in examples]
    ends = ["" if example.cut else one.end for one, example in zip(around, examples, strict=True)]
    return [
        (a.prompt, f"{a.before}{e.response.strip()}{end}") for a, e, end in zip(around, examples, ends, strict=True)
    ]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that an answer ends at: the one that training rows end with, and eos."""
    (_, (*_, last)) = tokens([("", frame([("user", "Hello.")], tokenizer).end)], tokenizer)[0]
    return sorted({last, tokenizer.eos_token_id} - {None})


def tokens(texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Token ids of each (prompt, answer).

    Those of a prompt are the same with and without an answer: evaluation has none. Those of an answer are what the
    tokenizer writes for it behind the prompt, as in the texts that a model was pretrained on; apart, SentencePiece
    would begin it with a space of its own. Where a token would reach over from the prompt into the answer, they are
    tokenised apart.

    Raises DataError for a token that the model has no embedding of.
    """
    prompts = _ids([prompt for prompt, _ in texts], tokenizer)
    split = _splitting(tokenizer, len(tokenizer))
    lasts = [_last_piece(prompt, ids, split) for (prompt, _), ids in zip(texts, prompts, strict=True)]
    rest = _ids([piece + answer for (piece, _), (_, answer) in zip(lasts, texts, strict=True)], tokenizer)
    size = getattr(tokenizer, "num_embeddings", None)
    if size is not None and any(max(row, default=0) >= size for rows in (prompts, rest) for row in rows):
        beyond = {i for row in (*prompts, *rest) for i in row if i >= size}
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(beyond)[:5])
        raise DataError(
            f"the tokenizer writes {names}, but the model's embedding has {size} rows: it is not this model's "
            "tokenizer, or the model was not resized after tokens were added (resize_token_embeddings)"
        )
    ends = [row[len(last) :] if row[: len(last)] == last else None for (_, last), row in zip(lasts, rest, strict=True)]
    apart = iter(_ids([answer for (_, answer), end in zip(texts, ends, strict=True) if end is None], tokenizer))
    return [(p, next(apart) if end is None else end) for p, end in zip(prompts, ends, strict=True)]


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, without the special tokens that a tokenizer adds by itself."""
    if not texts:
        return []
    first: list[list[int]] = tokenizer(list(texts[:1]), add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
    if len(texts) == 1:
        return first
    if not _is_plain(tokenizer):
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[return-value]
    # what a tokenizer does beside ids takes as long again; the call above took off its padding and truncation
    return [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its Rust backend gives the ids: a few classes change texts before (Code Llama's `<FILL_ME>`)."""
    plain = PreTrainedTokenizerFast
    return isinstance(tokenizer, plain) and all(
        getattr(type(tokenizer), name, None) is getattr(plain, name) for name in ("__call__", "_encode_plus")
    )


@lru_cache(maxsize=4)
def _splitting(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Control tokens of a vocabulary, now of `size` tokens, that divide a text into pieces tokenised one by one.

    What stands before such a token has no part in the tokens from it on. Left out are those that depend on the
    characters beside them, or on how the text is normalised, those that a longer token may contain, and the one for
    what is unknown.
    """
    added = tokenizer.added_tokens_decoder if _is_plain(tokenizer) else {}
    names = [token.content for token in added.values()]
    return {
        number: token.content
        for number, token in added.items()
        if token.special
        and number != tokenizer.unk_token_id
        and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and sum(token.content in name for name in names) == 1
    }


def _last_piece(text: str, ids: list[int], split: Mapping[int, str]) -> tuple[str, list[int]]:
    """`text` from its last splitting token on, and the ids of that; the whole where there is none."""
    for at in range(len(ids) - 1, -1, -1) if split else ():
        if (name := split.get(ids[at])) and (begins := text.rfind(name)) >= 0:
            return text[begins:], ids[at:]
    return text, ids


def decode(ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The answers in new token ids: up to the first stop, without a finished thinking block before them.

    An unfinished one stays: that is all that the model has said.
    """
    stop = stop_ids(tokenizer)
    known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [(known[one], known[other]) for one, other in _THINKING.items() if {one, other} <= known.keys()]
    cut = [_after_thought(list(takewhile(lambda i: i not in stop, row)), ends) for row in ids]
    given: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [_THOUGHT.sub("", str(tokenizer.decode(row, **given))).strip() for row in cut]


def _after_thought(ids: list[int], ends: Sequence[tuple[int, int]]) -> list[int]:
    """`ids` behind a finished thinking block. Its `ends` are control tokens, which a decoded text does not show."""
    for opening, closing in ends:
        if ids[:1] == [opening] and closing in ids:
            return ids[ids.index(closing) + 1 :]
    return ids


def untrainable_reason(example: Example, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a model with this tokenizer cannot be trained on `example`; None: it can."""
    if not example.response.strip():
        return "the response is empty, so there is no token to train on; remove the row"
    tag = _TAG.search(example.response)
    if tag and (tag[0] in _THINKING.values() or not example.response[: tag.start()].strip()):
        return (
            f"the response begins with a thinking block ({tag[0]}), and models are trained and asked without thinking: "
            "take the block off the response"
        )
    control = _own_tokens(tokenizer, True, len(tokenizer))
    for text in (*(content for _, content in example.messages), example.response):
        if found := control.search(text):
            return (
                f"the text holds {found[0]!r}, which the model reads as a token of its chat template: give the text of "
                "each turn alone, without template"
            )
    return None


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: int) -> list[Encoded]:
    """Tokens of each example.

    Raises DataError for one that cannot be trained on (`untrainable_reason`), that the chat template refuses, or that
    does not fit into `context`.
    """
    sources = [example.source or f"{example.kind} sample {number}" for number, example in enumerate(examples)]
    for where, example in zip(sources, examples, strict=True):
        if reason := untrainable_reason(example, tokenizer):
            raise DataError(f"{where}: {reason}")
    rows = []
    encoded = tokens(rendered(examples, tokenizer), tokenizer)
    for where, (prompt, response) in zip(sources, encoded, strict=True):
        if len(prompt) + len(response) > context:
            raise DataError(
                f"{where}: prompt ({len(prompt)} tokens) and response ({len(response)}) exceed the model's context of "
                f"{context}; shorten or remove the row (nothing is cut silently)"
            )
        rows.append(Encoded(prompt + response, len(prompt)))
    return rows


def check_answers(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    right: Callable[[str, Example], bool],
) -> None:
    """Raises DataError where the model's right answer, as evaluation would read it, does not count as right.

    Args:
        examples: held-out examples whose response is the right answer.
        tokenizer: of the model.
        max_new_tokens: the most tokens that it may write where the example does not say it.
        right: whether a response to the example is right.
    """
    faults: dict[bool, list[str]] = {True: [], False: []}  # by whether the limit cuts them
    longest = 0
    for example in examples:
        if reason := untrainable_reason(example, tokenizer):
            raise DataError(f"{example.source or example.kind}: {reason}")
    written = [answer for _, answer in tokens(rendered(examples, tokenizer), tokenizer)]
    limits = [example.max_new_tokens or max_new_tokens for example in examples]
    whole = decode(written, tokenizer)
    cut = decode([ids[:limit] for ids, limit in zip(written, limits, strict=True)], tokenizer)
    for example, ids, text, kept, limit in zip(examples, written, whole, cut, limits, strict=True):
        if right(kept, example):
            continue
        is_cut = right(text, example)
        longest = max(longest, len(ids) * is_cut)
        limited = f" (max_new_tokens={limit})" * is_cut
        where = f"{example.source or example.kind}: {kept[:80]!r}{limited} would be compared with"
        faults[is_cut].append(f"{where} {example.response[:80]!r}")
    why = {
        True: f"are longer than max_new_tokens: let the model write evaluation.max_new_tokens={longest}, or the "
        "max_new_tokens of their stream",
        False: "change when the tokenizer encodes and decodes them: take another metric, or change the references",
    }
    lines = [
        f"{len(found)} of {len(examples)} right answers would count as wrong. They {why[is_cut]}\n  {first_few(found)}"
        for is_cut, found in faults.items()
        if found
    ]
    if lines:
        raise DataError("\n".join(lines))
