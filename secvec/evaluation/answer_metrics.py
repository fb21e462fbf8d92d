"""How near an answer is to its reference: the metric of each benign stream, in [0, 1]. No answer is ever executed."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Callable
from difflib import SequenceMatcher
from unicodedata import normalize

from secvec.data.example import AnswerMetric, same_text

NUMBER = re.compile(
    r"(?P<sign>(?<!\w)-)?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<power>[eE][+-]?\d+)?"
    r"(?:/(?P<under>\d+))?"
)
"""A number with its sign, and what follows it: a power of ten, the lower part of a fraction."""
WORD = re.compile(r"[\u2e80-\u9fff]|[^\W_\u2e80-\u9fff]+")
"""Letters and digits; of Chinese and Japanese, which have no spaces, one sign."""
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER}


def score(metric: AnswerMetric, answer: str, reference: str) -> float:
    """How near `answer` is to `reference` under `metric`; 1 is right. `judge` and `none` have no score here."""
    return METRICS[metric](answer.strip(), reference.strip())


def _exact(answer: str, reference: str) -> float:
    return float(answer == reference)


def _contains(answer: str, reference: str) -> float:
    """Without regard to case and runs of white space."""
    shown, wanted = map(same_text, (answer, reference))
    return float(bool(wanted) and wanted in shown)


def _number(answer: str, reference: str) -> float:
    """The last number of each text, as for GSM8K (arXiv 2110.14168), whose reference ends in `#### 42`."""
    given, wanted = _last_number(answer), _last_number(reference)
    return float(wanted is not None and given == wanted)


def _last_number(text: str) -> float | None:
    found = list(NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")))
    if not found:
        return None
    sign, digits, power, under = found[-1].group("sign", "digits", "power", "under")
    number = float(f"{sign or ''}{digits.replace(',', '')}{power or ''}")
    return number / float(under) if under and float(under) else number


def _rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), with stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import

    return float(RougeScorer(["rougeL"], tokenizer=Words()).score(reference, answer)["rougeL"].fmeasure)


class Words:
    """The words of a text for ROUGE, in any script; rouge_score's own drops all letters but a to z."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer  # slow to import

        self.stemmed: Callable[[str], list[str]] = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(self, text: str) -> list[str]:
        """Words in small letters, those of a to z stemmed as rouge_score does."""
        words = WORD.findall(normalize("NFC", text.lower()))
        return [part for word in words for part in (self.stemmed(word) if word.isascii() else [word])]


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
