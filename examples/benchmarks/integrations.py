"""What becomes of an adapter in the tools that people train with: does it train, reload and resume, ours and PEFT's?

    cd examples/benchmarks
    python integrations.py
    python integrations.py --record integrations

Each of the --tools trains a tiny model of its own, saves, reloads, and goes on from the checkpoint. About a minute.
Needs the packages of the tools: `pip install -e '.[tools]'`. Written to --output_dir: integrations.json.
"""

import contextlib
import copy
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would look for the base on the hub when it saves
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this checkout's loralib

import integrations_trainer
import measure
import torch
import transformers
from common.cli import UserError, knob, make_output_folder, parse_knobs, run
from common.records import results
from common.reports import tables

import loralib as lora

HERE = Path(__file__).resolve().parent
STEPS = 4


class Loralib:
    def inject(self, model, targets, heads=()):
        lora.inject_lora(model, r=2, target_modules=targets, modules_to_save=list(heads))
        return model

    def save(self, model, folder):
        folder.mkdir(parents=True, exist_ok=True)
        lora.save_lora(model, folder / "adapter.safetensors")

    def load(self, model, folder):
        lora.load_lora(model, folder / "adapter.safetensors")
        return model


class Peft:
    def inject(self, model, targets, heads=()):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=list(heads) or None))

    def save(self, model, folder):
        model.save_pretrained(folder)

    def load(self, model, folder):
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder, is_trainable=True)


class PeftInDiffusers(Peft):
    """What diffusers' models have of PEFT in themselves."""

    def inject(self, model, targets, heads=()):
        from peft import LoraConfig

        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, lora_alpha=16))
        return model

    def save(self, model, folder):
        model.save_lora_adapter(folder)

    def load(self, model, folder):
        model.requires_grad_(False)
        model.load_lora_adapter(folder, prefix=None, use_safetensors=True)
        return model


class LoralibForDiffusers(Loralib):
    def save(self, model, folder):
        lora.save_lora(model, folder, format="diffusers")

    def load(self, model, folder):
        lora.load_lora(model, folder)
        return model


SYSTEMS = {"loralib": Loralib(), "peft": Peft()}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


def size(folder):
    """The bytes of what is in a folder, but for texts."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".ckpt", ".bin"))


def difference(ours, theirs):
    return (ours - theirs).abs().max().item()


def outputs(model, call):
    model.eval()
    with torch.no_grad():
        return call(model).clone()


def in_a_loop(system, folder, build, call, targets, heads=()):
    """What a loop of one's own gives: `call(model)` is trained to be one everywhere."""
    folder.mkdir(parents=True, exist_ok=True)

    def train(model, optimizer):
        model.train()
        losses = []
        for _ in range(STEPS):
            loss = (call(model) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = system.inject(build(), targets, heads)
    optimizer = adamw(model)
    losses = train(model, optimizer)
    system.save(model, folder)
    state = copy.deepcopy(optimizer.state_dict())
    reloaded = system.load(build(), folder)
    reload = difference(outputs(reloaded, call), outputs(model, call))
    again = adamw(reloaded)
    again.load_state_dict(state)
    train(reloaded, again)
    train(model, optimizer)
    return {
        "trains": losses[-1] < losses[0],
        "checkpoint_bytes": size(folder),
        "reload_difference": reload,
        "resume_difference": difference(outputs(reloaded, call), outputs(model, call)),
    }


def seeded(build):
    def again():
        torch.manual_seed(0)
        return build()

    return again


def images(pixels):
    return torch.linspace(-1, 1, 2 * 3 * pixels * pixels).sin().reshape(2, 3, pixels, pixels)


def with_timm(system, folder):
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    build = seeded(lambda: timm.create_model("vit_tiny_patch16_224", **sizes))
    return in_a_loop(SYSTEMS[system], folder, build, lambda model: model(images(32)), ["qkv"], ["head"])


def with_torchvision(system, folder):
    import torchvision

    build = seeded(lambda: torchvision.models.resnet18(num_classes=5))
    return in_a_loop(SYSTEMS[system], folder, build, lambda model: model(images(32)), ["conv1", "conv2"], ["fc"])


def with_open_clip(system, folder):
    import open_clip

    sizes = {"layers": 2, "width": 16}
    vision = {"image_size": 32, "patch_size": 8, "head_width": 8, **sizes}
    text = {"context_length": 8, "vocab_size": 64, "heads": 2, **sizes}
    build = seeded(lambda: open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))
    tokens = torch.arange(16).reshape(2, 8) + 1

    def call(model):
        model = getattr(model, "base_model", model)  # of PEFT, whose wrapper has no encode_image
        model = getattr(model, "model", model)
        return torch.cat([model.encode_image(images(32)), model.encode_text(tokens)])

    return in_a_loop(SYSTEMS[system], folder, build, call, ["c_fc", "c_proj"])


