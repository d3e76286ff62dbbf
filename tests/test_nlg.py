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
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
NLG = ROOT / "examples" / "NLG"
DATA = NLG / "data"
REAL_DATA = ROOT.parent / "shared" / "data" / "e2e"
sys.path[:0] = [str(NLG), str(NLG.parent)]

import run_inference  # noqa: E402
import run_training  # noqa: E402
from common import causal_lm, cli, e2e, results, training  # noqa: E402

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the official E2E files are not in {REAL_DATA}")
END = "<|endoftext|>"
PROMPT = "name : Quince | Type : pub | area : old town"


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
        loss = model(**causal_lm.collate(samples)).loss.item()
    assert loss == pytest.approx(total / count, rel=1e-5)
    for batch_size in (1, 2):  # weighted by tokens, so independent of the batches
        assert training.mean_loss(model, samples, causal_lm.collate, batch_size) == pytest.approx(
            total / count, rel=1e-5
        )


LENGTHS = [(7 * i) % 60 + 1 for i in range(1003)]


@pytest.mark.parametrize("batch_size", [1, 8, 2000])
def test_batches_hold_every_sample_once(batch_size):
    batches = training.make_batches(LENGTHS, batch_size, seed=3)
    assert sorted(index for batch in batches for index in batch) == list(range(len(LENGTHS)))
    assert len(batches) == math.ceil(len(LENGTHS) / batch_size)
    assert max(map(len, batches)) <= batch_size


def test_batches_are_fixed_by_the_seed_and_waste_little():
    batches = training.make_batches(LENGTHS, 8, seed="1 1")
    assert batches == training.make_batches(LENGTHS, 8, seed="1 1")
    assert batches != training.make_batches(LENGTHS, 8, seed="1 2")
    padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)
    one_pool = training.make_batches(LENGTHS[:300], 8, seed=0)
    means = [sum(LENGTHS[i] for i in batch) / len(batch) for batch in one_pool]
    assert means != sorted(means)  # no curriculum of lengths


def test_learning_rate_rises_and_falls_linearly():
    rates = [training.learning_rate(step, 10, 1.0, 4) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert training.learning_rate(0, 10, 1.0, 0) == 1.0


def test_too_long_texts_are_left_out_and_counted(tokenizer, capsys):
    pairs = [("name : A", "A is a pub ."), ("name : A", "A is a pub . " * 20)]
    limit = len(causal_lm.encode(tokenizer, *pairs[0])["input_ids"])
    samples = run_training.encode_pairs(pairs, tokenizer, limit, "training")
    assert [len(sample["input_ids"]) for sample in samples] == [limit]
    assert capsys.readouterr().out == f"left out 1 of 2 training texts of more than {limit} tokens\n"
    with pytest.raises(cli.UserError, match=f"--seq_len {limit - 1}: every one of the 2 training texts is longer"):
        run_training.encode_pairs(pairs, tokenizer, limit - 1, "training")


# Training


def test_training_changes_what_requires_gradients_alone_and_lowers_the_loss(gpt2):
    model, tokenizer = load(gpt2)
    model.requires_grad_(False)
    chosen = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = [causal_lm.encode(tokenizer, *pair) for pair in e2e.read_pairs(DATA / "train.txt")[:16]]
    history = training.train(
        model, samples, samples, causal_lm.collate, epochs=3, batch_size=4, lr=1e-2, warmup_steps=2, seed=0
    )
    assert [(entry["epoch"], entry["step"]) for entry in history] == [(1, 4), (2, 8), (3, 12)]
    assert history[2]["valid_loss"] < history[0]["valid_loss"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"transformer.h.0.mlp.c_fc.weight"}
    assert chosen.grad is None


def test_max_steps_ends_the_training_within_an_epoch(gpt2):
    model, tokenizer = load(gpt2)
    samples = [causal_lm.encode(tokenizer, "name : A", "A is a pub .")] * 12
    options = {"epochs": 5, "batch_size": 4, "lr": 1e-3, "warmup_steps": 0, "seed": 0}
    history = training.train(model, samples, samples, causal_lm.collate, max_steps=4, **options)
    assert [(entry["epoch"], entry["step"]) for entry in history] == [(1, 3), (2, 4)]


def test_a_loss_that_is_not_finite_stops_the_training(gpt2):
    model, tokenizer = load(gpt2)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    samples = [causal_lm.encode(tokenizer, "name : A", "A is a pub .")] * 8
    with pytest.raises(cli.UserError, match=r"the loss is nan at step 1 of 2 \(learning rate 5.00e-04\).*--lr"):
        training.train(
            model, samples, samples, causal_lm.collate, epochs=1, batch_size=4, lr=1e-3, warmup_steps=2, seed=0
        )


def test_choose_device():
    assert training.choose_device("cpu") == torch.device("cpu")
    assert training.choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "gpu", "meta"):
        with pytest.raises(cli.UserError, match=f"--device {name}: no such device here; use auto or one of: .*cpu"):
            training.choose_device(name)


