"""A batch whose rows have adapters of their own beside PEFT: time, exactness, and the memory of 100 adapters.

    cd examples/benchmarks
    python adapters_per_row.py
    python adapters_per_row.py --record benchmark_adapters_per_row

Some ten minutes on two cores, which it needs for itself. The model is a Llama with random weights, all linear layers
adapted; both libraries hold the same adapters, and the rows take them in turn. In each round every way answers the same
batch, in an order drawn anew: the base alone, this library within `lora.adapters_per_row`, and PEFT with
`adapter_names`; once for a whole text and once for one more token with a cache. A ratio is the median of the rounds'
ratios, with quartiles; "added" is what a way takes beyond the base. The error is the largest difference from the rows
alone, each under its adapter, through the largest output. Written to --output_dir: adapters_per_row.json.
"""

import gc
import os
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait (see run_benchmarks.py).
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import measure
import torch
from common.cli import UserError, knob, parse_knobs, require_positive, run
from common.reports import tables
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import loralib as lora

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
SHAPE = {"vocab_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
MANY = 100
TRIED = 4  # rows that are computed alone


@dataclass
class Knobs:
    adapters: str = knob("2,8,32", "how many there are, comma separated")
    rows: str = knob("1,8,64", "texts in a batch")
    length: int = knob(64, "tokens of each")
    lora_dim: int = knob(16, "rank")
    hidden_size: int = knob(512, "width of the model")
    num_layers: int = knob(4, "and its depth")
    rounds: int = knob(9, "how often each way answers")
    threads: int = knob(2, "of the CPU")
    allow_busy: bool = knob(False, "measure though the machine does something else, too")
    output_dir: str = knob(str(HERE / "output"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


def base_of(knobs):
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": knobs.hidden_size, "num_hidden_layers": knobs.num_layers}
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=3 * knobs.hidden_size)).eval()


def inject(model, knobs, names):
    """Give the model adapters of those names that do something."""
    for name in names:
        lora.inject_lora(model, r=knobs.lora_dim, lora_alpha=16, target_modules=LINEAR, adapter_name=name)
        for key, tensor in lora.lora_state_dict(model).items():
            if key.endswith("lora_B"):
                torch.nn.init.normal_(tensor, std=0.02)


def both(knobs, count):
    """The model of each library with the same adapters, and their names."""
    names = [f"task{number}" for number in range(count)]
    ours, theirs = base_of(knobs), base_of(knobs)
    inject(ours, knobs, names)
    config = LoraConfig(r=knobs.lora_dim, lora_alpha=16, target_modules=LINEAR)
    for name in names:
        if isinstance(theirs, LlamaForCausalLM):
            theirs = get_peft_model(theirs, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        lora.set_adapter(ours, name)
        state = {f"base_model.model.{key}.{name}.weight": tensor for key, tensor in lora.lora_state_dict(ours).items()}
        if theirs.load_state_dict(state, strict=False).unexpected_keys:
            raise RuntimeError("PEFT calls its tensors otherwise than this script")
    return ours, theirs.eval(), names


class Work:
    """A batch, whole or one more token with a cache, in each way."""

    def __init__(self, ours, theirs, names, rows, knobs):
        self.ours, self.theirs = ours, theirs
        self.names = [names[row % len(names)] for row in range(rows)]
        torch.manual_seed(1)
        self.ids = torch.randint(5, SHAPE["vocab_size"], (rows, knobs.length))
        with torch.no_grad(), lora.disable_adapters(ours):
            self.cache = ours(self.ids, use_cache=True).past_key_values

    def answer(self, model, step, **more):
        if step == "text":
            return model(input_ids=self.ids, use_cache=False, **more).logits
        logits = model(input_ids=self.ids[:, :1], past_key_values=self.cache, use_cache=True, **more).logits
        self.cache.crop(-1)
        return logits

    def base(self, step):
        with lora.disable_adapters(self.ours):
            return self.answer(self.ours, step)

    def loralib(self, step):
        with lora.adapters_per_row(self.ours, self.names):
            return self.answer(self.ours, step)

    def peft(self, step):
        return self.answer(self.theirs, step, adapter_names=self.names)

    def alone(self):
        """What the first rows give by themselves."""
        outputs = []
        for row, name in enumerate(self.names[:TRIED]):
            lora.set_adapter(self.ours, name)
            outputs.append(self.ours(input_ids=self.ids[row : row + 1], use_cache=False).logits)
        return torch.cat(outputs)


@torch.inference_mode()
def cell(work, knobs, title):
    """Times and errors of one number of adapters and rows."""
    wanted, found = work.alone(), {"error": {}}
    for library in ("loralib", "peft"):
        error = (getattr(work, library)("text")[:TRIED] - wanted).abs().max() / wanted.abs().max()
        found["error"][library] = error.item()
    for step in ("text", "token"):
        # Entering a block is timed with the call: that is what a server does for every batch.
        ways = {way: lambda way=way, step=step: getattr(work, way)(step) for way in ("base", "loralib", "peft")}
        times = measure.in_turn(ways, knobs.rounds, CPU, f"{title}, {step}")
        added = {way: [a - b for a, b in zip(times[way], times["base"], strict=True)] for way in ("loralib", "peft")}
        found[step] = {
            "seconds": {way: measure.spread(seconds) for way, seconds in times.items()},
            "ratio": measure.ratio(times, "loralib", "peft"),
            "added": {way: statistics.median(seconds) for way, seconds in added.items()},
        }
    with lora.adapters_per_row(work.ours, work.names):  # within one, as generate does it
        inside = measure.in_turn(
            {"loralib": lambda: work.answer(work.ours, "token"), "peft": lambda: work.peft("token")},
            knobs.rounds,
            CPU,
            f"{title}, tokens",
        )
    found["tokens"] = {
        "seconds": {way: measure.spread(seconds) for way, seconds in inside.items()},
        "ratio": measure.ratio(inside, "loralib", "peft"),
    }
    return found


def memory_of(knobs):
    """The bytes of the base and of many adapters on it, by their tensors and by what the process grows."""
    model = base_of(knobs)
    base, before = sum(parameter.nbytes for parameter in model.parameters()), resident_bytes()
    inject(model, knobs, [f"task{number}" for number in range(MANY)])
    adapter = sum(tensor.nbytes for tensor in lora.lora_state_dict(model).values())
    gc.collect()
    return {"base": base, "adapter": adapter, "adapters": MANY, "process_growth": resident_bytes() - before}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check(knobs):
    """(numbers of adapters, of rows); raise a UserError for what cannot be measured, before anything is."""
    require_positive(knobs, "length", "lora_dim", "hidden_size", "num_layers", "rounds", "threads")
    numbers = []
    for option in ("adapters", "rows"):
        given = getattr(knobs, option)
        if not all(part.isdigit() and int(part) for part in given.split(",")):
            raise UserError(f"--{option} {given}: must be positive numbers, comma separated")
        numbers.append([int(part) for part in given.split(",")])
    if not Path("/proc/self/statm").exists():
        raise UserError("the memory can be measured on Linux alone, and this is another system")
    return numbers


def measure_all(knobs):
    """Measure, print, write and return the record."""
    adapters, rows = check(knobs)
    record = measure.begin("adapters_per_row", knobs, CPU)
    warnings.simplefilter("ignore")  # what PEFT says of adapters that it has not trained
    cells = []
    for count in adapters:
        ours, theirs, names = both(knobs, count)
        for number in rows:
            found = cell(Work(ours, theirs, names, number, knobs), knobs, f"{count} adapters, {number} rows")
            cells.append({"adapters": count, "rows": number, **found})
    memory = measure.in_own_process(memory_of, knobs)
    record.update(cells=cells, memory=memory, versions=measure.versions("peft", "transformers"))
    print(tables.aligned(tables.in_lists(tables.adapters_per_row_rows(record))))
    measure.write(record, knobs, "adapters_per_row")
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
