"""Fine-tune an encoder with LoRA on one of the eight GLUE tasks.

    cd examples/NLU
    python run_training_nlu.py --task sst2
    python run_training_nlu.py --task sst2 --adapt full
    python run_training_nlu.py --task mnli --preset paper --model roberta-base --data_dir ~/glue --precision bf16
    python run_training_nlu.py --task rte --preset paper --model roberta-base --data_dir ~/glue \\
        --init_adapter output/mnli/adapter.safetensors
    torchrun --nproc_per_node 2 run_training_nlu.py --task qqp

or from Python, in this folder:

    from run_training_nlu import train_model
    train_model("sst2", num_epochs=5)

The tasks are sst2, mnli, qnli, rte, mrpc, cola, qqp and stsb. The first command uses the model and the data that ship
here. The others train all parameters instead; follow the paper's recipe with a model from the hub on the official
files; begin with the adapter of another task, as the paper does for MRPC, RTE and STS-B; and share every batch between
two processes. Any folder or hub name of an encoder will do (RoBERTa, BERT, DistilBERT, DeBERTa, ...), and a decoder,
too. `--adapt head` trains the head alone, on top of the frozen model.

The head is new and is trained and saved with the adapter. What is kept is the checkpoint that was best by the task's
own metric on tune.tsv or, where the data have none, as the official ones, on the dev set, so that the scores are those
of a choice among a few. The majority column shows what guessing the most common label (or the mean) of the training
set scores on the dev set. The data that ship here have labels with noise; the ceiling column shows what the labels
before the noise score, which is the most that can be learnt. Written to --output_dir: adapter.safetensors for
run_inference_nlu.py (or the folder model/ unless LoRA was trained); dev_predictions.jsonl; and results.json, the record
of the run. A run that Ctrl-C or SIGTERM stopped goes on with --resume after its last step, one that was killed after
its last validation, to the bit on a CPU.
"""

import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
from common.cli import UserError, as_user_error, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import glue
from common.models import pretrained
from common.models import sequence_classification as classification
from common.records import results
from common.scores import glue_scores
from common.training import compute, distributed, loop

import loralib as lora
from loralib.hub import UPSTREAM_SUFFIXES

HERE = Path(__file__).resolve().parent
# Batch size, learning rate and epochs of the authors' RoBERTa-base runs (table 9 of the paper, and their code).
PAPER = {
    "sst2": (128, 5e-4, 60),
    "mnli": (128, 5e-4, 30),
    "qnli": (256, 4e-4, 25),
    "rte": (256, 5e-4, 80),
    "mrpc": (128, 4e-4, 30),
    "cola": (64, 4e-4, 80),
    "qqp": (128, 5e-4, 25),
    "stsb": (128, 4e-4, 40),
}
# The tasks on which the paper begins with the adapter of MNLI.
FROM_MNLI = ("mrpc", "rte", "stsb")
# The learning rate where none is given; full fine-tuning wants about a tenth of LoRA's.
LEARNING_RATES = {"lora": 4e-3, "full": 4e-4, "head": 4e-3}
# What a resumed run may change: it does not touch the training.
FREE_TO_CHANGE = {"output_dir", "record", "resume", "device", "eval_batch_size"}


def presets(given):
    """The presets for a task: where a knob is not given."""
    batch_size, lr, num_epochs = PAPER[glue.task_of(given.get("task", Knobs.task)).name]
    rates = {} if given.get("adapt", Knobs.adapt) != "lora" else {"lr": lr}  # the paper has no recipe for the others
    return {
        "fast": {},
        "paper": {"batch_size": batch_size, "num_epochs": num_epochs, "seq_len": 512, "weight_decay": 0.1, **rates},
    }


