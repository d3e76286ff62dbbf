"""Train the tokenizer and pretrain the encoder that ship in examples/NLU/model.

    python examples/embedded/make_encoder.py
    python examples/embedded/make_encoder.py --output_dir somewhere --steps 20    # a quick look

Takes about 9 minutes on one core, without network, and gives the same bits again on the same machine with
the same versions of torch and transformers. The encoder is an ordinary RobertaForMaskedLM in float16,
pretrained by masked language modelling on the unlabelled text of glue_grammar.py. How two texts go together is asked
of the last token; the first, which a classifier reads, learns which words there are, and nothing else.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path

import make_glue_data
import pretraining
import tokenizers
import torch
import transformers
from glue_grammar import OPENINGS, page
from torch.nn.functional import cross_entropy, layer_norm, mse_loss
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
from common.cli import run

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCABULARY = 2048  # nearly every word of the grammar is one token
WIDTH, LAYERS, HEADS, POSITIONS = 160, 4, 4, 128
BATCH = 96  # pages to a step
STEPS = 2400
WORDS_ONLY = 0.25  # of the steps: to copy comes before to compare
LR, WARMUP, WEIGHT_DECAY = 4e-3, 100, 0.1
CHOSEN = 0.25  # of the words, more than RoBERTa's 15 %: the pages are short, and each is seen once
MASKED, REPLACED = 0.4, 0.5  # of the chosen; many are replaced, so that every word is checked against the other text
WHOLE = 0.7  # of the pages that a word could open: nothing in them is hidden, and only that word is asked for
OPENING_WEIGHT = 3.0  # of the loss of the opening word, beside that of the hidden words
BAG_WEIGHT = 3.0  # of the error of the first token
SEED = 5
THREADS = 1  # fixed: the order of a sum depends on the number of threads
TOKENIZER_PAGES = 20_000
HELDOUT_BATCHES = 16
HELDOUT_SEED = 1_000_003  # added to the seed of the training text


def dev_texts():
    """Every text of the shipped dev and tune files: none of them may be met in the pretraining."""
    made = make_glue_data.make_rows().items()
    return frozenset(text for (_, file), rows in made if file != "train" for row in rows for text in row.texts)


def train_tokenizer(rng):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _ in range(TOKENIZER_PAGES) for text in page(rng)[0]), trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    return transformers.RobertaTokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        add_prefix_space=True,  # a word is the same token at the start of a text as inside it
        model_max_length=POSITIONS,
    )


def token_batches(tokenizer, rng, batches, held_out):
    """Batches of pages of about the same length, in random order, (padded ids, opening words); and their SHA-256.

    An opening word is its index in OPENINGS, or -1 where a page has none.
    """
    made, digest = [], hashlib.sha256()
    with tqdm(total=batches, desc="text", unit="batch", disable=batches < 1000) as progress:
        while len(made) < batches:
            count = min(50, batches - len(made))
            pages = [page(rng, held_out) for _ in range(count * BATCH)]
            digest.update("\0".join(text for texts, _ in pages for text in texts).encode())
            rows = [
                (tokenizer(*texts, truncation=True)["input_ids"], OPENINGS.index(opening) if opening else -1)
                for texts, opening in pages
            ]
            rows.sort(key=lambda row: len(row[0]))
            group = []
            for start in range(0, len(rows), BATCH):
                ids, openings = zip(*rows[start : start + BATCH], strict=True)
                padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")["input_ids"]
                group.append((padded, torch.tensor(openings)))
            rng.shuffle(group)
            made += group
            progress.update(count)
    return made, digest.hexdigest()


class Objective:
    """The losses of the pretraining: words of a page that are hidden or replaced, the word that could open it, its bag.

    The last </s> is asked for the opening word, by a head that is trained along and then left behind, as in BERT's
    prediction of the next sentence. <s>, which a classifier reads, is to be the mean of the embeddings of all tokens,
    a bag of words, and so to hold nothing of how they stand to each other: to bring that there is left to fine-tuning.
    """

    def __init__(self, tokenizer, seed):
        self.mask, self.pad = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.special = torch.tensor(tokenizer.all_special_ids)
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.starts = torch.tensor([token.startswith("Ġ") or not token.isalnum() for token in tokens])
        self.generator = torch.Generator().manual_seed(seed)

    def hide(self, ids, rows):
        """(The ids with whole words of these rows hidden or replaced, where those are.)"""
        words, special = self.starts[ids].cumsum(1) - 1, torch.isin(ids, self.special)
        chosen, way = (torch.rand(ids.shape, generator=self.generator).gather(1, words) for _ in range(2))
        chosen = (chosen < CHOSEN) & ~special & rows[:, None]
        others = ids[~special]  # a replacement is as likely as its word is frequent
        other = others[torch.randint(len(others), ids.shape, generator=self.generator)]
        hidden = ids.masked_fill(chosen & (way < MASKED), self.mask)
        return torch.where(chosen & (way >= MASKED) & (way < MASKED + REPLACED), other, hidden), chosen

    def losses(self, model, batch):
        ids, openings = batch
        whole = (openings >= 0) & (torch.rand(len(ids), generator=self.generator) < WHOLE)
        hidden, chosen = self.hide(ids, ~whole)
        openings = openings.masked_fill(~whole, -1)
        states = model.roberta(hidden, attention_mask=(ids != self.pad).long()).last_hidden_state
        words = cross_entropy(model.lm_head(states[chosen]).float(), ids[chosen])
        last = (ids != self.pad).sum(1) - 1
        guesses = model.opening_head(states[torch.arange(len(ids)), last]).float()
        opening = cross_entropy(guesses, openings, ignore_index=-1, reduction="sum") / (openings >= 0).sum().clamp(
            min=1
        )
        real = (ids != self.pad)[..., None]
        mean = (model.roberta.embeddings.word_embeddings(hidden).detach() * real).sum(1) / real.sum(1)
        first, mean = (layer_norm(state.float(), (WIDTH,)) for state in (states[:, 0], mean))
        return words, opening, mse_loss(first, mean)

    def __call__(self, model, batch):
        words, opening, bag = self.losses(model, batch)
        return words + OPENING_WEIGHT * opening + BAG_WEIGHT * bag


def heldout_perplexity(model, tokenizer, seed):
    """Perplexity of hidden words under a float32 model, on text that the pretraining with this seed did not see."""
    batches, _ = token_batches(tokenizer, random.Random(seed + HELDOUT_SEED), HELDOUT_BATCHES, frozenset())
    objective, losses = Objective(tokenizer, seed + HELDOUT_SEED), []
    model.eval()
    with torch.no_grad():
        for ids, _ in batches:
            hidden, chosen = objective.hide(ids, torch.ones(len(ids), dtype=torch.bool))
            logits = model(input_ids=hidden, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
            losses.append(cross_entropy(logits[chosen], ids[chosen]).item())
    return math.exp(sum(losses) / len(losses))


def make_encoder(output_dir, steps=STEPS, seed=SEED):
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    tokenizer = train_tokenizer(random.Random(seed))
    batches, text_sha256 = token_batches(tokenizer, random.Random(seed), steps, dev_texts())
    for _, openings in batches[: int(WORDS_ONLY * steps)]:
        openings.fill_(-1)
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS + tokenizer.pad_token_id + 1,  # RoBERTa counts from behind the padding
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,  # every page is seen once, so there is nothing to overfit
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # the fastest here at this size; it is not saved
    )
    model = transformers.RobertaForMaskedLM(config).train()
    model.opening_head = torch.nn.Linear(WIDTH, len(OPENINGS))
    objective = Objective(tokenizer, seed)
    losses = pretraining.fit(model, model.roberta.encoder, batches, objective, LR, WARMUP, WEIGHT_DECAY)
    del model.opening_head
    facts = {
        "seed": seed,
        "tokens": sum((ids != tokenizer.pad_token_id).sum().item() for ids, _ in batches),
        "seconds": round(time.perf_counter() - started, 1),
        "text_sha256": text_sha256,
    }
    return pretraining.save(
        output_dir, model, tokenizer, losses, lambda saved: heldout_perplexity(saved, tokenizer, seed), facts
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=Path(__file__).parents[1] / "NLU" / "model")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the pretraining (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of text and weights (default: %(default)s)")
    args = parser.parse_args()
    print(json.dumps(make_encoder(args.output_dir, args.steps, args.seed), indent=2))


if __name__ == "__main__":
    run(main)
