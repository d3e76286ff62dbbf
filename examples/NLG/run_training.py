"""Fine-tune a causal language model with LoRA to turn E2E meaning representations into sentences.

    cd examples/NLG
    python run_training.py
    python run_training.py --adapt full
    python run_training.py --preset paper --model gpt2-medium --data_dir output/e2e --precision bf16
    torchrun --nproc_per_node 2 run_training.py

The first command uses the model and the data that ship here and takes about two minutes on 2 CPU cores. On the held-out
test file (examples/results/nlg_embedded.json is the record of such a run) it reaches

                               before    after  references
    BLEU                          4.1     94.9
    slot values, %               18.1    100.0       100.0

The others train all parameters instead; follow the paper's recipe with a model from the hub on the files that
download_data.py gets; and share every batch between two processes. Any folder or hub name of a causal language model
will do, any E2E files in either official form. Written to --output_dir: adapter.safetensors, the adapter alone, for
run_inference.py (or the folder model/ after full fine-tuning); test_texts.jsonl, what it writes for the test meanings;
and results.json, the record of the run. A run that Ctrl-C or SIGTERM stopped goes on with --resume after its
last step, one that was killed after its last validation (training_state.pt), to the bit on a CPU.
"""

import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
from common.cli import UserError, as_user_error, fill_in, knob, make_output_folder, parse_knobs, require_positive, run
from common.data import e2e
from common.models import causal_lm, pretrained
from common.records import results
from common.scores import text_scores
from common.training import compute, distributed, loop

import loralib as lora

HERE = Path(__file__).resolve().parent
TASK = loop.Task(causal_lm.collate, causal_lm.loss_sum, causal_lm.count_labels)
# Where a knob is not given. The paper's recipe is that for GPT-2 medium (table 11 and the authors' code).
PRESETS = {
    "fast": {},
    "paper": {
        **{"num_epochs": 5, "batch_size": 8, "warmup_steps": 500, "seq_len": 512, "label_smoothing": 0.1},
        **{"target_modules": None, "lora_dim": 4, "lora_alpha": 32.0, "lora_dropout": 0.1},
        **causal_lm.PAPER_DECODING,
    },
}
# Full fine-tuning wants about a tenth of LoRA's learning rate; the paper has no recipe for it. LoRA's targets, rank and
# rate of the fast preset were chosen on the validation loss, which is then that of full fine-tuning.
LEARNING_RATES = {"fast": {"lora": 5e-3, "full": 7e-4}, "paper": {"lora": 2e-4, "full": 2e-5}}
# What a word for --target_modules means to lora.inject_lora, where that has another.
TARGETS = {"query-value": None}
# Above it a perplexity is no number that a computer has.
LARGEST_LOSS = math.log(sys.float_info.max)
# What is printed of the scores, and by what it is multiplied.
SCORES = {
    **{"bleu": ("BLEU", 1), "nist": ("NIST", 1), "meteor": ("METEOR", 1), "rouge_l": ("ROUGE-L", 1)},
    **{"cider": ("CIDEr", 1), "slot_share": ("slot values, %", 100), "slot_error_rate": ("slot errors, %", 100)},
    **{"distinct_1": ("distinct 1", 1), "distinct_2": ("distinct 2", 1), "perplexity": ("perplexity", 1)},
}
# What a resumed run may change: it does not touch the training.
FREE_TO_CHANGE = {"output_dir", "test_file", "skip_base", "record", "resume", "device", "eval_batch_size"}
FREE_TO_CHANGE |= set(causal_lm.PAPER_DECODING)


@dataclass
class Knobs(causal_lm.DecodingKnobs, loop.Knobs):
    preset: str = knob("fast", "recipe for all knobs that are not given", PRESETS)
    model: str = knob(str(HERE / "model"), "folder or hub name of a causal language model")
    data_dir: str = knob(str(HERE / "data"), "folder of the three E2E files, lines or CSV")
    train_file: str | None = knob(None, "file in data_dir to train on, if not called as the official one")
    valid_file: str | None = knob(None, "the same for the file of the validation loss")
    test_file: str | None = knob(None, "the same for the file that is scored before and after")
    output_dir: str = knob(str(HERE / "output"), "folder for what the run writes")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")
    adapt: str = knob("lora", "what trains: adapters, all parameters, or nothing", ["lora", "full", "none"])
    base_dtype: str = knob(
        "float32",
        "of the frozen weights; the model computes in bfloat16 if they are that; int8 needs torchao, nf4 bitsandbytes",
        pretrained.BASE_DTYPES,
    )
    lora_dim: int = knob(16, "rank; the paper's for GPT-2 on E2E is 4")
    lora_alpha: float = knob(32.0, "the update is scaled by lora_alpha / lora_dim; the paper's")
    lora_dropout: float = knob(0.0, "probability, on the input of the adapters; the paper takes 0.1")
    target_modules: str | None = knob(
        "all-linear", "layers to adapt: all-linear, query-value (of the attention; the paper's), or names by comma"
    )
    seq_len: int = knob(256, "most tokens of meaning and text together; longer ones are left out, and counted")
    max_train_samples: int | None = knob(None, "train on so many lines, drawn with the seed")
    max_eval_samples: int | None = knob(None, "validate and score on so many meanings, drawn with the seed")
    max_valid_samples: int | None = knob(None, "validate on so many meanings, whatever max_eval_samples")
    skip_base: bool = knob(False, "do not score the base before the training")


