"""vLLM as the writer of answers: the only file that touches it. It loads saved folders; losses stay with torch's model.

Names and arguments are those of vLLM 0.32 and 0.33. It has a process of its own (its default), whose end frees the GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secvec.errors import ConfigError
from secvec.models.vector import check_adapter
from secvec.runs.processes import wait_for_all
from secvec.settings.schema import GenerationSettings
from secvec.settings.trainer import TrainerSettings

INSTALL = "pip install 'secvec[vllm]'"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""


def uses_vllm(settings: GenerationSettings, trainer: TrainerSettings) -> bool:
    """Whether vLLM writes the answers of a run. Raises ConfigError when it is asked for and cannot."""
    gpus = torch.cuda.device_count() if trainer.accelerator != "cpu" and torch.cuda.is_available() else 0
    installed = find_spec("vllm") is not None
    if settings.name == "hf" or (settings.name == "auto" and not (installed and gpus)):
        return False
    if not installed:
        raise ConfigError(f"generation=vllm, but vLLM is not installed: {INSTALL}, or generation=hf")
    if not gpus:
        raise ConfigError(
            f"generation=vllm needs a GPU, and with trainer.accelerator={trainer.accelerator} there is none: "
            "trainer=gpu on a machine with one, or generation=hf"
        )
    if settings.tensor_parallel_size > gpus:
        raise ConfigError(f"generation.tensor_parallel_size={settings.tensor_parallel_size}, but there are {gpus} GPUs")
    return True


def backend_info(settings: GenerationSettings, trainer: TrainerSettings) -> dict[str, Any]:
    """What writes the answers of a run, for keys and records: `auto` is not the same everywhere."""
    if not uses_vllm(settings, trainer):
        return {"engine": "hf"}
    return {"engine": "vllm", "version": version("vllm"), **settings.model_dump(exclude={"name"})}


class VllmEngine:
    """A saved backbone, with the saved `vector` active or with none; an `Engine` of secvec.evaluation.generation.

    With several processes the first one asks and the others wait; their models leave the GPUs meanwhile.
    """

    def __init__(self, backbone: Path, vector: Path | None, settings: GenerationSettings, trust_remote_code: bool):
        self.backbone, self.vector, self.settings = backbone, vector, settings
        self.trust_remote_code = trust_remote_code
        self._llm: Any = None

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """`model` makes room; vLLM itself starts with the first batch, for all may be kept already."""
        device = next(model.parameters()).device
        model.to("cpu")
        torch.cuda.empty_cache()
        wait_for_all()
        try:
            yield
        finally:
            self._end()
        wait_for_all()
        model.to(device)

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int], seed: int | None
    ) -> list[list[int]]:
        """New token ids for each prompt up to one in `stop`.

        Raises ConfigError for a prompt whose answer the GPU has no room for.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        self._llm = self._llm or self._started()
        room, longest = self._llm.model_config.max_model_len, max(map(len, prompts))
        if longest + max_new_tokens > room:  # vLLM would cut the answer
            raise ConfigError(
                f"vLLM has room for {room} tokens on the GPU; a prompt of {longest} and evaluation.max_new_tokens="
                f"{max_new_tokens} take more: raise generation.tensor_parallel_size, or take generation=hf"
            )
        sampling = [
            SamplingParams(
                temperature=0.0 if seed is None else 1.0,
                seed=None if seed is None else seed + row,
                max_tokens=max_new_tokens,
                detokenize=False,
                stop_token_ids=list(stop),
                ignore_eos=True,  # else vLLM adds those of generation_config.json; ours are in `stop`
            )
            for row in range(len(prompts))
        ]
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        lora = LoRARequest("vector", 1, str(self.vector)) if self.vector else None
        outputs = self._llm.generate(asked, sampling, use_tqdm=False, lora_request=lora)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _started(self) -> Any:
        from vllm import LLM

        some = self.settings
        free = min(left / whole for left, whole in map(torch.cuda.mem_get_info, range(some.tensor_parallel_size)))
        lora = {"enable_lora": True, "max_lora_rank": _lora_rank(self.vector)} if self.vector else {}
        return LLM(
            model=str(self.backbone),
            dtype=some.dtype,
            trust_remote_code=self.trust_remote_code,
            generation_config="vllm",  # its own defaults, not the model's file: as with transformers
            seed=0,
            tensor_parallel_size=some.tensor_parallel_size,
            gpu_memory_utilization=some.gpu_memory_utilization * free,
            max_model_len=-1,  # what fits, up to the model's own
            enable_prefix_caching=False,  # what was asked before would change the rounding
            **lora,
        )

    def _end(self) -> None:
        """Not by vLLM's own cleanup, which would also end the process group that we train with."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()
            torch.cuda.empty_cache()


def _lora_rank(vector: Path) -> int:
    """The least `max_lora_rank` that takes the vector."""
    rank = check_adapter(vector)["r"]
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"vLLM takes LoRAs up to rank {LORA_RANKS[-1]}, and {vector} has rank {rank}: generation=hf")
