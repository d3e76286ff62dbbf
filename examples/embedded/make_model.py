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
import os
import random
import shutil
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from grammar import document
from tqdm import tqdm

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
    # Muon learns to copy from the context in fewer steps than AdamW, but is meant for hidden matrices only.
    hidden = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not other for other in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps, losses = len(windows) // BATCH, []
    bar = tqdm(windows.split(BATCH), desc="pretraining", unit="step")
    for step, batch in enumerate(bar):
        warm, done = min(1.0, (step + 1) / WARMUP), step / steps
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LR * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        with torch.autocast("cpu", torch.bfloat16):  # nearly twice as fast as float32 here
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return model, losses


def make_model(output_dir, steps=STEPS, seed=SEED):
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    tokenizer = train_tokenizer(random.Random(seed))
    windows, text_sha256 = token_windows(tokenizer, random.Random(seed), steps * BATCH)
    model, losses = pretrain(tokenizer, windows, seed)
    seconds = time.perf_counter() - started

    # Written beside the target first, then moved: a run that is interrupted leaves the old folder whole.
    output_dir, partial = Path(output_dir), Path(f"{output_dir}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    model.half().save_pretrained(partial)
    perplexity = heldout_perplexity(model.float(), tokenizer, seed)  # of the rounded weights: those that ship
    last = losses[-50:]
    report = {
        "seed": seed,
        "steps": steps,
        "tokens": windows.numel(),
        "parameters": model.num_parameters(),
        "seconds": round(seconds, 1),
        "first_loss": losses[0],
        "final_loss": sum(last) / len(last),
        "heldout_perplexity": perplexity,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "threads": THREADS,
        "text_sha256": text_sha256,
        "weights_sha256": hashlib.sha256((partial / "model.safetensors").read_bytes()).hexdigest(),
    }
    (partial / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
    output_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        os.replace(file, output_dir / file.name)
    partial.rmdir()
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=Path(__file__).parents[1] / "NLG" / "model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the pretraining (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of text and weights (default: %(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it warns of padding where END stands between two pages
    print(json.dumps(make_model(args.output_dir, args.steps, args.seed), indent=2))