def with_diffusers(system, folder):
    import diffusers

    build = seeded(
        lambda: diffusers.UNet2DConditionModel(
            **{"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1},
            **{"cross_attention_dim": 8, "attention_head_dim": 4},
            **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
            **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        )
    )
    x, text = images(8)[:, :1].repeat(1, 4, 1, 1), torch.linspace(-1, 1, 80).reshape(2, 5, 8)
    systems = {"loralib": LoralibForDiffusers(), "peft": PeftInDiffusers()}
    return in_a_loop(systems[system], folder, build, lambda model: model(x, 3, text).sample, ["to_q", "to_v"])


def classifier():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, **off, num_attention_heads=2, max_position_embeddings=16)
    )


IDS = torch.arange(48).reshape(8, 6) * 7 % 40
LABELS = torch.arange(8) % 2


def batches():
    pairs = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS, strict=True)]
    return torch.utils.data.DataLoader(pairs, batch_size=4)


def logits(model):
    return outputs(model, lambda model: model(input_ids=IDS).logits)


def with_accelerate(system, folder):
    from accelerate import Accelerator

    library = SYSTEMS[system]

    def prepared():
        model = library.inject(classifier(), ["query", "value"], ["classifier"])
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, adamw(model), batches())

    def train(accelerator, model, optimizer, loader):
        model.train()
        losses = []
        for _ in range(STEPS):
            losses.append(0.0)
            for batch in loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses[-1] += loss.item()
        return losses

    first = prepared()
    losses = train(*first)
    accelerator, model = first[:2]
    accelerator.save_state(folder / "state")
    library.save(accelerator.unwrap_model(model), folder / "adapter")
    wanted = logits(model)
    reloaded = logits(library.load(classifier(), folder / "adapter"))
    train(*first)
    second = prepared()
    second[0].load_state(folder / "state")
    train(*second)
    return {
        "trains": losses[-1] < losses[0],
        "checkpoint_bytes": size(folder / "adapter"),
        "reload_difference": difference(reloaded, wanted),
        "resume_difference": difference(logits(second[1]), logits(model)),
    }


def with_lightning(system, folder):
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    library = SYSTEMS[system]

    class Classifier(lightning.LightningModule):
        strict_loading = False  # a checkpoint is without the base

        def __init__(self):
            super().__init__()
            self.model = library.inject(classifier(), ["query", "value"], ["classifier"])
            self.losses = []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return adamw(self)

        def on_save_checkpoint(self, checkpoint):
            if system == "loralib":
                checkpoint["state_dict"] = lora.lora_state_dict(self)
            else:
                trained = {name for name, p in self.named_parameters() if p.requires_grad}
                checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def trained(epochs, resumed=None):
        model = Classifier()
        quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, **quiet)
        trainer.fit(model, batches(), ckpt_path=resumed)
        return trainer, model

    trainer, model = trained(STEPS)
    (folder / "lightning").mkdir(parents=True)
    trainer.save_checkpoint(folder / "lightning" / "a.ckpt")
    library.save(model.model, folder / "adapter")
    reloaded = library.load(classifier(), folder / "adapter")
    _, resumed = trained(2 * STEPS, folder / "lightning" / "a.ckpt")
    _, whole = trained(2 * STEPS)
    return {
        "trains": model.losses[-1] < model.losses[0],
        "checkpoint_bytes": size(folder / "lightning"),
        "reload_difference": difference(logits(reloaded), logits(model.model)),
        "resume_difference": difference(logits(resumed.model), logits(whole.model)),
    }


