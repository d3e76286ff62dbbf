"""What the dtype of a frozen base costs: time and peak memory of a training step in each of --base_dtype, in turn.

    cd examples/benchmarks
    python base_dtypes.py --model smollm2
    python base_dtypes.py --model smollm2 --record benchmark_base

With a folder of SmolLM2-135M it takes some minutes on two cores, and needs them for itself. In each round every base
makes one step of LoRA on all linear layers, in an order drawn anew, and a ratio is the median of the rounds' ratios,
with quartiles. The peak is that of a process of its own, from when the model is ready; some 0.5 GB of it are Python and
the libraries. Linux alone tells it. Written to --output_dir: base_dtypes.json.
"""

import ctypes
import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import measure
import torch
from common.cli import UserError, as_user_error, knob, parse_knobs, require_positive, run
from common.models import causal_lm, pretrained
from common.records import results
from common.reports import tables
from common.training import compute, memory

import loralib as lora

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


@dataclass
class Knobs:
    model: str = knob("HuggingFaceTB/SmolLM2-135M-Instruct", "folder or hub name of a model whose layers are nn.Linear")
    base_dtypes: str = knob(",".join(pretrained.BASE_DTYPES), "what to measure, comma separated; float32 always")
    precisions: str = knob("fp32,bf16", "of the matrix products (autocast), comma separated")
    batch_size: int = knob(8, "texts in a step")
    length: int = knob(64, "tokens of each")
    lora_dim: int = knob(8, "rank, on all linear layers")
    rounds: int = knob(9, "how often each base makes a step")
    threads: int = knob(2, "of the CPU")
    allow_busy: bool = knob(False, "measure though the machine does something else, too")
    output_dir: str = knob(str(HERE / "output"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


class Step:
    """A training step on one base."""

    def __init__(self, dtype, precision, knobs):
        self.model, _ = causal_lm.load_causal_lm(knobs.model, CPU)
        pretrained.store_base(self.model, dtype)
        with as_user_error(ValueError):
            lora.inject_lora(self.model, r=knobs.lora_dim, target_modules="all-linear")
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        self.precision = precision
        torch.manual_seed(1)
        ids = torch.randint(5, self.model.config.vocab_size, (knobs.batch_size, knobs.length))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def __call__(self):
        with compute.autocast(CPU, self.precision):
            loss = causal_lm.loss_sum(self.model, self.batch, 0.0) / self.batch["labels"].numel()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_of(dtype, precision, knobs):
    """The most memory of this process in three steps, what loading the model took aside."""
    step = Step(dtype, precision, knobs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(3):
        step()
    return results.peak_memory_bytes(CPU)["process"]


def check(knobs):
    """(base dtypes, precisions); raise a UserError for what cannot be measured, before anything is."""
    require_positive(knobs, "batch_size", "length", "lora_dim", "rounds", "threads")
    chosen = []
    known = {"base_dtypes": pretrained.BASE_DTYPES, "precisions": ["fp32", "bf16"]}
    for option, allowed in known.items():
        names = getattr(knobs, option).split(",")
        for name in names:
            if name not in allowed:
                raise UserError(f"--{option} {name}: must be one of {', '.join(allowed)}")
        chosen.append(names)
    dtypes, precisions = chosen
    for dtype in dtypes:
        pretrained.check_installed(dtype)
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the peak of memory can be measured on Linux alone, and this is another system")
    return ["float32", *(dtype for dtype in dtypes if dtype != "float32")], precisions


def measure_all(knobs):
    """Measure, print, write and return the record."""
    dtypes, precisions = check(knobs)
    record = measure.begin("base_dtypes", knobs, CPU)
    found = {dtype: {"seconds": {}, "ratio": {}, "peak_bytes": {}} for dtype in dtypes}
    for precision in precisions:
        steps = {dtype: Step(dtype, precision, knobs) for dtype in dtypes}
        for dtype, step in steps.items():
            frozen = [p for p in step.model.parameters() if not p.requires_grad]
            found[dtype]["base_bytes"] = sum(part.nbytes for p in frozen for part in memory.plain_tensors(p))
        times = measure.in_turn(steps, knobs.rounds, CPU, precision)
        for dtype in dtypes:
            found[dtype]["seconds"][precision] = measure.spread(times[dtype])
            found[dtype]["ratio"][precision] = measure.ratio(times, dtype, "float32")
        del steps, step
        gc.collect()
        # Or the peaks would be what the allocator keeps of freed blocks.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        for dtype in dtypes:
            found[dtype]["peak_bytes"][precision] = measure.in_own_process(peak_of, dtype, precision, knobs)
    packages = {pretrained.QUANTIZERS[dtype] for dtype in dtypes if dtype in pretrained.QUANTIZERS}
    record.update(bases=found, quantizers=measure.versions(*sorted(packages)))
    print(tables.aligned(tables.in_lists(tables.base_rows(record))))
    measure.write(record, knobs, "base_dtypes")
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
