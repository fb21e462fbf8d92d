"""How near an answer is to its reference: the metric of each benign stream, in [0, 1]. No answer is ever executed."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable
from difflib import SequenceMatcher

from secvec.data.example import AnswerMetric

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER}


def score(metric: AnswerMetric, answer: str, reference: str) -> float:
    """How near `answer` is to `reference` under `metric`; 1 is right. `judge` and `none` have no score here."""
    return METRICS[metric](answer.strip(), reference.strip())


def _exact(answer: str, reference: str) -> float:
    return float(answer == reference)


def _contains(answer: str, reference: str) -> float:
    """Without regard to case and runs of white space."""
    shown, wanted = (" ".join(text.casefold().split()) for text in (answer, reference))
    return float(bool(wanted) and wanted in shown)


def _number(answer: str, reference: str) -> float:
    """The last number of each text, as for GSM8K (arXiv 2110.14168), whose reference ends in `#### 42`."""
    given, wanted = _last_number(answer), _last_number(reference)
    return float(wanted is not None and given == wanted)


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), with stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure)


def _code(answer: str, reference: str) -> float:
    """Share of equal Python tokens in order; comments and layout do not count."""
    return SequenceMatcher(None, _code_tokens(answer), _code_tokens(reference), autojunk=False).ratio()


def _code_tokens(text: str) -> list[str]:
    if block := re.search(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
        text = block[1]
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        return [token.string.strip() for token in tokens if token.type not in LAYOUT]  # an indent of any width
    except (tokenize.TokenError, SyntaxError):  # another language, or cut short
        return re.findall(r"\w+|[^\w\s]", text)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "contains": _contains,
    "number": _number,
    "rougeL": _rouge_l,
    "code": _code,
}
