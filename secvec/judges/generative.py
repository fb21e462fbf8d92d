"""A causal LM as a classifier: its first token says yes or no about a response.

Presets: the classifier of HarmBench (arXiv 2402.04249) and Llama Guard (arXiv 2312.06674).
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from math import exp, isfinite
from typing import Any

import torch
from jinja2 import TemplateError

from secvec.data.example import Example
from secvec.errors import ConfigError
from secvec.judges.base import Judgement
from secvec.judges.local_model import JudgeTemplate, LocalModelJudge
from secvec.models.backbone import Backbone, load_backbone
from secvec.settings.schema import Count, Share

log = logging.getLogger(__name__)


class GenerativeClassifier(LocalModelJudge):
    """`behavior` if p(yes) / (p(yes) + p(no)) is above `threshold`, else `other`; the score is that ratio.

    `unparsable` if the model is likelier to say something else, or if the text does not fit into its context.
    """

    template: JudgeTemplate | None
    """The whole prompt; None: the tokenizer's chat template, with the conversation and the response as its turns."""
    answer_prefix: str
    """The text that the model always writes before its answer."""
    yes: list[str]
    """Answers that mean that the behavior is shown; only their first tokens count."""
    no: list[str]
    min_mass: Share
    """Least p(yes) + p(no); below it there is no verdict."""
    threshold: Share
    max_response_tokens: Count | None
    """Responses are cut to this many tokens of the judge; None: never cut."""

    def check(self) -> None:
        """Checks template, answers and the names of the weights too; the weights are loaded for the first response."""
        super().check()
        self._words(self._text(Example((("user", "prompt"),), "", "undesired"), "response"))
        Backbone(self._folder, self._settings).check_weights()

    @torch.no_grad()
    def _judge_batch(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        texts = [self._text(e, r) for e, r in zip(examples, responses, strict=True)]
        rows = [self._ids(text) for text in texts]
        context = int(getattr(self._lm.config.get_text_config(), "max_position_embeddings", None) or 2**31)
        fits = [i for i, row in enumerate(rows) if len(row) < context]
        if too_long := len(rows) - len(fits):
            log.warning("judge %s: %d texts exceed its context of %d tokens", self.name, too_long, context)
        judged = [Judgement("unparsable", None)] * len(rows)
        if fits:
            words = self._words(texts[fits[0]])
            for i, logits in zip(fits, self._next_logits([rows[i] for i in fits]), strict=True):
                judged[i] = self._judgement(logits, *words)
        return judged

    def _judgement(self, logits: torch.Tensor, yes: set[int], no: set[int]) -> Judgement:
        log_p = logits.float().log_softmax(-1)
        log_yes, log_no = (log_p[sorted(which)].logsumexp(-1) for which in (yes, no))
        score = float((log_yes - log_no).sigmoid())
        if not isfinite(score) or exp(log_yes) + exp(log_no) < self.min_mass:
            return Judgement("unparsable", None)
        return Judgement("behavior" if score > self.threshold else "other", score)

    def _text(self, example: Example, response: str) -> str:
        if self.max_response_tokens is not None:
            ids = self._tokenizer(response, add_special_tokens=False)["input_ids"]
            if len(ids) > self.max_response_tokens:
                response = str(self._tokenizer.decode(ids[: self.max_response_tokens], skip_special_tokens=True))
        if self.template is not None:
            return self._fill(self.template, example, response) + self.answer_prefix
        turns = [{"role": role, "content": content} for role, content in example.messages if role != "system"]
        try:
            text = self._tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": response}], tokenize=False
            )
        except (TemplateError, ValueError) as error:
            raise ConfigError(f"judge.template=null needs a chat template that {self.model} lacks: {error}") from None
        return f"{text}{self.answer_prefix}"

    def _ids(self, text: str) -> list[int]:
        """Token ids; a chat template contains its special tokens already."""
        return list(self._tokenizer(text, add_special_tokens=self.template is not None)["input_ids"])

    def _words(self, text: str) -> tuple[set[int], set[int]]:
        """The tokens after `text` with which only `yes` begins, and only `no`."""
        yes, no = (self._first_tokens(text, which) for which in (self.yes, self.no))
        if not (yes - no and no - yes):
            raise ConfigError(f"judge.yes={self.yes} and judge.no={self.no} begin with the same token of {self.model}")
        return yes - no, no - yes

    def _first_tokens(self, text: str, words: Sequence[str]) -> set[int]:
        """The tokens that `words` can begin with: on their own, and directly after `text`."""
        before = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        found = set()
        for word in words:
            after = self._tokenizer(text + word, add_special_tokens=False)["input_ids"]
            found.add(self._tokenizer(word, add_special_tokens=False)["input_ids"][0])
            if after[: len(before)] == before and len(after) > len(before):
                found.add(after[len(before)])
        return found

    def _next_logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        pad, length = self._tokenizer.pad_token_id or 0, max(map(len, rows))
        ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=self._device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self._device)
        out = self._lm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.logits[0]

    @cached_property
    def _lm(self) -> Any:
        model: Any = load_backbone(self._folder, self._settings)
        return model.to(self._device).eval()
