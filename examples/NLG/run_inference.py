"""Write sentences for E2E meaning representations with a base model and an adapter of run_training.py.

    cd examples/NLG
    python run_inference.py --prompt "name : Tamarind Yard | Type : pub | food : Thai | area : old town"
    python run_inference.py --input_file data/test.txt --output_file output/test_texts.txt --merge

Takes a few seconds to start. The first prints, after the default run of run_training.py:

    name : Tamarind Yard | Type : pub | food : Thai | area : old town -> Tamarind Yard is a Thai pub in the old town .

A file holds a meaning or an E2E line (whose reference is ignored) in each line; every distinct meaning gets one text,
and the output file has lines `meaning||text`.
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
from common import causal_lm, e2e, results, training
from common.cli import UserError, as_user_error, knob, parse_knobs, require_positive, run

import loralib as lora

HERE = Path(__file__).resolve().parent


@dataclass
class Knobs:
    model: str = knob(str(HERE / "model"), "folder or hub name of the model that the adapter was trained on")
    adapter: str = knob(str(HERE / "output" / "adapter.safetensors"), "file of run_training.py")
    prompt: str | None = knob(None, "one meaning representation, slot : value | slot : value")
    input_file: str | None = knob(None, "file of meaning representations or E2E lines")
    output_file: str | None = knob(None, "file for the texts, which are printed otherwise")
    merge: bool = knob(False, "put the adapters into the weights and drop their layers first, as for deployment")
    device: str = knob("auto", "cpu, cuda, mps, or auto for the fastest that is there")
    max_new_tokens: int = knob(causal_lm.MAX_NEW_TOKENS, "where a text is cut off that does not end by itself")
    num_beams: int = knob(causal_lm.NUM_BEAMS, "width of the beam search; 1 is greedy, the paper takes 10")
    batch_size: int = knob(40, "meanings at a time")


def load_data(knobs):
    """The meanings to write texts for."""
    if (knobs.prompt is None) == (knobs.input_file is None):
        raise UserError('give either --prompt "name : ... | food : ..." or --input_file FILE')
    if knobs.prompt is not None:
        meaning = knobs.prompt.strip()
        e2e.check_meaning(meaning, "--prompt")
        return [meaning]
    return e2e.read_meanings(knobs.input_file)


def build_model(knobs, device):
    """The base model with the adapter loaded, or merged into it, and the tokenizer."""
    if not Path(knobs.adapter).is_file():
        raise UserError(f"--adapter {knobs.adapter}: no such file; run_training.py writes one to its --output_dir")
    model, tokenizer = causal_lm.load_causal_lm(knobs.model, device)
    # The file knows which layers it adapts, with which rank and alpha; one that does not fit changes nothing.
    with as_user_error(OSError, ValueError):
        lora.load_lora(model, knobs.adapter)
        if knobs.merge:
            model = lora.merge_and_unload(model)  # a plain model of transformers again
    return model, tokenizer


def main():
    knobs = parse_knobs(Knobs, __doc__)
    require_positive(knobs, "max_new_tokens", "num_beams", "batch_size")
    device = training.choose_device(knobs.device)
    meanings = load_data(knobs)
    model, tokenizer = build_model(knobs, device)
    texts = causal_lm.generate(
        model,
        tokenizer,
        meanings,
        batch_size=knobs.batch_size,
        num_beams=knobs.num_beams,
        max_new_tokens=knobs.max_new_tokens,
    )
    pairs = list(zip(meanings, texts, strict=True))
    if knobs.output_file is not None:
        with as_user_error(OSError):
            results.write_atomically(knobs.output_file, "".join(f"{meaning}||{text}\n" for meaning, text in pairs))
        print(f"written {len(pairs)} texts to {knobs.output_file}")
        return
    for meaning, text in pairs:
        print(f"{meaning} -> {text}")


if __name__ == "__main__":
    run(main)
