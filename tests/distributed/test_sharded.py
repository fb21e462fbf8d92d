"""Gloo processes that shard a model (`strategy=fsdp`): what each of them holds, and that all of them stay in step."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from in_memory import ON_CPU
from lightning.pytorch.loggers.logger import DummyLogger
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, LlamaForCausalLM

from secvec.data.batch import Encoded
from secvec.data.datamodule import training_loader
from secvec.data.embedded import Skill
from secvec.data.prompts import prompt_set
from secvec.evaluation.losses import in_parts, keep_log_probs, kl_to_kept, sample_losses
from secvec.evaluation.prediction import predict, respond
from secvec.metrics import mean
from secvec.models import backbone, sharding
from secvec.models.sharding import local_shard, trained_state
from secvec.models.tiny import build_tiny
from secvec.module import SecVecModule
from secvec.settings.schema import EvaluationSettings
from secvec.settings.trainer import TrainerSettings
from secvec.training.trainer import Training, fit

EXAMPLES = Skill().examples("test", 7, 0)
SETTINGS = EvaluationSettings(num_prompts=7, batch_size=2, max_new_tokens=8, num_leak_prompts=0)
LORA = {"r": 2, "alpha": 4, "target_modules": "all-linear"}


def sharded(processes: int) -> TrainerSettings:
    return ON_CPU.model_copy(update={"strategy": "fsdp", "devices": processes})


def together(processes: int, work: Callable[..., Any], folder: Path, *given: Any, start: str = "fork") -> list[Any]:
    """What `work(processes, *given)` returns on each of some processes."""
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _process, (processes, work, folder, given), nprocs=processes, start_method=start
    )
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(processes)]


def _process(rank: int, processes: int, work: Callable[..., Any], folder: Path, given: tuple[Any, ...]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # no more is to be started
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=processes)
    torch.set_num_threads(1)
    torch.save(work(processes, *given), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """MB that the process holds at most inside, above what it held before; pages of the files that it reads apart."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 14)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    libc.mallopt(-8, 1)  # M_ARENA_MAX: of all threads
    libc.malloc_trim(0)  # and what the parent has freed is not used again
    found, done, before = [0.0], threading.Event(), _held()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], _held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield found
    done.set()
    watcher.join()


def _held() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def build_and_ask(processes: int, *folders: Path) -> float:
    """The peak while a model is built, and while it computes a loss and an answer: of the last folder."""
    trainer, settings = sharded(processes), SETTINGS.model_copy(update={"max_new_tokens": 2})
    for folder in folders:
        module = SecVecModule("infer", folder)
        with peak_memory() as peak:
            sample_losses(module, {"skill": EXAMPLES[:1]}, settings, trainer)
            respond(module, [prompt_set(EXAMPLES[:1], module.backbone.tokenizer)], settings, trainer, "test")
    return peak[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
def test_the_memory_of_a_process_falls_as_processes_are_added(tmp_path: Path) -> None:
    """A model of 110 MB in float32: 32 layers of 3.4 MB, an embedding of 1 MB."""
    tiny, tokenizer = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], 0)
    size = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 32, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **size)).bfloat16()
    megabytes = model.num_parameters() * 4 / 1e6
    folders = [tmp_path / "tiny", tmp_path / "model"]  # the first one for what is imported meanwhile
    for one, folder in zip((tiny, model), folders, strict=True):
        one.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # by a process that has done nothing else: what earlier tests have freed would be used again, and not counted
    peak = {n: max(together(n, build_and_ask, tmp_path / str(n), *folders, start="forkserver")) for n in (1, 2, 4)}
    assert peak[1] > megabytes, peak  # alone it holds all of it
    assert peak[2] < 0.85 * peak[1] and peak[4] < 0.85 * peak[2] and peak[4] < 0.7 * megabytes, peak


def ask(processes: int, folder: Path, other: Path) -> tuple[Any, ...]:
    module, base = (SecVecModule("infer", one) for one in (folder, other))
    trainer = sharded(processes)
    asked = [prompt_set(EXAMPLES, module.backbone.tokenizer)] * 2
    answers = respond(module, asked, SETTINGS, trainer, "test")
    losses = sample_losses(module, {"skill": EXAMPLES, "one": EXAMPLES[:1]}, SETTINGS, trainer)
    kept = folder.parent / f"log_probs-{processes}"
    kept.mkdir(exist_ok=True)
    (part,) = in_parts(module.backbone, EXAMPLES, 2)
    keep_log_probs(module, part, kept, trainer)
    shard = weakref.ref(next(module.model.parameters()))
    module.release()
    assert shard() is None  # a process holds shards of one model at a time
    kl = [value for _, values in sorted(kl_to_kept(base, part, kept, trainer)) for value in values]
    return answers, {name: mean(found).value for name, found in losses.items()}, kl


