"""Stands in for train.py in tests of multiruns: composes, starts and records as it does, but trains nothing.

Seed 13 is killed, seed 14 is a user's mistake, a learning rate above 0.1 diverges; a plan is one line.
`after/behavior_rate` is the rate under `tune=full` and 0 under `tune=lora`; `after/task_accuracy` is 1 minus ten times
the rate.
"""

import json
import os
import signal
import time
from pathlib import Path

from omegaconf import DictConfig

from secvec.cli import run_command
from secvec.errors import ConfigError, DivergedError
from secvec.multirun.forked import CONTEXT

CONTEXT.set_forkserver_preload(["secvec.multirun.forked", "secvec.cli"])  # no job of ours imports more


def main(cfg: DictConfig) -> None:
    if cfg.get("plan"):
        if cfg.seed == 14:
            raise ConfigError("seed 14 is not liked")
        print(f"plan: seed {cfg.seed}")
        return
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as stream:
        stream.write(json.dumps({name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MASTER_PORT")}) + "\n")
    if cfg.seed == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.seed == 14:
        raise ConfigError("seed 14 is not liked")
    rate = cfg.optimizer.lr
    if rate > 0.1:
        raise DivergedError("the loss is nan")
    time.sleep(float(os.environ.get("STAND_IN_SECONDS", "0")))
    values = {"after/behavior_rate": rate if cfg.tune.kind == "full" else 0.0, "after/task_accuracy": 1 - 10 * rate}
    record = {
        "schema": 1, "run": folder.name, "stage": cfg.stage, "seed": cfg.seed, "defense": cfg.defense.name,
        "status": "completed", "stages": ["finetune", "infer"], "key": cfg.key, "sweep": cfg.sweep, "config": {},
        "metrics": {name: {"value": value, "n": 10} for name, value in values.items()},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))


if __name__ == "__main__":
    raise SystemExit(run_command("train", main))
