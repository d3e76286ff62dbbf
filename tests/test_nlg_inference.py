"""Texts from an adapted model, and base against adapted: run_inference.py and evaluate_lora_improvement.py.

Adapters are random and strong, saved in each form; what they should write is what the model that they were saved from
writes. Scores are compared with those of texts that were chosen for it. Without Java but in the slow test: METEOR's
program takes long to start.
Alone: `pytest tests/test_nlg_inference.py`.
"""

import dataclasses
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import evaluate_lora_improvement
import pytest
import run_inference
import torch
from common import cli
from common.data import e2e
from common.models import causal_lm
from common.records import results
from common.scores import e2e_scorer, text_scores
from nlg_models import DATA, PROMPT, load, own_lines, save_model, script

import loralib as lora

CPU = torch.device("cpu")
PATH, NO_JAVA = os.environ["PATH"], e2e_scorer.missing_for_ptb()
ALPHA = 8.0
MEANINGS = [PROMPT, "name : Lumen | family friendly : no", "name : The Salted Fig | food : Thai | price : cheap"]
SPEED = r"[\d,]+ tokens in \d+\.\d s, [\d,]+ tokens/s"
SHORT = {"num_beams": 2, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, gpt2):
    """(The adapted model, {form: the arguments that name it})."""
    folder = tmp_path_factory.mktemp("adapters")
    model, tokenizer = load(gpt2)
    torch.manual_seed(1)
    lora.inject_lora(model, r=2, lora_alpha=ALPHA)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    lora.save_lora(model, folder / "adapter.safetensors")
    lora.save_lora(model, folder / "peft", format="peft")
    torch.save(lora.lora_state_dict(model), folder / "upstream.bin")
    merged, _ = load(gpt2)
    lora.load_lora(merged, folder / "adapter.safetensors")
    whole = save_model(folder / "whole", tokenizer, lora.merge_and_unload(merged))
    return model, {
        "native": {"model": gpt2, "adapter": str(folder / "adapter.safetensors")},
        "peft": {"model": gpt2, "adapter": str(folder / "peft")},
        "upstream": {"model": gpt2, "adapter": str(folder / "upstream.bin"), "lora_alpha": ALPHA},
        "whole": {"model": whole, "adapter": "none"},
    }


def options(arguments):
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def generate(model, tokenizer, meanings, **changes):
    return causal_lm.generate(model, tokenizer, meanings, causal_lm.DecodingKnobs(**{**SHORT, **changes})).texts


# run_inference.py


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merge"])
@pytest.mark.parametrize("form", ["native", "peft", "upstream", "whole"])
def test_every_form_of_an_adapter_writes_the_texts_of_the_model_it_came_from(adapted, gpt2, form, merge):
    original, forms = adapted
    merge = merge and form != "whole"
    model, tokenizer = run_inference.build_model(run_inference.Knobs(**forms[form], merge=merge), CPU)
    texts = generate(model, tokenizer, MEANINGS)
    assert texts == generate(original, tokenizer, MEANINGS)
    assert not set(texts) & set(generate(*load(gpt2), MEANINGS))


