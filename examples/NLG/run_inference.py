"""Write sentences for E2E meaning representations with a base model and an adapter.

    cd examples/NLG
    python run_inference.py --prompt "name : Tamarind Yard | Type : pub | food : Thai | area : old town"
    python run_inference.py --interactive
    python run_inference.py --input_file data/test.txt --output_file output/texts.jsonl --merge
    python run_inference.py --input_file data/test.txt --output_file output/texts.jsonl --compare_speed
    python run_inference.py --model output/model --adapter none --input_file data/test.txt

Takes a few seconds to start. The first prints, after the default run of run_training.py:

    name : Tamarind Yard | Type : pub | food : Thai | area : old town -> Tamarind Yard is a Thai pub in the old town .

and how many tokens a second that was. The second, which is also what happens without any of the three on a terminal,
asks for meanings until an empty line. A file holds meanings or E2E lines (whose references are ignored), or is CSV;
every distinct meaning gets one text, and the output file has lines {"meaning": ..., "text": ...}. The fourth writes all
texts twice, with the adapters apart and merged, and stops if they differ. The last takes a model that run_training.py
--adapt full trained.

An adapter is a file of run_training.py, a folder of PEFT, or a .bin or .pt file of upstream's loralib, which needs
--lora_alpha, too.
"""

import os
import sys
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
    given,
    knob,
    make_place_for,
    parse_knobs,
    refuse_together,
    require_positive,
    run,
)
from common.data import e2e
from common.models import causal_lm
from common.records import results
from common.training import compute

import loralib as lora

HERE = Path(__file__).resolve().parent
PRESETS = {"fast": {}, "paper": causal_lm.PAPER_DECODING}
NO_ADAPTER = "none"


@dataclass
class Knobs(causal_lm.DecodingKnobs):
    preset: str = knob("fast", "decoding for all knobs that are not given", PRESETS)
    model: str = knob(str(HERE / "model"), "folder or hub name of the model that the adapter was trained on")
    adapter: str = knob(
        str(HERE / "output" / "adapter.safetensors"),
        f"file of run_training.py, folder of PEFT, upstream's .bin or .pt file, or {NO_ADAPTER}: the model as it is",
    )
    lora_alpha: float | None = knob(None, "as the adapter was trained with; for upstream's files, which do not say it")
    prompt: str | None = knob(None, "one meaning: slot : value | slot : value, or slot[value], slot[value]")
    input_file: str | None = knob(None, "file of meaning representations or E2E lines")
    interactive: bool = knob(False, "ask for one meaning representation after the other")
    output_file: str | None = knob(None, "JSONL file for the texts, which are printed otherwise")
    merge: bool = knob(False, "put the adapters into the weights and drop their layers first, as for deployment")
    compare_speed: bool = knob(False, "write the texts with the adapters apart and merged: how fast, and the same?")


def check(knobs):
    """Choose between prompt, file and terminal; raise a UserError for knobs that are out of range or do not agree."""
    causal_lm.check_decoding(knobs)
    require_positive(knobs, "lora_alpha")
    sources = given(knobs, "prompt", "input_file", "interactive")
    if not sources and sys.stdin.isatty():
        knobs.interactive = True
    elif len(sources) != 1:
        what = " and ".join(f"--{name}" for name in sources) or "nothing to write texts for"
        raise UserError(f'{what}: give one of --prompt "name : ... | food : ...", --input_file FILE, --interactive')
    excluded = {
        "--interactive": (knobs.interactive, ("output_file", "compare_speed")),
        "--compare_speed": (knobs.compare_speed, ("merge",)),
        f"--adapter {NO_ADAPTER}": (knobs.adapter == NO_ADAPTER, ("lora_alpha", "merge", "compare_speed")),
    }
    refuse_together(knobs, excluded)
    if knobs.output_file is not None:
        make_place_for(knobs.output_file, "--output_file")


def load_data(knobs):
    """The meanings to write texts for."""
    if knobs.input_file is not None:
        meanings = e2e.read_meanings(knobs.input_file)
    else:
        meanings = [e2e.read_meaning(knobs.prompt, "--prompt")]
    note_marks(meanings)
    return meanings


