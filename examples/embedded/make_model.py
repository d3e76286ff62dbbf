"""Train the tokenizer and pretrain the base that ship in examples/NLG/model.

    python examples/embedded/make_model.py
    python examples/embedded/make_model.py --output_dir somewhere --steps 20    # a quick look

Takes about 10 minutes on 2 cores, without network, and gives the same bits again on the same machine with
the same versions of torch and transformers. The base is an ordinary GPT2LMHeadModel in float16, pretrained
by causal language modelling on the many-domain English of grammar.py, in which no restaurant is in a record.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path

import pretraining
import tokenizers
import torch
import transformers
from grammar import document
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
from common.cli import run

END = "<|endoftext|>"
VOCABULARY = 1024  # small, so that the 2 million parameters sit in the blocks
WIDTH, LAYERS, HEADS, POSITIONS = 192, 4, 4, 256
BATCH = 8  # windows of POSITIONS tokens to a step
STEPS = 2800
LR, WARMUP, WEIGHT_DECAY = 4e-3, 50, 0.1
SEED = 7
THREADS = 2  # fixed: the order of a sum depends on the number of threads
TOKENIZER_DOCUMENTS = 8000
HELDOUT_WINDOWS = 64
HELDOUT_SEED = 1_000_003  # added to the seed of the training text


def train_tokenizer(rng):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pages = [page for _ in range(TOKENIZER_DOCUMENTS) for page in document(rng)]
    tokenizer.train_from_iterator(pages, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    return transformers.GPT2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token=END,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
    )


def token_windows(tokenizer, rng, windows):
    """Rows of POSITIONS tokens, pages one after the other, each ended by END; and the text's SHA-256."""
    wanted, tokens, digest = windows * POSITIONS, [], hashlib.sha256()
    with tqdm(total=wanted, desc="text", unit="token", unit_scale=True, disable=windows < 1000) as progress:
        while len(tokens) < wanted:
            text = "".join(page + END for _ in range(500) for page in document(rng))
            digest.update(text.encode())
            new = tokenizer(text, verbose=False)["input_ids"]
            tokens += new
            progress.update(len(new))
    return torch.tensor(tokens[:wanted]).view(windows, POSITIONS), digest.hexdigest()


def heldout_perplexity(model, tokenizer, seed):
    """Perplexity of a float32 model on text that the pretraining with this seed did not see."""
    windows, _ = token_windows(tokenizer, random.Random(seed + HELDOUT_SEED), HELDOUT_WINDOWS)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in windows.split(BATCH)]
    return math.exp(sum(losses) / len(losses))


def pretrain(tokenizer, windows, seed):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        embd_pdrop=0.0,  # every window is seen once, so there is nothing to overfit
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # the fastest here at this size; it is not saved
    )
    model = transformers.GPT2LMHeadModel(config).train()
    losses = pretraining.fit(
        model,
        model.transformer.h,
        windows.split(BATCH),
        lambda model, batch: model(input_ids=batch, labels=batch).loss,
        LR,
        WARMUP,
        WEIGHT_DECAY,
    )
    return model, losses


def make_model(output_dir, steps=STEPS, seed=SEED):
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    tokenizer = train_tokenizer(random.Random(seed))
    windows, text_sha256 = token_windows(tokenizer, random.Random(seed), steps * BATCH)
    model, losses = pretrain(tokenizer, windows, seed)
    facts = {
        "seed": seed,
        "tokens": windows.numel(),
        "seconds": round(time.perf_counter() - started, 1),
        "text_sha256": text_sha256,
    }
    return pretraining.save(
        output_dir, model, tokenizer, losses, lambda saved: heldout_perplexity(saved, tokenizer, seed), facts
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=Path(__file__).parents[1] / "NLG" / "model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the pretraining (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of text and weights (default: %(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it warns of padding where END stands between two pages
    print(json.dumps(make_model(args.output_dir, args.steps, args.seed), indent=2))


if __name__ == "__main__":
    run(main)