def check(knobs):
    """Raise a UserError for a knob that is out of range."""
    loop.check(knobs)
    require_positive(knobs, "seq_len", "max_train_samples", "max_eval_samples", "max_valid_samples")
    causal_lm.check_decoding(knobs)
    pretrained.check_base_dtype(knobs)


def find_files(knobs):
    """{split: path} of the data files."""
    names = {split: getattr(knobs, f"{split}_file") for split in ("train", "valid", "test")}
    return e2e.find_files(knobs.data_dir, names)


def load_data(knobs):
    """The training pairs, and {meaning: references} to validate and to test on."""
    pairs = {split: e2e.read_pairs(path) for split, path in find_files(knobs).items()}
    train = pairs["train"]
    if knobs.max_train_samples and knobs.max_train_samples < len(train):
        print(f"training on {knobs.max_train_samples} of {len(train)} texts (--max_train_samples)")
        train = random.Random(knobs.seed).sample(train, knobs.max_train_samples)
    valid, test = (e2e.group_references(pairs[split]) for split in ("valid", "test"))
    valid = some_meanings(valid, knobs.max_valid_samples or knobs.max_eval_samples, "validating", knobs.seed)
    return train, valid, some_meanings(test, knobs.max_eval_samples, "testing", knobs.seed)


def some_meanings(groups, most, doing, seed):
    """At most so many of the meanings, drawn with the seed, and their references."""
    if not most or most >= len(groups):
        return groups
    print(f"{doing} on {most} of {len(groups)} meanings")
    chosen = set(random.Random(seed).sample(list(groups), most))
    return {meaning: references for meaning, references in groups.items() if meaning in chosen}


def adapt_model(model, knobs):
    """Choose what trains, which is all that LoRA, full fine-tuning and the base alone differ in."""
    model.requires_grad_(knobs.adapt == "full")
    if knobs.adapt == "lora":
        targets = TARGETS.get(knobs.target_modules, knobs.target_modules)
        if targets and targets != "all-linear":
            targets = targets.split(",")
        torch.manual_seed(knobs.seed)
        # Everything but the adapters is frozen from here on. Their update starts at zero: the outputs have not changed.
        with as_user_error(TypeError, ValueError):
            lora.inject_lora(
                model,
                r=knobs.lora_dim,
                lora_alpha=knobs.lora_alpha,
                lora_dropout=knobs.lora_dropout,
                target_modules=targets,
            )


def save_model(model, tokenizer, knobs):
    """Write what was trained to output_dir; return the files."""
    output_dir = Path(knobs.output_dir)
    if knobs.adapt == "lora":
        adapter = output_dir / "adapter.safetensors"
        with as_user_error(OSError):
            lora.save_lora(model, adapter)  # the adapter alone, with its rank and alpha; whole or not at all
        return [adapter]
    return pretrained.save(model, tokenizer, output_dir / "model")


def encode_pairs(pairs, tokenizer, seq_len, purpose):
    """Token samples of the pairs but the too long ones: a text cut off would teach to stop in mid-sentence."""
    seen = {"unit": "text", "delay": 1, "leave": False, "disable": not distributed.is_main()}
    bar = tqdm(pairs, f"reading {purpose} texts", **seen)
    samples = [causal_lm.encode(tokenizer, *pair) for pair in bar]
    short = [sample for sample in samples if len(sample["input_ids"]) <= seq_len]
    if len(short) < len(samples):
        print(f"left out {len(samples) - len(short)} of {len(samples)} {purpose} texts of more than {seq_len} tokens")
    if not short:
        raise UserError(f"--seq_len {seq_len}: every one of the {len(samples)} {purpose} texts is longer")
    return short


def encode_test(model, tokenizer, test):
    """The samples of {meaning: references}, all of them: what is scored is never left out."""
    samples = encode_pairs(all_pairs(test), tokenizer, math.inf, "test")
    longest, window = max(len(sample["input_ids"]) for sample in samples), pretrained.context_window(model)
    if longest > window:
        raise UserError(f"a text of the test file has {longest} tokens, and the model reads at most {window}")
    return samples


def all_pairs(groups):
    return [(meaning, reference) for meaning, references in groups.items() for reference in references]


def evaluate(model, tokenizer, test, knobs, what="the result"):
    """(Scores of the texts that the model writes for the test meanings, the texts)."""
    loss = loop.mean_loss(model, TASK, encode_test(model, tokenizer, test), knobs)
    generated = causal_lm.generate(model, tokenizer, list(test), knobs, f"scoring {what}")
    scores = text_scores.score(generated.texts, list(test.values()), list(test)) if distributed.is_main() else {}
    return {
        **scores,
        "perplexity": math.exp(loss) if loss < LARGEST_LOSS else None,
        "tokens": generated.tokens,
        "generation_seconds": generated.seconds,
    }, generated.texts