# Models and decoding

CONTEXTS = [
    "name : A",
    "name : The Salted Fig | Type : pub | food : Thai | price : cheap | near : Sable Bridge",
    PROMPT,
    "name : Lumen | family friendly : no",
]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_texts_of_a_padded_batch_equal_those_made_one_by_one(request, architecture, num_beams):
    model, tokenizer = load(request.getfixturevalue(architecture))
    options = {"num_beams": num_beams, "max_new_tokens": 12}
    together = causal_lm.generate(model, tokenizer, CONTEXTS, batch_size=4, **options)
    alone = [causal_lm.generate(model, tokenizer, [context], batch_size=1, **options)[0] for context in CONTEXTS]
    assert together == alone
    assert len(set(alone)) > 1


def test_greedy_text_is_the_literal_argmax(gpt2):
    model, tokenizer = load(gpt2)
    ids = causal_lm.encode_context(tokenizer, PROMPT)
    length = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids[length:], clean_up_tokenization_spaces=False).split(END)[0]
    texts = causal_lm.generate(model, tokenizer, [PROMPT], batch_size=1, num_beams=1, max_new_tokens=12)
    assert texts == [" ".join(expected.split())]


def test_text_ends_at_the_end_token_and_keeps_the_spaces_before_punctuation(tokenizer):
    tokens = tokenizer(f" It isn 't cheap , at £ 20 - 25 .{END} More .")["input_ids"]
    assert causal_lm._decode(tokenizer, tokens) == "It isn 't cheap , at £ 20 - 25 ."


def test_a_models_own_generation_settings_do_not_count(gpt2, tokenizer, tmp_path):
    model = tiny_gpt2(tokenizer)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=5, max_new_tokens=3
    )
    folder = save_model(tmp_path, tokenizer, model)
    texts = [causal_lm.generate(*load(path), CONTEXTS, batch_size=4, max_new_tokens=12) for path in (folder, gpt2)]
    assert texts[0] == texts[1]


def test_contexts_must_leave_room_and_shorten_the_texts(gpt2):
    model, tokenizer = load(gpt2)
    context = "name : A"
    while len(causal_lm.encode_context(tokenizer, context + " | near : B")) < 255:
        context += " | near : B"
    causal_lm.generate(model, tokenizer, [context], batch_size=1, max_new_tokens=100)
    with pytest.raises(cli.UserError, match="a context of [0-9]+ tokens fills the model's 256"):
        causal_lm.generate(model, tokenizer, [context + " | near : B" * 3], batch_size=1)


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
    assert results.portable(str(DATA)) == "examples/NLG/data"
    assert results.portable(str(tmp_path)) == tmp_path.name
    assert results.portable("gpt2") == "gpt2"
    assert results.portable(4) == 4


# The scripts


SHORT = ["--max_steps", 3, "--max_eval_samples", 3, "--batch_size", 4, "--lora_alpha", 8]


@pytest.fixture(scope="module")
def run(tmp_path_factory, gpt2):
    """The output folder and the printed text of a short run of run_training.py."""
    folder = tmp_path_factory.mktemp("run") / "new" / "output"
    status, stdout, stderr = script("run_training.py", "--model", gpt2, "--output_dir", folder, *SHORT)
    assert status == 0, stderr
    return folder, stdout, stderr