def test_processes_with_more_and_with_less_to_do_stay_in_step(tmp_path: Path) -> None:
    """Four batches for three processes, of answers that end at different tokens; some have none at all."""
    folders = [tmp_path / "model", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        model, tokenizer = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    answers, losses, kl = together(3, ask, tmp_path / "three", *folders)[0]
    (alone, alone_losses, alone_kl) = together(1, ask, tmp_path / "one", *folders)[0]
    assert answers == alone and len(set(alone[0])) > 3
    assert (
        losses == pytest.approx(alone_losses, rel=1e-6) and kl == pytest.approx(alone_kl, rel=1e-5) and max(kl) > 0.01
    )


SIZES = {"vocab_size": 600, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 64}
SHARD = 200_000
"""Bytes of a file of weights."""


def save_parts(processes: int, folder: Path, out: Path, dtype: str) -> int:
    """Saves a changed model, and all at once in `out`/whole. Returns the most gathered bytes that lived at one time."""
    backbone.MAX_SHARD_SIZE = SHARD  # type: ignore[assignment]
    module = SecVecModule("finetune", {"name": None, "name_or_path": str(folder), "dtype": dtype})
    predict(module, [[]], sharded(processes), "sharding")
    with torch.no_grad():
        for parameter in module.model.parameters():
            local_shard(parameter).mul_(3)
    known: list[weakref.ref[torch.Tensor]] = []
    most = [0]
    gathered = sharding._gathered

    def look(tensor: torch.Tensor) -> torch.Tensor:
        found = gathered(tensor)
        known.append(weakref.ref(found))
        most[0] = max(most[0], sum(one.nbytes for ref in known if (one := ref()) is not None))
        return found

    sharding._gathered = look
    module.save(out)
    state = trained_state(module.model)
    if dist.get_rank() == 0:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        model.save_pretrained(out / "whole", max_shard_size=SHARD)
    return most[0]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (LlamaConfig(**SIZES, hidden_size=64, intermediate_size=128, tie_word_embeddings=True), "float32"),
        (LlamaConfig(**SIZES, hidden_size=64, intermediate_size=128, tie_word_embeddings=False), "bfloat16"),
        pytest.param(
            DeepseekV3Config(
                **SIZES, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, n_routed_experts=4, n_group=1,
                topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
                qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=2,
            ), "float32",
        ),
    ],
    ids=["tied", "bfloat16", "experts and buffers"],
)  # fmt: skip
def test_a_model_is_saved_file_by_file(tmp_path: Path, config: Any, dtype: str) -> None:
    """What is saved is to the bit what one process would save that holds it all; none of the two ever holds it all."""
    folder, out = tmp_path / "model", tmp_path / "out"
    _, tokenizer = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], 0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    first, second = together(2, save_parts, tmp_path / "two", folder, out, dtype)
    mine, whole = (
        {name: tensor for file in sorted(one.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for one in (out / "backbone", out / "whole")
    )
    assert mine.keys() == whole.keys() and {str(tensor.dtype) for tensor in mine.values()} == {f"torch.{dtype}"}
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    saved = AutoModelForCausalLM.from_pretrained(out / "backbone", dtype=getattr(torch, dtype))
    assert all(torch.equal(p * 3, q) for p, q in zip(start.parameters(), saved.parameters(), strict=True))
    if isinstance(config, LlamaConfig):  # the files too, and their index
        for file in (out / "whole").glob("model*"):
            assert file.read_bytes() == (out / "backbone" / file.name).read_bytes()
    largest, total = (f(p.nbytes for p in saved.parameters()) for f in (max, sum))
    assert len(list((out / "backbone").glob("*.safetensors"))) > 2 and total > 2 * SHARD
    assert second <= largest < first <= SHARD + largest < total


ROWS = [Encoded(list(range(3, 10 + i % 5)), 3 + i % 2) for i in range(8)]


class Cut(Exception):
    pass


class Began(L.Callback):
    """Keeps the step that a training begins at; may raise before the second epoch."""

    def __init__(self, cut: bool = False):
        self.cut, self.step = cut, -1

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.step = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.cut and trainer.current_epoch == 1:
            raise Cut


def train(processes: int, folder: Path, out: Path, began: Began, lora: bool) -> dict[str, torch.Tensor]:
    """Two epochs of four steps each; what was trained, on the first process."""
    module = SecVecModule("finetune", folder, tune=LORA if lora else None)
    state: dict[str, torch.Tensor] = {}
    module.save = lambda _: state.update(trained_state(module.model))  # type: ignore[method-assign]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    training = Training(out, "finetune", "optimizer.lr", 0, 2, sharded(processes).model_copy(update=quiet), False)
    loader = training_loader([(ROWS, 2)], 0, dist.get_rank(), processes)
    fit(module, loader, training, DummyLogger(), out, [began])  # type: ignore[arg-type]
    return state


def cut_and_go_on(processes: int, folder: Path, out: Path, lora: bool) -> tuple[Any, ...]:
    """The weights without and with a cut, the step after it, and the sizes of the checkpoint's files."""
    whole = train(processes, folder, out / "whole", Began(), lora)
    with pytest.raises(Cut):
        train(processes, folder, out / "cut", Began(cut=True), lora)
    last = out / "cut" / "checkpoints" / "finetune" / "last.ckpt"
    sizes = {file.name: file.stat().st_size for file in last.iterdir()}
    dist.barrier()
    began = Began()
    return whole, train(processes, folder, out / "cut", began, lora), began.step, sizes


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoint_of_shards_is_gone_on_from(tmp_path: Path, lora: bool) -> None:
    """Each of two processes writes and reads its half; the weights are to the bit those of a training without a cut."""
    model, tokenizer = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], 0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    whole, found, step, sizes = together(
        2, cut_and_go_on, tmp_path / "two", tmp_path / "model", tmp_path / "out", lora
    )[0]
    assert step == 4 and len(whole) > 10
    assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
    shards = [size for name, size in sizes.items() if name.endswith(".distcp")]
    assert len(shards) == 2 and min(shards) > 0.4 * sum(shards)
    trained, all_weights = (sum(t.nbytes for t in part) for part in (whole.values(), model.parameters()))
    if lora:
        assert trained < 0.1 * all_weights and sum(shards) < all_weights
    else:
        assert sum(shards) == pytest.approx(3 * all_weights, rel=0.1)  # two moments of AdamW
