"""A training of milliseconds for the tests of faults; as a program, one that torchrun can start, without transformers.

torchrun --nproc_per_node 2 toy_training.py FOLDER [--resume]
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from common import cli  # noqa: E402 (after the folder that holds it)
from common.training import distributed, loop  # noqa: E402

TASK = loop.Task(
    collate=lambda samples: {"x": torch.tensor([sample["input_ids"] for sample in samples])},
    loss_sum=lambda model, batch, _: model(batch["x"]).square().sum(),
    count=lambda samples: 8 * len(samples),
    validate=lambda model, task, samples, knobs: (0.0, {}),
)
SAMPLES = [{"input_ids": [float((i * j) % 7) for j in range(8)]} for i in range(1, 25)]


def train(folder, task=TASK, **changes):
    """(Trained weights, outcome) of a small network with dropout: six steps an epoch, three epochs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 8))
    knobs = loop.Knobs(**{"batch_size": 4, "lr": 0.1, "warmup_steps": 2, "eval_every": 4, "seed": 0, **changes})
    folder.mkdir(exist_ok=True)
    state = loop.read_state(folder / "state.pt", {}) if knobs.resume else None
    outcome = loop.train(model, task, SAMPLES, SAMPLES, knobs, folder / "state.pt", {}, state)
    return [parameter.detach() for parameter in model.parameters()], outcome


def main():
    folder, resume = Path(sys.argv[1]), "--resume" in sys.argv
    distributed.start(torch.device("cpu"))
    (folder / f"pid{distributed.rank()}").write_text(str(os.getpid()))

    def slow_loss_sum(*arguments):
        time.sleep(0.05)
        return TASK.loss_sum(*arguments)

    weights, outcome = train(folder, TASK._replace(loss_sum=slow_loss_sum), resume=resume, eval_every=15)
    if distributed.is_main():
        torch.save(
            {"weights": weights, "history": outcome.history, "first_step": outcome.first_step}, folder / "end.pt"
        )
    distributed.stop()


if __name__ == "__main__":
    cli.run(main, under_torchrun=True)