@dataclass
class Knobs(loop.Knobs):
    task: str = knob("sst2", "what to learn", glue.TASKS)
    preset: str = knob("fast", "recipe for all knobs that are not given", ["fast", "paper"])
    model: str = knob(str(HERE / "model"), "folder or hub name of an encoder, or of a decoder")
    data_dir: str = knob(str(HERE / "data"), "folder of the GLUE folders, such as SST-2 with its train.tsv and dev.tsv")
    output_dir: str | None = knob(None, "folder for what the run writes; by default output/ and the task's name here")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")
    adapt: str = knob("lora", "what trains beside the head: adapters, everything, or nothing", ["lora", "full", "head"])
    lora_dim: int = knob(8, "rank; 8 is the paper's for RoBERTa-base on GLUE")
    lora_alpha: float = knob(16.0, "the update is scaled by lora_alpha / lora_dim; as in the authors' files")
    lora_dropout: float = knob(0.0, "probability, on the input of the adapters")
    target_modules: str | None = knob(
        None, "layers to adapt, comma separated, or all-linear; by default query and value of the attention"
    )
    init_adapter: str | None = knob(None, "file of an adapter to begin with, without its head, such as one of MNLI")
    seq_len: int = knob(128, "most tokens of the texts of a line together; longer ones are cut, and counted")
    batch_size: int = knob(32, "lines in an optimizer step, over all processes")
    warmup_steps: float = knob(0.06, "steps up to the peak, or below 1 a share of all; the paper's share")
    max_train_samples: int | None = knob(None, "train on so many lines, drawn with the seed")
    max_eval_samples: int | None = knob(None, "validate on so many lines, drawn with the seed")
    seed: int = knob(0, "of the head, the adapters, the order of the lines and dropout; 0 is the paper authors'")


def check(knobs):
    """Raise a UserError for a knob that is out of range, or does not go with another."""
    loop.check(knobs)
    require_positive(knobs, "seq_len", "max_train_samples", "max_eval_samples")
    if knobs.init_adapter is not None:
        if knobs.adapt != "lora":
            raise UserError(f"--init_adapter goes with --adapt lora, and this is --adapt {knobs.adapt}; leave it out")
        if not Path(knobs.init_adapter).exists():
            raise UserError(
                f"--init_adapter {knobs.init_adapter}: no such file; run_training_nlu.py --task mnli writes one"
            )
    if knobs.label_smoothing and glue.task_of(knobs.task).labels is None:
        raise UserError(f"--label_smoothing {knobs.label_smoothing}: {knobs.task} is a regression, which has none")


def load_data(task, knobs):
    """{split: examples} of the training set, the dev sets, and the set to choose on if the data have one."""
    splits = {split: glue.read_examples(path, task) for split, path in glue.find_files(knobs.data_dir, task).items()}
    return {
        split: some(examples, knobs.max_train_samples if split == "train" else knobs.max_eval_samples, split, knobs)
        for split, examples in splits.items()
    }


def some(examples, most, split, knobs):
    """At most so many of the examples, drawn with the seed."""
    if not most or most >= len(examples):
        return examples
    print(f"{split}: {most:,} of {len(examples):,} lines")
    return random.Random(knobs.seed).sample(examples, most)


def adapt_model(model, heads, knobs):
    """Choose what trains, which is all that LoRA, full fine-tuning and the head alone differ in."""
    model.requires_grad_(knobs.adapt == "full")
    if knobs.adapt == "head":
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
    if knobs.adapt == "lora":
        targets = knobs.target_modules
        if targets and targets != "all-linear":
            targets = targets.split(",")
        torch.manual_seed(knobs.seed)
        with as_user_error(OSError, TypeError, ValueError):
            # Everything is frozen from here on but the adapters and the head, which is saved with them.
            lora.inject_lora(
                model,
                r=knobs.lora_dim,
                lora_alpha=knobs.lora_alpha,
                lora_dropout=knobs.lora_dropout,
                target_modules=targets,
                modules_to_save=heads,
            )
            if knobs.init_adapter is not None:
                # Upstream's files do not say their lora_alpha.
                alpha = knobs.lora_alpha if Path(knobs.init_adapter).suffix in UPSTREAM_SUFFIXES else None
                lora.load_lora(model, knobs.init_adapter, lora_alpha=alpha, heads=False)
                for layer in model.modules():
                    if isinstance(layer, lora.LoRALayer) and layer.lora_alpha != knobs.lora_alpha:
                        raise UserError(
                            f"--lora_alpha {knobs.lora_alpha:g}: {knobs.init_adapter} was trained with "
                            f"{layer.lora_alpha:g}; give --lora_alpha {layer.lora_alpha:g}"
                        )


