"""In the tools that people train with: wrappers and their prefixes, heads within them, and each tool's own round trip.

The default group has accelerate and torch's own wrappers, and small classes with the names and the layout of
Lightning's and sentence-transformers'; the slow tests have the tools themselves. With them: `pip install -e '.[tools]'`
and `pytest tests/test_integrations.py -m "slow or not slow"`.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import loralib as lora

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]

import integrations  # noqa: E402 (after the folder that holds it)
from common.reports import tables  # noqa: E402

PACKAGES = {"sentence-transformers": "sentence_transformers"}
IN_DEFAULT = {"accelerate"}


def runs(tools):
    return [pytest.param(tool, marks=[] if tool in IN_DEFAULT else pytest.mark.slow) for tool in tools]


def outcome(tool, system, folder):
    try:
        return integrations.RUNS[tool](system, folder)
    except ImportError as error:
        pytest.skip(f"{tool}: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", runs(integrations.RUNS))
def test_trains_reloads_and_resumes(tool, tmp_path):
    found = outcome(tool, "loralib", tmp_path)
    assert found["trains"] and found["reload_difference"] == 0 and found["resume_difference"] in (0, None)
    assert found["checkpoint_bytes"] < 1_000_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", integrations.RUNS)
def test_peft_beside_it(tool, tmp_path):
    """The other column: what it is compared with does train."""
    found = outcome(tool, "peft", tmp_path)
    assert found["trains"]
    # It saves no statistics of batch norms.
    assert (found["reload_difference"] == 0) == (tool != "torchvision")


def test_rows_of_the_table():
    row = {"trains": True, "checkpoint_bytes": 1234, "reload_difference": 0.0, "resume_difference": None}
    found = {"loralib": row, "peft": {"error": "ValueError: no"}}
    rows = tables.integration_rows({"tools": {"one": found}})
    assert rows["one"] == ["yes / error", "1,234 / error", "0 / error", "- / error"]


# Wrappers.


class LightningModule(nn.Module):
    """As Lightning's, under whose name users' classes are."""


class Lit(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net, self.metric = model, nn.Identity()


class SentenceTransformer(nn.Sequential):
    pass


class Transformer(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)


class _FabricModule(nn.Module):
    def __init__(self, model):
        super().__init__()
        self._forward_module = self._original_module = model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "Fabric": _FabricModule,
    "Lightning": Lit,
    "Lightning, compiled": lambda model: Lit(torch.compile(model, backend="eager")),
    "Lightning, parallel": lambda model: Lit(nn.DataParallel(model)),
    "sentence-transformers": lambda model: SentenceTransformer(Transformer(model, "model"), nn.Identity()),
    "sentence-transformers 5": lambda model: SentenceTransformer(Transformer(model, "auto_model"), nn.Identity()),
}


def classifier():
    return integrations.classifier().eval()


def inner(wrapper):
    return next(m for m in wrapper.modules() if isinstance(m, transformers.BertForSequenceClassification))


def trained(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("format", ["loralib", "peft"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_files_have_the_names_of_the_model_itself(wrap, format, tmp_path):
    """Whatever is around it: found head and all, to the byte the file of the bare model; and into either."""
    bare = classifier()
    lora.inject_lora(bare, r=2)
    lora.save_lora(trained(bare), tmp_path / "bare", format=format)
    wrapper = wrap(classifier())
    lora.inject_lora(wrapper, r=2)
    model = inner(wrapper)
    model.load_state_dict(bare.state_dict())
    assert model.classifier.weight.requires_grad
    lora.save_lora(wrapper, tmp_path / "wrapped", format=format)
    names = ["adapter_model.safetensors", "adapter_config.json"] if format == "peft" else [""]
    for name in names:
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "bare" / name).read_bytes()
    wanted = integrations.logits(bare)
    for around in (lambda model: model, wrap):
        loaded = around(classifier())
        lora.load_lora(loaded, tmp_path / "wrapped")
        assert torch.equal(integrations.logits(inner(loaded)), wanted)
        lora.load_lora(loaded, tmp_path / "wrapped")  # into the adapter that is there
        assert torch.equal(integrations.logits(inner(loaded)), wanted)


def test_what_is_trained_beside_the_model_keeps_the_names(tmp_path):
    """A prefix is left out of all names or of none."""
    module = Lit(classifier())
    module.extra = nn.Linear(4, 4)
    lora.inject_lora(module, r=2, target_modules=["query"], modules_to_save=["extra"])
    lora.save_lora(trained(module), tmp_path / "a")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "a")}
    assert names == {"net", "extra"}
    loaded = Lit(classifier())
    loaded.extra = nn.Linear(4, 4)
    lora.load_lora(loaded, tmp_path / "a")
    assert torch.equal(loaded.extra.weight, module.extra.weight)
    assert torch.equal(integrations.logits(loaded.net), integrations.logits(module.net))


def test_any_module_around_a_classifier_has_its_head_trained():
    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = classifier(), classifier()

    model = Anything()
    lora.inject_lora(model, r=2)
    assert model.first.classifier.weight.requires_grad and model.second.classifier.weight.requires_grad


def language_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


def test_a_language_model_within_a_wrapper(tmp_path):
    """The output layer is no target of "all-linear", tokens are of its table, and resized embeddings are noticed."""
    module = Lit(language_model())
    assert not any("lm_head" in name for name in lora.inject_lora(module, r=2, target_modules="all-linear"))
    module = Lit(language_model())
    lora.inject_lora(module, r=2, target_modules=[], trainable_token_indices=[3, 5])
    lora.save_lora(trained(module), tmp_path / "a")
    with pytest.warns(UserWarning, match="PEFT, and so from_pretrained, reads no adapter of token rows alone"):
        lora.save_lora(module, tmp_path / "c", format="peft")
    assert json.loads(json.dumps(list(load_file(tmp_path / "a")))) == ["model.embed_tokens.lora_rows_weight"]
    module = Lit(language_model())
    lora.inject_lora(module, r=2)
    module.net.resize_token_embeddings(24)
    with pytest.warns(UserWarning, match="embeddings were resized .*net.model.embed_tokens, net.lm_head go with the"):
        lora.save_lora(module, tmp_path / "b")


def test_an_offloaded_model_is_told_to_be_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = classifier()
    lora.inject_lora(model, r=2)
    lora.save_lora(model, tmp_path / "a")
    offloaded = accelerate.cpu_offload(classifier(), execution_device="cpu")
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        lora.load_lora(offloaded, tmp_path / "a")