TEXTS = ["a b c", "d e f g", "h", "a c e", "b b", "f h g", "c", "e d"]


def with_sentence_transformers(system, folder):
    import sentence_transformers
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, losses

    library, here = SYSTEMS[system], folder / "base"
    here.mkdir(parents=True)
    words = [*["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], *"abcdefgh"]
    (here / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab_file=str(here / "vocab.txt")).save_pretrained(here)
    classifier().bert.save_pretrained(here)

    def plain():
        return SentenceTransformer(str(here), device="cpu")

    def inner(model):
        return "model" if "model" in model[0]._modules else "auto_model"  # before version 6

    model = plain()
    setattr(model[0], inner(model), library.inject(getattr(model[0], inner(model)), ["query", "value"]))
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": [text[::-1] + " a" for text in TEXTS]})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        **{
            "output_dir": str(folder / "out"),
            "max_steps": 2 * STEPS,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
        },
        **{"report_to": [], "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, loss=loss
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    library.save(getattr(model[0], inner(model)), folder / "adapter")
    reloaded = plain()
    setattr(reloaded[0], inner(model), library.load(getattr(reloaded[0], inner(model)), folder / "adapter"))
    wanted, found = (torch.tensor(each.encode(TEXTS, show_progress_bar=False)) for each in (model, reloaded))
    return {
        "trains": history[-1] < history[0],
        "checkpoint_bytes": size(folder / "adapter"),
        "reload_difference": difference(found, wanted),
        "resume_difference": None,
    }


RUNS = {
    **integrations_trainer.RUNS,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
    "sentence-transformers": with_sentence_transformers,
    "timm": with_timm,
    "torchvision": with_torchvision,
    "open_clip": with_open_clip,
    "diffusers": with_diffusers,
}
DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    **dict.fromkeys(["Trainer", "Seq2SeqTrainer"], "transformers"),
    **dict.fromkeys(["SFTTrainer", "DPOTrainer", "GRPOTrainer"], "trl"),
}


@dataclass
class Knobs:
    tools: str = knob(",".join(RUNS), "which to run, comma separated")
    output_dir: str = knob(str(HERE / "output"), "folder for what is written")
    record: str | None = knob(None, "name under which examples/results/ gets the record, too")


def run_one(tool, system):
    """The outcome of one run, in a folder of its own; what it cannot do is said in "error"."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return RUNS[tool](system, Path(folder))
        except ImportError:
            raise
        except Exception as error:  # a finding about the other system, to be shown
            if system == "loralib":
                raise
            return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}


def accuracy():
    """What a trained classifier gets right in memory, and after `save_model` and `from_pretrained`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return integrations_trainer.accuracy(folder)


def measure_all(knobs):
    """Run, print, write and return the record."""
    chosen = knobs.tools.split(",")
    unknown = [tool for tool in chosen if tool not in RUNS]
    if unknown:
        raise UserError(f"--tools {','.join(unknown)}: must be among {', '.join(RUNS)}")
    make_output_folder(knobs.output_dir)
    torch.set_num_threads(1)
    environment, found = results.environment(torch.device("cpu")), {}
    for tool in chosen:
        try:
            found[tool] = {system: run_one(tool, system) for system in SYSTEMS}
        except ImportError as error:
            raise UserError(f"--tools {tool}: {error}; install the tools with pip install -e '.[tools]'") from error
    versions = {}
    for tool in (*chosen, "peft"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[DISTRIBUTIONS.get(tool, tool)] = metadata.version(DISTRIBUTIONS.get(tool, tool))
    record = {
        "task": "integrations",
        "configuration": results.configuration(knobs),
        "tools": found,
        "classifier": accuracy() if "Trainer" in chosen else None,
        "versions": versions,
        "environment": environment,
    }
    print(tables.aligned(tables.in_lists(tables.integration_rows(record))))
    measure.write(record, knobs, "integrations")
    return record


def main():
    measure_all(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
