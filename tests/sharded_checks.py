"""What test_distributed.py checks of the library in several processes: models that fully_shard shards.

    torchrun --nproc_per_node 2 sharded_checks.py cpu outcomes.json

Each check holds a sharded model against the same one in one piece. outcomes.json gets {check: None, or its error}.
"""

import datetime
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import loralib as lora

X = torch.randint(0, 11, (8, 6), generator=torch.Generator().manual_seed(1))
TARGETS = ["table", "linear", "convolution"]


class Model(nn.Module):
    """Sizes that neither two nor four divide."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 9)
        self.linear = nn.Linear(9, 9)
        self.fused = nn.Linear(9, 15)
        self.convolution = nn.Conv1d(15, 7, 3)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = self.fused(torch.tanh(self.linear(self.table(x))))
        return self.head(self.convolution(x.transpose(1, 2)).transpose(1, 2))


def made(seed=0):
    """A model with an adapter that is not zero and a head that belongs to it."""
    torch.manual_seed(seed)
    model = Model()
    lora.inject_lora(model, r=2, target_modules=[*TARGETS, "fused"], modules_to_save=["head"])
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            nn.init.normal_(parameter, std=0.3)
    return model


def sharded(model, adapters=True):
    """The model with each layer but the fused one by itself; without `adapters` what trains stays whole."""
    ignored = {"ignored_params": set() if adapters else {p for p in model.parameters() if p.requires_grad}}
    for name in TARGETS:
        fully_shard(model.get_submodule(name), **ignored)
    return fully_shard(model, **ignored)


def steps(model, processes):
    """The losses of three steps on X, of which each process takes a share."""
    optimizer, found = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    model.train()
    for _ in range(3):
        loss = model(X[dist.get_rank() :: processes] if processes > 1 else X).square().mean()
        loss.backward()
        if processes > 1:
            loss = loss.detach() / processes  # fully_shard has divided the gradients in the same way
            dist.all_reduce(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def check_training_evaluation_and_saving_are_those_of_one_process(folder):
    one, several = made(), sharded(made())
    assert lora.count_parameters(several) == lora.count_parameters(one)
    assert steps(several, dist.get_world_size()) == pytest.approx(steps(one, 1), rel=1e-5)
    for name, tensor in lora.lora_state_dict(several, modules_to_save=["head"]).items():
        torch.testing.assert_close(tensor, one.state_dict()[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(several.eval()(X), one.eval()(X), rtol=1e-4, atol=1e-6)


def check_files_are_those_of_one_process(folder):
    one, several = made(), sharded(made())
    for _ in range(2):  # before and after a forward, which leaves the root's Parameters whole
        for kind, name in (("loralib", "adapter.safetensors"), ("peft", "peft")):
            alone = folder / str(dist.get_rank())
            alone.mkdir(exist_ok=True)
            lora.save_lora(several, folder / name, format=kind)
            lora.save_lora(one, alone / name, format=kind)
            names = [name] if kind == "loralib" else [f"peft/{file.name}" for file in (folder / name).iterdir()]
            assert all((folder / file).read_bytes() == (alone / file).read_bytes() for file in names)
        with torch.no_grad():
            several(X)


def check_the_first_process_alone_writes(folder):
    mine = folder / f"adapter {dist.get_rank()}.safetensors"
    lora.save_lora(sharded(made()), mine)
    assert mine.exists() == (dist.get_rank() == 0)


def check_an_error_of_writing_reaches_all(folder):
    (folder / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        lora.save_lora(sharded(made()), folder / "file" / "adapter.safetensors")


def check_loading_in_any_state_gives_what_was_saved(folder):
    other = made(seed=1)
    for adapters in (True, False):
        path = folder / f"{adapters}.safetensors"  # the first process may write the second while others read the first
        several = sharded(made(), adapters)
        lora.save_lora(sharded(other, adapters) if adapters else several, path)
        if adapters:
            want = lora.lora_state_dict(other)
        several.eval()
        with torch.no_grad():
            before = several(X)
            assert lora.load_lora(several, path) == ["table", "linear", "fused", "convolution"]
            after = several(X)
        if adapters:
            got = lora.lora_state_dict(several)
            assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
            whole = made()
            lora.load_lora(whole, path)
            with torch.no_grad():
                torch.testing.assert_close(after, whole.eval()(X), rtol=1e-5, atol=1e-6)
            assert not torch.equal(before, after)
        else:
            assert torch.equal(before, after)


def check_a_model_in_evaluation_mode_can_be_sharded(folder):
    """fully_shard reads `weight` before its first forward; that must not be the merged one."""
    for adapters in (True, False):
        one, several = (lora.merge_lora_weights(made().eval()) for _ in range(2))
        assert all(layer.merged for layer in several.modules() if isinstance(layer, lora.LoRALayer))
        sharded(several, adapters)
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(several(X), one(X), rtol=1e-5, atol=1e-6)
            several.train().eval()
            assert not any(layer.merged for layer in several.modules() if isinstance(layer, lora.LoRALayer))
        base = several.state_dict()["fused.weight"].full_tensor()
        assert torch.equal(base, one.state_dict()["fused.weight"])


def check_a_model_that_is_one_layer(folder):
    layers = [lora.MergedLinear(9, 15, r=2, enable_lora=[True, False, True]) for _ in range(2)]
    nn.init.normal_(layers[0].lora_B)
    layers[1].load_state_dict(layers[0].state_dict())
    one, several = layers[0].eval(), fully_shard(layers[1].eval())
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), device="cpu").to(X.device)
    for _ in range(2):
        assert torch.equal(several.delta_weight(), one.delta_weight())
        with torch.no_grad():
            torch.testing.assert_close(several(x), one(x))


def check_what_would_replace_or_merge_layers_is_refused(folder):
    one, several = made(), sharded(made())
    lora.save_lora(several, folder / "adapter.safetensors")
    with torch.no_grad():
        before = several(X)
    lora.save_lora(one, folder / f"{dist.get_rank()}.safetensors")
    for change in (
        lora.merge_lora_weights,
        lora.merge_and_unload,
        lora.unload,
        lambda model: lora.inject_lora(model, r=2, target_modules=["linear"], adapter_name="other"),
        lambda model: lora.load_lora(model, folder / "adapter.safetensors", adapter_name="other"),
        lambda model: lora.disable_adapters(model).__enter__(),  # the head has another one in its place
    ):
        with pytest.raises(ValueError, match="FSDPModel is sharded by fully_shard, .*; nothing was changed. Inject"):
            change(several)
        assert lora.list_adapters(several) == ["default"]
        with torch.no_grad():
            assert torch.equal(several(X), before)


def check_save_pretrained(folder):
    """Of all processes together, and of the first one with a state dict that accelerate has put together."""
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    dist.barrier()
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(transformers.LlamaForCausalLM.from_pretrained(folder / "base"))
        lora.inject_lora(models[-1], r=2)
        for name, parameter in models[-1].named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    one, several = models
    for layer in several.model.layers:
        fully_shard(layer)
    fully_shard(several).save_pretrained(folder / "together", is_main_process=dist.get_rank() == 0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(several, options=options)
    if dist.get_rank() == 0:
        several.save_pretrained(folder / "given", state_dict=state)
        one.save_pretrained(folder / "one")
        for name in ("adapter_model.safetensors", "adapter_config.json", "model.safetensors"):
            expected = (folder / "one" / name).read_bytes()
            assert (folder / "together" / name).read_bytes() == expected == (folder / "given" / name).read_bytes(), name


if __name__ == "__main__":
    # An error in one process alone leaves the others waiting.
    device = sys.argv[1]
    torch.set_default_device(device)
    X = X.to(device)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    outcomes = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(folders)
            try:
                check(Path(folders[0]))
                error = None
            except Exception:
                error = traceback.format_exc()
                print(error, file=sys.stderr)
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error)
            outcomes[name] = next(filter(None, errors), None)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(outcomes), encoding="utf-8")
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # for the reason in cli.run