def test_merging_gives_a_plain_model_with_the_same_logits(adapted, gpt2):
    original, forms = adapted
    merged, tokenizer = run_inference.build_model(run_inference.Knobs(**forms["native"], merge=True), CPU)
    base, _ = load(gpt2)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    ids = torch.tensor([causal_lm.encode_context(tokenizer, PROMPT)])
    with torch.no_grad():
        expected = lora.unmerge_lora_weights(original)(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_prompt_as_a_script(adapted, tokenizer):
    original, forms = adapted
    status, stdout, stderr = script(
        "run_inference.py", *options(forms["native"] | SHORT), "--prompt", f" {PROMPT} ", "--device", "cpu"
    )
    assert status == 0, stderr
    (text,) = generate(original, tokenizer, [PROMPT])
    assert re.fullmatch(rf"{re.escape(f'{PROMPT} -> {text}')}\n{SPEED}\n", stdout)


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_a_file_gives_a_json_line_for_each_distinct_meaning(adapted, tokenizer, call, tmp_path, suffix):
    original, forms = adapted
    file, output = tmp_path / f"data{suffix}", tmp_path / "new" / "texts.jsonl"
    lines = {
        ".txt": f"{PROMPT}||ignored .\nname : Café | price : £ 20\n{PROMPT}||again .\n",
        ".csv": 'mr\n"name[Quince], eatType[pub], area[old town]"\n"name[Café], priceRange[£20]"\n',
    }
    file.write_text(lines[suffix], encoding="utf-8")
    arguments = [*options(forms["native"] | SHORT), "--input_file", file, "--output_file", output]
    status, stdout, stderr = call(run_inference, *arguments)
    assert status == 0, stderr
    assert re.fullmatch(rf"written 2 texts to {re.escape(str(output))}\n{SPEED}\n", stdout)
    meanings = [PROMPT, "name : Café | price : £ 20"]
    content = output.read_text(encoding="utf-8")
    assert [json.loads(line) for line in content.splitlines()] == [
        {"meaning": meaning, "text": text}
        for meaning, text in zip(meanings, generate(original, tokenizer, meanings), strict=True)
    ]
    assert "Café" in content
    assert text_scores.read_predictions(output, meanings[::-1]) == generate(original, tokenizer, meanings)[::-1]
    assert os.listdir(output.parent) == ["texts.jsonl"]


def test_tokens_per_second_are_the_tokens_over_the_seconds():
    assert run_inference.speed(causal_lm.Generated(["..."], 3000, 1.5)) == "3,000 tokens in 1.5 s, 2,000 tokens/s"


@pytest.mark.parametrize("num_beams", [1, 4])
def test_speed_is_compared_apart_and_merged_and_the_texts_are_the_same(
    adapted, tokenizer, call, monkeypatch, tmp_path, num_beams
):
    original, forms = adapted
    states = []
    real = causal_lm.generate

    def watched(model, *arguments):
        generated = real(model, *arguments)
        states.append({module.merged for module in model.modules() if isinstance(module, lora.LoRALayer)})
        return generated

    monkeypatch.setattr(causal_lm, "generate", watched)
    decoding = {**SHORT, "num_beams": num_beams}
    meanings = e2e.read_meanings(DATA / "test.txt")[:12]
    file = tmp_path / "meanings.txt"
    file.write_text("\n".join(meanings), encoding="utf-8")
    status, stdout, stderr = call(
        run_inference, *options(forms["native"] | decoding), "--input_file", file, "--compare_speed"
    )
    assert status == 0, stderr
    texts = generate(original, tokenizer, meanings, num_beams=num_beams)
    pairs = "".join(f"{meaning} -> {text}\n" for meaning, text in zip(meanings, texts, strict=True))
    assert re.fullmatch(rf"unmerged: {SPEED}\nmerged:   {SPEED}\n{re.escape(pairs)}", stdout)
    assert states[:3] == [{False}, {False}, {True}]  # the first is not timed


def test_texts_that_differ_apart_and_merged_are_named_and_not_written(adapted, call, monkeypatch, tmp_path):
    original, forms = adapted

    def weaken(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.mul_(0.98)
        return model

    meanings = e2e.read_meanings(DATA / "test.txt")[:12]
    weak, tokenizer = run_inference.build_model(run_inference.Knobs(**forms["native"]), CPU)
    pairs = zip(generate(original, tokenizer, meanings), generate(weaken(weak), tokenizer, meanings), strict=True)
    different = [meaning for meaning, (one, other) in zip(meanings, pairs, strict=True) if one != other]
    assert 0 < len(different) < 12  # or this test says little
    file, output = tmp_path / "meanings.txt", tmp_path / "texts.jsonl"
    file.write_text("\n".join(meanings), encoding="utf-8")
    output.write_text("earlier", encoding="utf-8")
    monkeypatch.setattr(lora, "merge_lora_weights", weaken)
    arguments = [*options(forms["native"] | SHORT), "--input_file", file, "--output_file", output, "--compare_speed"]
    status, stdout, stderr = call(run_inference, *arguments)
    assert status == 2
    assert re.fullmatch(rf"unmerged: {SPEED}\nmerged:   {SPEED}\n", stdout)
    assert f"error: --compare_speed: {len(different)} of 12 texts differ unmerged and merged; nothing was" in stderr
    assert stderr.endswith("The texts are those for:\n  " + "\n  ".join(different) + "\n")
    assert output.read_text(encoding="utf-8") == "earlier"


class Terminal(io.StringIO):
    def isatty(self):
        return True


LONG = "name : A" + " | near : B" * 100


@pytest.mark.parametrize("end", ["\n", ""], ids=["empty line", "end of input"])
@pytest.mark.parametrize("stdin, option", [(io.StringIO, ["--interactive"]), (Terminal, [])], ids=["asked", "terminal"])
def test_a_conversation_goes_on_after_ill_formed_lines(adapted, tokenizer, call, monkeypatch, stdin, option, end):
    original, forms = adapted
    lines = stdin(f"a pub\n{MEANINGS[0]}\n{LONG}\n {MEANINGS[1]} \n{end}")
    monkeypatch.setattr(sys, "stdin", lines)
    status, stdout, stderr = call(run_inference, *options(forms["native"] | SHORT), *option)
    assert status == 0, stderr
    first, second = generate(original, tokenizer, MEANINGS[:2])
    assert re.fullmatch(
        "a meaning representation such as: name : Quince .* an empty line ends\n"
        rf"meaning: meaning: {re.escape(first)}\n{SPEED}\nmeaning: meaning: {re.escape(second)}\n{SPEED}\nmeaning: ",
        stdout,
    )
    errors = re.findall("^error: .*", stderr, re.MULTILINE)
    assert errors[0] == "error: this line: 'a pub' is no `slot : value`; slots are separated by ` | `"
    assert re.fullmatch("error: a context of [0-9]+ tokens fills the model's 256", errors[1])
    assert len(errors) == 2


@pytest.mark.parametrize("module", [run_inference, evaluate_lora_improvement], ids=lambda module: module.__name__)
def test_the_presets_are_the_decoding_and_give_way_to_what_is_given(module):
    def decoding(*arguments):
        knobs = cli.parse_knobs(module.Knobs, "", arguments, module.PRESETS)
        return knobs.num_beams, knobs.length_penalty, knobs.no_repeat_ngram_size, knobs.max_new_tokens

    assert decoding() == (4, 1.0, 0, 128)
    assert decoding("--preset", "paper") == (10, 0.8, 4, 64)
    assert decoding("--preset", "paper", "--num_beams", "1") == (1, 0.8, 4, 64)


@pytest.mark.parametrize("module", [run_inference, evaluate_lora_improvement], ids=lambda module: module.__name__)
def test_every_knob_is_an_option_with_a_reason(module, call):
    status, stdout, _ = call(module, "--help")
    assert status == 0
    text = " ".join(stdout.split())
    for field in dataclasses.fields(module.Knobs):
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert cli.parse_knobs(module.Knobs, "", [], module.PRESETS) == module.Knobs()


# evaluate_lora_improvement.py


BRIEF = {**SHORT, "max_eval_samples": 6, "resamples": 40}


@pytest.fixture(scope="module")
def improvement(tmp_path_factory, adapted, no_java):
    """(The output folder, the record) of a comparison of the tiny model with its adapted self."""
    folder = tmp_path_factory.mktemp("improvement") / "new"
    record = evaluate_lora_improvement.measure_improvement(**adapted[1]["native"], **BRIEF, output_dir=str(folder))
    return folder, record


def texts_of(folder, system):
    lines = (folder / f"{system}_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["meaning"]: record["text"] for record in map(json.loads, lines)}


def test_both_are_decoded_and_scored(improvement, adapted, gpt2):
    """Against texts of the models themselves, sacrebleu and transformers' own loss."""
    folder, record = improvement
    references = e2e.group_references(e2e.read_pairs(DATA / "test.txt"))
    base, tokenizer = load(gpt2)
    for system, model in {"base": base, "adapted": adapted[0]}.items():
        texts = texts_of(folder, system)
        assert len(texts) == 6
        assert list(texts.values()) == generate(model, tokenizer, list(texts))
        chosen = [references[meaning] for meaning in texts]
        assert record[system]["sacrebleu"] == text_scores.bleu(list(texts.values()), chosen)[0]
        assert record[system]["slot_share"] == text_scores.slot_share(list(texts.values()), list(texts))
        total = count = 0
        for meaning, refs in zip(texts, chosen, strict=True):
            for reference in refs:
                sample = causal_lm.encode(tokenizer, meaning, reference)
                labels = causal_lm.count_labels([sample])
                with torch.no_grad():
                    total += labels * model.eval()(**causal_lm.collate([sample])).loss.item()
                count += labels
        assert record[system]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert record["counts"] == {"test_meanings": 6, "test_references": sum(map(len, chosen))}


def test_the_record_says_where_its_numbers_come_from(improvement, adapted, tmp_path_factory):
    folder, record = improvement
    assert sorted(os.listdir(folder)) == ["adapted_texts.jsonl", "base_texts.jsonl", "improvement.json"]
    assert json.loads((folder / "improvement.json").read_text(encoding="utf-8")) == record
    assert set(record["configuration"]) == {field.name for field in dataclasses.fields(evaluate_lora_improvement.Knobs)}
    assert str(tmp_path_factory.getbasetemp()) not in json.dumps(record)
    assert record["data"] == {"test": {"file": "test.txt", "sha256": results.sha256(DATA / "test.txt")}}
    adapter = adapted[1]["native"]["adapter"]
    assert record["inputs_sha256"]["adapter"] == {"adapter.safetensors": results.sha256(adapter)}
    assert record["inputs_sha256"].keys() == {"model", "adapter"}
    assert record["compared"]["base"] == "base"
    assert record["references"]["slot_share"] == 1
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["seconds"]["total"] > 0
    assert (
        record["base"]["meteor"] is record["wins"]["meteor"] is record["intervals"]["systems"]["base"]["cider"] is None
    )
    assert "needs Java" in record["adapted"]["not_measured"]["meteor"]


def test_the_intervals_are_of_the_written_texts(improvement):
    folder, record = improvement
    references = e2e.group_references(e2e.read_pairs(DATA / "test.txt"))
    texts = {system: texts_of(folder, system) for system in ("base", "adapted")}
    meanings = list(texts["base"])
    expected = text_scores.bootstrap(
        {system: list(values.values()) for system, values in texts.items()},
        [references[meaning] for meaning in meanings],
        meanings,
        resamples=40,
        seed=110,
    )
    assert record["intervals"] == expected
    assert record["intervals"]["systems"]["base"]["bleu"][0] < record["intervals"]["systems"]["base"]["bleu"][1]


@pytest.mark.parametrize("form", ["peft", "upstream", "whole"])
def test_other_forms_of_the_adapted_model_give_the_same_record(improvement, adapted, gpt2, form, tmp_path):
    _, record = improvement
    arguments = adapted[1][form]
    if form == "whole":
        arguments = {"model": gpt2, "adapted_model": arguments["model"]}
    other = evaluate_lora_improvement.measure_improvement(**arguments, **BRIEF, output_dir=str(tmp_path))
    for same in ("intervals", "wins", "samples", "references", "counts"):
        assert other[same] == record[same], same
    assert other["adapted"]["perplexity"] == pytest.approx(record["adapted"]["perplexity"], rel=1e-5)
    files = {"peft": "adapter_model.safetensors", "upstream": "upstream.bin", "whole": "model.safetensors"}
    adapted = other["inputs_sha256"]["adapted_model" if form == "whole" else "adapter"]
    assert list(adapted) == [files[form]]


REFERENCES = {
    "name : Lumen | Type : pub": "Lumen is a pub by the river and a fine one .",
    "name : Quince | food : Thai": "You can eat good Thai food at the Quince near the station .",
    "name : Zaranda | area : old town": "Zaranda lies in the middle of the old town .",
    "name : Hana | price : cheap": "If you look for something cheap , then go to Hana .",
    "name : Old Bell | Type : tea room": "The Old Bell is a tea room with cakes .",
}
WORSE = "There is something to eat ."


@pytest.fixture
def given_texts(tmp_path, no_java):
    """Two systems whose order is known: the first meaning goes down, the second and third stay, the others gain."""
    perfect = list(REFERENCES.values())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.txt").write_text(
        "".join(f"{meaning}||{text}\n" for meaning, text in REFERENCES.items()), encoding="utf-8"
    )
    base = [perfect[0], perfect[1], WORSE, WORSE, perfect[4].replace("tea room", "house")]
    adapted = [WORSE, perfect[1], WORSE, perfect[3], perfect[4]]
    (tmp_path / "base.txt").write_text("\n".join(base), encoding="utf-8")
    records = [{"meaning": m, "text": text} for m, text in zip(REFERENCES, adapted, strict=True)][::-1]
    (tmp_path / "adapted.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return {
        "base_texts": str(tmp_path / "base.txt"),
        "adapted_texts": str(tmp_path / "adapted.jsonl"),
        "data_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "output"),
        "model": "no-such-model",
        "resamples": 50,
    }


@pytest.mark.parametrize("when", ["after", "before", None], ids=["its texts", "its base's texts", "other texts"])
def test_a_comparison_names_both_systems(given_texts, when, tmp_path, capsys):
    """By the run beside the texts, if that run scored as they do, and else by the file."""
    test = e2e.group_references(e2e.read_pairs(Path(given_texts["data_dir"]) / "test.txt"))
    path = given_texts["adapted_texts" if when else "base_texts"]
    settings = {"lora_dim": 4, "lora_alpha": 8.0, "target_modules": "all-linear", "lr": 0.01}
    scores = evaluate_lora_improvement.read_texts(path, test)[0]
    run = {"adapt": "lora", "configuration": settings, when or "after": scores}
    beside = tmp_path / "run"
    beside.mkdir()
    (beside / "results.json").write_text(json.dumps(run), encoding="utf-8")
    given_texts["adapted_texts"] = str(Path(given_texts["adapted_texts"]).rename(beside / "texts.jsonl"))
    record = evaluate_lora_improvement.measure_improvement(**given_texts)
    title = {"after": "LoRA r=4, alpha=8, all linear layers, lr 0.01", "before": "base"}.get(when, "texts.jsonl")
    assert record["compared"] == {"base": "base.txt", "adapted": title}
    assert f"\nbase: base.txt\nadapted: {title}\n5 meanings; in brackets" in capsys.readouterr().out


def test_given_texts_are_scored_without_a_model(given_texts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    record = evaluate_lora_improvement.measure_improvement(**given_texts, record="named")
    assert record["wins"]["bleu"] == {"base": 0.2, "adapted": 0.4, "tie": 0.4}
    # Values that count as mentioned: base 2 2 0 0 1, adapted 0 2 0 2 2, of two each.
    assert (record["base"]["slot_share"], record["adapted"]["slot_share"]) == (0.5, 0.6)
    assert record["wins"]["slot_error_rate"] == {"base": 0.2, "adapted": 0.4, "tie": 0.4}
    assert record["base"]["perplexity"] is record["adapted"]["perplexity"] is None
    low, high = record["intervals"]["differences"]["adapted - base"]["bleu"]
    assert low < 0 < high
    meanings = list(REFERENCES)
    samples = [(sample["which"], sample["meaning"]) for sample in record["samples"]]
    assert samples == [("best gain", meanings[3]), ("median gain", meanings[2]), ("worst gain", meanings[0])]
    assert record["samples"][0]["base"] == WORSE
    assert record["samples"][0]["adapted"] == REFERENCES[meanings[3]] == record["samples"][0]["references"][0]
    assert set(record["inputs_sha256"]) == {"base_texts", "adapted_texts"}
    assert os.listdir(tmp_path / "output") == ["improvement.json"]
    assert (tmp_path / "named.json").read_bytes() == (tmp_path / "output" / "improvement.json").read_bytes()

    printed = capsys.readouterr().out
    number = r"-?\d+\.\d\d"
    interval = rf"{number} \[{number}, {number}\]"
    assert "5 meanings; in brackets 95 % of 50 resamples\n" in printed
    assert re.search("^ +base +adapted +adapted - base +wins: base +adapted +tie$", printed, re.MULTILINE)
    assert re.search(rf"^BLEU +{interval} +{interval} +{interval} +20\.0% +40\.0% +40\.0%$", printed, re.MULTILINE)
    low, high = record["intervals"]["systems"]["adapted"]["slot_share"]
    percent = re.escape(f"60.00 [{100 * low:.2f}, {100 * high:.2f}]")
    assert re.search(rf"^slot values, % +50\.00 \[.*\] +{percent} +10\.00 \[{number}, ", printed, re.MULTILINE)
    assert re.search(rf"^distinct 2 +{number} +{number} +{number}$", printed, re.MULTILINE)
    assert re.search("^METEOR +not measured$", printed, re.MULTILINE)
    assert "\nnot measured: METEOR needs Java 8 or newer" in printed
    assert "\nnot measured: perplexity needs the model, not texts alone\n" in printed
    assert f"\nbest gain: {record['samples'][0]['bleu_gain']:+.1f} BLEU\n  meaning    {meanings[3]}\n" in printed
    assert f"\nwritten to {tmp_path / 'output' / 'improvement.json'}\n" in printed


def test_the_written_texts_can_be_given_again(improvement, no_java, tmp_path):
    folder, record = improvement
    files = {f"{system}_texts": str(folder / f"{system}_texts.jsonl") for system in ("base", "adapted")}
    again = evaluate_lora_improvement.measure_improvement(
        **files, max_eval_samples=6, resamples=40, output_dir=str(tmp_path)
    )
    for same in ("intervals", "wins", "samples"):
        assert again[same] == record[same], same


@pytest.mark.parametrize("given", ["base", "adapted"])
def test_one_system_may_be_given_as_texts(improvement, adapted, given, tmp_path):
    folder, record = improvement
    file = folder / f"{given}_texts.jsonl"
    arguments = adapted[1]["native"] if given == "base" else {"model": adapted[1]["native"]["model"]}
    again = evaluate_lora_improvement.measure_improvement(
        **arguments, **BRIEF, **{f"{given}_texts": str(file)}, output_dir=str(tmp_path)
    )
    other = "adapted" if given == "base" else "base"
    for same in ("intervals", "wins", "samples", other):
        if same == other:  # but for the seconds
            assert again[same]["perplexity"] == record[same]["perplexity"]
        else:
            assert again[same] == record[same], same
    assert again[given]["perplexity"] is None
    assert sorted(os.listdir(tmp_path)) == sorted([f"{other}_texts.jsonl", "improvement.json"])
    inputs = again["inputs_sha256"]
    assert inputs[f"{given}_texts"] == {file.name: results.sha256(file)}
    assert inputs.keys() == {f"{given}_texts", "adapter" if given == "base" else "model"}


def test_the_comparison_as_a_script(improvement, adapted, no_java, tmp_path):
    """Told the same, another process writes the same numbers."""
    _, record = improvement
    arguments = options(adapted[1]["native"] | BRIEF | {"output_dir": tmp_path, "device": "cpu"})
    status, stdout, stderr = script("evaluate_lora_improvement.py", *arguments)
    assert status == 0, stderr
    assert stdout.startswith("testing on 6 of 80 meanings\n\nbest gain: ")
    again = json.loads((tmp_path / "improvement.json").read_text(encoding="utf-8"))
    for same in ("intervals", "wins", "samples", "counts"):
        assert again[same] == record[same], same


@pytest.mark.slow
@pytest.mark.skipif(NO_JAVA is not None, reason=f"METEOR, ROUGE-L and CIDEr need {NO_JAVA}")
def test_all_metrics_where_there_is_java(given_texts, monkeypatch):
    monkeypatch.setenv("PATH", PATH)
    text_scores._measured.cache_clear()
    record = evaluate_lora_improvement.measure_improvement(**given_texts)
    for name in text_scores.METRICS:
        low, high = record["intervals"]["systems"]["adapted"][name]
        assert low <= record["adapted"][name] <= high
        assert sum(record["wins"][name].values()) == pytest.approx(1)
    assert record["base"]["not_measured"].keys() == {"perplexity"}


# Errors

BAD_INFERENCE = {
    "nothing to do": (
        {},
        r'nothing to write texts for: give one of --prompt "name : .* \| food : .*", --input_file FILE, --interactive',
    ),
    "two sources": ({"prompt": PROMPT, "input_file": "{bad}/test.txt"}, "--prompt and --input_file: give one of"),
    "malformed prompt": ({"prompt": "a pub"}, "--prompt: 'a pub' is no `slot : value`"),
    "empty prompt": ({"prompt": " "}, "--prompt: the meaning is empty; expected for example: name : Blue Spice"),
    "malformed file": ({"input_file": "{bad}/test.txt"}, r"test\.txt, line 2: 'a pub' is no `slot : value`"),
    "long prompt": ({"prompt": LONG}, "a context of [0-9]+ tokens fills the model's 256"),
    "missing adapter": (
        {"prompt": PROMPT, "adapter": "nowhere"},
        r"--adapter nowhere: no such file or folder; run_training\.py writes adapter\.safetensors .* --adapter none",
    ),
    "folder without adapter": (
        {"prompt": PROMPT, "adapter": "{bad}"},
        r"a folder without adapter_config\.json holds no",
    ),
    "other model": (
        {"prompt": PROMPT, "model": "{wide}"},
        r"does not fit GPT2LMHeadModel; nothing was loaded:\n  .*lora_A",
    ),
    "no adapter": ({"prompt": PROMPT, "adapter": "{model}/model.safetensors"}, "has no loralib configuration"),
    "upstream without alpha": (
        {"prompt": PROMPT, "adapter": "{upstream}"},
        r"upstream\.bin carries no lora_alpha, which the result depends on; pass lora_alpha=",
    ),
    "alpha that is known": ({"prompt": PROMPT, "lora_alpha": "8"}, "carries its own; it is for upstream's"),
    "nothing to merge": (
        {"prompt": PROMPT, "adapter": "none", "merge": None},
        "--adapter none does not go with --merge; leave one of them out",
    ),
    "nothing to compare": (
        {"prompt": PROMPT, "adapter": "none", "compare_speed": None},
        "--adapter none does not go with --compare_speed",
    ),
    "alpha of nothing": (
        {"prompt": PROMPT, "adapter": "none", "lora_alpha": "8"},
        "--adapter none does not go with --lora_alpha",
    ),
    "merged twice": (
        {"prompt": PROMPT, "compare_speed": None, "merge": None},
        "--compare_speed does not go with --merge",
    ),
    "conversation to a file": (
        {"interactive": None, "output_file": "{bad}/texts.jsonl"},
        "--interactive does not go with --output_file",
    ),
    "conversation compared": (
        {"interactive": None, "compare_speed": None},
        "--interactive does not go with --compare_speed",
    ),
    "output is a folder": ({"prompt": PROMPT, "output_file": "{bad}"}, "--output_file .*: a folder; give the name"),
    "output under a file": (
        {"prompt": PROMPT, "output_file": "{bad}/test.txt/texts.jsonl"},
        r"--output_file .*test\.txt.*: cannot be written there \((File exists|Not a directory)\)",
    ),
    "no beams": ({"prompt": PROMPT, "num_beams": "0"}, "--num_beams 0: must be above 0"),
}
BAD_IMPROVEMENT = {
    "one file of texts, no adapter": (
        {"base_texts": "{bad}/texts", "adapter": "nowhere"},
        r"--adapter nowhere: no such file or folder",
    ),
    "missing texts": (
        {"base_texts": "nowhere.jsonl", "adapted_texts": "{bad}/texts"},
        r"nowhere\.jsonl: no such file of predictions",
    ),
    "too few texts": (
        {"base_texts": "{bad}/texts", "adapted_texts": "{bad}/texts"},
        "texts, line 1: the file ends after 1 texts, expected is one for each of the 80 distinct meanings",
    ),
    "missing adapter": (
        {"adapter": "nowhere"},
        r"--adapter nowhere: no such file or folder; run_training\.py writes .*; or give --adapted_model",
    ),
    "upstream without alpha": ({"adapter": "{upstream}"}, r"upstream\.bin carries no lora_alpha"),
    "alpha of a whole model": (
        {"adapted_model": "{model}", "lora_alpha": "8"},
        "--lora_alpha does not go with --adapted_model",
    ),
    "other model": ({"model": "{wide}"}, "does not fit GPT2LMHeadModel; nothing was loaded"),
    "missing model": ({"adapted_model": "./nowhere"}, r"--model \./nowhere: no such folder"),
    "other tokens": ({"adapted_model": "{other}"}, "--adapted_model .*: its tokens are not those of .*; check both"),
    "missing data": ({"data_dir": "{model}"}, r"needed are test\.txt or testset_w_refs\.csv; missing: test\.txt"),
    "malformed data": ({"data_dir": "{bad}"}, r"test\.txt, line 2: expected one `\|\|`"),
    "no resamples": ({"resamples": "0"}, "--resamples 0: must be above 0"),
    "no meanings": ({"max_eval_samples": "0"}, "--max_eval_samples 0: must be above 0"),
    "output is a file": ({"output_dir": "{bad}/test.txt"}, r"--output_dir .*test\.txt: .*\(File exists\)"),
}
BAD = [(run_inference, *case) for case in BAD_INFERENCE.values()]
BAD += [(evaluate_lora_improvement, *case) for case in BAD_IMPROVEMENT.values()]


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory, gpt2):
    model, tokenizer = load(gpt2)
    tokenizer.add_tokens(["another"])
    return save_model(tmp_path_factory.mktemp("other"), tokenizer, model)


@pytest.fixture
def bad(tmp_path, gpt2, wide_gpt2, adapted, other_tokens):
    """Fills the places of the cases: {bad} is a folder of malformed files."""
    (tmp_path / "test.txt").write_text(f"{PROMPT}||Quince is a pub .\na pub\n", encoding="utf-8")
    (tmp_path / "texts").write_text("Quince is a pub .\n", encoding="utf-8")
    places = {"bad": tmp_path, "model": gpt2, "wide": wide_gpt2, "other": other_tokens}
    places["upstream"] = adapted[1]["upstream"]["adapter"]

    def arguments(module, changes):
        values = {**adapted[1]["native"]}
        if module is evaluate_lora_improvement:
            values["output_dir"] = tmp_path / "output"
        values.update({name: value and value.format(**places) for name, value in changes.items()})
        return [str(part) for name, value in values.items() for part in (f"--{name}", value) if part is not None]

    return arguments


@pytest.mark.parametrize("module, changes, message", BAD, ids=[*BAD_INFERENCE, *BAD_IMPROVEMENT])
def test_user_errors_are_one_message_and_status_2(call, bad, monkeypatch, tmp_path, module, changes, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status, stdout, stderr = call(module, *bad(module, changes))
    assert status == 2
    assert stderr.startswith("error: ") or stderr.splitlines()[-1].startswith("error: ")
    assert stderr.count("error: ") == 1
    assert re.search(message, stderr)
    assert "->" not in stdout
    assert not any((tmp_path / "output").glob("*"))
    assert not (tmp_path / "texts.jsonl").exists()


@pytest.mark.parametrize("module", [run_inference, evaluate_lora_improvement], ids=lambda module: module.__name__)
def test_user_errors_of_the_scripts(bad, module):
    status, stdout, stderr = script(f"{module.__name__}.py", *bad(module, {"num_beams": "0"}), "--max_new_tokens", 3)
    assert (status, stdout, own_lines(stderr)) == (2, "", "error: --num_beams 0: must be above 0\n")


def test_values_that_a_model_has_not_seen_in_this_form_are_named(capsys):
    run_inference.note_marks(["name : Ann 's | food : Soup"])
    assert capsys.readouterr().err == ""
    run_inference.note_marks(["name : Ann's | food : Soup"])
    assert 'note: "Ann\'s" is "Ann \'s" in files with marks set apart' in capsys.readouterr().err
