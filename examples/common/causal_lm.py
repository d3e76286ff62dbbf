"""Causal language models of Hugging Face: loading, encoding of context and completion, collation, generation."""

from pathlib import Path

import huggingface_hub
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.cli import UserError

MAX_NEW_TOKENS = 128  # the longest official reference has 89 GPT-2 tokens, the longest embedded one 72
NUM_BEAMS = 4  # mentions about two in a hundred slot values more than greedy search, which is 1


def load_causal_lm(name, device):
    """(model in float32 on the device, tokenizer) of a folder or a hub name, for greedy or beam decoding only."""
    local = Path(name).is_dir()
    if not local:
        _require_on_hub(name)
    transformers.utils.logging.disable_progress_bar()  # of the weights' loading; downloads keep theirs
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model, report = AutoModelForCausalLM.from_pretrained(name, local_files_only=local, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: cannot be loaded as a causal language model: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"--model {name}: no causal language model, its weights lack {missing} and would be random")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end-of-text token, which ends a sentence here")
    # The model's own configuration may ask for sampling, penalties or other ends; without it results are repeatable.
    # Padding is masked, so that a tokenizer without padding token needs none.
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    return model.float().to(device), tokenizer


def context_window(model):
    """The most tokens the model can read."""
    return model.config.max_position_embeddings


def encode_context(tokenizer, context):
    return tokenizer(context, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def encode(tokenizer, context, completion):
    """The tokens of context, end-of-text, space, completion, end-of-text, with labels on the completion alone."""
    prompt = encode_context(tokenizer, context)
    # Encoded apart, as generation will see them: the completion's first token begins with the space.
    answer = tokenizer(" " + completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def collate(samples):
    """The arguments of the model for a list of encoded samples, padded on the right."""
    width = max(len(sample["input_ids"]) for sample in samples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        ids, padding = sample["input_ids"], width - len(sample["input_ids"])
        rows["input_ids"].append(ids + [0] * padding)  # any token: the mask hides it
        rows["attention_mask"].append([1] * len(ids) + [0] * padding)
        rows["labels"].append(sample["labels"] + [-100] * padding)
    return {name: torch.tensor(values) for name, values in rows.items()}


def generate(model, tokenizer, contexts, *, batch_size, num_beams=NUM_BEAMS, max_new_tokens=MAX_NEW_TOKENS):
    """The text the model writes after each context, by greedy or beam search; sets evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    prompts = [encode_context(tokenizer, context) for context in contexts]
    room = context_window(model) - max(map(len, prompts))
    if room < 1:
        raise UserError(f"a context of {max(map(len, prompts))} tokens fills the model's {context_window(model)}")
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # little padding
    texts = [""] * len(prompts)
    with torch.inference_mode(), tqdm(total=len(prompts), desc="generating", unit="text") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[index]) for index in chosen)
            # On the left, so that every row's last token is the one to continue from.
            paddings = [width - len(prompts[index]) for index in chosen]
            ids = [[tokenizer.eos_token_id] * pad + prompts[i] for pad, i in zip(paddings, chosen, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in paddings]
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                num_beams=num_beams,
                max_new_tokens=min(max_new_tokens, room),
            )
            for index, row in zip(chosen, output[:, width:].tolist(), strict=True):
                texts[index] = _decode(tokenizer, row)
            bar.update(len(chosen))
    return texts


def _decode(tokenizer, tokens):
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    # No clean-up: it would take away the spaces before punctuation, which E2E texts have.
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return " ".join(text.split())


def _require_on_hub(name):
    what = "neither a folder nor a model that can be had from the Hugging Face hub"
    do = (
        "Give a folder with config.json, tokenizer and weights, or a hub name such as gpt2 (with network, or one "
        "downloaded before); examples/embedded/make_model.py writes the model of the default run anew"
    )
    try:
        huggingface_hub.hf_hub_download(name, "config.json", local_files_only=True)
        return  # downloaded before
    except huggingface_hub.errors.HFValidationError:
        raise UserError(f"--model {name}: no such folder, and no hub name either. {do}") from None
    except OSError:
        pass
    try:
        # One request first: from_pretrained tries each file for half a minute when there is no network.
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:  # no common base: the hub's own errors, or those of the http client it uses
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--model {name}: {what} ({reason}). {do}") from error
