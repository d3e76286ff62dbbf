"""What make_model.py and make_encoder.py share: the loop of the pretraining, and the folder it ends in."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm


def fit(model, blocks, batches, loss_of, lr, warmup, weight_decay):
    """Trains `model` by one step for each of `batches`; `blocks` is its part that holds the hidden layers."""
    # Muon learns to copy from the context in fewer steps than AdamW, but is meant for hidden matrices only.
    hidden = [weight for weight in blocks.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not other for other in hidden)]
    optimizers = [
        torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    losses = []
    bar = tqdm(batches, desc="pretraining", unit="step")
    for step, batch in enumerate(bar):
        warm, done = min(1.0, (step + 1) / warmup), step / len(batches)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        with torch.autocast("cpu", torch.bfloat16):  # nearly twice as fast as float32 here
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def save(output_dir, model, tokenizer, losses, heldout_perplexity, facts):
    """Writes the folder, in float16, with pretraining.json; `heldout_perplexity` is called on what is saved."""
    # Written beside the target first, then moved: a run that is interrupted leaves the old folder whole.
    output_dir, partial = Path(output_dir), Path(f"{output_dir}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    model.half().save_pretrained(partial)
    perplexity = heldout_perplexity(model.float())  # of the rounded weights: those that ship
    last = losses[-50:]
    report = {
        **facts,
        "steps": len(losses),
        "parameters": model.num_parameters(),
        "first_loss": losses[0],
        "final_loss": sum(last) / len(last),
        "heldout_perplexity": perplexity,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "threads": torch.get_num_threads(),
        "weights_sha256": hashlib.sha256((partial / "model.safetensors").read_bytes()).hexdigest(),
    }
    (partial / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
    output_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        os.replace(file, output_dir / file.name)
    partial.rmdir()
    return report
