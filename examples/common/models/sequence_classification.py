"""Classifiers and regressions over one or two texts: loading, encoding, losses, predictions."""

import copy
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from common.cli import UserError
from common.models import pretrained
from common.scores import glue_scores
from common.training import compute, distributed, loop


class Loaded(NamedTuple):
    model: torch.nn.Module  # in float32 on its device
    tokenizer: Any
    heads: list[str]  # the modules that are trained however the rest is adapted
    random: list[str]  # the tensors among them that the weights lack


def load(name, task, device, seed=0):
    """A `Loaded` of a folder or a hub name, with a head for the labels of a `glue.GlueTask`.

    What the weights lack gets random values from the seed; that is the head, or nothing.
    """
    trained_on = _trained_on(name)
    if trained_on not in (None, task.name):  # before the weights, whose head may have another shape
        raise UserError(
            f"--model {name} was trained on {trained_on}, and this is {task.name}; give the base model, or --task "
            f"{trained_on}"
        )
    torch.manual_seed(seed)
    purpose = f"classifier for {task.name}"
    model, tokenizer, missing = pretrained.load(AutoModelForSequenceClassification, name, purpose, **_outputs(task))
    others = [part for part in model.named_children() if part[0] != model.base_model_prefix]
    heads = [part for part, module in others if next(module.parameters(), None) is not None]
    # Encoders that were pretrained without a pooler get one here, between the encoder and the head.
    heads += sorted({key.rpartition(".")[0] for key in missing if ".pooler." in key})
    lost = [key for key in missing if not key.startswith(tuple(f"{part}." for part in heads))]
    if lost:
        raise UserError(f"--model {name}: its weights lack {', '.join(lost[:3])}, which would be random")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last token before it
    model.config.finetuning_task = task.name
    return Loaded(model.to(device), tokenizer, heads, missing)


def begin_at_the_mean(loaded, labels):
    """Let the new head of a regression predict the mean label at first, or hundreds of steps go into learning it."""
    for name, parameter in loaded.model.named_parameters():
        if name in loaded.random and name.endswith(".bias") and parameter.shape == (1,):
            torch.nn.init.constant_(parameter, statistics.fmean(labels))


def _trained_on(name):
    """The task that a folder of ours says; None for others, and for one that cannot be read, which loading it tells."""
    try:
        return json.loads((Path(name) / "config.json").read_text(encoding="utf-8")).get("finetuning_task")
    except (OSError, ValueError):
        return None


def around_the_same_encoder(model, task):
    """Another model with the encoder of this one, not a copy of it, and an empty head for another task."""
    config = copy.deepcopy(model.config)
    config.update({**_outputs(task), "finetuning_task": task.name})
    with torch.device("meta"):  # shapes without numbers
        other = type(model)(config)
    setattr(other, model.base_model_prefix, model.base_model)
    for name, part in other.named_children():
        if name != model.base_model_prefix:
            part.to_empty(device=model.device)
    return other


def _outputs(task):
    """The entries of a configuration that say what the outputs are."""
    labels = task.labels or ("score",)
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification" if task.labels else "regression",
    }


def encode(tokenizer, texts, seq_len):
    """The tokens of one or two texts, the longer one cut where they are too many together, and whether one was."""
    if len(texts) == 2 and tokenizer.sep_token_id is None:
        texts = ("\n".join(texts),)  # of a decoder: without a separator the two would run into each other
    encoding = tokenizer(*texts, truncation=True, max_length=seq_len)
    if len(encoding["input_ids"]) > seq_len:  # the tokenizer cuts nothing then
        marks = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        raise UserError(f"--seq_len {seq_len}: the marks around the texts alone are {marks} tokens; use more")
    if tokenizer.is_fast:
        return {**encoding, "cut": bool(encoding.encodings[0].overflowing)}
    return {**encoding, "cut": len(tokenizer(*texts)["input_ids"]) > seq_len}


def collate(samples, tokenizer):
    """The tensors of a list of encoded samples, padded on the right, and their labels if they have some."""
    width = max(len(sample["input_ids"]) for sample in samples)
    fillers = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    batch = {
        name: torch.tensor([sample[name] + [filler] * (width - len(sample[name])) for sample in samples])
        for name, filler in fillers.items()
        if name in samples[0]
    }
    if "label" in samples[0]:
        batch["labels"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def logits(model, batch):
    """`(samples, labels)` logits, or `(samples,)` predictions of a regression, in float32."""
    output = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.float()
    return output[:, 0] if model.config.problem_type == "regression" else output


def loss_sum(model, batch, label_smoothing):
    return _loss_sum(logits(model, batch), batch["labels"], label_smoothing)


def _loss_sum(output, labels, label_smoothing):
    if output.dim() == 1:
        return F.mse_loss(output, labels.float(), reduction="sum")
    return F.cross_entropy(output, labels, label_smoothing=label_smoothing, reduction="sum")


@torch.no_grad()  # see loop.mean_loss
def predict(model, samples, knobs, tokenizer, progress=False):
    """The logits of every sample, in order, on the CPU; several processes share the work, and each gets all."""
    device = next(model.parameters()).device
    model.eval()
    order = sorted(range(len(samples)), key=lambda index: len(samples[index]["input_ids"]))
    batches = [order[start : start + knobs.eval_batch_size] for start in range(0, len(order), knobs.eval_batch_size)]
    batches = distributed.share_batches(batches, model)
    rows = {}
    with tqdm(total=sum(map(len, batches)), desc="predicting", unit="text", disable=not progress) as bar:
        for chosen in batches:
            batch = compute.to_device(collate([samples[index] for index in chosen], tokenizer), device)
            with compute.autocast(device, knobs.precision):
                output = logits(model, batch).cpu()
            rows.update(zip(chosen, output, strict=True))
            bar.update(len(chosen))
    rows = distributed.union(rows)
    output = torch.stack([rows[index] for index in range(len(samples))])
    if not output.isfinite().all():
        raise loop.NotFinite(
            f"the outputs for {len(samples)} texts are not all finite; nothing was written of them. In training, try a "
            "lower --lr or more --warmup_steps; with --precision fp16, another one"
        )
    return output


def decide(output):
    """The predictions that scores take: label ids, or the numbers of a regression."""
    return output.tolist() if output.dim() == 1 else output.argmax(-1).tolist()


def training_task(task, tokenizer):
    """The `loop.Task` of a `glue.GlueTask`: the best validation has most of its first metric, then least loss."""

    def validate(model, _, samples, knobs):
        output = predict(model, samples, knobs, tokenizer)
        labels = [sample["label"] for sample in samples]
        loss = _loss_sum(output, torch.tensor(labels), 0.0).item() / len(samples)
        scores = glue_scores.score(decide(output), labels, task)
        chosen = {metric: scores[metric] for metric in task.metrics}
        first = chosen[task.metrics[0]]
        return (-2.0 if first is None else first, -loss), {"valid_loss": loss, **chosen}

    return loop.Task(partial(collate, tokenizer=tokenizer), loss_sum, len, validate)
