"""The NLG example: encoding, batches, the training loop, decoding, result files, both scripts.

What is tested is called as functions where the function is the point, and as a subprocess from examples/NLG where the
command line is. Models are real and tiny, made from a configuration here, with a tokenizer trained on the shipped data.
Oracles are literal: a cross entropy over hand-picked positions, texts generated one by one.
Alone: `pytest tests/test_nlg.py` (about a minute on 2 cores); `pytest tests/test_nlg.py -m slow` makes the default run
(about two more).
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_training
import safetensors
import torch
import transformers
from common import cli, files
from common.models import causal_lm, pretrained
from common.records import results
from common.training import loop
from nlg_models import (
    DATA,
    END,
    NLG,
    PROMPT,
    ROOT,
    load,
    own_lines,
    save_model,
    script,
    tiny_gpt2,
    tiny_llama_config,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("no_java")
REAL_DATA = ROOT.parent / "shared" / "data" / "e2e"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the official E2E files are not in {REAL_DATA}")


# Encoding and batches


def test_only_the_completion_has_labels(tokenizer):
    sample = causal_lm.encode(tokenizer, "name : A", "A is a pub .")
    labelled = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(sample["input_ids"], clean_up_tokenization_spaces=False) == (
        f"name : A{END} A is a pub .{END}"
    )
    assert tokenizer.decode(labelled, clean_up_tokenization_spaces=False) == f" A is a pub .{END}"
    assert sample["input_ids"][-len(labelled) :] == labelled
    assert set(sample["labels"][: -len(labelled)]) == {-100}
    assert sample["input_ids"][: -len(labelled)] == causal_lm.encode_context(tokenizer, "name : A")


def test_loss_is_the_cross_entropy_of_the_completions_alone(gpt2):
    """Against a literal sum over each sample alone; padding and contexts must not count."""
    model, tokenizer = load(gpt2)
    model.eval()
    samples = [
        causal_lm.encode(tokenizer, "name : A", "A is a pub ."),
        causal_lm.encode(
            tokenizer, "name : The Salted Fig | food : Thai", "The Salted Fig serves Thai food . It is a pub ."
        ),
    ]
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0].double().log_softmax(-1)
            start = len(causal_lm.encode_context(tokenizer, tokenizer.decode(sample["input_ids"]).split(END)[0]))
            for position in range(start, len(sample["input_ids"])):
                total -= logits[position - 1, sample["input_ids"][position]].item()
                count += 1
        batch = causal_lm.collate(samples)
        assert causal_lm.loss_sum(model, batch, 0.0).item() == pytest.approx(total, rel=1e-5)
        assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)  # transformers' own
    assert causal_lm.count_labels(samples) == count


def test_logits_are_computed_where_a_text_begins_and_of_any_model_that_cannot_leave_some_out(gpt2):
    model, tokenizer = load(gpt2)
    model.eval()
    batch = causal_lm.collate([causal_lm.encode(tokenizer, "name : A | food : Thai", "A is a pub .")] * 2)
    widths = []
    model.lm_head.register_forward_hook(lambda head, inputs, output: widths.append(output.shape[1]))
    kept = causal_lm.loss_sum(model, batch, 0.0).item()

    class Whole(type(model)):
        def forward(self, input_ids, attention_mask, use_cache):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.__class__ = Whole
    assert causal_lm.loss_sum(model, batch, 0.0).item() == pytest.approx(kept, rel=1e-6)
    labels = (batch["labels"][0] != causal_lm.NO_LABEL).sum()
    assert widths == [labels + 1, batch["input_ids"].shape[1]]


def test_label_smoothing_is_the_papers_formula(gpt2):
    """(1 - s) times the loss of the label and s times the mean loss over the vocabulary."""
    model, tokenizer = load(gpt2)
    model.eval()
    sample = causal_lm.encode(tokenizer, PROMPT, "Quince is a pub .")
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0].double().log_softmax(-1)
        smoothed = causal_lm.loss_sum(model, causal_lm.collate([sample]), 0.1).item()
    expected = 0.0
    for position, label in enumerate(sample["labels"]):
        if label != -100:
            expected -= 0.9 * logs[position - 1, label].item() + 0.1 * logs[position - 1].mean().item()
    assert smoothed == pytest.approx(expected, rel=1e-5)


def test_too_long_texts_are_left_out_and_counted(tokenizer, capsys):
    pairs = [("name : A", "A is a pub ."), ("name : A", "A is a pub . " * 20)]
    limit = len(causal_lm.encode(tokenizer, *pairs[0])["input_ids"])
    samples = run_training.encode_pairs(pairs, tokenizer, limit, "training")
    assert [len(sample["input_ids"]) for sample in samples] == [limit]
    assert capsys.readouterr().out == f"left out 1 of 2 training texts of more than {limit} tokens\n"
    with pytest.raises(cli.UserError, match=f"--seq_len {limit - 1}: every one of the 2 training texts is longer"):
        run_training.encode_pairs(pairs, tokenizer, limit - 1, "training")


# Models and decoding

CONTEXTS = [
    "name : A",
    "name : The Salted Fig | Type : pub | food : Thai | price : cheap | near : Sable Bridge",
    PROMPT,
    "name : Lumen | family friendly : no",
]


def decoding(**changes):
    return causal_lm.DecodingKnobs(**{"max_new_tokens": 12, **changes})


PENALISED = {"num_beams": 3, "length_penalty": 0.8, "no_repeat_ngram_size": 4}


@pytest.mark.parametrize(
    "changes", [{"num_beams": 1}, {"num_beams": 3}, PENALISED], ids=["greedy", "beam", "penalised"]
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_texts_of_a_padded_batch_equal_those_made_one_by_one(request, architecture, changes):
    model, tokenizer = load(request.getfixturevalue(architecture))
    together = causal_lm.generate(model, tokenizer, CONTEXTS, decoding(eval_batch_size=4, **changes))
    alone = [causal_lm.generate(model, tokenizer, [context], decoding(**changes)).texts[0] for context in CONTEXTS]
    assert together.texts == alone
    assert len(set(alone)) > 1


def test_greedy_text_is_the_literal_argmax(gpt2):
    model, tokenizer = load(gpt2)
    ids = causal_lm.encode_context(tokenizer, PROMPT)
    length = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids[length:], clean_up_tokenization_spaces=False).split(END)[0]
    generated = causal_lm.generate(model, tokenizer, [PROMPT], decoding(num_beams=1))
    assert generated.texts == [" ".join(expected.split())]
    assert generated.tokens == (ids[length:] + [0]).index(0) + 1 if 0 in ids[length:] else 12


class Looping(torch.nn.Module):
    """Says a, b, c again and again, or another token where that is forbidden."""

    def __init__(self, model, cycle, other):
        super().__init__()
        self.model, self.cycle, self.other = model, cycle, other
        model.forward = self.forward

    def forward(self, input_ids, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.model.config.vocab_size)
        logits[..., self.other] = 1
        following = dict(zip(self.cycle, self.cycle[1:] + self.cycle[:1], strict=True))
        for row, column in torch.cartesian_prod(*map(torch.arange, input_ids.shape)):
            logits[row, column, following.get(input_ids[row, column].item(), self.cycle[0])] = 2
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def test_ngrams_must_not_repeat_within_the_text_but_may_repeat_the_prompt(gpt2):
    """The prompt holds a run of four that the text must be free to say once."""
    model, tokenizer = load(gpt2)
    a, b, c, d, other = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcdz")
    Looping(model, [a, b, c, d], other)
    prompt = "abcd"
    tokens = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(prompt))
    free = causal_lm.generate(model, tokenizer, [prompt], decoding(num_beams=1, max_new_tokens=10)).texts[0]
    once = causal_lm.generate(
        model, tokenizer, [prompt], decoding(num_beams=1, max_new_tokens=10, no_repeat_ngram_size=4)
    ).texts[0]
    assert free == "abcdabcdab", tokens
    assert once == "abcdabczab"


def test_length_penalty_prefers_longer_or_shorter_texts(gpt2):
    """Among beams, which may end anywhere here, the sum of log probabilities is divided by length ** penalty."""
    model, tokenizer = load(gpt2)

    def likely_end(module, inputs, logits):
        logits[..., tokenizer.eos_token_id] = logits.max(-1).values - 0.3
        return logits

    model.lm_head.register_forward_hook(likely_end)
    lengths = [
        causal_lm.generate(
            model, tokenizer, CONTEXTS, decoding(num_beams=4, length_penalty=penalty, max_new_tokens=20)
        ).tokens
        for penalty in (-5.0, 5.0)
    ]
    assert lengths[0] < lengths[1]


def test_text_ends_at_a_blank_line_and_keeps_the_spaces_before_punctuation(tokenizer):
    tokens = tokenizer(" It isn 't cheap , at £ 20 - 25 .\n\nMore .")["input_ids"]
    assert causal_lm._decode(tokenizer, tokens) == "It isn 't cheap , at £ 20 - 25 ."


def test_a_models_own_generation_settings_do_not_count(gpt2, tokenizer, tmp_path):
    model = tiny_gpt2(tokenizer)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=5, max_new_tokens=3
    )
    folder = save_model(tmp_path, tokenizer, model)
    texts = [causal_lm.generate(*load(path), CONTEXTS, decoding()).texts for path in (folder, gpt2)]
    assert texts[0] == texts[1]


def test_contexts_must_leave_room_and_shorten_the_texts(gpt2):
    model, tokenizer = load(gpt2)
    context = "name : A"
    while len(causal_lm.encode_context(tokenizer, context + " | near : B")) < 255:
        context += " | near : B"
    causal_lm.generate(model, tokenizer, [context], decoding(max_new_tokens=100))
    with pytest.raises(cli.UserError, match="a context of [0-9]+ tokens fills the model's 256"):
        causal_lm.generate(model, tokenizer, [context + " | near : B" * 3], decoding())


def test_a_long_context_shortens_no_text_but_those_of_its_batch(gpt2, capsys):
    """What does not end within the window is counted."""
    model, tokenizer = load(gpt2)
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer.eos_token_id] = -1e3 * model.transformer.ln_f.bias  # never the likeliest
    long, short = "name : A" + " | near : B" * 60, "name : A"
    room = 256 - len(causal_lm.encode_context(tokenizer, long))
    assert 0 < room < 40
    alone = causal_lm.generate(model, tokenizer, [short], decoding(max_new_tokens=40))
    assert alone.tokens == 40 and not capsys.readouterr().out
    options = decoding(max_new_tokens=40)
    options.eval_batch_size = 1
    both = causal_lm.generate(model, tokenizer, [long, short], options)
    assert both.texts[1] == alone.texts[0] and both.tokens == 40 + room
    assert capsys.readouterr().out == "1 of 2 texts were cut off where the model's 256 tokens were full\n"


@pytest.mark.parametrize("beams", [1, 2])
def test_no_text_is_written_of_outputs_that_are_not_finite(gpt2, beams):
    model, tokenizer = load(gpt2)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(cli.UserError, match="the model's outputs are not finite; nothing was written"):
        causal_lm.generate(model, tokenizer, CONTEXTS, decoding(num_beams=beams))


def test_a_test_text_that_the_model_cannot_read_is_refused_before_the_training(gpt2, tmp_path):
    for name in ("train", "valid", "test"):
        text = "a pub " * 200 if name == "test" else "a pub"
        (tmp_path / f"{name}.txt").write_text(f"{PROMPT}||{text}\n", encoding="utf-8")
    options = {"model": str(gpt2), "data_dir": str(tmp_path), "output_dir": str(tmp_path / "output")}
    with pytest.raises(cli.UserError, match=r"a text of the test file has \d+ tokens, and the model reads at most 256"):
        run_training.train_model(**options, max_steps=1)
    assert not any((tmp_path / "output").iterdir())


def test_weights_that_would_be_random_are_an_error(tokenizer, tmp_path):
    folder = save_model(tmp_path, tokenizer, transformers.LlamaModel(tiny_llama_config(tokenizer)))
    with pytest.raises(cli.UserError, match="no causal language model, its weights lack lm_head.weight"):
        load(folder)


def test_a_tokenizer_without_end_token_is_an_error(tokenizer, tmp_path):
    without = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    folder = save_model(tmp_path, without, tiny_gpt2(tokenizer))
    with pytest.raises(cli.UserError, match="its tokenizer has no end-of-text token"):
        load(folder)


# Result files


def test_interrupted_writing_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results.write_json(path, {"a": 1})
    earlier = path.read_bytes()
    assert json.loads(earlier) == {"a": 1}

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.write_json(path, {"a": 2})
    assert path.read_bytes() == earlier
    assert os.listdir(tmp_path) == ["results.json"]


def test_result_files_name_no_folder_of_this_machine(tmp_path):
    assert files.portable(str(DATA)) == "examples/NLG/data"
    assert files.portable(str(tmp_path)) == tmp_path.name
    assert files.portable(str(tmp_path / "not there")) == "not there"
    assert files.portable("gpt2") == "gpt2"
    assert files.portable(4) == 4


# The scripts


SHORT = ["--max_steps", 3, "--max_eval_samples", 3, "--batch_size", 4, "--lora_alpha", 8]
WRITTEN = ["adapter.safetensors", "results.json", "test_texts.jsonl"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, gpt2, no_java):
    """The output folder and the printed text of a short run of run_training.py."""
    folder = tmp_path_factory.mktemp("run") / "new" / "output"
    status, stdout, stderr = script("run_training.py", "--model", gpt2, "--output_dir", folder, *SHORT)
    assert status == 0, stderr
    return folder, stdout, stderr


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_training_script_prints_what_was_asked_for(run):
    folder, stdout, stderr = run
    base = sum(parameter.numel() for parameter in tiny_gpt2([0] * 600).parameters())
    trainable = 2 * 16 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)  # layers, rank, and ins and outs of four matrices
    percent = 100 * trainable / (base + trainable)
    assert f"parameters   {base + trainable:,} in total, {trainable:,} trainable ({percent:.2f} %)" in stdout
    assert "validating on 3 of 60 meanings" in stdout
    assert "testing on 3 of 80 meanings" in stdout
    assert re.search(r"step 3: train loss \d+\.\d+, valid loss \d+\.\d+", stdout)
    record = read(folder)
    for name, key, factor in (("BLEU", "bleu", 1), ("slot values, %", "slot_share", 100), ("NIST", "nist", 1)):
        line = re.search(rf"^{name} +([\d.]+) +([\d.]+)", stdout, re.M)
        assert line.groups() == tuple(f"{factor * record[when][key]:.2f}" for when in ("before", "after")), name
    assert re.search(r"^slot values, % +[\d.]+ +[\d.]+ +100.00$", stdout, re.M)
    assert "\nMETEOR\n" in stdout and "\nnot measured: METEOR needs Java" in stdout
    assert re.search(r"checkpoint   [\d.]+ KiB, [\d.]+% of the model's [\d.]+ MiB", stdout)
    assert re.search(r"seconds      \d+ training, \d+ in all", stdout)
    assert all(len(re.findall(f"^{word} ", stdout, re.M)) == 3 for word in ("meaning", "before", "after", "reference"))
    assert stdout.endswith(f"written      to {folder}: {', '.join(WRITTEN)}\n")
    assert re.search(r"training: 100%.*3/3 .*loss=", stderr)


def test_training_script_saves_the_adapter_alone_the_texts_and_the_record(run):
    folder, _, _ = run
    assert sorted(os.listdir(folder)) == WRITTEN
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 16
    layer = r"transformer\.h\.[01]\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.lora_[AB]"
    assert all(re.fullmatch(layer, name) for name in names)
    written = [json.loads(line) for line in (folder / "test_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = read(folder)["samples"]
    assert [w["text"] for w in written] == [s["after"] for s in samples]  # of three meanings all are samples
    assert [w["meaning"] for w in written] == [s["meaning"] for s in samples]


def test_record_of_a_run(run, gpt2):
    folder, _, _ = run
    record = read(folder)
    knobs = {field.name for field in dataclasses.fields(run_training.Knobs)}
    assert set(record["configuration"]) == knobs
    assert record["configuration"]["data_dir"] == "examples/NLG/data"
    assert record["configuration"]["model"] == Path(gpt2).name
    assert record["configuration"]["lr"] == run_training.LEARNING_RATES["fast"]["lora"]
    assert str(folder.parent) not in json.dumps(record)
    assert record["data"] == {
        s: {"file": f"{s}.txt", "sha256": results.sha256(DATA / f"{s}.txt")} for s in ("train", "valid", "test")
    }
    adapter = folder / "adapter.safetensors"
    assert record["bytes"]["checkpoint"] == adapter.stat().st_size
    assert record["checkpoint_sha256"] == {adapter.name: results.sha256(adapter)}
    assert record["parameters"]["trainable"] == 16_384
    assert (
        record["bytes"]["optimizer"] == 16_384 * 2 * 4 + 4 * 16
    )  # two moments each, and a count for each of 16 tensors
    assert record["counts"]["test_meanings"] == 3
    for when in ("before", "after"):
        assert 0 <= record[when]["bleu"] <= 100
        assert 0 <= record[when]["slot_share"] <= 1
        assert record[when]["perplexity"] > 1
    assert record["references"] == {"slot_share": 1, "slot_error_rate": 0}
    assert record["seconds"]["total"] > record["seconds"]["train"] > record["seconds"]["step"] > 0
    assert record["peak_memory_bytes"]["process"] > 1e8
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "python", "platform", "threads"} <= set(record["environment"])
    assert [entry["step"] for entry in record["history"]] == [3]
    assert len(record["samples"]) == 3
    assert all({"meaning", "before", "after", "references"} == set(sample) for sample in record["samples"])


def test_perplexity_is_that_of_the_references(run, gpt2):
    model, tokenizer = load(gpt2)
    record = read(run[0])
    total, count = 0.0, 0
    for sample in record["samples"]:
        for reference in sample["references"]:
            encoded = causal_lm.encode(tokenizer, sample["meaning"], reference)
            total += causal_lm.loss_sum(model.eval(), causal_lm.collate([encoded]), 0.0).item()
            count += causal_lm.count_labels([encoded])
    assert record["before"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_full_fine_tuning_trains_and_saves_everything(gpt2, tmp_path):
    """The folder that it writes is an ordinary model, which computes what was scored."""
    status, stdout, stderr = script(
        "run_training.py", "--model", gpt2, "--output_dir", tmp_path, "--adapt", "full", "--skip_base", *SHORT
    )
    assert status == 0, stderr
    record = read(tmp_path)
    assert record["parameters"]["trainable"] == record["parameters"]["total"]
    assert record["configuration"]["lr"] == run_training.LEARNING_RATES["fast"]["full"]
    assert "before" not in record and set(record["samples"][0]) == {"meaning", "after", "references"}
    assert sorted(os.listdir(tmp_path)) == ["model", "results.json", "test_texts.jsonl"]
    model, tokenizer = load(tmp_path / "model")
    base, _ = load(gpt2)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True) if p.dim() > 1)
    knobs = run_training.Knobs()
    texts = causal_lm.generate(model, tokenizer, [sample["meaning"] for sample in record["samples"]], knobs).texts
    assert texts == [sample["after"] for sample in record["samples"]]


def test_the_base_alone_is_scored_and_nothing_trained(gpt2, run, tmp_path):
    status, _, stderr = script("run_training.py", "--model", gpt2, "--output_dir", tmp_path, "--adapt", "none", *SHORT)
    assert status == 0, stderr
    record, other = read(tmp_path), read(run[0])
    assert {**record["before"], "generation_seconds": 0} == {**other["before"], "generation_seconds": 0}
    assert record["parameters"]["trainable"] == 0 and "after" not in record and "history" not in record
    assert sorted(os.listdir(tmp_path)) == ["results.json", "test_texts.jsonl"]


def test_the_paper_preset_is_the_papers_recipe():
    knobs = cli.parse_knobs(run_training.Knobs, "", ["--preset", "paper"], run_training.PRESETS)
    recipe = {"batch_size": 8, "num_epochs": 5, "seq_len": 512, "warmup_steps": 500, "weight_decay": 0.01}
    recipe.update(label_smoothing=0.1, lora_dim=4, lora_alpha=32, lora_dropout=0.1, seed=110, num_beams=10)
    recipe.update(length_penalty=0.8, no_repeat_ngram_size=4, max_new_tokens=64, target_modules=None)
    assert {name: getattr(knobs, name) for name in recipe} == recipe
    assert run_training.LEARNING_RATES["paper"]["lora"] == 2e-4
    assert (loop.BETAS, loop.EPS) == ((0.9, 0.999), 1e-6)


def test_same_seed_same_adapter_in_python_and_on_the_command_line(run, gpt2, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocess: the order of sums depends on it
    try:
        options = {"model": gpt2, "max_steps": 3, "max_eval_samples": 3, "batch_size": 4, "lora_alpha": 8}
        same = run_training.train_model(**options, output_dir=str(tmp_path / "same"))
        other = run_training.train_model(**options, output_dir=str(tmp_path / "other"), seed=1)
    finally:
        torch.set_num_threads(threads)
    record = read(run[0])
    # The tensors, not the bytes: safetensors writes its metadata in no fixed order.
    wanted = load_file(run[0] / "adapter.safetensors")
    again, different = (load_file(tmp_path / name / "adapter.safetensors") for name in ("same", "other"))
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    assert not any(torch.equal(different[name], tensor) for name, tensor in wanted.items())
    assert same["history"] == record["history"] != other["history"]
    assert same["after"]["bleu"] == record["after"]["bleu"]


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_training_on_a_llama_and_chosen_targets(llama, tmp_path):
    options = {"model": llama, "max_steps": 1, "max_eval_samples": 1, "max_train_samples": 8}
    run_training.train_model(**options, output_dir=str(tmp_path / "default"))
    run_training.train_model(**options, output_dir=str(tmp_path / "chosen"), target_modules="k_proj,up_proj")
    run_training.train_model(**options, output_dir=str(tmp_path / "paper's"), target_modules="query-value")
    layers = {}
    for name in ("default", "chosen", "paper's"):
        with safetensors.safe_open(tmp_path / name / "adapter.safetensors", "pt") as file:
            layers[name] = {key.split(".")[-2] for key in file.keys()}  # noqa: SIM118 (no dict)
    assert layers == {"default": ALL, "chosen": {"k_proj", "up_proj"}, "paper's": {"q_proj", "v_proj"}}


@pytest.mark.parametrize("dtype", pretrained.BASE_DTYPES)
def test_the_base_is_stored_as_asked_and_the_adapters_in_float32(llama, tmp_path, dtype):
    if dtype in pretrained.QUANTIZERS:
        package = pretrained.QUANTIZERS[dtype]
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[test]'")
    record = run_training.train_model(
        **{"model": llama, "max_steps": 4, "max_eval_samples": 2, "max_train_samples": 16, "base_dtype": dtype},
        **{"target_modules": "all-linear", "output_dir": str(tmp_path), "warmup_steps": 0},
    )
    adapter = load_file(tmp_path / "adapter.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in adapter.values())
    assert record["after"]["perplexity"] < record["before"]["perplexity"]
    base, _ = load(llama)
    matrices = [m.weight for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    total, quantised = (sum(p.numel() for p in some) for some in (base.parameters(), matrices))
    rows = sum(map(len, matrices))  # of each a scale of four bytes and a zero point of one
    # A byte of scale for 64 weights, four for 256 such; an offset, what the 256 bytes stand for, and what the 16 codes.
    scales = [math.ceil(matrix.numel() / 64) for matrix in matrices]
    four_bits = quantised // 2 + sum(n + 4 * (math.ceil(n / 256) + 1 + 256 + 16) for n in scales)
    stored = {"float32": 4 * total, "bfloat16": 2 * total, "int8": 4 * (total - quantised) + quantised + 5 * rows}
    stored["nf4"] = 4 * (total - quantised) + four_bits
    trained = sum(tensor.numel() for tensor in adapter.values())
    assert record["bytes"]["model"] == stored[dtype] + 4 * trained
    assert record["parameters"] == {"trainable": trained, "total": total + trained}


def test_what_does_not_go_with_a_quantised_base_is_refused_before_anything_is_loaded(monkeypatch):
    def refusal(**knobs):
        with pytest.raises(cli.UserError) as raised:
            pretrained.check_base_dtype(run_training.Knobs(**knobs))
        return str(raised.value)

    for dtype, package in pretrained.QUANTIZERS.items():
        assert refusal(base_dtype=dtype, fsdp=True) == (
            f"--base_dtype {dtype} does not go with --fsdp, which divides plain tensors; take bfloat16"
        )
        assert refusal(base_dtype=dtype, adapt="full") == (
            f"--base_dtype {dtype} is for frozen weights, and --adapt full freezes none; leave one of them out"
        )
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        assert refusal(base_dtype=dtype) == (
            f"--base_dtype {dtype} needs {package}, which is not installed: pip install {package}"
        )


@needs_real_data
def test_official_files_go_the_same_way(gpt2, tmp_path):
    options = ["--data_dir", os.path.relpath(REAL_DATA, NLG), "--max_train_samples", 50, *SHORT]
    status, stdout, stderr = script("run_training.py", "--model", gpt2, "--output_dir", tmp_path, *options)
    assert status == 0, stderr
    assert "training on 50 of 42061 texts" in stdout
    assert "testing on 3 of 630 meanings" in stdout


BAD_TRAINING = {
    "missing file": (["--test_file", "nowhere.txt"], r"nowhere\.txt: no such data file"),
    "malformed line": (["--data_dir", "{bad}"], r"train\.txt, line 2: expected one `\|\|`"),
    "unknown model": (["--model", "no-such-model"], r"--model no-such-model: neither a folder nor .* Give a folder"),
    "unknown folder": (["--model", "./nowhere/model"], r"--model \./nowhere/model: no such folder, and no hub name"),
    "folder without model": (["--model", "{bad}"], r"cannot be loaded as a causal language model"),
    "rank too small": (["--lora_dim", "0"], r"--lora_dim 0: must be above 0"),
    "rank too large": (["--lora_dim", "33"], r"r=33: .*at most 32"),
    "unknown target": (
        ["--target_modules", "c_attm"],
        r"nothing in the model is called 'c_attm'; did you .*c_attn\?",
    ),
    "long texts": (["--seq_len", "300"], r"--seq_len 300: the model reads at most 256 tokens"),
    "no steps": (["--max_steps", "0"], r"--max_steps 0: must be above 0"),
    "no parts": (["--grad_accumulation", "0"], r"--grad_accumulation 0: must be above 0"),
    "nothing frozen": (["--base_dtype", "bfloat16", "--adapt", "full"], r"--base_dtype bfloat16 is for frozen weights"),
    "no linear layers": (["--base_dtype", "int8"], r"--base_dtype int8(: .*GPT2LMHeadModel| needs torchao)"),
    "no linear layers, 4 bits": (["--base_dtype", "nf4"], r"--base_dtype nf4(: .*GPT2LMHeadModel| needs bitsandbytes)"),
    "repeats": (["--no_repeat_ngram_size", "-1"], r"--no_repeat_ngram_size -1: must be at least 0"),
    "nothing to go on from": (["--resume", ""], r"--resume: there is no .*training_state.pt to go on from"),
    "output is a file": (
        ["--output_dir", "run_training.py"],
        r"--output_dir run_training\.py: .*\(File exists\)",
    ),
}


@pytest.mark.parametrize("arguments, message", BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_user_errors_are_one_message_and_status_2(tmp_path, gpt2, arguments, message, monkeypatch, capsys):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{PROMPT}||Quince is a pub .\na pub\n", encoding="utf-8")
    options = {"--model": gpt2, "--output_dir": str(tmp_path / "output")}
    options.update(zip(arguments[::2], (value.format(bad=tmp_path) for value in arguments[1::2]), strict=True))
    monkeypatch.chdir(NLG)
    monkeypatch.setattr(sys, "argv", ["run_training.py", *(part for item in options.items() for part in item if part)])
    with pytest.raises(SystemExit) as end:
        cli.run(run_training.main)
    stderr = capsys.readouterr().err
    assert end.value.code == 2, stderr
    assert re.search(r"(^|\r *)error: ", stderr) and re.search(message, stderr), stderr  # after a bar, if it was slow
    assert not any((tmp_path / "output").glob("*"))


def test_a_user_error_of_the_script(tmp_path):
    status, _, stderr = script("run_training.py", "--output_dir", tmp_path, "--lora_dim", 0)
    assert (status, own_lines(stderr)) == (2, "error: --lora_dim 0: must be above 0\n")


def test_every_knob_is_an_option_with_a_reason(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse_knobs(run_training.Knobs, run_training.__doc__, ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(run_training.Knobs):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert cli.parse_knobs(run_training.Knobs, "", []) == run_training.Knobs()


def test_options_reach_the_knobs_with_their_types():
    arguments = ["--lr", "0.5", "--max_steps", "7", "--lora_alpha", "3", "--target_modules", "a,b"]
    assert cli.parse_knobs(run_training.Knobs, "", arguments) == run_training.Knobs(
        lr=0.5, max_steps=7, lora_alpha=3.0, target_modules="a,b"
    )


def test_bugs_keep_their_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run(main)


def test_the_shared_package_knows_neither_lora_nor_the_scripts():
    for path in (NLG.parent / "common").glob("*.py"):
        assert not re.search(r"^\s*(import|from) (loralib|run_)", path.read_text(encoding="utf-8"), re.M), path


@pytest.mark.slow
def test_default_run_reaches_its_bars(tmp_path):
    """The bars of the default run: three minutes on 2 cores, BLEU from under 20 to over 60, 95 % of the values."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "run_training.py", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=NLG, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record["before"]["bleu"] < 20
    assert record["after"]["bleu"] > 60
    assert record["after"]["slot_share"] >= 0.95
    assert record["seconds"]["total"] < 180
