"""Security vector and task LoRA: the only file that touches PEFT.

PEFT's own switches turn gradients back on (the exit of `disable_adapter()`, every `set_adapter`: peft #3580, #1374).
So adapters are switched here by each layer's list of active adapters, and gradients by parameter name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from secvec.errors import ArtifactError, ConfigError, nearest, one_line
from secvec.models.modes import in_eval
from secvec.models.outline import Weights, inside_peft, is_outlined, text_part, weights_at_hand
from secvec.models.quantized import is_quantized, plain_copy, plain_dtype, shape_of
from secvec.runs.content import folder_digest
from secvec.settings.schema import LoraSettings

VECTOR = "security_vector"
SCORES = "scan.json"
"""The scores of a vector's own samples, beside it (`secvec.evaluation.scan`)."""
TASK = "task"

ATTENTION = ("q_proj", "v_proj")
"""Where a LoRA goes if nothing else is said: the choice of the LoRA paper (arXiv 2106.09685), section 7.1."""
NOT_TARGETS = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")
"""Input and output embeddings: many models tie them, and a LoRA on tied weights cannot be merged or removed."""

STATE_SPACE = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
OF_STATE_SPACE = ("out_proj", "conv1d")
"""Types of models, and layers of theirs that PEFT refuses: their kernels read the weights themselves."""

NOT_SWITCHED = (
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
)
"""Settings of a LoRA by which it changes the backbone itself, or acts on some tokens only."""


