"""Evaluates any saved backbone: `python evaluate.py model.name_or_path=FOLDER [key=value]`. See --help."""

from secvec.cli import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())
