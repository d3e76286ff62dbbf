"""Classify texts, or pairs of texts, with a base model and the adapter of a GLUE task.

    cd examples/NLU
    python run_inference_nlu.py --task sst2 --text "a quiet film that stays with you"
    python run_inference_nlu.py --task rte --text "The Kite is run by Ada." --text_pair "The Kite belongs to Ada."
    python run_inference_nlu.py --task sst2 --input_file data/SST-2/dev.tsv --output_file output/labels.jsonl
    python run_inference_nlu.py --task sst2 --input_file data/SST-2/dev.tsv --compare_speed
    python run_inference_nlu.py --adapter output/mnli/adapter.safetensors < pairs.txt
    python run_inference_nlu.py --task sst2 --model output/sst2/model --adapter none --input_file data/SST-2/dev.tsv

The first two need the default runs of run_training_nlu.py --task sst2 and --task rte. A file, or the standard input,
holds a text to a line, or two with a tab between, or is a GLUE file with its header; an output file gets lines
{"texts": [...], "label": ..., "probabilities": {...}}, or {"texts": [...], "score": ...} for stsb. The fourth
classifies everything twice, with the adapters apart and merged, says how fast that was, and stops if labels differ. An
adapter file knows its task, so that --task need not be given with it; the last takes a model that run_training_nlu.py
--adapt full trained.

An adapter is a file of run_training_nlu.py, a folder of PEFT, or a .bin or .pt file of upstream's loralib, which needs
--lora_alpha, too.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads: how long its threads spin while they wait. By default so long that beside another busy process
# a small model's steps take many times longer; with no spinning at all (OMP_WAIT_POLICY=PASSIVE) they are slow alone.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib
from common.cli import (
    UserError,
    as_user_error,
    knob,
    make_place_for,
    parse_knobs,
    refuse_together,
    require_positive,
    run,
)
from common.data import glue
from common.models import pretrained
from common.models import sequence_classification as classification
from common.records import results
from common.training import compute

import loralib as lora

HERE = Path(__file__).resolve().parent
NO_ADAPTER = "none"


@dataclass
class Knobs(compute.ComputeKnobs):
    task: str | None = knob(
        None, "what the labels are; by default the task that the adapter was trained on", glue.TASKS
    )
    model: str = knob(str(HERE / "model"), "folder or hub name of the model that the adapter was trained on")
    adapter: str | None = knob(
        None,
        "file of run_training_nlu.py (by default that of the task), folder of PEFT, upstream's .bin or .pt file, or "
        f"{NO_ADAPTER}: the model as it is",
    )
    lora_alpha: float | None = knob(None, "as the adapter was trained with; for upstream's files, which do not say it")
    text: str | None = knob(None, "the text to classify")
    text_pair: str | None = knob(None, "the second text, for tasks on pairs")
    input_file: str = knob("-", "file of texts, one or a pair to a line, or in GLUE's form; - is the standard input")
    output_file: str | None = knob(None, "JSONL file for the labels, which are printed otherwise")
    merge: bool = knob(False, "put the adapters into the weights and drop their layers first, as for deployment")
    compare_speed: bool = knob(False, "classify with the adapters apart and merged: how fast, and the same?")
    seq_len: int = knob(128, "most tokens of the texts together; longer ones are cut, and counted")


def check(knobs):
    """Fill in task and adapter; raise a UserError for knobs that are out of range or do not agree."""
    require_positive(knobs, "eval_batch_size", "seq_len", "lora_alpha")
    if knobs.task is None and knobs.adapter in (None, NO_ADAPTER):
        raise UserError(f"no --task: give one of {', '.join(glue.TASKS)}, or an --adapter, whose file says it")
    if knobs.adapter is None:
        knobs.adapter = str(HERE / "output" / knobs.task / "adapter.safetensors")
    excluded = {
        "--compare_speed": (knobs.compare_speed, ("merge", "text")),
        f"--adapter {NO_ADAPTER}": (knobs.adapter == NO_ADAPTER, ("lora_alpha", "merge", "compare_speed")),
        f"--input_file {knobs.input_file}": (knobs.input_file != glue.STANDARD_INPUT, ("text", "text_pair")),
    }
    refuse_together(knobs, excluded)
    if knobs.adapter != NO_ADAPTER:
        if not Path(knobs.adapter).exists():
            raise UserError(
                f"--adapter {knobs.adapter}: no such file or folder; run_training_nlu.py writes adapter.safetensors to "
                f"its --output_dir, and --adapter {NO_ADAPTER} takes the model alone"
            )
        with as_user_error(OSError, ValueError):
            trained_on = lora.read_metadata(knobs.adapter).get("task")
        if knobs.task is None and trained_on is None:
            raise UserError(f"--adapter {knobs.adapter} does not say its task; give --task")
        if trained_on is not None and knobs.task not in (None, trained_on):
            raise UserError(
                f"--adapter {knobs.adapter} was trained on {trained_on}, and --task is {knobs.task}; leave --task out, "
                f"or give the adapter of {knobs.task}"
            )
        knobs.task = knobs.task or trained_on
    task = glue.task_of(knobs.task)
    given = (knobs.text is not None, knobs.text_pair is not None)
    if any(given) and given != (True, len(task.texts) == 2):
        wanted = "--text and --text_pair" if len(task.texts) == 2 else "--text alone"
        raise UserError(f"--task {task.name} takes {wanted}: {' and '.join(task.texts)}")
    if knobs.output_file is not None:
        make_place_for(knobs.output_file, "--output_file")


def load_data(knobs, task):
    """The texts to classify, tuples of one or two."""
    if knobs.text is not None:
        return [(knobs.text,) if knobs.text_pair is None else (knobs.text, knobs.text_pair)]
    if knobs.input_file == glue.STANDARD_INPUT and sys.stdin.isatty():
        print(f"a line each: {' <tab> '.join(task.texts)}; the end of the input (Ctrl-D) starts", file=sys.stderr)
    return glue.read_texts(knobs.input_file, task)


def build_model(knobs, task, device):
    """(The base model with the adapter loaded, or merged into it; the tokenizer)."""
    model, tokenizer, _, random = classification.load(knobs.model, task, device)
    if knobs.seq_len > pretrained.context_window(model):
        raise UserError(f"--seq_len {knobs.seq_len}: the model reads at most {pretrained.context_window(model)} tokens")
    if knobs.adapter != NO_ADAPTER:
        with as_user_error(OSError, ValueError):
            # The file knows which layers it adapts, with which rank and alpha; one that does not fit changes nothing.
            lora.load_lora(model, knobs.adapter, lora_alpha=knobs.lora_alpha)
        random = [name for name in random if name not in lora.lora_state_dict(model)]
    if random:
        what = f"--model {knobs.model}" if knobs.adapter == NO_ADAPTER else f"--adapter {knobs.adapter}"
        raise UserError(
            f"{what} has no trained head: {', '.join(random)} would be random. A classifier's head is trained and "
            "saved with its adapter (modules_to_save)"
        )
    if knobs.merge:
        model = lora.merge_and_unload(model)  # a plain model of transformers again
    elif knobs.adapter != NO_ADAPTER and not knobs.compare_speed:
        lora.merge_lora_weights(model)
    return model, tokenizer


def classify(model, tokenizer, texts, knobs):
    """(Output of the model for each of the texts, seconds)."""
    started = time.perf_counter()
    samples = [classification.encode(tokenizer, text, knobs.seq_len) for text in texts]
    cut = sum(sample["cut"] for sample in samples)
    if cut:
        print(f"{cut:,} of {len(texts):,} texts cut to {knobs.seq_len} tokens (--seq_len)", file=sys.stderr)
    output = classification.predict(model, samples, knobs, tokenizer, progress=len(texts) > 1)
    return output, time.perf_counter() - started


def speed(texts, seconds):
    return f"{len(texts):,} texts in {seconds:.2f} s, {len(texts) / seconds:,.0f} texts/s"


def compare_speed(model, tokenizer, texts, knobs):
    """The outputs of the merged model; print how fast they were with the adapters apart and merged."""
    classify(model, tokenizer, texts[:1], knobs)  # the first text of a process is slow
    unmerged, seconds = classify(model, tokenizer, texts, knobs)
    print(f"unmerged: {speed(texts, seconds)}")
    with as_user_error(ValueError):
        lora.merge_lora_weights(model)
    merged, seconds = classify(model, tokenizer, texts, knobs)
    print(f"merged:   {speed(texts, seconds)}")
    print(f"the outputs differ by at most {(merged - unmerged).abs().max():.1e}")
    if merged.dim() == 2:
        different = int((merged.argmax(-1) != unmerged.argmax(-1)).sum())
        if different:
            raise UserError(
                f"--compare_speed: {different} of {len(texts)} labels differ unmerged and merged; nothing was written. "
                "Sums in another order can turn a choice between labels that are about as likely; --precision fp32 "
                "makes that rare"
            )
    return merged, seconds


def answers(texts, output, task):
    """What is written of each of the texts: a dict of label and probabilities, or of the score."""
    for text, row in zip(texts, output, strict=True):
        if task.labels is None:
            yield {"texts": text, "score": row.item()}
        else:
            probabilities = row.softmax(-1).tolist()
            label = task.labels[row.argmax().item()]
            yield {"texts": text, "label": label, "probabilities": dict(zip(task.labels, probabilities, strict=True))}


def in_words(answer):
    texts = " | ".join(answer["texts"])
    if "score" in answer:
        return f"{answer['score']:.2f}  {texts}"
    probabilities = ", ".join(f"{label} {value:.3f}" for label, value in answer["probabilities"].items())
    return f"{answer['label']} ({probabilities})  {texts}"


def main():
    knobs = parse_knobs(Knobs, __doc__)
    check(knobs)
    task, device = glue.task_of(knobs.task), compute.choose_device(knobs.device)
    texts = load_data(knobs, task)
    model, tokenizer = build_model(knobs, task, device)
    output, seconds = (compare_speed if knobs.compare_speed else classify)(model, tokenizer, texts, knobs)
    found = list(answers(texts, output, task))
    if knobs.output_file is not None:
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in found]
        results.write_atomically(knobs.output_file, "".join(lines))
        print(f"written {len(found):,} lines to {knobs.output_file}")
    else:
        for answer in found:
            print(in_words(answer))
    if not knobs.compare_speed:
        print(speed(texts, seconds))


if __name__ == "__main__":
    run(main)