DRAWN = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` by which PEFT draws A and B, and leaves the backbone's weights alone."""


def part_of(name: str) -> str:
    """The part that the parameter `name` belongs to: `vector`, `task`, `kept` (`secvec.models.kept`) or `backbone`."""
    parts = name.split(".")
    return "vector" if VECTOR in parts else "task" if TASK in parts else "kept" if "kept" in parts else "backbone"


def attach_new_vector(model: nn.Module, settings: LoraSettings, dropout: float) -> nn.Module:
    """Attaches a new vector (B = 0: no effect yet). Raises ConfigError for target modules that the model lacks."""
    return _attach(model, VECTOR, settings, dropout)


def attach_task(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Attaches a new task LoRA; other adapters stay. Raises ConfigError like `attach_new_vector`."""
    return _attach(model, TASK, settings, 0.0)


def vector_digest(folder: Path) -> str:
    """SHA-256 of what a saved vector does: of its folder without SCORES, which only a scan reads."""
    return folder_digest(folder, without=(SCORES,))


def vector_info(folder: Path) -> dict[str, Any]:
    """What was written beside a saved vector: `backbone`, `tokenizer`, `behavior`, `keep_dropout`; {} for others'.

    Raises ArtifactError.
    """
    path = folder / "secvec.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): copy the vector again, or train it again") from None


def check_adapter(folder: Path) -> dict[str, Any]:
    """PEFT's config of an adapter. Raises ArtifactError for none, or for one that cannot be switched off exactly."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        remedy = "train one with stage=vector"
        if (folder / "vector" / "adapter_config.json").is_file():  # of a run
            remedy = f"give {folder / 'vector'}"
        raise ArtifactError(f"{folder} holds no vector (adapter_config.json is missing): {remedy}")
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): copy the adapter again") from None
    faults = [
        f"{name}={given[name]!r}" for name in NOT_SWITCHED if given.get(name) not in (None, "none", False, [], {})
    ]
    if given.get("peft_type") != "LORA":
        faults = [f"peft_type={given.get('peft_type')!r}"]
    elif own := [name for name in _saved_names(folder) if "lora_" not in name]:
        faults.append(
            f"its file holds weights of the backbone ({own[0]}; PEFT's save_embedding_layers=False leaves them)"
        )
    if faults:
        raise ArtifactError(
            f"the adapter in {folder} cannot be a vector: {', '.join(faults)}. A vector must not change the "
            "backbone's own weights or tokens, so that it can be switched off exactly: use a LoRA (also rsLoRA, DoRA) "
            "without these settings"
        )
    return given


def _saved_names(folder: Path) -> list[str]:
    """The names of the weights of an adapter; [] where it has no file. Raises ArtifactError."""
    file = folder / "adapter_model.safetensors"
    try:
        if file.is_file():
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        file = folder / "adapter_model.bin"
        return list(torch.load(file, map_location="meta", weights_only=True)) if file.is_file() else []
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ArtifactError(f"{file} is damaged or cut short ({one_line(error, 200)}): copy it again") from None


def attach_frozen_vector(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the vector saved in `folder`: active, frozen, without dropout unless it says `keep_dropout`.

    Whatever made the adapter: on some tokens the logits with it are those that PEFT gives, and without it those of
    `model`, to the bit. Raises ArtifactError.
    """
    init = check_adapter(folder).get("init_lora_weights", True)
    if is_outlined(model) and init not in DRAWN:
        raise _more_than_a_vector(folder, "off the logits are not those of the bare model", init)
    bare = _probe(model)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            attached = PeftModel.from_pretrained(model, str(folder), adapter_name=VECTOR, is_trainable=False)
        if missing := [str(one.message) for one in told if "missing adapter keys" in str(one.message)]:
            raise ValueError(missing[0])  # PEFT goes on with an adapter that does nothing
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = one_line(error, 300)
        raise ArtifactError(f"the vector in {folder} does not fit this model or is damaged: {reason}") from None
    if any(VECTOR in layer.lora_embedding_A for layer in _lora_layers(attached)):
        raise ArtifactError(
            f"the adapter in {folder} cannot be a vector: it changes the embeddings, and PEFT saves these as a whole. "
            "Train one without them in target_modules"
        )
    theirs = _probe(attached)
    _make_active(attached, [VECTOR])
    with vector_off(attached):
        off = _probe(attached)
    for state, ours, wanted in (("on", _probe(attached), theirs), ("off", off, bare)):
        if not torch.allclose(ours, wanted, rtol=0, atol=0, equal_nan=True):
            whose = "PEFT" if state == "on" else "the bare model"
            raise _more_than_a_vector(folder, f"{state} the logits are not those of {whose}", init)
    for layer in [] if vector_info(folder).get("keep_dropout") else _lora_layers(attached):
        # model.train() would switch dropout on again, and a vector with dropout is a random vector
        layer.lora_dropout[VECTOR] = nn.Identity()
    return attached


def _more_than_a_vector(folder: Path, how: str, init: Any) -> ArtifactError:
    return ArtifactError(
        f"the adapter in {folder} cannot be a vector: with it {how}. It changes more than the layers it is added to "
        f"(init_lora_weights={init!r}): save it as a plain LoRA, or train a vector with stage=vector"
    )


@contextmanager
def vector_off(model: nn.Module) -> Iterator[None]:
    """Forward passes inside run without the vector. Task LoRA, flags, gradients and weights do not change."""
    layers = [layer for layer in _lora_layers(model) if VECTOR in layer.active_adapters]
    with _with_adapters([(layer, [name for name in layer.active_adapters if name != VECTOR]) for layer in layers]):
        yield


class AdaptersOfForward:
    """The `context_fn` of checkpointed layers: a layer that is computed again has the adapters of its forward pass.

    By the backward pass `vector_off` has ended. It is an object, so that a copy of the model has a copy of it.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self) -> tuple[Any, Any]:
        """Contexts of the forward pass and of the second one."""
        return nullcontext(), _with_adapters([(layer, layer._active_adapter) for layer in _lora_layers(self.model)])


@contextmanager
def _with_adapters(adapters: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Inside, each layer has the adapters that stand beside it."""
    before = [(layer, layer._active_adapter) for layer, _ in adapters]
    for layer, active in adapters:
        layer._active_adapter = active
    try:
        yield
    finally:
        for layer, active in before:
            layer._active_adapter = active


def activate(attached: nn.Module, activation: str) -> nn.Module:
    """The frozen vector of a model acts beside its weights (`adapter`) or through them (`merged`).

    `auto`: merged where that is exact to float32. Raises ConfigError where `merged` is asked for and is not.
    """
    faults = why_not_merged(attached)
    if faults and activation == "merged":
        raise ConfigError(f"defense.activation=merged: {'; '.join(faults)}. Set defense.activation=adapter")
    if not faults and activation != "adapter":
        merge_activation(attached)
    return attached


def vector_deltas(backbone: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What the vector saved in `folder` adds to each weight of `backbone`, s B A, by Hugging Face name, in float32.

    `backbone` is changed: give a fresh copy. Raises ArtifactError, and ConfigError where that is not all that it adds.
    """
    attached = attach_frozen_vector(backbone.float(), folder)
    require_delta(attached)
    return {
        f"{name}.weight".removeprefix("base_model.model."): layer.get_delta_weight(VECTOR).detach()
        for name, layer in attached.named_modules()
        if isinstance(layer, LoraLinear)
    }


def column_space(matrix: Tensor, rank: int | None = None) -> Tensor:
    """An orthonormal basis (m, r) of the columns of `matrix` (m, n), whose rank r is low: at most `rank`, or as found.

    By random projections of a few columns more (Halko et al., arXiv 0909.4061): a whole decomposition of a matrix of
    4,096 x 4,096 takes a minute. The same matrix gives the same basis.
    """
    size = 32 if rank is None else rank + 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while True:
            size = min(size, *matrix.shape)
            left, values, _ = torch.svd_lowrank(matrix, q=size, niter=4)
            found = int((values > 1e-5 * values[0]).sum())
            if rank is not None or found < size or size == min(matrix.shape):
                return left[:, : min(found, rank or found)]
            size *= 2


@torch.no_grad()
def randomize_vector(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights for the vector of `model`, with the Frobenius norm of its B A in each layer.

    A and B are drawn from a normal distribution and scaled alike. Raises ConfigError where B A is not all it adds.
    """
    require_delta(model)
    for layer in _lora_layers(model):
        modules: list[Any] = [layer.lora_A[VECTOR], layer.lora_B[VECTOR]]
        a, b = (module.weight for module in modules)
        norm = torch.linalg.norm(b.float() @ a.float())
        drawn = [torch.randn(weight.shape, generator=generator) for weight in (a, b)]
        scale = (norm.cpu() / torch.linalg.norm(drawn[1] @ drawn[0])).sqrt()
        for weight, values in zip((a, b), drawn, strict=True):
            weight.copy_(values * scale)


def require_delta(model: nn.Module) -> None:
    """Raises ConfigError for a vector that adds more to a layer than s B A, or to no linear layer."""
    if not all(map(_is_delta, _lora_layers(model))):
        raise ConfigError(
            "this defense takes a vector that is a low-rank delta of linear layers, s B A, and nothing more: not DoRA, "
            "and without a bias (lora_bias). Train one with stage=vector"
        )


def _is_delta(layer: LoraLayer) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)  # experts have several
    plain = isinstance(layer, LoraLinear) or (weight is not None and is_quantized(weight))
    plain &= VECTOR not in layer.lora_variant
    return plain and not layer.lora_bias.get(VECTOR)


def why_not_merged(model: nn.Module) -> list[str]:
    """Why the frozen vector of `model` cannot act through the weights; [] if it can.

    The sum of a weight and the vector's delta must be exact to float32, and the delta must be the whole of the vector.
    """
    faults = set()
    for layer in _lora_layers(model):
        if not _is_delta(layer):
            faults.add("it is more than a low-rank delta of a linear layer")
        elif is_quantized(layer.weight):
            faults.add("the weights are in 4 bits")
        elif layer.weight.dtype != torch.float32:
            faults.add(f"the weights are {str(layer.weight.dtype).removeprefix('torch.')}, not float32")
        elif not isinstance(layer.lora_dropout[VECTOR], nn.Identity):
            faults.add("it keeps its dropout")
    return sorted(faults)


def merge_activation(model: nn.Module) -> None:
    """Where the frozen vector is a layer's only adapter, the layer computes (W + s B A) x in place of Wx + s B A x.

    The same function of x and the same gradient with respect to W, without a second pass over x. W itself stays as it
    is: weight decay, checkpoints and the saved backbone never hold the delta, and `vector_off` is exact.
    """
    for layer in _lora_layers(model):
        layer.forward = partial(_merged_forward, layer, layer.forward)  # type: ignore[attr-defined]


def _merged_forward(layer: Any, separate: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.active_adapters != [VECTOR] or layer.base_layer.weight.dtype.itemsize < 4:  # trainer.precision=bf16-true
        return separate(x, *args, **kwargs)
    with torch.autocast(x.device.type, enabled=False):  # the sum in float32, the product as the trainer has it
        weight = layer.base_layer.weight + layer.get_delta_weight(VECTOR)
    output: Tensor = functional_call(layer.base_layer, {"weight": weight}, (x,))
    return output


def has_vector(model: nn.Module) -> bool:
    """Whether a vector is attached."""
    return any(VECTOR in layer.lora_A for layer in _lora_layers(model))


def active_parts(model: nn.Module) -> set[str]:
    """The parts that the forward pass uses."""
    adapters = {name for layer in _lora_layers(model) for name in layer.active_adapters}
    return {"backbone"} | ({"vector"} if VECTOR in adapters else set()) | ({"task"} if TASK in adapters else set())


def save_adapter(model: nn.Module, state: Mapping[str, Tensor], part: str, folder: Path) -> None:
    """Saves the adapter `part` (`vector` or `task`) of the full `state` as a standard PEFT folder."""
    name = {"vector": VECTOR, "task": TASK}[part]
    assert isinstance(model, PeftModel)
    weights = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, folder / "adapter_model.safetensors")
    model.peft_config[name].save_pretrained(str(folder), auto_mapping_dict=None)
    path = folder / "adapter_config.json"  # PEFT writes a set, whose order another process would not repeat
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: sorted(value) if key == "target_modules" else value for key, value in config.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights under their Hugging Face names; `state` may hold adapters too."""
    return {
        ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"): tensor
        for name, tensor in state.items()
        if part_of(name) == "backbone"
    }


def with_task(backbone: nn.Module, folder: Path) -> nn.Module:
    """`backbone`, which may be outlined, with the task LoRA saved in `folder`."""
    return PeftModel.from_pretrained(backbone, str(folder), adapter_name=TASK)


def merged_task(model: nn.Module) -> Weights:
    """The weights of the backbone with the task LoRA of `model` merged into them, each when it is read.

    `model` keeps its own as they are. Weights in 4 bits are merged as they are multiplied, and saved as plain ones.
    """
    saved = model.state_dict().keys()
    every = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    tensors = backbone_state({name: tensor for name, tensor in every if name in saved})
    layers: list[Any] = [layer for layer in _lora_layers(model) if TASK in layer.lora_A]
    adapted = {id(_adapted_weight(layer)): layer for layer in layers}

    def read(name: str) -> Tensor:
        value, layer = plain_copy(tensors[name]), adapted.get(id(tensors[name]))
        if layer is not None:
            value += layer.get_delta_weight(TASK).detach()
        return value.cpu()

    shapes = {n: torch.empty(shape_of(t), dtype=plain_dtype(t), device="meta") for n, t in tensors.items()}
    return Weights(shapes, read)


def _adapted_weight(layer: Any) -> Tensor:
    """The weight that the LoRA of a layer adds to; of experts, which are one weight, the one that it names."""
    weight: Tensor = layer.get_param() if hasattr(layer, "parameter_name") else layer.get_base_layer().weight
    return weight


def _takes_lora(module: nn.Module) -> bool:
    """Linear layers, and not what is derived from them and computes something else (the router of Llama 4)."""
    known = type(module).forward is nn.Linear.forward or type(module).__module__.startswith("bitsandbytes")
    return isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and known)


def _attach(model: Any, name: str, settings: LoraSettings, dropout: float) -> nn.Module:
    bare = inside_peft(model)
    inside = {id(module) for module in text_part(bare).modules()}
    found = {
        path: module
        for path, module in bare.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not bare.get_output_embeddings()
        and part_of(path) == "backbone"
    }
    linear = {
        path.removesuffix(".base_layer").rsplit(".", 1)[-1]
        for path, module in found.items()
        if id(module) in inside and _takes_lora(module)
    }
    # a text does not pass through the part of a model that sees or hears
    outside = [path for path, module in found.items() if id(module) not in inside or not _takes_lora(module)]
    usable = sorted(linear - set(NOT_TARGETS))
    if bare.config.model_type in STATE_SPACE:
        usable = [target for target in usable if target not in OF_STATE_SPACE]
    wanted = settings.target_modules
    if wanted is None:
        wanted = list(ATTENTION) if linear.issuperset(ATTENTION) else "all-linear"
    wanted = usable if wanted == "all-linear" else [wanted] if isinstance(wanted, str) else wanted
    if any(target in NOT_TARGETS for target in wanted):
        raise ConfigError(f"target_modules {wanted}: input and output embeddings may be tied and take no LoRA")
    if missing := [target for target in wanted if target not in usable]:
        raise ConfigError(
            f"target_modules {missing}: the model has no such linear layer{nearest(missing[0], usable)}; it has "
            f"{', '.join(usable)}; all of them: {'vector' if name == VECTOR else 'tune.lora'}.target_modules=all-linear"
        )
    count = bare.config.get_text_config().num_hidden_layers
    if beyond := [layer for layer in settings.layers or [] if not 0 <= layer < count]:
        raise ConfigError(
            f"{'vector' if name == VECTOR else 'tune.lora'}.layers={settings.layers}: the model has the layers 0 to "
            f"{count - 1}, and none {', '.join(map(str, beyond))}"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        target_modules=wanted,
        layers_to_transform=settings.layers,
        exclude_modules=outside or None,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            attached = model
        else:
            attached = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        reason = one_line(error, 200)
        raise ConfigError(
            f"layers {settings.layers} with target_modules {wanted} do not fit the model: {reason}"
        ) from None
    _make_active(attached, list(attached.peft_config))
    return attached


def _make_active(model: nn.Module, names: list[str]) -> None:
    for layer in _lora_layers(model):
        layer._active_adapter = [name for name in names if name in layer.lora_A]


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """The logits of `model`, in eval mode, for the first ids of its vocabulary."""
    ids = torch.arange(1, 17, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with in_eval(model), weights_at_hand(model):
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