def save_model(model, tokenizer, knobs):
    """Write what was trained to output_dir; return the files."""
    output_dir = Path(knobs.output_dir)
    if knobs.adapt == "lora":
        adapter = output_dir / "adapter.safetensors"
        with as_user_error(OSError):  # adapters and head, and what they are for
            lora.save_lora(model, adapter, metadata={"task": knobs.task})
        return [adapter]
    return pretrained.save(model, tokenizer, output_dir / "model")


def encode_examples(examples, tokenizer, seq_len):
    """The samples of the training loop."""
    return [
        {**classification.encode(tokenizer, example.texts, seq_len), "label": example.label} for example in examples
    ]


def ceiling(examples, task):
    """What the labels before noise score, with the share of labels that the noise changed; None if not known."""
    rule, labels = zip(*((example.rule, example.label) for example in examples), strict=True)
    if None in rule:
        return None
    changed = sum(before != after for before, after in zip(rule, labels, strict=True)) / len(labels)
    return {"labels_changed": changed, "scores": glue_scores.score(rule, labels, task)}


def describe(examples, samples, task):
    """Classes and lengths of a split."""
    labels = [example.label for example in examples]
    lengths = [len(sample["input_ids"]) for sample in samples]
    classes = Counter(task.labels[label] for label in labels) if task.labels else None
    return {
        "classes": classes and {name: classes[name] for name in task.labels},
        "mean_label": None if task.labels else statistics.fmean(labels),
        "tokens": {"median": statistics.median(lengths), "most": max(lengths)},
        "cut": sum(sample["cut"] for sample in samples),
    }


def evaluate(model, samples, tokenizer, task, knobs):
    """(Scores, predictions, probabilities or None) on a dev set."""
    output = classification.predict(model, samples, knobs, tokenizer, progress=distributed.is_main())
    predictions = classification.decide(output)
    scores = glue_scores.score(predictions, [sample["label"] for sample in samples], task)
    return scores, predictions, output.softmax(-1).tolist() if task.labels else None


def train_model(task, **overrides):
    """Train on a task with the preset but for `overrides`, print and write the results, and return them."""
    overrides = {"task": glue.task_of(task).name, **overrides}
    knobs = fill_in(Knobs, overrides, presets)
    if knobs.lr is None:
        knobs.lr = LEARNING_RATES[knobs.adapt]
    if knobs.output_dir is None:
        knobs.output_dir = str(HERE / "output" / knobs.task)
    started = time.perf_counter()
    check(knobs)
    if knobs.preset == "paper" and knobs.adapt == "lora" and knobs.task in FROM_MNLI and knobs.init_adapter is None:
        print("the paper begins this task with an adapter of mnli; give --init_adapter for that")
    task, output_dir = glue.task_of(knobs.task), make_output_folder(knobs.output_dir)
    device = distributed.start(compute.choose_device(knobs.device))
    splits = load_data(task, knobs)
    load_on = torch.device("cpu") if knobs.fsdp else device
    loaded = model, tokenizer, heads, _ = classification.load(knobs.model, task, load_on, knobs.seed)
    train_labels = [example.label for example in splits["train"]]
    if task.labels is None:
        classification.begin_at_the_mean(loaded, train_labels)
    window = pretrained.context_window(model)
    if knobs.seq_len > window:
        raise UserError(f"--seq_len {knobs.seq_len}: the model reads at most {window} tokens; use that or less")
    adapt_model(model, heads, knobs)
    if knobs.fsdp:
        distributed.shard(model, device)

    samples = {split: encode_examples(examples, tokenizer, knobs.seq_len) for split, examples in splits.items()}
    parameters = lora.count_parameters(model)
    files = glue.find_files(knobs.data_dir, task)
    record = results.begin(f"glue {task.name}", knobs, files, parameters, model, device)
    if knobs.init_adapter is not None:
        record["init_adapter"] = results.weights_fingerprint(knobs.init_adapter)
    record["counts"] = {f"{split} lines": len(examples) for split, examples in splits.items()}
    record["splits"] = {split: describe(splits[split], samples[split], task) for split in splits}
    record["ceiling"] = {split: ceiling(splits[split], task) for split in splits}
    report_data(record)
    dev_splits = [split for split in splits if split.startswith("dev")]
    chosen_on = record["chosen_on"] = "tune" if "tune" in splits else "dev"
    record["majority"] = {}
    for split in dev_splits:
        labels = [example.label for example in splits[split]]
        guesses = glue_scores.majority(train_labels, len(labels), task)
        record["majority"][split] = glue_scores.score(guesses, labels, task)

    state_path = output_dir / "training_state.pt"
    identity = loop.identity(knobs, FREE_TO_CHANGE, record, ("train", chosen_on))
    state = loop.read_state(state_path, identity) if knobs.resume else None
    outcome = loop.train(
        model,
        classification.training_task(task, tokenizer),
        samples["train"],
        samples[chosen_on],
        knobs,
        state_path,
        identity,
        state,
    )
    results.add_training(record, outcome, device)
    if distributed.is_main() or knobs.fsdp:  # of sharded weights the first process writes, with the help of all
        results.add_checkpoint(record, save_model(model, tokenizer, knobs))
    record["after"], lines = {}, []
    for split in dev_splits:
        record["after"][split], predictions, probabilities = evaluate(model, samples[split], tokenizer, task, knobs)
        lines += prediction_lines(split, splits[split], predictions, probabilities)
    record["seconds"]["total"] = time.perf_counter() - started
    if distributed.is_main():
        results.write_atomically(output_dir / "dev_predictions.jsonl", "".join(lines))
        results.write_record(record, output_dir, knobs.record)
        state_path.unlink(missing_ok=True)  # everything it is for has been written
        report(record, output_dir)
    distributed.stop()
    return record


