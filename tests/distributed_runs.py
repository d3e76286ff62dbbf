"""What test_distributed.py runs in several processes: trainings of the two scripts, one after the other.

    torchrun --nproc_per_node 2 distributed_runs.py runs.json

runs.json has a list of [script, knobs, steps]: after so many steps, if not null, the run is broken off and resumed.
"""

import json
import sys

import nlu_models  # noqa: F401 (puts the folders of the scripts into the path)
import run_training
import run_training_nlu
from common import cli
from common.training import compute, distributed, loop

SCRIPTS = {"nlg": run_training.train_model, "nlu": run_training_nlu.train_model}


class BrokenOff(Exception):
    pass


def broken_off(train_model, knobs, steps):
    step, left = loop.optimizer_step, iter(range(steps))

    def counted(*arguments):
        if next(left, None) is None:
            raise BrokenOff
        return step(*arguments)

    loop.optimizer_step = counted
    try:
        train_model(**knobs)
    except BrokenOff:
        loop.optimizer_step = step


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = json.load(file)
    stop, distributed.stop = distributed.stop, lambda: None  # once joined, for all runs
    distributed.start(compute.choose_device("cpu"))
    distributed.start = lambda device: device
    for script, knobs, steps in runs:
        if steps is not None:
            broken_off(SCRIPTS[script], knobs, steps)
        SCRIPTS[script](**knobs, resume=steps is not None)
    stop()


if __name__ == "__main__":
    cli.run(main, under_torchrun=True)
