"""Fine-tune a GPT-2 with LoRA to turn E2E meaning representations into sentences.

    cd examples/NLG
    python run_training.py
    python run_training.py --model gpt2 --lr 1e-3 --data_dir ../../../shared/data/e2e --max_steps 200

The first command uses the model and the data that ship here and takes about two minutes on 2 CPU cores. On the held-out
test file (examples/results/nlg_embedded.json is the record of such a run) it reaches

                               before    after  references
    BLEU                          4.2     92.7
    slot values, %               18.1     98.8       100.0

The second does the same with real ones: any folder or hub name of a causal language model, any E2E files. Written to
--output_dir: adapter.safetensors, the adapter alone, for run_inference.py; and results.json, the record of the run.
"""

import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
from common import causal_lm, e2e, metrics, results, training
from common.cli import UserError, as_user_error, knob, parse_knobs, require_positive, run

import loralib as lora

HERE = Path(__file__).resolve().parent
EVAL_BATCH_SIZE = 40


@dataclass
class Knobs:
    model: str = knob(str(HERE / "model"), "folder or hub name of a causal language model")
    data_dir: str = knob(str(HERE / "data"), "folder of the three E2E files")
    train_file: str = knob("train.txt", "file in data_dir to train on")
    valid_file: str = knob("valid.txt", "file in data_dir for the validation loss")
    test_file: str = knob("test.txt", "file in data_dir that is scored before and after")
    output_dir: str = knob(str(HERE / "output"), "folder for the adapter and the record of the run")
    lora_dim: int = knob(4, "rank; 4 is the paper's for GPT-2 on E2E")
    lora_alpha: float = knob(32.0, "the update is scaled by lora_alpha / lora_dim; the paper's")
    lora_dropout: float = knob(0.0, "probability, on the input of the adapters; the paper takes 0.1")
    target_modules: str | None = knob(
        None, "layers to adapt, comma separated; by default query and value of the attention"
    )
    num_epochs: int = knob(3, "passes over the training file")
    max_steps: int | None = knob(None, "stop after so many optimizer steps, for a quick look at a large file")
    batch_size: int = knob(8, "texts in an optimizer step")
    lr: float = knob(7e-3, "peak learning rate; a large pretrained model wants less, GPT-2 medium 2e-4")
    warmup_steps: int = knob(30, "steps up to the peak; the adapters start from zero and Adam without statistics")
    seq_len: int = knob(256, "most tokens of meaning and text together; longer ones are left out, and counted")
    max_train_samples: int | None = knob(None, "train on so many lines, drawn with the seed")
    max_eval_samples: int | None = knob(None, "validate and score on so many meanings, drawn with the seed")
    seed: int = knob(110, "of the adapters, the order of the texts and dropout; 110 is the paper authors'")
    device: str = knob("auto", "cpu, cuda, mps, or auto for the fastest that is there")


def load_data(knobs):
    """The training pairs, and {meaning: references} to validate and to test on."""
    folder = Path(knobs.data_dir)
    train = e2e.read_pairs(folder / knobs.train_file)
    valid = e2e.group_references(e2e.read_pairs(folder / knobs.valid_file))
    test = e2e.group_references(e2e.read_pairs(folder / knobs.test_file))
    if knobs.max_train_samples and knobs.max_train_samples < len(train):
        print(f"training on {knobs.max_train_samples} of {len(train)} texts (--max_train_samples)")
        train = random.Random(knobs.seed).sample(train, knobs.max_train_samples)
    return train, _some_meanings(valid, "validating", knobs), _some_meanings(test, "testing", knobs)


def _some_meanings(groups, doing, knobs):
    if not knobs.max_eval_samples or knobs.max_eval_samples >= len(groups):
        return groups
    print(f"{doing} on {knobs.max_eval_samples} of {len(groups)} meanings (--max_eval_samples)")
    chosen = set(random.Random(knobs.seed).sample(list(groups), knobs.max_eval_samples))
    return {meaning: references for meaning, references in groups.items() if meaning in chosen}


def build_model(knobs, device):
    """The pretrained model with fresh adapters, and its tokenizer."""
    model, tokenizer = causal_lm.load_causal_lm(knobs.model, device)
    window = causal_lm.context_window(model)
    if knobs.seq_len > window:
        raise UserError(f"--seq_len {knobs.seq_len}: the model reads at most {window} tokens; use that or less")
    # Everything but the adapters is frozen from here on. Their update starts at zero: the outputs have not changed.
    torch.manual_seed(knobs.seed)
    with as_user_error(TypeError, ValueError):
        lora.inject_lora(
            model,
            r=knobs.lora_dim,
            lora_alpha=knobs.lora_alpha,
            lora_dropout=knobs.lora_dropout,
            target_modules=knobs.target_modules and knobs.target_modules.split(","),
        )
    return model, tokenizer


def encode_pairs(pairs, tokenizer, seq_len, purpose):
    """Token samples of the pairs but the too long ones: a text cut off would teach to stop in mid-sentence."""
    samples = [causal_lm.encode(tokenizer, meaning, reference) for meaning, reference in pairs]
    short = [sample for sample in samples if len(sample["input_ids"]) <= seq_len]
    if len(short) < len(samples):
        print(f"left out {len(samples) - len(short)} of {len(samples)} {purpose} texts of more than {seq_len} tokens")
    if not short:
        raise UserError(f"--seq_len {seq_len}: every one of the {len(samples)} {purpose} texts is longer")
    return short