def test_training_script_prints_what_was_asked_for(run):
    _, stdout, stderr = run
    base = sum(parameter.numel() for parameter in tiny_gpt2([0] * 600).parameters())
    trainable = 2 * 2 * (4 * 32 + 32 * 4)  # layers, q and v, A and B
    percent = 100 * trainable / (base + trainable)
    assert f"parameters   {base + trainable:,} in total, {trainable:,} trainable ({percent:.2f} %)" in stdout
    assert "validating on 3 of 60 meanings (--max_eval_samples)" in stdout
    assert "testing on 3 of 80 meanings (--max_eval_samples)" in stdout
    assert re.search(r"epoch 1: train loss \d+\.\d+, validation loss \d+\.\d+", stdout)
    assert re.search(
        r"^ +before +after +references\nBLEU +[\d.]+ +[\d.]+\nslot values, % +[\d.]+ +[\d.]+ +100.00$", stdout, re.M
    )
    assert re.search(r"checkpoint   [\d.]+ KiB, [\d.]+% of the model's [\d.]+ MiB", stdout)
    assert re.search(r"seconds      \d+ training, \d+ testing, \d+ in all", stdout)
    assert all(len(re.findall(f"^{word} ", stdout, re.M)) == 3 for word in ("meaning", "before", "after", "reference"))
    assert re.search(r"training: 100%.*3/3 .*loss=", stderr)


def test_training_script_saves_the_adapter_alone_and_the_record(run):
    folder, _, _ = run
    assert sorted(os.listdir(folder)) == ["adapter.safetensors", "results.json"]
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 4
    assert all(re.fullmatch(r"transformer\.h\.[01]\.attn\.c_attn\.lora_[AB]", name) for name in names)


def test_record_of_a_run(run, gpt2):
    folder, _, _ = run
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    knobs = {field.name for field in dataclasses.fields(run_training.Knobs)}
    assert set(record["configuration"]) == knobs
    assert record["configuration"]["data_dir"] == "examples/NLG/data"
    assert record["configuration"]["model"] == Path(gpt2).name
    assert str(folder.parent) not in json.dumps(record)
    assert record["data"] == {
        f"{s}.txt": {"sha256": results.sha256(DATA / f"{s}.txt")} for s in ("train", "valid", "test")
    }
    assert record["bytes"]["adapter"] == (folder / "adapter.safetensors").stat().st_size
    assert record["adapter_sha256"] == results.sha256(folder / "adapter.safetensors")
    assert record["parameters"]["trainable"] == 1024
    assert record["counts"]["test_meanings"] == 3
    for when in ("before", "after"):
        assert 0 <= record[when]["bleu"] <= 100
        assert 0 <= record[when]["slot_share"] <= 1
    assert record["references"]["slot_share"] == 1
    assert record["seconds"]["total"] > record["seconds"]["train"] > 0
    assert record["peak_memory_bytes"]["process"] > 1e8
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "device", "python", "platform", "threads"} <= set(record["environment"])
    assert [entry["step"] for entry in record["history"]] == [3]
    assert len(record["samples"]) == 3
    assert all({"meaning", "before", "after", "references"} == set(sample) for sample in record["samples"])