def prediction_lines(split, examples, predictions, probabilities):
    """JSONL of what the model says of each line."""
    for index, (example, prediction) in enumerate(zip(examples, predictions, strict=True)):
        line = {"split": split, "texts": example.texts, "label": example.label, "prediction": prediction}
        if probabilities is not None:
            line["probabilities"] = probabilities[index]
        yield json.dumps(line, ensure_ascii=False) + "\n"


def report_data(record):
    """Print what there is to learn from, and what trains."""
    for split, facts in record["splits"].items():
        lines, tokens = record["counts"][f"{split} lines"], facts["tokens"]
        if facts["classes"]:
            kinds = ", ".join(f"{name} {count / lines:.1%}" for name, count in facts["classes"].items())
        else:
            kinds = f"mean label {facts['mean_label']:.2f}"
        cut = f", {facts['cut']:,} lines cut to that" if facts["cut"] else ""
        known = record["ceiling"][split]
        noise = f"; noise in {known['labels_changed']:.1%} of the labels" if known else ""
        print(
            f"{split:<15} {lines:,} lines: {kinds}{noise}; {tokens['median']:g} tokens, at most {tokens['most']}{cut}"
        )
    total, trainable = record["parameters"]["total"], record["parameters"]["trainable"]
    print(f"{'parameters':<15} {total:,} in total, {trainable:,} trainable ({100 * trainable / total:.2f} %)")


def report(record, output_dir):
    """Print what the record says."""
    columns = {"majority": record["majority"], "after": record["after"]}
    if all(record["ceiling"][split] for split in record["after"]):
        columns["ceiling"] = {split: record["ceiling"][split]["scores"] for split in record["after"]}
    print(f"\n{'':<15} {'':<20} " + " ".join(f"{title:>10}" for title in columns))
    for split, scores in record["after"].items():
        for name in scores:
            cells = [found[split][name] for found in columns.values()]
            texts = [f"{'not defined':>11}" if cell is None else f"{100 * cell:>10.1f}" for cell in cells]
            print(f"{split:<15} {glue_scores.METRICS[name]:<20} " + " ".join(texts))
    sizes, seconds = record["bytes"], record["seconds"]
    share = sizes["checkpoint"] / sizes["model"]
    print(f"\n{'best step':<15} {record['best_step']} of {record['history'][-1]['step']}")
    print(
        f"{'checkpoint':<15} {sizes['checkpoint'] / 1024:,.1f} KiB, {share:.2%} of the model's "
        f"{sizes['model'] / 2**20:,.1f} MiB"
    )
    print(f"{'seconds':<15} {seconds['train']:.0f} training, {seconds['total']:.0f} in all")
    print(f"{'written':<15} to {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")


def main():
    knobs = vars(parse_knobs(Knobs, __doc__, presets=presets))
    train_model(knobs.pop("task"), **knobs)


if __name__ == "__main__":
    run(main, under_torchrun=True)
