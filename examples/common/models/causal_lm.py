"""Causal language models of Hugging Face: loading, encoding of context and completion, losses, generation."""

import inspect
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from common.cli import UserError, knob, require_positive
from common.models import pretrained
from common.training import compute, distributed

NO_LABEL = -100


@dataclass
class DecodingKnobs(compute.ComputeKnobs):
    """The knobs of `generate`."""

    num_beams: int = knob(4, "width of the beam search; 1 is greedy, the paper takes 10")
    length_penalty: float = knob(1.0, "power of the length that a beam's log probability is divided by; paper: 0.8")
    no_repeat_ngram_size: int = knob(0, "no run of so many tokens twice in one text; 0 allows all, the paper takes 4")
    max_new_tokens: int = knob(128, "where a text is cut off that does not end by itself; the paper takes 64")


PAPER_DECODING = {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "max_new_tokens": 64}


class Generated(NamedTuple):
    texts: list[str]
    tokens: int  # generated in all, the ends of texts included
    seconds: float


def check_decoding(knobs):
    require_positive(knobs, "num_beams", "max_new_tokens", "eval_batch_size")
    if knobs.no_repeat_ngram_size < 0:
        raise UserError(f"--no_repeat_ngram_size {knobs.no_repeat_ngram_size}: must be at least 0")


def load_causal_lm(name, device):
    """(model in float32 on the device, tokenizer) of a folder or a hub name, for greedy or beam decoding only."""
    model, tokenizer, missing = pretrained.load(AutoModelForCausalLM, name, "causal language model")
    if missing:
        names = ", ".join(missing[:3])
        raise UserError(f"--model {name}: no causal language model, its weights lack {names} and would be random")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-text token, which ends a sentence here")
    # The model's own configuration may ask for sampling, penalties or other ends; without it results are repeatable.
    # Padding is masked, so that a tokenizer without padding token needs none, and transformers need not look for it.
    model.config.pad_token_id = None
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    return model.to(device), tokenizer


def encode_context(tokenizer, context):
    return tokenizer(context, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def encode(tokenizer, context, completion):
    """The tokens of context, end-of-text, space, completion, end-of-text, with labels on the completion alone."""
    prompt = encode_context(tokenizer, context)
    # Encoded apart, as generation will see them: the completion's first token begins with the space.
    answer = tokenizer(" " + completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [NO_LABEL] * len(prompt) + answer}


def collate(samples):
    """The token, mask and label tensors of a list of encoded samples, padded on the right."""
    width = max(len(sample["input_ids"]) for sample in samples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        ids, padding = sample["input_ids"], width - len(sample["input_ids"])
        rows["input_ids"].append(ids + [0] * padding)  # any token: the mask hides it
        rows["attention_mask"].append([1] * len(ids) + [0] * padding)
        rows["labels"].append(sample["labels"] + [NO_LABEL] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}


def loss_sum(model, batch, label_smoothing):
    """The cross entropy of every label given the tokens before it, summed."""
    labels = batch["labels"][:, 1:]
    # No text of the batch has a label before this position, so none needs logits there: half of a vocabulary's cost.
    start = int((labels != NO_LABEL).any(0).int().argmax())
    labels = labels[:, start:]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = labels.shape[1] + 1
    logits = model(**given).logits[:, -labels.shape[1] - 1 : -1]
    there = labels != NO_LABEL
    return F.cross_entropy(logits[there].float(), labels[there], label_smoothing=label_smoothing, reduction="sum")


def count_labels(samples):
    return sum(label != NO_LABEL for sample in samples for label in sample["labels"])


class _NoRepeatInText(transformers.LogitsProcessor):
    # transformers' own counts the prompt too, and a text has to repeat the names in its meaning.
    def __init__(self, size, prompt_width):
        self.inner, self.prompt_width = transformers.NoRepeatNGramLogitsProcessor(size), prompt_width

    def __call__(self, input_ids, scores):
        return self.inner(input_ids[:, self.prompt_width :], scores)


class _NoNaN(transformers.LogitsProcessor):
    # The largest of NaNs is some token, and a text of such tokens looks like one of a bad model.
    def __call__(self, input_ids, scores):
        if scores.isnan().any():
            raise UserError("the model's outputs are not finite; nothing was written. Try another --precision")
        return scores


def generate(model, tokenizer, contexts, knobs, what="generating"):
    """The text that the model writes after each context, by greedy or beam search; sets evaluation mode.

    Several processes share the contexts, and each gets all texts. A text ends at the end-of-text token or a blank line.
    """
    model.eval()
    device = next(model.parameters()).device
    prompts = [encode_context(tokenizer, context) for context in contexts]
    window, longest = pretrained.context_window(model), max(map(len, prompts))
    if longest >= window:
        raise UserError(f"a context of {longest} tokens fills the model's {window}")
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    batches = [order[start : start + knobs.eval_batch_size] for start in range(0, len(order), knobs.eval_batch_size)]
    batches = distributed.share_batches(batches, model)
    rows, started = {}, time.perf_counter()
    bar = tqdm(total=sum(map(len, batches)), desc=what, unit="text", disable=not distributed.is_main())
    with torch.no_grad(), compute.autocast(device, knobs.precision), bar:  # see loop.mean_loss
        for chosen in batches:
            width = max(len(prompts[index]) for index in chosen)
            # On the left, so that every row's last token is the one to continue from.
            paddings = [width - len(prompts[index]) for index in chosen]
            ids = [[tokenizer.eos_token_id] * pad + prompts[i] for pad, i in zip(paddings, chosen, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in paddings]
            size = knobs.no_repeat_ngram_size
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                num_beams=knobs.num_beams,
                max_new_tokens=min(knobs.max_new_tokens, window - width),
                # Only a beam search takes it.
                **({"length_penalty": knobs.length_penalty} if knobs.num_beams > 1 else {}),
                logits_processor=[_NoNaN(), *([_NoRepeatInText(size, width)] if size else [])],
                synced_gpus=distributed.is_sharded(model),  # all go on until the last text has ended
            )
            for index, row in zip(chosen, output[:, width:].tolist(), strict=True):
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                rows[index] = row[:end]
            bar.update(len(chosen))
    seconds = time.perf_counter() - started
    rows = distributed.union(rows)
    ended = {index: row[-1] == tokenizer.eos_token_id for index, row in rows.items()}
    cut = sum(not ended[index] and len(row) < knobs.max_new_tokens for index, row in rows.items())
    if cut:
        print(f"{cut} of {len(rows)} texts were cut off where the model's {window} tokens were full")
    texts = [_decode(tokenizer, rows[index]) for index in range(len(prompts))]
    return Generated(texts, sum(map(len, rows.values())), seconds)


def _decode(tokenizer, tokens):
    # No clean-up: it would take away the spaces before punctuation, which E2E texts have.
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return " ".join(text.strip().split("\n\n")[0].split())
