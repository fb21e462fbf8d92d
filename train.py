"""Trains: `python train.py [stage=vector|finetune|infer|all] [group=choice] [key=value]`; `-m` sweeps. See --help."""

import hydra
from omegaconf import DictConfig

from secvec.cli import exit_code, for_people, overrides


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@for_people
def main(cfg: DictConfig) -> None:
    """One run."""
    from secvec.config.load import RunConfig, load
    from secvec.run import train

    train(load(cfg, RunConfig), overrides())


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "train"))
