"""TRL's trainers on an adapted model, and the references of DPO and GRPO.

pip install -e '.[tools]'
python -m pytest -m slow tests/test_trl.py
"""

import sys

import pytest
import torch
from nlg_models import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig

import loralib as lora

sys.path.append(str(ROOT / "examples" / "benchmarks"))
import integrations_trainer as runs  # noqa: E402

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # theirs
ROWS = [{"prompt": "the red cat", "chosen": " sleeps well .", "rejected": " runs badly ."}] * 8


@pytest.mark.parametrize("system", ["loralib", "peft"])
@pytest.mark.parametrize("tool", ["SFTTrainer", "DPOTrainer", "GRPOTrainer"])
def test_trainers_train_save_reload_and_resume(tool, system, tmp_path):
    row = runs.RUNS[tool](system, tmp_path)
    assert row["trains"] and row["reload_difference"] == 0 and row["resume_difference"] == 0
    assert row["checkpoint_bytes"] < row["model_bytes"] / 3


@pytest.fixture
def after_sft(tmp_path):
    """A model with the adapter of an earlier training."""
    config = LlamaConfig(**runs.SMALL, intermediate_size=64, max_position_embeddings=64, pad_token_id=0)
    model = AutoModelForCausalLM.from_pretrained(runs.base(tmp_path, AutoModelForCausalLM, config))
    lora.inject_lora(model, r=4, lora_alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def dpo(model, folder, **more):
    arguments = runs.arguments(trl.DPOConfig, str(folder), bf16=False)
    data = datasets.Dataset.from_list(ROWS)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=runs.tokenizer(), **more)
    trainer.train()
    return [line["rewards/chosen"] for line in trainer.state.log_history if "rewards/chosen" in line]


def test_the_reference_of_dpo_is_the_model_after_sft(after_sft, tmp_path):
    """Case tools/06; without it TRL takes the base."""
    rewards = dpo(after_sft, tmp_path / "run", ref_model=lora.reference_model(after_sft))
    assert rewards[0] == 0 and rewards[-1] != 0


def test_of_itself_trl_takes_the_base(after_sft, tmp_path):
    assert dpo(after_sft, tmp_path / "run")[0] != 0


def test_the_base_alone_as_reference(after_sft, tmp_path):
    """As TRL's own choice, without a second model in memory."""
    with lora.disable_adapters(after_sft):
        reference = lora.reference_model(after_sft)
    held = {id(p) for p in after_sft.parameters()}
    assert all(id(p) in held for p in reference.parameters())
    state = {name: tensor.clone() for name, tensor in after_sft.state_dict().items()}
    rewards = dpo(after_sft, tmp_path / "run", ref_model=reference)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora.inject_lora(again, r=4, lora_alpha=8)
    again.load_state_dict(state)
    assert rewards == pytest.approx(dpo(again, tmp_path / "again"), rel=1e-4)


def test_the_reference_of_grpo(after_sft, tmp_path):
    """GRPO has no argument for it, and starts at a divergence of zero where the reference is the model."""
    from trl.trainer.utils import add_fused_lm_head

    divergences = []
    for mend in (False, True):
        reference = lora.reference_model(after_sft)
        trainer = trl.GRPOTrainer(
            after_sft,
            lambda completions, **_: [float(len(text) % 7) for text in completions],
            args=runs.arguments(
                trl.GRPOConfig, str(tmp_path / "run"), bf16=False, beta=0.1, num_generations=4, max_completion_length=8
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": "the red cat"}] * 8),
            processing_class=runs.tokenizer(),
        )
        if mend:
            add_fused_lm_head(reference, temperature=trainer.temperature)
            trainer.ref_model = reference
            trainer.train()
        else:
            trainer.evaluate(trainer.train_dataset)
        divergences += [line[key] for line in trainer.state.log_history for key in ("eval_kl", "kl") if key in line][:1]
        with pytest.raises(ValueError, match="take the reference before the model is given to a trainer"):
            lora.reference_model(after_sft)
        del after_sft.forward
    assert divergences[0] > 1e-4 and divergences[1] == 0