def train_model(**overrides):
    """Train with the preset but for `overrides`, print and write the results, and return them."""
    knobs = fill_in(Knobs, overrides, PRESETS)
    if knobs.lr is None and knobs.adapt != "none":
        knobs.lr = LEARNING_RATES[knobs.preset][knobs.adapt]
    started = time.perf_counter()
    check(knobs)
    output_dir = make_output_folder(knobs.output_dir)
    device = distributed.start(compute.choose_device(knobs.device))
    train, valid, test = load_data(knobs)
    model, tokenizer = causal_lm.load_causal_lm(knobs.model, torch.device("cpu") if knobs.fsdp else device)
    window = pretrained.context_window(model)
    if knobs.seq_len > window:
        raise UserError(f"--seq_len {knobs.seq_len}: the model reads at most {window} tokens; use that or less")
    pretrained.store_base(model, knobs.base_dtype)
    adapt_model(model, knobs)
    if knobs.fsdp:
        distributed.shard(model, device)

    parameters = lora.count_parameters(model)
    percent = 100 * parameters.trainable / parameters.total
    print(f"data         {len(train):,} texts to train on, {len(test):,} meanings to test on")
    print(f"parameters   {parameters.total:,} in total, {parameters.trainable:,} trainable ({percent:.2f} %)")

    train_samples = encode_pairs(train, tokenizer, knobs.seq_len, "training")
    valid_samples = encode_pairs(all_pairs(valid), tokenizer, knobs.seq_len, "validation")
    encode_test(model, tokenizer, test)  # what is too long is told before the training

    record = results.begin("e2e", knobs, find_files(knobs), parameters, model, device)
    record["counts"] = {
        "train_texts": len(train_samples),
        "valid_texts": len(valid_samples),
        "test_meanings": len(test),
    }
    record["references"] = score_references(test)
    state_path = output_dir / "training_state.pt"
    identity = loop.identity(knobs, FREE_TO_CHANGE, record, ("train", "valid"))
    state = loop.read_state(state_path, identity) if knobs.resume else None
    texts_before = texts = None
    if not knobs.skip_base or knobs.adapt == "none":
        with lora.disable_adapters(model):  # the base alone
            record["before"], texts_before = evaluate(model, tokenizer, test, knobs, "the base")
    if knobs.adapt != "none":
        outcome = loop.train(model, TASK, train_samples, valid_samples, knobs, state_path, identity, state)
        results.add_training(record, outcome, device)
        if distributed.is_main() or knobs.fsdp:  # saved before the test, which cannot harm it then
            results.add_checkpoint(record, save_model(model, tokenizer, knobs))
        record["after"], texts = evaluate(model, tokenizer, test, knobs)
    record["seconds"]["total"] = time.perf_counter() - started
    if distributed.is_main():
        results.write_texts(output_dir / "test_texts.jsonl", test, texts or texts_before)
        record["samples"] = [
            {
                "meaning": meaning,
                **({"before": texts_before[i]} if texts_before else {}),
                **({"after": texts[i]} if texts else {}),
                "references": test[meaning],
            }
            for i, meaning in list(enumerate(test))[:: max(1, len(test) // 3)][:3]
        ]
        results.write_record(record, output_dir, knobs.record)
        state_path.unlink(missing_ok=True)  # everything it is for has been written
        report(record, output_dir)
    distributed.stop()
    return record


def score_references(test):
    """People leave out values as well: what the references mention is what a perfect imitation of them reaches."""
    meanings, texts = zip(*all_pairs(test), strict=True)
    return {
        "slot_share": text_scores.slot_share(texts, meanings),
        "slot_error_rate": text_scores.slot_error_rate(texts, meanings),
    }


def report(record, output_dir):
    """Print what the record says."""
    for sample in record["samples"]:
        print()
        for name in ("meaning", "before", "after"):
            if name in sample:
                print(f"{name:<12} {sample[name]}")
        print(f"{'reference':<12} {sample['references'][0]}")
    print()
    columns = [who for who in ("before", "after", "references") if who in record]
    print(f"{'':<16}" + "".join(f"{who:>12}" for who in columns))
    for key, (name, factor) in SCORES.items():
        values = [record[who].get(key) for who in columns]
        cells = ["" if value is None else f"{factor * value:.2f}" for value in values]
        print((f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells)).rstrip())
    for reason in record[columns[-2]]["not_measured"].values():
        print(reason)
    sizes, seconds = record["bytes"], record["seconds"]
    if "checkpoint" in sizes:
        share = sizes["checkpoint"] / sizes["model"]
        print(
            f"\ncheckpoint   {sizes['checkpoint'] / 1024:,.1f} KiB, {share:.2%} of the model's "
            f"{sizes['model'] / 2**20:,.1f} MiB"
        )
        print("seconds      {train:.0f} training, {total:.0f} in all".format(**seconds))
    print(f"written      to {output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))}")


def main():
    train_model(**vars(parse_knobs(Knobs, __doc__, presets=PRESETS)))


if __name__ == "__main__":
    run(main, under_torchrun=True)
