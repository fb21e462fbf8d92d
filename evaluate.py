"""Evaluates any saved backbone: `python evaluate.py model.name_or_path=FOLDER [key=value]`. See --help."""

import hydra
from omegaconf import DictConfig

from secvec.cli import exit_code, for_people, overrides


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
@for_people
def main(cfg: DictConfig) -> None:
    """One evaluation."""
    from secvec.config.load import EvaluateConfig, load
    from secvec.run import evaluate

    evaluate(load(cfg, EvaluateConfig), overrides())


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "evaluate"))
