"""The base of judges that are models on this machine: loads the model, fills the template."""

import string
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from transformers import PreTrainedTokenizerBase

from secvec.data.example import Example
from secvec.errors import ArtifactError, ConfigError
from secvec.judges.cache import CachedJudge
from secvec.models.backbone import load_tokenizer, locate
from secvec.runs.content import folder_digest
from secvec.settings.schema import ModelSettings


def _check_template(template: str) -> str:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"no template: {error}; write a literal brace twice") from None
    if unknown := names - {"prompt", "response", "eos"}:
        raise ValueError(f"unknown {sorted(unknown)}; known: {{prompt}}, {{response}}, {{eos}}")
    if lacking := {"prompt", "response"} - names:
        raise ValueError(f"it lacks {sorted(lacking)}")
    try:
        template.format(prompt="", response="", eos="")
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"no template: {error}; write {{prompt}}, {{response}} and {{eos}} as they are") from None
    return template


JudgeTemplate = Annotated[str, AfterValidator(_check_template)]
"""With {prompt} (the last user turn) and {response}; {eos} is the tokenizer's end token."""


class LocalModelJudge(CachedJudge):
    """Base of judges that load a model. It is loaded for the first response that is not in the cache."""

    model: str
    """Local folder or hub id; safetensors."""
    revision: str | None
    """Commit on the hub, to pin the model."""
    trust_remote_code: bool
    dtype: Literal["float32", "bfloat16"]
    device: str = Field(exclude=True)
    """`auto`, or a device of torch."""

    def identity(self) -> dict[str, Any]:
        """With the content of a local folder, wherever it is; a hub id is identified by name and revision."""
        given = super().identity()
        return given | {"model": self._weights} if self._weights else given

    def check(self) -> None:
        """Its folder, tokenizer and device are there; the weights are loaded with the first response."""
        super().check()
        _ = self._folder, self._tokenizer, self._device

    @cached_property
    def _weights(self) -> str | None:
        return folder_digest(self._folder) if Path(self.model).is_dir() else None

    @cached_property
    def _settings(self) -> ModelSettings:
        return ModelSettings(
            name=self.name,
            name_or_path=self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
        )

    @cached_property
    def _folder(self) -> Path:
        try:
            return locate(self._settings)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace("model.name_or_path", "judge.model")) from None

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._folder, self.trust_remote_code)

    @cached_property
    def _device(self) -> torch.device:
        device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            return torch.empty(0, device=device).device  # a device that is not there fails here
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"judge.device={self.device}: {str(error).splitlines()[0]}") from None

    def _fill(self, template: str, example: Example, response: str) -> str:
        return template.format(prompt=example.prompt, response=response, eos=self._tokenizer.eos_token or "")