def test_same_seed_same_adapter_in_python_and_on_the_command_line(run, gpt2, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the subprocess: the order of sums depends on it
    try:
        options = {"model": gpt2, "max_steps": 3, "max_eval_samples": 3, "batch_size": 4, "lora_alpha": 8}
        same = run_training.train_model(**options, output_dir=str(tmp_path / "same"))
        other = run_training.train_model(**options, output_dir=str(tmp_path / "other"), seed=1)
    finally:
        torch.set_num_threads(threads)
    record = json.loads((run[0] / "results.json").read_text(encoding="utf-8"))
    # The tensors, not the bytes: safetensors writes its metadata in no fixed order.
    wanted = load_file(run[0] / "adapter.safetensors")
    again, different = (load_file(tmp_path / name / "adapter.safetensors") for name in ("same", "other"))
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    assert not any(torch.equal(different[name], tensor) for name, tensor in wanted.items())
    assert same["history"] == record["history"] != other["history"]
    assert same["after"]["bleu"] == record["after"]["bleu"]


def test_training_on_a_llama_and_chosen_targets(llama, tmp_path):
    options = {"model": llama, "max_steps": 1, "max_eval_samples": 1, "max_train_samples": 8}
    run_training.train_model(**options, output_dir=str(tmp_path / "default"))
    run_training.train_model(**options, output_dir=str(tmp_path / "chosen"), target_modules="k_proj,up_proj")
    layers = {}
    for name in ("default", "chosen"):
        with safetensors.safe_open(tmp_path / name / "adapter.safetensors", "pt") as file:
            layers[name] = {key.split(".")[-2] for key in file.keys()}  # noqa: SIM118 (no dict)
    assert layers == {"default": {"q_proj", "v_proj"}, "chosen": {"k_proj", "up_proj"}}


@needs_real_data
def test_official_files_go_the_same_way(gpt2, tmp_path):
    options = ["--data_dir", os.path.relpath(REAL_DATA, NLG), "--max_train_samples", 50, *SHORT]
    status, stdout, stderr = script("run_training.py", "--model", gpt2, "--output_dir", tmp_path, *options)
    assert status == 0, stderr
    assert "training on 50 of 42061 texts" in stdout
    assert "testing on 3 of 630 meanings" in stdout


def test_inference_merged_equals_unmerged(run, gpt2, tmp_path):
    folder, _, _ = run
    common = ["--model", gpt2, "--adapter", folder / "adapter.safetensors", "--max_new_tokens", 20]
    status, stdout, stderr = script("run_inference.py", *common, "--prompt", PROMPT)
    assert status == 0, stderr
    assert re.fullmatch(re.escape(PROMPT) + r" -> .*\n", stdout)
    text = stdout.removeprefix(f"{PROMPT} -> ").removesuffix("\n")

    file = tmp_path / "data.txt"
    file.write_text(f"{PROMPT}||ignored .\nname : Lumen\n{PROMPT}||again .\n", encoding="utf-8")
    status, stdout, stderr = script(
        "run_inference.py", *common, "--input_file", file, "--output_file", tmp_path / "texts.txt", "--merge"
    )
    assert status == 0, stderr
    assert stdout == f"written 2 texts to {tmp_path / 'texts.txt'}\n"
    lines = (tmp_path / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"{PROMPT}||{text}"
    assert lines[1].startswith("name : Lumen||")
    assert sorted(os.listdir(tmp_path)) == ["data.txt", "texts.txt"]


def test_merging_gives_a_plain_model_with_the_same_logits(run, gpt2):
    knobs = run_inference.Knobs(model=gpt2, adapter=str(run[0] / "adapter.safetensors"))
    cpu = torch.device("cpu")
    adapted, tokenizer = run_inference.build_model(knobs, cpu)
    merged, _ = run_inference.build_model(dataclasses.replace(knobs, merge=True), cpu)
    base, _ = load(gpt2)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    ids = torch.tensor([causal_lm.encode_context(tokenizer, PROMPT)])
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base.eval()(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


BAD_TRAINING = {
    "missing file": (["--test_file", "nowhere.txt"], r"nowhere\.txt: no such data file"),
    "malformed line": (["--data_dir", "{bad}"], r"train\.txt, line 2: expected one `\|\|`"),
    "unknown model": (["--model", "no-such-model"], r"--model no-such-model: neither a folder nor .* Give a folder"),
    "unknown folder": (["--model", "./nowhere/model"], r"--model \./nowhere/model: no such folder, and no hub name"),
    "folder without model": (["--model", "{bad}"], r"cannot be loaded as a causal language model"),
    "rank too small": (["--lora_dim", "0"], r"r=0: the rank to inject must be at least 1"),
    "rank too large": (["--lora_dim", "33"], r"r=33: .*at most 32"),
    "unknown target": (
        ["--target_modules", "c_attm"],
        r"nothing in the model is called 'c_attm'; did you .*c_attn\?",
    ),
    "long texts": (["--seq_len", "300"], r"--seq_len 300: the model reads at most 256 tokens"),
    "no steps": (["--max_steps", "0"], r"--max_steps 0: must be above 0"),
    "output is a file": (["--output_dir", "run_training.py"], r"File exists: 'run_training\.py'"),
}
BAD_INFERENCE = {
    "nothing to do": ([], r'give either --prompt "name : \.\.\. \| food : \.\.\." or --input_file FILE'),
    "malformed prompt": (["--prompt", "a pub"], r"--prompt: 'a pub' is no `slot : value`"),
    "malformed file": (["--input_file", "{bad}/train.txt"], r"train\.txt, line 2: 'a pub' is no `slot : value`"),
    "missing adapter": (["--prompt", PROMPT, "--adapter", "none"], r"--adapter none: no such file; run_training\.py"),
    "other model": (
        ["--prompt", PROMPT, "--model", "{wide}"],
        r"does not fit GPT2LMHeadModel; nothing was loaded:\n  .*lora_A",
    ),
    "no adapter": (["--prompt", PROMPT, "--adapter", "{model}/model.safetensors"], r"has no loralib configuration"),
}
BAD = [("run_training.py", *case) for case in BAD_TRAINING.values()]
BAD += [("run_inference.py", *case) for case in BAD_INFERENCE.values()]


@pytest.mark.parametrize("name, arguments, message", BAD, ids=[*BAD_TRAINING, *BAD_INFERENCE])
def test_user_errors_are_one_message_and_status_2(request, tmp_path, run, gpt2, name, arguments, message):
    (tmp_path / "train.txt").write_text(f"{PROMPT}||Quince is a pub .\na pub\n", encoding="utf-8")
    folders = {"bad": tmp_path, "model": gpt2, "wide": request.getfixturevalue("wide_gpt2")}
    defaults = {"--model": gpt2}
    if name == "run_training.py":
        defaults["--output_dir"] = tmp_path / "output"
    else:
        defaults["--adapter"] = run[0] / "adapter.safetensors"
    defaults.update(zip(arguments[::2], (value.format(**folders) for value in arguments[1::2]), strict=True))
    status, stdout, stderr = script(name, *(part for item in defaults.items() for part in item))
    assert status == 2, stderr
    assert re.match(r"error: ", own_lines(stderr)), stderr
    assert re.search(message, stderr)
    assert "Traceback" not in stderr
    assert not any((tmp_path / "output").glob("*"))


def test_ctrl_c_in_training_writes_nothing(gpt2, tmp_path):
    earlier = tmp_path / "adapter.safetensors"
    earlier.write_bytes(b"earlier")
    with start("run_training.py", "--model", gpt2, "--output_dir", tmp_path, "--max_eval_samples", 2) as process:
        seen = ""
        while not re.search(r"training: +\d+%.*[1-9]\d*/\d+ .*loss=", seen):
            piece = process.stderr.read(1)
            assert piece, f"ended before the first step: {seen}"
            seen += piece
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith("interrupted; no file was left half-written\n")
    assert "Traceback" not in stderr
    assert os.listdir(tmp_path) == ["adapter.safetensors"]
    assert earlier.read_bytes() == b"earlier"


@pytest.mark.parametrize("module", [run_training, run_inference], ids=lambda module: module.__name__)
def test_every_knob_is_an_option_with_a_reason(module, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse_knobs(module.Knobs, module.__doc__, ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(module.Knobs):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert cli.parse_knobs(module.Knobs, "", []) == module.Knobs()


def test_options_reach_the_knobs_with_their_types():
    arguments = ["--lr", "0.5", "--max_steps", "7", "--lora_alpha", "3", "--target_modules", "a,b"]
    assert cli.parse_knobs(run_training.Knobs, "", arguments) == run_training.Knobs(
        lr=0.5, max_steps=7, lora_alpha=3.0, target_modules="a,b"
    )
    assert cli.parse_knobs(run_inference.Knobs, "", ["--merge"]).merge is True


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
