"""A training step with LoRA on a 4-bit base, and on the fused experts of a Mixtral, beside PEFT: time and peak memory.

    cd examples/benchmarks
    python against_peft.py
    python against_peft.py --record benchmark_against_peft
    python against_peft.py --device cuda --hidden_size 2048 --num_layers 16 --batch_size 4 --length 1024

It takes some minutes on two cores, and needs them for itself. The models are made on the spot. In each round both
libraries make one step on the same model and batch, in an order drawn anew, and a ratio is the median of the rounds'
ratios, with quartiles. The peak is what three steps take beyond the model: of tensors on a GPU, elsewhere of a process
of its own, which Linux alone tells. Written to --output_dir: against_peft.json.
"""

import ctypes
import gc
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait (see base_dtypes.py).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import measure
import torch
from common.cli import UserError, knob, parse_knobs, require_positive, run
from common.models import pretrained
from common.records import results
from common.reports import tables
from common.training import compute
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import loralib as lora

HERE = Path(__file__).resolve().parent
SHAPE = {"vocab_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass
class Knobs:
    cases: str = knob("nf4,experts", "what to measure, comma separated")
    batch_size: int = knob(8, "texts in a step")
    length: int = knob(64, "tokens of each")
    lora_dim: int = knob(16, "rank")
    hidden_size: int = knob(512, "width of the models")
    num_layers: int = knob(4, "and their depth")
    rounds: int = knob(9, "how often each library makes a step")
    threads: int = knob(2, "of the CPU")
    device: str = knob("cpu", "auto, cpu or cuda; on cuda with bfloat16 autocast")
    allow_busy: bool = knob(False, "measure though the machine does something else, too")
    output_dir: str = knob(str(HERE / "output"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


def base_of(case, knobs):
    """The frozen model, and what is adapted in it, by the names that both libraries have for their arguments."""
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": knobs.hidden_size, "num_hidden_layers": knobs.num_layers}
    if case == "nf4":
        model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=3 * knobs.hidden_size))
        pretrained.store_base(model, "nf4")
        return model, {"target_modules": LINEAR}
    config = MixtralConfig(**shape, intermediate_size=knobs.hidden_size, num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM(config), {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}


class Step:
    """A training step of one library on one base."""

    def __init__(self, library, case, knobs):
        model, targets = base_of(case, knobs)
        if library == "loralib":
            lora.inject_lora(model, r=knobs.lora_dim, lora_alpha=16, **targets)
        else:
            from peft import LoraConfig, get_peft_model  # beside the library only

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(model, LoraConfig(r=knobs.lora_dim, lora_alpha=16, **targets))
        device = compute.choose_device(knobs.device)
        self.model = model.to(device).train()
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        torch.manual_seed(1)
        self.ids = torch.randint(5, SHAPE["vocab_size"], (knobs.batch_size, knobs.length)).to(device)

    def __call__(self):
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.ids.is_cuda):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_of(library, case, knobs):
    """The most memory that three steps take, beyond what there is before them: of this process, or on a GPU."""
    step = Step(library, case, knobs)
    gc.collect()
    if step.ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = results.peak_memory_bytes(step.ids.device)["process"]
    for _ in range(3):
        step()
    return results.peak_memory_bytes(step.ids.device)["process"] - before


def check(knobs):
    """The cases; raise a UserError for what cannot be measured, before anything is."""
    require_positive(knobs, "batch_size", "length", "lora_dim", "hidden_size", "num_layers", "rounds", "threads")
    cases = knobs.cases.split(",")
    for case in cases:
        if case not in ("nf4", "experts"):
            raise UserError(f"--cases {case}: must be one of nf4, experts")
    if "nf4" in cases:
        pretrained.check_installed("nf4")
    if compute.choose_device(knobs.device).type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise UserError("the peak of memory can be measured on Linux alone, and this is another system")
    return cases


def measure_all(knobs):
    """Measure, print, write and return the record."""
    cases = check(knobs)
    device = compute.choose_device(knobs.device)
    versions = measure.versions("peft", "transformers", *(["bitsandbytes"] if "nf4" in cases else []))
    record, found = measure.begin("against_peft", knobs, device), {}
    for case in cases:
        steps = {library: Step(library, case, knobs) for library in ("loralib", "peft")}
        trained = {library: sum(p.numel() for p in step.trained) for library, step in steps.items()}
        times = measure.in_turn(steps, knobs.rounds, device, case)
        del steps
        gc.collect()
        # Or the peaks would be what the allocator keeps of freed blocks.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
        peaks = {name: measure.in_own_process(peak_of, name, case, knobs) for name in ("loralib", "peft")}
        found[case] = {
            "seconds": {library: measure.spread(seconds) for library, seconds in times.items()},
            "ratio": measure.ratio(times, "loralib", "peft"),
            "peak_bytes": peaks,
            "trained": trained,
        }
    record.update(cases=found, versions=versions)
    print(tables.aligned(tables.in_lists(tables.against_peft_rows(record))))
    measure.write(record, knobs, "against_peft")
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
