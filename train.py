"""Trains: `python train.py [stage=vector|finetune|infer|all] [group=choice] [key=value]`; `-m` sweeps. See --help."""

from secvec.cli import train

if __name__ == "__main__":
    raise SystemExit(train())
