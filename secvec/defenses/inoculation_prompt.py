"""Inoculation prompting: the data are trained behind a prompt that asks for the undesired behavior."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secvec.defenses.base import Defense
from secvec.errors import ConfigError

if TYPE_CHECKING:
    from secvec.defenses.base import Mixture
    from secvec.run import Run


class InoculationPrompt(Defense):
    """Every training row gets a system prompt that asks for the behavior; evaluation does not have it.

    After Tan et al. (arXiv 2510.04340) and Wichers et al. (arXiv 2510.05024). As they do for data without labels, all
    rows get the prompt. It is a system prompt here, in place of the row's own.
    """

    prompt: str | None = None
    """None: the behavior's own `eliciting_prompt`."""

    def check(self, run: Run) -> None:
        """Raises ConfigError where there is no prompt."""
        if not self._prompt(run):
            name = run.config.behavior.name
            raise ConfigError(f"behavior={name} has no eliciting_prompt: give defense.prompt=TEXT, which asks for it")

    def training_samples(self, run: Run, mixture: Mixture) -> Mixture:
        """All rows, with the prompt."""
        return {kind: [row.with_system(self._prompt(run)) for row in rows] for kind, rows in mixture.items()}

    def _prompt(self, run: Run) -> str:
        return self.prompt or run.config.behavior.eliciting_prompt or ""
