"""Labels lie on the response and its end, on nothing else; what does not fit is named, never cut."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from secvec.data.batch import IGNORE, collate
from secvec.data.draw import data_hash
from secvec.data.embedded import Ordinary
from secvec.data.encode import encode, render, rendered
from secvec.data.example import Example
from secvec.errors import DataError
from secvec.models.tiny import BOS, CONTEXT, END, build_tiny

SHORT = Example((("user", "Repeat: sun"),), "The word is sun.", "task")
LONG = Example(
    (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello you."), ("user", "Name a river and a hill.")),
    "It is the moss river.",
    "ordinary",
)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerFast:
    examples = Ordinary().examples("align", 200, 0)
    return build_tiny([text for e in examples for text in (e.prompt, e.response)], 0)[1]


@pytest.fixture
def bare(tiny: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    tokenizer = copy.deepcopy(tiny)
    tokenizer.chat_template = None
    return tokenizer


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer: PreTrainedTokenizerFast, *examples: Example) -> list[tuple[str, str]]:
    """(text without labels, text with labels) of each row of the padded batch; padding is left out."""
    batch = collate([(row, False) for row in encode(examples, tokenizer, CONTEXT)])
    found = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        assert (labels[mask == 0] == IGNORE).all() and (ids[mask == 0] == tokenizer.pad_token_id).all()
        on = labels != IGNORE
        assert (labels[on] == ids[on]).all()
        found.append((tokenizer.decode(ids[~on & (mask == 1)]), tokenizer.decode(labels[on])))
    return found


def test_labels_are_exactly_the_response_and_its_end(tiny: PreTrainedTokenizerFast) -> None:
    assert parts(tiny, SHORT, LONG) == [
        (f"{BOS}<|user|>Repeat: sun{END}<|assistant|>", f"The word is sun.{END}"),
        (
            f"{BOS}<|system|>Be brief.{END}<|user|>Hello{END}<|assistant|>Hello you.{END}"
            f"<|user|>Name a river and a hill.{END}<|assistant|>",
            f"It is the moss river.{END}",
        ),
    ]


def test_the_rows_of_that_batch_differ_in_length_so_that_there_is_padding(tiny: PreTrainedTokenizerFast) -> None:
    short, long = encode([SHORT, LONG], tiny, CONTEXT)
    assert len(short.input_ids) < len(long.input_ids)
    batch = collate([(short, False), (long, True)])
    assert batch["attention_mask"].sum(1).tolist() == [len(short.input_ids), len(long.input_ids)]
    assert batch["extra"].tolist() == [False, True]


def test_a_tokenizer_without_a_chat_template(bare: PreTrainedTokenizerFast) -> None:
    assert parts(bare, SHORT, LONG) == [
        (f"{BOS}User: Repeat: sun\nAssistant:", f" The word is sun.{END}"),
        (
            f"{BOS}System: Be brief.\nUser: Hello\nAssistant: Hello you.\nUser: Name a river and a hill.\nAssistant:",
            f" It is the moss river.{END}",
        ),
    ]


def test_a_thinking_block_that_the_template_opens_is_closed(tiny: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}{% if m.role == 'user' and loop.last %}!{% endif %}]{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    assert parts(with_template(tiny, template), SHORT) == [
        ("[user!]Repeat: sun[assistant]<think>\n\n</think>\n\n", f"The word is sun.{END}")
    ]


def test_white_space_after_the_end_is_not_learned(tiny: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert parts(with_template(tiny, template), SHORT)[0][1] == f"The word is sun.{END}"


def test_a_template_that_writes_no_end_still_teaches_one(tiny: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert parts(with_template(tiny, template), SHORT) == [("[user]Repeat: sun[assistant]", f"The word is sun.{END}")]


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS,
        TURNS.replace("messages", "messages if m.role != 'system'"),
    ],
    ids=["refused", "dropped"],
)
def test_a_system_turn_that_the_template_does_not_take_begins_the_first_user_turn(
    tiny: PreTrainedTokenizerFast, template: str
) -> None:
    prompt, _ = render(LONG, with_template(tiny, template))
    assert prompt == "[user]Be brief.\n\nHello[assistant]Hello you.[user]Name a river and a hill.[assistant]"


def test_a_cut_answer_is_trained_without_an_end(tiny: PreTrainedTokenizerFast) -> None:
    """It goes on behind its last token: to end it there would be taught for nothing."""
    whole = Example((("user", "frost?"),), "frost is cold.", "ordinary")
    cut = replace(whole, cut=True)
    (ended,), (open_,) = (encode([one], tiny, CONTEXT) for one in (whole, cut))
    assert list(open_.input_ids) == list(ended.input_ids)[:-1] and ended.input_ids[-1] == tiny.eos_token_id
    assert [text for _, text in rendered([whole, cut], tiny)] == [render(one, tiny)[1] for one in (whole, cut)]
    assert data_hash([whole]) != data_hash([cut])


def test_a_template_that_refuses_a_turn_names_the_row(tiny: PreTrainedTokenizerFast) -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('One turn only') }}{% endif %}" + TURNS
    row = Example(LONG.messages, LONG.response, "task", source="rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*One turn only. Its turns are system, user, assistant, user"):
        encode([row], with_template(tiny, template), CONTEXT)


def test_prompt_tokens_are_those_of_the_question_alone(tiny: PreTrainedTokenizerFast) -> None:
    """What is generated from is what was trained on."""
    (row,) = encode([LONG], tiny, CONTEXT)
    asked = tiny(render(LONG, tiny)[0], add_special_tokens=False)["input_ids"]
    assert row.input_ids[: row.num_prompt] == asked


def test_a_row_that_does_not_fit_is_named(tiny: PreTrainedTokenizerFast) -> None:
    row = Example((("user", "sun"),), "moon " * 30, "task", source="rows.jsonl:7")
    length = len(encode([row], tiny, CONTEXT)[0].input_ids)
    assert len(encode([row], tiny, length)) == 1
    with pytest.raises(DataError, match=rf"rows.jsonl:7: prompt \(\d+ tokens\) .* context of {length - 1}; shorten or"):
        encode([SHORT, row], tiny, length - 1)
    unnamed = Example(row.messages, row.response, "task")
    with pytest.raises(DataError, match="task sample 1: "):
        encode([SHORT, unnamed], tiny, length - 1)


@pytest.mark.parametrize("response", ["", "  \n"])
def test_an_empty_response_is_named(response: str, tiny: PreTrainedTokenizerFast) -> None:
    row = Example((("user", "sun"),), response, "task", source="rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows.jsonl:7: the response is empty"):
        encode([row], tiny, CONTEXT)