def note_marks(meanings):
    """Say which values a model that learnt from CSV has not seen in this form."""
    values = e2e.written_together(meanings)
    if values:
        print(
            f"note: {values[0]!r} is {e2e.tokenise(values[0])!r} in files with marks set apart, as those read from CSV "
            "are; a meaning in the form `slot[value], slot[value]` is read as they are",
            file=sys.stderr,
        )


def build_model(knobs, device):
    """The base model with the adapter loaded, or merged into it, and the tokenizer."""
    if knobs.adapter != NO_ADAPTER and not Path(knobs.adapter).exists():
        raise UserError(
            f"--adapter {knobs.adapter}: no such file or folder; run_training.py writes adapter.safetensors to its "
            f"--output_dir, and --adapter {NO_ADAPTER} takes the model alone"
        )
    model, tokenizer = causal_lm.load_causal_lm(knobs.model, device)
    if knobs.adapter == NO_ADAPTER:
        return model, tokenizer
    with as_user_error(OSError, ValueError):
        # The file knows which layers it adapts, with which rank and alpha; one that does not fit changes nothing.
        lora.load_lora(model, knobs.adapter, lora_alpha=knobs.lora_alpha)
        if knobs.merge:
            model = lora.merge_and_unload(model)  # a plain model of transformers again
        elif not knobs.compare_speed:
            lora.merge_lora_weights(model)
    return model, tokenizer


def speed(generated):
    per_second = generated.tokens / generated.seconds
    return f"{generated.tokens:,} tokens in {generated.seconds:.1f} s, {per_second:,.0f} tokens/s"


def compare_speed(model, tokenizer, meanings, knobs):
    """What `causal_lm.generate` returns, the same with the adapters apart and merged; print how fast both were."""
    causal_lm.generate(model, tokenizer, meanings[:1], knobs)  # the first text of a process is slow
    unmerged = causal_lm.generate(model, tokenizer, meanings, knobs)
    print(f"unmerged: {speed(unmerged)}")
    with as_user_error(ValueError):
        lora.merge_lora_weights(model)
    merged = causal_lm.generate(model, tokenizer, meanings, knobs)
    print(f"merged:   {speed(merged)}")
    different = [m for m, *texts in zip(meanings, unmerged.texts, merged.texts, strict=True) if len(set(texts)) > 1]
    if different:
        raise UserError(
            f"--compare_speed: {len(different)} of {len(meanings)} texts differ unmerged and merged; nothing was "
            "written. Sums in another order can turn a choice between words that are about as likely; --precision fp32 "
            "makes that rare. The texts are those for:\n  " + "\n  ".join(different)
        )
    return merged


def converse(model, tokenizer, knobs):
    """Write a text for each meaning that is typed in, until an empty line or the end of the input."""
    print("a meaning representation such as: name : Quince | Type : pub | area : old town; an empty line ends")
    while True:
        try:
            given = input("meaning: ").strip()
        except EOFError:
            given = ""
        if not given:
            return
        try:
            meaning = e2e.read_meaning(given, "this line")
            note_marks([meaning])
            generated = causal_lm.generate(model, tokenizer, [meaning], knobs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"{generated.texts[0]}\n{speed(generated)}")


def main():
    knobs = parse_knobs(Knobs, __doc__, presets=PRESETS)
    check(knobs)
    device = compute.choose_device(knobs.device)
    if knobs.interactive:
        converse(*build_model(knobs, device), knobs)
        return
    meanings = load_data(knobs)
    model, tokenizer = build_model(knobs, device)
    generated = (compare_speed if knobs.compare_speed else causal_lm.generate)(model, tokenizer, meanings, knobs)
    if knobs.output_file is not None:
        results.write_texts(knobs.output_file, meanings, generated.texts)
        print(f"written {len(meanings)} texts to {knobs.output_file}")
    else:
        for meaning, text in zip(meanings, generated.texts, strict=True):
            print(f"{meaning} -> {text}")
    if not knobs.compare_speed:
        print(speed(generated))


if __name__ == "__main__":
    run(main)
