"""Trainers of transformers and TRL: whether they train an adapter, what a checkpoint takes, and what comes back.

For integrations.py, which runs them. TRL's need `pip install trl datasets`. Each is a real training of a model with
random weights, the same for both libraries.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

import loralib as lora

STEPS = 6
WORDS = ["the", "a", "red", "blue", "cat", "dog", "sees", "likes", "runs", "sleeps", "well", "badly", "."]
SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def base(folder, auto, config):
    """Write a base model with random weights once, and return where."""
    path = Path(folder) / "base"
    if not path.exists():
        set_seed(0)
        auto.from_config(config).save_pretrained(path)
        tokenizer().save_pretrained(path)
    return path


def adapt(system, model, **more):
    """Put the same new adapter in, by either library."""
    set_seed(1)
    if system == "loralib":
        lora.inject_lora(model, r=4, lora_alpha=8, lora_dropout=0.1, **more)
        return model
    import peft

    task = more.pop("task_type", None)
    if "target_modules" not in more:
        more["target_modules"] = [name for name in ("q_proj", "v_proj", "q", "v", "query", "value")]
    return peft.get_peft_model(model, peft.LoraConfig(task, r=4, lora_alpha=8, lora_dropout=0.1, **more))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def size(folder):
    """The bytes of the weights and their configuration in a folder, without the state of optimizer and trainer."""
    files = [path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin", ".json")]
    return sum(path.stat().st_size for path in files if "adapter" in path.name or "model" in path.name)


def run(system, folder, make_model, make_trainer, output, auto):
    """Train, save, load what was saved, and train once more from the middle on.

    Args:
        system: "loralib" or "peft".
        folder: for everything that is written.
        make_model: returns a model that has a new adapter.
        make_trainer: returns a trainer for a model, given the folder to write to.
        output: what the model computes, as a tensor.
        auto: the class whose `from_pretrained` reads the folder.
    """
    whole = make_trainer(make_model(), f"{folder}/whole")
    before = trained(whole.model)
    whole.train()
    after = trained(whole.model)
    whole.save_model(f"{folder}/saved")
    with torch.no_grad():
        expected = output(whole.model.eval())
        loaded = output(auto.from_pretrained(f"{folder}/saved").eval())
    middle = f"{folder}/whole/checkpoint-{STEPS // 2}"
    resumed = make_trainer(make_model(), f"{folder}/resumed")
    resumed.train(resume_from_checkpoint=middle)
    again = trained(resumed.model)
    return {
        "trains": all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name),
        "checkpoint_bytes": size(middle),
        "model_bytes": size(f"{folder}/base"),
        "reload_difference": (loaded - expected).abs().max().item(),
        "resume_difference": max((again[name] - after[name]).abs().max().item() for name in after),
    }


def arguments(cls, folder, **more):
    return cls(
        folder,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **more,
    )


def sentences(count=16):
    """Token ids that a classifier can tell apart: the words at even and odd places."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 12, (count, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]


def trainer(system, folder):
    config = RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=20, num_labels=2, pad_token_id=0)
    auto, data = AutoModelForSequenceClassification, sentences()
    path = base(folder, auto, config)
    task = {} if system == "loralib" else {"task_type": "SEQ_CLS"}
    return run(
        system,
        folder,
        lambda: adapt(system, auto.from_pretrained(path), **task),
        lambda model, output: Trainer(model, arguments(TrainingArguments, output), train_dataset=data),
        lambda model: model(torch.stack([row["input_ids"] for row in data])).logits,
        auto,
    )


def seq2seq_trainer(system, folder):
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    auto = AutoModelForSeq2SeqLM
    data = [{**row, "labels": row["input_ids"].flip(0)} for row in sentences()]
    path = base(folder, auto, config)
    task = {} if system == "loralib" else {"task_type": "SEQ_2_SEQ_LM"}
    ids = torch.stack([row["input_ids"] for row in data])
    return run(
        system,
        folder,
        lambda: adapt(system, auto.from_pretrained(path), **task),
        lambda model, output: Seq2SeqTrainer(model, arguments(Seq2SeqTrainingArguments, output), train_dataset=data),
        lambda model: model(input_ids=ids, decoder_input_ids=ids).logits,
        auto,
    )


def with_trl(system, folder, cls, config, rows, first=None, **more):
    """A run of one of TRL's trainers; `first` makes the further arguments of the trainer, given the model."""
    from datasets import Dataset

    auto, tokens = AutoModelForCausalLM, tokenizer()
    small = LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    path = base(folder, auto, small)
    ids = torch.arange(4, 12)[None]

    def make(model, output):
        return cls(
            model=model,
            args=arguments(config, output, bf16=False, **more),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokens,
            **({} if first is None or system == "peft" else first(model)),
        )

    task = {} if system == "loralib" else {"task_type": "CAUSAL_LM"}
    return run(
        system,
        folder,
        lambda: adapt(system, auto.from_pretrained(path), **task),
        make,
        lambda model: model(ids).logits,
        auto,
    )


def sft(system, folder):
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": "the red cat sees a dog ."}, {"text": "a blue dog sleeps well ."}] * 8
    return with_trl(system, folder, SFTTrainer, SFTConfig, rows, max_length=16)


def dpo(system, folder):
    """Ours is given its reference; PEFT's model has one within."""
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "the red cat", "chosen": " sleeps well .", "rejected": " runs badly ."}] * 8
    return with_trl(
        system, folder, DPOTrainer, DPOConfig, rows, lambda model: {"ref_model": lora.reference_model(model)}
    )


def grpo(system, folder):
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def __init__(self, **given):
            super().__init__(reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions], **given)

    rows = [{"prompt": "the red cat"}, {"prompt": "a blue dog"}] * 8
    return with_trl(system, folder, Trainer, GRPOConfig, rows, beta=0.1, num_generations=4, max_completion_length=8)


def accuracy(folder):
    """A classifier in memory, and after `save_model` and `from_pretrained`: what fraction of its data it gets right."""
    config = RobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=20, num_labels=2, pad_token_id=0)
    auto, data = AutoModelForSequenceClassification, sentences(128)
    data = [
        {**row, "labels": (row["input_ids"][0] + row["input_ids"][3]) % 2} for row in data
    ]  # no word tells it alone
    ids, labels = torch.stack([row["input_ids"] for row in data]), torch.stack([row["labels"] for row in data])
    model = auto.from_pretrained(base(folder, auto, config))
    set_seed(1)
    lora.inject_lora(model, r=8, target_modules="all-linear")
    arguments = TrainingArguments(
        f"{folder}/run", max_steps=600, learning_rate=5e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    run = Trainer(model, arguments, train_dataset=data)
    run.train()
    run.save_model(f"{folder}/saved")
    files = [path.stat().st_size for path in Path(folder, "saved").glob("*.safetensors")]
    with torch.no_grad():
        right = [
            (each.eval()(ids).logits.argmax(-1) == labels).float().mean().item()
            for each in (model, auto.from_pretrained(f"{folder}/saved"))
        ]
    return {"version": lora.__version__, "in_memory": right[0], "reloaded": right[1], "bytes": sum(files)}


RUNS = {
    "Trainer": trainer,
    "Seq2SeqTrainer": seq2seq_trainer,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "GRPOTrainer": grpo,
}
