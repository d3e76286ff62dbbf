"""The training loop: batches, device, schedule, evaluation, resumption. It knows nothing about the task.

A task is a few functions: how samples become the arguments of the model (`collate`), the sum of the losses of a batch
(`loss_sum`), how many losses that sum has (`count`), and what a validation measures (`validate`). Every optimizer step
follows the mean over all labels of its batch, into however many parts and processes the batch is cut.
"""

import math
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import stopping
from common.cli import UserError, knob, require_not_negative, require_positive, require_share
from common.files import write_atomically
from common.training import compute, distributed

# AdamW as in the LoRA authors' GPT-2 runs.
BETAS, EPS = (0.9, 0.999), 1e-6
# Batches are cut from this many times their size of shuffled samples sorted by length: little padding, yet random.
POOL = 50
# The loss curve of a run has at most about this many points.
CURVE_POINTS = 200


@dataclass
class Knobs(compute.ComputeKnobs):
    """The knobs of the loop; a script adds its own and says which defaults differ."""

    num_epochs: int = knob(3, "passes over the training file")
    max_steps: int | None = knob(None, "stop after so many optimizer steps, for a quick look at a large file")
    batch_size: int = knob(8, "texts in an optimizer step, over all processes")
    grad_accumulation: int = knob(1, "parts that a batch is cut into, one after the other: less memory, same result")
    lr: float | None = knob(None, "peak learning rate; by default the preset's for the way of adapting")
    warmup_steps: float = knob(
        30, "steps up to the peak, or below 1 a share of all; the adapters start from zero and Adam without statistics"
    )
    weight_decay: float = knob(0.01, "of AdamW; the paper's")
    label_smoothing: float = knob(0.0, "share of the target that is spread over all classes; the paper takes 0.1")
    fsdp: bool = knob(False, "under torchrun, divide the frozen weights, for a base too large for one process")
    gradient_checkpointing: bool = knob(False, "compute activations again in the backward pass: less memory, slower")
    eval_every: int | None = knob(None, "steps between validations; by default one after each epoch")
    patience: int | None = knob(None, "stop after so many validations in a row without a new best one")
    resume: bool = knob(False, "go on with a stopped or killed run of the same knobs and output_dir")
    seed: int = knob(110, "of the adapters, the order of the texts and dropout; 110 is the paper authors'")


class NotFinite(UserError):
    """Losses, outputs or weights are not finite: of a learning rate that is too high, as a rule."""


def validate_by_loss(model, task, samples, knobs):
    """The validation of a task whose aim is its loss."""
    loss = mean_loss(model, task, samples, knobs)
    return -loss, {"valid_loss": loss}


class Task(NamedTuple):
    """What the loop has to know about the samples."""

    collate: Callable  # list of samples -> arguments of the model
    loss_sum: Callable  # (model, batch, label_smoothing) -> sum of the losses
    count: Callable  # list of samples -> how many losses they have
    # (model, task, samples, knobs) -> what the best validation has most of, and {name: figure} for the history
    validate: Callable = validate_by_loss


class Outcome(NamedTuple):
    """What a training leaves beside the trained model, which is that of the best validation."""

    history: list  # {epoch, step, train_loss, and what the task's validation measures} of each validation
    curve: list  # mean training losses of successive stretches of steps, [last step, loss]
    best_step: int
    first_step: int  # 0, or where a resumed run went on
    step_seconds: float | None  # median; None if the resumed run had no step left
    seconds: float  # in all, with the validations
    optimizer_bytes: int


def check(knobs):
    """Raise a UserError for a knob that is out of range, or does not go with how the script was started."""
    require_positive(knobs, "num_epochs", "max_steps", "batch_size", "grad_accumulation", "lr")
    require_positive(knobs, "eval_every", "patience", "eval_batch_size")
    require_not_negative(knobs, "warmup_steps", "weight_decay")
    require_share(knobs, "label_smoothing")
    if knobs.adapt == "lora":
        require_positive(knobs, "lora_dim", "lora_alpha")
        require_share(knobs, "lora_dropout")
    if knobs.fsdp and distributed.started() == 1:
        raise UserError(
            "--fsdp divides the frozen weights between processes; start it with torchrun --nproc_per_node 2"
        )
    if knobs.fsdp and knobs.adapt == "full":
        raise UserError("--fsdp divides the frozen weights, and --adapt full freezes none; leave one of them out")


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
    if warmup_steps < 1:
        warmup_steps = round(warmup_steps * steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps)


def make_optimizer(model, knobs):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=knobs.lr, betas=BETAS, eps=EPS, weight_decay=knobs.weight_decay)


def make_scaler(device, knobs):
    # Half precision loses small gradients, which a factor keeps in its range. It adapts; where it was too large, a step
    # is left out, and torch's own first value is so for the first few.
    return torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=knobs.precision == "fp16")