def evaluate(model, tokenizer, test):
    """The scores of the texts that the model writes for the test meanings, and the texts."""
    started = time.perf_counter()
    texts = causal_lm.generate(model, tokenizer, list(test), batch_size=EVAL_BATCH_SIZE)
    bleu, _ = metrics.bleu(texts, list(test.values()))
    return {
        "bleu": bleu,
        "slot_share": metrics.slot_share(texts, list(test)),
        "seconds": time.perf_counter() - started,
    }, texts


def train_model(**overrides):
    """Train with the default knobs but for `overrides`, print and write the results, and return them."""
    knobs = Knobs(**overrides)
    started = time.perf_counter()
    require_positive(knobs, "num_epochs", "max_steps", "batch_size", "lr", "seq_len")
    require_positive(knobs, "max_train_samples", "max_eval_samples")
    output_dir = Path(knobs.output_dir)
    with as_user_error(OSError):  # before the work rather than after it
        output_dir.mkdir(parents=True, exist_ok=True)
    device = training.choose_device(knobs.device)
    data_files = [Path(knobs.data_dir) / name for name in (knobs.train_file, knobs.valid_file, knobs.test_file)]
    train, valid, test = load_data(knobs)
    fingerprints = {path.name: {"sha256": results.sha256(path)} for path in data_files}  # now: a file may change later
    model, tokenizer = build_model(knobs, device)

    parameters = lora.count_parameters(model)
    percent = 100 * parameters.trainable / parameters.total
    print(f"data         {len(train):,} texts to train on, {len(test):,} meanings to test on")
    print(f"parameters   {parameters.total:,} in total, {parameters.trainable:,} trainable ({percent:.2f} %)")

    train_samples = encode_pairs(train, tokenizer, knobs.seq_len, "training")
    valid_pairs = [(meaning, reference) for meaning, references in valid.items() for reference in references]
    valid_samples = encode_pairs(valid_pairs, tokenizer, knobs.seq_len, "validation")

    with lora.disable_adapters(model):  # the base alone
        before, texts_before = evaluate(model, tokenizer, test)
    training_started = time.perf_counter()
    history = training.train(
        model,
        train_samples,
        valid_samples,
        causal_lm.collate,
        epochs=knobs.num_epochs,
        max_steps=knobs.max_steps,
        batch_size=knobs.batch_size,
        lr=knobs.lr,
        warmup_steps=knobs.warmup_steps,
        seed=knobs.seed,
    )
    train_seconds = time.perf_counter() - training_started
    # The adapter alone, with its rank and alpha; whole or not at all. Saved before the test, which cannot harm it then.
    adapter = output_dir / "adapter.safetensors"
    lora.save_lora(model, adapter)
    after, texts_after = evaluate(model, tokenizer, test)  # evaluation mode merges the adapters

    # People leave out values as well: what the references mention is the share that a perfect imitation reaches.
    pairs = [(meaning, reference) for meaning, references in test.items() for reference in references]
    share_of_references = metrics.slot_share([reference for _, reference in pairs], [meaning for meaning, _ in pairs])
    _, signature = metrics.bleu(texts_after, list(test.values()))
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    total = time.perf_counter() - started
    record = {
        "task": "e2e",
        "adapt": "lora",
        "configuration": {name: results.portable(value) for name, value in asdict(knobs).items()},
        "data": fingerprints,
        "counts": {"train_texts": len(train_samples), "valid_texts": len(valid_samples), "test_meanings": len(test)},
        "parameters": parameters._asdict(),
        "bytes": {"adapter": adapter.stat().st_size, "model": model_bytes},
        "adapter_sha256": results.sha256(adapter),
        "before": before,
        "after": after,
        "references": {"slot_share": share_of_references},
        "bleu_signature": signature,
        "history": history,
        "seconds": {"train": train_seconds, "evaluate": before["seconds"] + after["seconds"], "total": total},
        "peak_memory_bytes": results.peak_memory_bytes(device),
        "environment": results.environment(device),
        "samples": [
            {"meaning": meaning, "before": texts_before[i], "after": texts_after[i], "references": test[meaning]}
            for i, meaning in list(enumerate(test))[:: max(1, len(test) // 3)][:3]
        ],
    }
    results.write_json(output_dir / "results.json", record)
    report(record, output_dir)
    return record


def report(record, output_dir):
    """Print what the record says."""
    for sample in record["samples"]:
        print()
        for name in ("meaning", "before", "after"):
            print(f"{name:<12} {sample[name]}")
        print(f"{'reference':<12} {sample['references'][0]}")
    before, after, seconds, sizes = record["before"], record["after"], record["seconds"], record["bytes"]
    mentioned = [100 * record[who]["slot_share"] for who in ("before", "after", "references")]
    print()
    print(f"{'':<24} {'before':>8} {'after':>8} {'references':>11}")
    print(f"{'BLEU':<24} {before['bleu']:8.2f} {after['bleu']:8.2f}")
    print("{:<24} {:8.2f} {:8.2f} {:11.2f}".format("slot values, %", *mentioned))
    print(f"BLEU is sacrebleu's, {record['bleu_signature']}")
    print()
    share = sizes["adapter"] / sizes["model"]
    print(
        f"checkpoint   {sizes['adapter'] / 1024:,.1f} KiB, {share:.2%} of the model's {sizes['model'] / 2**20:,.1f} MiB"
    )
    print("seconds      {train:.0f} training, {evaluate:.0f} testing, {total:.0f} in all".format(**seconds))
    print(f"written      {output_dir / 'adapter.safetensors'}, {output_dir / 'results.json'}")


def main():
    train_model(**vars(parse_knobs(Knobs, __doc__)))


if __name__ == "__main__":
    run(main)
