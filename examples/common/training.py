"""The training loop, its batches and its device. It knows nothing about the task: a batch goes to `model(**batch)`."""

import math
import random

import torch
from tqdm import tqdm

from common.cli import UserError

# AdamW as in the LoRA authors' GPT-2 runs.
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-6, 0.01
# Batches are cut from this many times their size of shuffled samples sorted by length: little padding, yet random.
POOL = 50


def choose_device(name):
    """The torch device for --device: "auto" is the first of cuda, mps, cpu that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = device is not None and available.get(device.type, False)
    if there and device.type == "cuda":
        there = (device.index or 0) < torch.cuda.device_count()
    if not there:
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"--device {name}: no such device here; use auto or one of: {usable}")
    return device


def make_batches(lengths, batch_size, seed):
    """Lists of sample indices: every sample once, those of similar length together, in an order fixed by the seed."""
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches, pool_size = [], POOL * batch_size
    for start in range(0, len(order), pool_size):
        pool = sorted(order[start : start + pool_size], key=lambda index: lengths[index])
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(batches)
    return batches


def learning_rate(step, steps, peak, warmup_steps):
    """The learning rate of a step counted from 0: linear up to the peak, then linear down towards 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def train(model, samples, valid_samples, collate, *, epochs, batch_size, lr, warmup_steps, seed, max_steps=None):
    """Train the parameters of `model` that require gradients; return one {epoch, step, ...loss} for each epoch.

    `samples` are dicts with "input_ids"; `collate` makes the keyword arguments of the model, labels included, of a
    list of them. `max_steps` ends the training, and the fall of the learning rate, after that many steps.
    """
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    lengths = [len(sample["input_ids"]) for sample in samples]
    steps = epochs * math.ceil(len(samples) / batch_size)
    steps = min(steps, max_steps or steps)
    history, step = [], 0
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            if step == steps:
                break
            model.train()
            losses = []
            # A string as seed: epochs are shuffled differently, and equally in every run.
            for batch in make_batches(lengths, batch_size, f"{seed} {epoch}")[: steps - step]:
                rate = learning_rate(step, steps, lr, warmup_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = model(**to_device(collate([samples[index] for index in batch]), device)).loss
                losses.append(loss.item())
                step += 1
                if not math.isfinite(losses[-1]):
                    raise UserError(
                        f"the loss is {losses[-1]} at step {step} of {steps} (learning rate {rate:.2e}); nothing was "
                        "saved. Try a lower --lr or more --warmup_steps"
                    )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
            entry = {"epoch": epoch, "step": step, "train_loss": sum(losses) / len(losses)}
            entry["valid_loss"] = mean_loss(model, valid_samples, collate, batch_size)
            history.append(entry)
            tqdm.write("epoch {epoch}: train loss {train_loss:.4f}, validation loss {valid_loss:.4f}".format(**entry))
    return history


@torch.inference_mode()
def mean_loss(model, samples, collate, batch_size):
    """The mean loss of the labels in `samples`, in evaluation mode."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    model.eval()
    samples = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size])
        labels = int((batch["labels"] != -100).sum())  # the model's loss is a mean over these
        total += model(**to_device(batch, device)).loss.item() * labels
        count += labels
    return total / count