def identity(knobs, free, record, splits):
    """What a resumed run must have in common with the one that it goes on with: the knobs but for `free`, and the data.

    `record` is that of `results.begin`, `splits` says which of its data the training sees.
    """
    return {
        **{name: value for name, value in asdict(knobs).items() if name not in free},
        "data": [record["data"][split]["sha256"] for split in splits],
        "base": record["base"],
        "processes": record["processes"],
    }


def read_state(path, identity):
    """What --resume goes on with; a UserError if there is nothing, or of another run."""
    if not path.is_file():
        when = "it is written at each validation, and when a signal stops a run"
        if (path.parent / "results.json").is_file():
            when = "the run whose results.json is there came to its end; start another without --resume"
        raise UserError(f"--resume: there is no {path} to go on from; {when}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = dict(state["identity"])
    except Exception as error:  # of whatever kind: torch lets through what its parts raise on damaged bytes
        reason = str(error).partition("\n")[0]
        raise UserError(f"--resume: {path} cannot be read ({reason}); start anew without --resume") from error
    differing = [name for name, value in identity.items() if before.get(name) != value]
    if differing:
        was = ", ".join(f"{name} {before.get(name)!r}, now {identity[name]!r}" for name in differing)
        raise UserError(f"--resume: {path} is of another run: {was}; start anew without --resume, or repeat its knobs")
    return state


def train(model, task, samples, valid_samples, knobs, state_path, identity, state=None):
    """Train the parameters of `model` that require gradients, leave it at its best validation, return an `Outcome`.

    SIGTERM and Ctrl-C raise `stopping.Stopped` after the step in progress and the validation that is due after it.

    Args:
        model: on its device.
        task: a `Task`.
        samples, valid_samples: dicts with "input_ids".
        knobs: a `Knobs`.
        state_path: file for all that --resume needs, written at each validation and before a signal ends the training.
        identity: dict of what a resumed run must have in common with the one that it goes on with.
        state: to go on with, of `read_state`.
    """
    begun, device = time.perf_counter(), next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # of the training alone
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(model, knobs)
    scaler = make_scaler(device, knobs)
    lengths = [len(sample["input_ids"]) for sample in samples]
    epoch_steps = math.ceil(len(samples) / knobs.batch_size)
    steps = min(knobs.num_epochs * epoch_steps, knobs.max_steps or math.inf)
    if knobs.warmup_steps >= steps:
        print(f"this run of {steps} steps ends within its warmup, --warmup_steps {knobs.warmup_steps:g}")
    stretch = max(1, steps // CURVE_POINTS)
    torch.manual_seed(knobs.seed + distributed.rank())  # dropout differs between processes
    # What a resumed run goes on with, beside the tensors: the losses are those since the last entry of their list.
    step, history, curve, epoch_losses, curve_losses, best = 0, [], [], [], [], None
    if state is not None:
        step, history, curve, epoch_losses, curve_losses, best = (
            state[name] for name in ("step", "history", "curve", "epoch_losses", "curve_losses", "best")
        )
        _put(trainable, state["trainable"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        _set_random_state(device, state["random"][distributed.rank()])
    if knobs.gradient_checkpointing:
        set_checkpointing(model, True)
    seconds, batches, first_step, saved_step = [], [], step, step if state is not None else None
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=not distributed.is_main())
    with bar, stopping.put_off() as signals:
        while step < steps and not _out_of_patience(history, best, knobs.patience):
            epoch, position = divmod(step, epoch_steps)
            if position == 0 or not batches:
                # A string as seed: epochs are shuffled differently, and equally in every run.
                batches = make_batches(lengths, knobs.batch_size, f"{knobs.seed} {epoch + 1}")
            started = time.perf_counter()
            rate = learning_rate(step, steps, knobs.lr, knobs.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = [samples[index] for index in batches[position]]
            loss = optimizer_step(model, task, batch, optimizer, scaler, knobs)
            seconds.append(time.perf_counter() - started)
            step += 1
            if not math.isfinite(loss):
                raise _not_finite(f"the loss is {loss}", step, steps, rate, state_path, saved_step)
            epoch_losses.append(loss)
            curve_losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if len(curve_losses) == stretch or step == steps:
                curve.append([step, statistics.fmean(curve_losses)])
                curve_losses = []
            due = step % knobs.eval_every == 0 if knobs.eval_every else position + 1 == epoch_steps
            if due or step == steps:
                entry = {"epoch": epoch + 1, "step": step, "train_loss": statistics.fmean(epoch_losses)}
                quality, figures = task.validate(model, task, valid_samples, knobs)
                entry.update(figures)
                tqdm.write(f"step {step}: {_in_words(entry)}")
                history.append(entry)
                epoch_losses = []
                if best is None or quality > best["quality"]:
                    best = {"step": step, "quality": quality, "trainable": _copy(trainable)}
            signum = distributed.largest(signals.signum, device)  # of one mind, or the others would wait for ever
            if due or step == steps or signum:
                if not all(parameter.isfinite().all() for parameter in trainable.values()):
                    raise _not_finite("not all weights are finite", step, steps, rate, state_path, saved_step)
                state = {
                    "identity": identity,
                    "step": step,
                    "history": history,
                    "curve": curve,
                    "epoch_losses": epoch_losses,
                    "curve_losses": curve_losses,
                    "best": best,
                    "trainable": best["trainable"] if best and best["step"] == step else _copy(trainable),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "random": distributed.collect(_random_state(device)),
                }
                if distributed.is_main():
                    write_atomically(state_path, partial(torch.save, state))
                saved_step = step
            if signum:
                distributed.largest(0, device)  # whoever ended while the file is written would end the others, too
                raise stopping.Stopped(signum, _stopped(signum, step, steps) if distributed.is_main() else "")
    if curve_losses:  # patience ended within a stretch
        curve.append([step, statistics.fmean(curve_losses)])
    if knobs.gradient_checkpointing:
        set_checkpointing(model, False)
    if best["step"] < step:
        print(f"the best validation was at step {best['step']}; that is what is kept")
        _put(trainable, best["trainable"])
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    optimizer_bytes = sum(tensor.nbytes for tensor in tensors)
    median = statistics.median(seconds) if seconds else None
    return Outcome(history, curve, best["step"], first_step, median, time.perf_counter() - begun, optimizer_bytes)


def optimizer_step(model, task, batch, optimizer, scaler, knobs):
    """One step of the optimizer on a list of samples; return their mean loss before it."""
    device = next(model.parameters()).device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    count, loss = task.count(batch), torch.zeros((), device=device)
    size = math.ceil(len(batch) / knobs.grad_accumulation)
    model.train()
    for start in range(0, len(batch), size):
        samples = distributed.share(batch[start : start + size])
        if samples or knobs.fsdp:  # there may be more processes than samples, but sharded blocks take all of them
            arguments = compute.to_device(task.collate(samples or batch[:1]), device)
            with compute.autocast(device, knobs.precision):
                part = task.loss_sum(model, arguments, knobs.label_smoothing) / count * bool(samples)
            scaler.scale(part).backward()
            loss += part.detach()
    if distributed.processes() > 1:
        _add_up(loss, parameters)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.item()


def _add_up(loss, parameters):
    # In one message. DistributedDataParallel would divide by the number of processes, and wait for ever where one of
    # them has no sample left.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # Where no process has a gradient the optimizer is to leave the weight alone, as it does in one process.
    there = loss.new_tensor([p.grad is not None for p in parameters])
    everything = torch.cat([loss.flatten(), there, *(gradient.flatten() for gradient in gradients)])
    distributed.add_up(everything)
    loss.copy_(everything[0])
    _, there, *totals = everything.split([1, len(parameters), *(parameter.numel() for parameter in parameters)])
    for parameter, found, total in zip(parameters, there.tolist(), totals, strict=True):
        parameter.grad = total.view_as(parameter) if found else None


@torch.no_grad()  # in inference mode fully_shard would make buffers that cannot be trained with
def mean_loss(model, task, samples, knobs):
    """The mean loss of `samples`, without label smoothing, in evaluation mode; the same in any number of processes."""
    device, size = next(model.parameters()).device, knobs.eval_batch_size
    model.eval()
    ordered = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    sums = {}
    for start in distributed.share_batches(range(0, len(ordered), size), model):
        with compute.autocast(device, knobs.precision):
            sums[start] = task.loss_sum(
                model, compute.to_device(task.collate(ordered[start : start + size]), device), 0.0
            )
    sums = distributed.union({start: loss.item() for start, loss in sums.items()})
    loss = math.fsum(sums.values()) / task.count(samples)
    if not math.isfinite(loss):
        raise NotFinite(
            f"the loss of {len(samples)} texts is {loss}; nothing was written of it. In training, try a lower --lr or "
            "more --warmup_steps; with --precision fp16, another one"
        )
    return loss


def set_checkpointing(model, on):
    # Newer versions of transformers call it activation checkpointing, and warn of the older name.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:  # the reentrant kind finds no gradient where the input of a frozen embedding comes in
        options = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{kind}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def _not_finite(what, step, steps, rate, state_path, saved_step):
    last = "there is none yet" if saved_step is None else f"{state_path}, of step {saved_step}"
    return NotFinite(
        f"{what} at step {step} of {steps} (learning rate {rate:.2e}); nothing was saved of this step. The last good "
        f"checkpoint: {last}. Try a lower --lr or more --warmup_steps"
    )


def _stopped(signum, step, steps):
    name = signal.Signals(signum).name
    return f"stopped by {name} after step {step} of {steps}; the same command with --resume goes on from there"


def _in_words(entry):
    figures = {name: value for name, value in entry.items() if name not in ("epoch", "step")}
    return ", ".join(
        f"{name.replace('_', ' ')} " + ("not defined" if value is None else f"{value:.4f}")
        for name, value in figures.items()
    )


def _out_of_patience(history, best, patience):
    return patience is not None and best is not None and sum(e["step"] > best["step"] for e in history) >= patience


def _copy(tensors):
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _put(tensors, values):
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _random_state(device):
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(device, states):
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:  # the run may have begun on another device
        torch.cuda.set_rng_state(states[1], device)
