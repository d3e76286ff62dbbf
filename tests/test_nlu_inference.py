"""run_inference_nlu.py: labels and probabilities from every form of an adapter, for texts from everywhere.

Adapters are random and strong, saved in each form; what they should say is what transformers' own forward of the merged
model says of each text alone. The official file's layout is put into the weights by hand.
Alone: `pytest tests/test_nlu_inference.py`.
"""

import io
import json
import re
import sys

import pytest
import run_inference_nlu as inference
import torch
import transformers
from common import cli
from common.data import glue
from common.models import sequence_classification as classification
from nlg_models import own_lines, save_model, script
from nlu_models import GLUE, NLU, WINDOW
from safetensors.torch import load_file

import loralib as lora

CPU = torch.device("cpu")
ALPHA = 8.0
TEXTS = [
    ("a quiet film",),
    ("the plot is boring from start to finish .",),
    ("i never admired the film , or the story .",),
]
PAIRS = [
    ("The clock is red .", "Ada sold it ."),
    ("A film .", "No ."),
    ("Kira comes on Sunday to Wenddale .", "She comes ."),
]
OF_TASK = {"sst2": TEXTS, "mnli": PAIRS, "stsb": PAIRS}
SPEED = r"[\d,]+ texts in \d+\.\d\d s, [\d,]+ texts/s"


class Adapted:
    """A base with a strong adapter for a task, in each form, and the merged whole model."""

    def __init__(self, folder, base, task):
        folder.mkdir()
        self.task = glue.task_of(task)
        model, tokenizer, heads, _ = classification.load(base, self.task, CPU)
        torch.manual_seed(7)
        lora.inject_lora(model, r=2, lora_alpha=ALPHA, modules_to_save=heads)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 2 else 0.01)
        lora.save_lora(model, folder / "adapter.safetensors", metadata={"task": task})
        lora.save_lora(model, folder / "peft", format="peft")
        torch.save(lora.lora_state_dict(model), folder / "upstream.bin")
        whole = save_model(folder / "whole", tokenizer, lora.merge_and_unload(model))
        self.forms = {
            "native": {"model": base, "adapter": str(folder / "adapter.safetensors")},
            "peft": {"model": base, "adapter": str(folder / "peft"), "task": task},
            "upstream": {"model": base, "adapter": str(folder / "upstream.bin"), "task": task, "lora_alpha": ALPHA},
            "whole": {"model": whole, "adapter": "none", "task": task},
        }
        self.oracle = transformers.AutoModelForSequenceClassification.from_pretrained(whole).eval()
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def probabilities(self, texts):
        """Of each label; of a regression its number."""
        options = {"truncation": True, "max_length": WINDOW, "return_tensors": "pt"}
        outputs = [self.oracle(**self.tokenizer(*text, **options)).logits[0] for text in texts]
        if self.task.labels is None:
            return [output.item() for output in outputs]
        return [dict(zip(self.task.labels, output.softmax(-1).tolist(), strict=True)) for output in outputs]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, roberta):
    """{task: `Adapted`}."""
    folder = tmp_path_factory.mktemp("adapted")
    found = {task: Adapted(folder / task, roberta, task) for task in OF_TASK}
    labels = {max(answer, key=answer.get) for answer in found["sst2"].probabilities(TEXTS)}
    assert len(labels) == 2  # or the tests below say little
    return found


def options(arguments):
    return [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]


def same(answer, expected):
    """Whether what was written of a text is what is expected, but for rounding."""
    if isinstance(expected, float):
        return answer["score"] == pytest.approx(expected, abs=1e-4) and "label" not in answer
    close = pytest.approx(expected, abs=1e-5)
    return answer["probabilities"] == close and answer["label"] == max(expected, key=expected.get)


def in_words(texts, expected):
    """The line that is printed of a text."""
    if isinstance(expected, float):
        return f"{expected:.2f}  {' | '.join(texts)}"
    probabilities = ", ".join(f"{label} {value:.3f}" for label, value in expected.items())
    return f"{max(expected, key=expected.get)} ({probabilities})  {' | '.join(texts)}"


class Piped:
    """A standard input that is no terminal."""

    def __init__(self, text):
        self.buffer = io.BytesIO(text.encode("utf-8"))

    def isatty(self):
        return False


# Adapters


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merge"])
@pytest.mark.parametrize("form", ["native", "peft", "upstream", "whole"])
@pytest.mark.parametrize("task", OF_TASK)
def test_every_form_of_an_adapter_gives_the_outputs_of_transformers(adapted, task, form, merge):
    knobs = inference.Knobs(**adapted[task].forms[form], merge=merge and form != "whole")
    inference.check(knobs)
    model, tokenizer = inference.build_model(knobs, glue.task_of(task), CPU)
    output, _ = inference.classify(model, tokenizer, OF_TASK[task], knobs)
    answers = list(inference.answers(OF_TASK[task], output, glue.task_of(task)))
    for answer, expected in zip(answers, adapted[task].probabilities(OF_TASK[task]), strict=True):
        assert same(answer, expected)
    layers = [module for module in model.modules() if isinstance(module, lora.LoRALayer)]
    assert len(layers) == (0 if knobs.merge or form == "whole" else 4)
    assert all(layer.merged for layer in layers)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_official_files_layout_is_put_where_it_belongs(roberta, call, tmp_path, seed):
    """Queries, values and the head of the authors' .bin; alpha / r * B A is added to the weights here by hand."""
    base = transformers.AutoModelForSequenceClassification.from_pretrained(roberta, num_labels=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(roberta)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in (0, 1):
        for part in ("query", "value"):
            place = f"roberta.encoder.layer.{layer}.attention.self.{part}"
            tensors[f"{place}.lora_A"] = torch.randn(8, 32, generator=generator)
            tensors[f"{place}.lora_B"] = torch.randn(32, 8, generator=generator) / 8
            delta = 16 / 8 * tensors[f"{place}.lora_B"] @ tensors[f"{place}.lora_A"]
            base.get_submodule(place).weight.data += delta
    for name, shape in {"dense": (32, 32), "out_proj": (3, 32)}.items():
        for key, size in {"weight": shape, "bias": shape[:1]}.items():
            tensors[f"classifier.{name}.{key}"] = torch.randn(size, generator=generator) / 4
            base.get_parameter(f"classifier.{name}.{key}").data = tensors[f"classifier.{name}.{key}"]
    torch.save(tensors, tmp_path / "mnli.bin")
    arguments = {"model": roberta, "adapter": tmp_path / "mnli.bin", "task": "mnli", "lora_alpha": 16}
    status, stdout, stderr = call(inference, *options(arguments | {"text": PAIRS[0][0], "text_pair": PAIRS[0][1]}))
    assert status == 0, stderr
    with torch.no_grad():
        output = base.eval()(**tokenizer(*PAIRS[0], return_tensors="pt")).logits[0].softmax(-1)
    expected = dict(zip(("entailment", "neutral", "contradiction"), output.tolist(), strict=True))
    assert stdout.splitlines()[0] == in_words(PAIRS[0], expected)


# Texts


@pytest.mark.parametrize("task", OF_TASK)
def test_a_text_or_a_pair_of_the_command_line(adapted, call, task):
    text, *second = OF_TASK[task][0]
    arguments = {"text": text, **({"text_pair": second[0]} if second else {})}
    status, stdout, stderr = call(inference, *options(adapted[task].forms["native"] | arguments))
    assert status == 0, stderr
    (expected,) = adapted[task].probabilities(OF_TASK[task][:1])
    assert re.fullmatch(rf"{re.escape(in_words((text, *second), expected))}\n{SPEED}\n", stdout)


def test_a_text_as_a_script(adapted):
    status, stdout, stderr = script(
        *("run_inference_nlu.py", *options(adapted["sst2"].forms["native"] | {"text": TEXTS[0][0], "device": "cpu"})),
        folder=NLU,
    )
    assert (status, own_lines(stderr)) == (0, "")
    (expected,) = adapted["sst2"].probabilities(TEXTS[:1])
    assert re.fullmatch(rf"{re.escape(in_words(TEXTS[0], expected))}\n{SPEED}\n", stdout)


@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.parametrize("task", OF_TASK)
def test_lines_of_a_file_or_of_the_standard_input(adapted, call, monkeypatch, tmp_path, task, source):
    lines = "\n".join("\t".join(texts) for texts in OF_TASK[task]) + "\n"
    arguments = dict(adapted[task].forms["native"])
    if source == "file":
        (tmp_path / "texts.txt").write_text(lines, encoding="utf-8")
        arguments["input_file"] = tmp_path / "texts.txt"
    else:
        monkeypatch.setattr(sys, "stdin", Piped(lines))
    status, stdout, stderr = call(inference, *options(arguments | {"eval_batch_size": 2}))
    assert status == 0, stderr
    answers = zip(OF_TASK[task], adapted[task].probabilities(OF_TASK[task]), strict=True)
    expected = "".join(in_words(*answer) + "\n" for answer in answers)
    assert re.fullmatch(rf"{re.escape(expected)}{SPEED}\n", stdout)


@pytest.mark.parametrize(
    "task, file", [("sst2", "SST-2/dev.tsv"), ("mnli", "MNLI/dev_matched.tsv"), ("stsb", "STS-B/dev.tsv")]
)
def test_a_glue_file_gives_a_json_line_for_each_row(adapted, call, tmp_path, task, file):
    header, *rows = (GLUE / file).read_text(encoding="utf-8").splitlines()[:21]
    rows.append(rows[0].replace(" ", " Café ", 1))
    (tmp_path / "dev.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    columns = {"sst2": [0], "mnli": [8, 9], "stsb": [7, 8]}[task]
    texts = [[row.split("\t")[column].strip() for column in columns] for row in rows]
    output = tmp_path / "new" / "labels.jsonl"
    arguments = adapted[task].forms["native"] | {"input_file": tmp_path / "dev.tsv", "output_file": output}
    status, stdout, stderr = call(inference, *options(arguments))
    assert status == 0, stderr
    assert re.fullmatch(rf"written 21 lines to {re.escape(str(output))}\n{SPEED}\n", stdout)
    content = output.read_text(encoding="utf-8")
    assert "Café" in content
    for line, text, expected in zip(
        map(json.loads, content.splitlines()), texts, adapted[task].probabilities(texts), strict=True
    ):
        assert line["texts"] == text and same(line, expected)
        assert list(line) == (["texts", "score"] if task == "stsb" else ["texts", "label", "probabilities"])
    assert [path.name for path in output.parent.iterdir()] == ["labels.jsonl"]


def test_texts_that_were_cut_are_said(adapted, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Piped("a film\n" + "the film " * 30 + "\n"))
    status, stdout, stderr = call(inference, *options(adapted["sst2"].forms["native"] | {"seq_len": 12}))
    assert status == 0 and len(stdout.splitlines()) == 3
    assert "1 of 2 texts cut to 12 tokens (--seq_len)\n" in stderr


def test_a_terminal_is_told_what_to_type(adapted, call, monkeypatch):
    terminal = Piped("A film .\tNo .\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    status, stdout, stderr = call(inference, *options(adapted["mnli"].forms["native"]))
    assert status == 0 and stdout.count("\n") == 2
    assert stderr.startswith("a line each: sentence1 <tab> sentence2; the end of the input (Ctrl-D) starts\n")


# Speed


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_speed_is_compared_apart_and_merged(adapted, call, monkeypatch, task):
    states, real = [], classification.predict

    def watched(model, *arguments, **named):
        output = real(model, *arguments, **named)
        states.append({module.merged for module in model.modules() if isinstance(module, lora.LoRALayer)})
        return output

    monkeypatch.setattr(classification, "predict", watched)
    monkeypatch.setattr(sys, "stdin", Piped("\n".join("\t".join(texts) for texts in OF_TASK[task])))
    status, stdout, stderr = call(inference, *options(adapted[task].forms["native"]), "--compare_speed")
    assert status == 0, stderr
    answers = zip(OF_TASK[task], adapted[task].probabilities(OF_TASK[task]), strict=True)
    expected = "".join(in_words(*answer) + "\n" for answer in answers)
    said = re.fullmatch(
        rf"unmerged: {SPEED}\nmerged:   {SPEED}\nthe outputs differ by at most (\S+)\n{re.escape(expected)}", stdout
    )
    assert said and float(said.group(1)) < 1e-4
    assert states == [{False}, {False}, {True}]  # the first is not timed


def test_labels_that_differ_apart_and_merged_stop_it(adapted, call, monkeypatch, tmp_path):
    """Merging that negates the head, say."""
    merge = lora.merge_lora_weights

    def wrong(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "out_proj" in name:
                    parameter.neg_()
        return merge(model)

    monkeypatch.setattr(lora, "merge_lora_weights", wrong)
    (tmp_path / "texts.txt").write_text("\n".join(text for (text,) in TEXTS), encoding="utf-8")
    files = {"input_file": tmp_path / "texts.txt", "output_file": tmp_path / "labels.jsonl"}
    status, stdout, stderr = call(inference, *options(adapted["sst2"].forms["native"] | files), "--compare_speed")
    assert status == 2
    assert "error: --compare_speed: 3 of 3 labels differ unmerged and merged; nothing was written. Sums" in stderr
    assert not (tmp_path / "labels.jsonl").exists()


# Errors

BAD = {  # knobs beside those of the adapter of sst2, the message
    "no task": ({"adapter": "none"}, "no --task: give one of sst2, mnli, .*, or an --adapter, whose file says it"),
    "other task": (
        {"task": "cola"},
        r"--adapter .*adapter\.safetensors was trained on sst2, and --task is cola; leave --task out, or give the "
        "adapter of cola",
    ),
    "task unsaid": ({"adapter": "{peft}"}, "--adapter .*peft does not say its task; give --task"),
    "other labels": (
        {"adapter": "{upstream}", "task": "mnli", "lora_alpha": 8, "text_pair": "b"},
        r"nothing was loaded:\n.*classifier.out_proj.bias: \(2,\) in the file, \(3,\) in the model",
    ),
    "no head": (
        {"adapter": "{headless}"},
        "headless.safetensors has no trained head: classifier.dense.bias, .* would be random. A classifier's head is",
    ),
    "base alone": ({"adapter": "none", "task": "sst2"}, "--model .* has no trained head: classifier.dense.bias, "),
    "model of another task": (
        {"adapter": "none", "task": "sst2", "model": "{mnli}"},
        "--model .* was trained on mnli, and this is sst2; give the base model, or --task mnli",
    ),
    "no alpha": (
        {"adapter": "{upstream}", "task": "sst2"},
        r"upstream\.bin carries no lora_alpha, .* pass lora_alpha=",
    ),
    "alpha that is known": ({"lora_alpha": 8}, "carries its own; it is for upstream's"),
    "no adapter": ({"adapter": "nowhere"}, r"--adapter nowhere: no such file or folder; run_training_nlu\.py writes"),
    "default adapter": (
        {"adapter": None, "task": "rte", "model": "none"},
        r"--adapter .*rte.adapter\.safetensors: no such file or folder",
    ),
    "no adapter file": ({"adapter": "{weights}"}, "has no loralib configuration"),
    "pair for one": ({"text_pair": "b"}, "--task sst2 takes --text alone: sentence"),
    "second text alone": ({"text": None, "text_pair": "b"}, "--task sst2 takes --text alone: sentence"),
    "one for a pair": (
        {"adapter": "{of_pairs}"},
        "--task mnli takes --text and --text_pair: sentence1 and sentence2",
    ),
    "second of a pair alone": (
        {"adapter": "{of_pairs}", "text": None, "text_pair": "b"},
        "--task mnli takes --text and --text_pair: sentence1 and sentence2",
    ),
    "two sources": ({"input_file": "{lines}"}, "--input_file .*lines.txt does not go with --text"),
    "line": ({"text": None, "input_file": "{lines}"}, r"lines\.txt, line 2: 2 columns where"),
    "merged twice": ({"text": None, "compare_speed": "", "merge": ""}, "--compare_speed does not go with --merge"),
    "compared alone": ({"compare_speed": ""}, "--compare_speed does not go with --text"),
    "nothing to merge": ({"adapter": "none", "task": "sst2", "merge": ""}, "--adapter none does not go with --merge"),
    "window": ({"seq_len": 129}, "--seq_len 129: the model reads at most 128 tokens"),
    "no room": ({"seq_len": 1}, "--seq_len 1: the marks around the texts alone are 2 tokens"),
    "batch": ({"eval_batch_size": 0}, "--eval_batch_size 0: must be above 0"),
    "output is a folder": ({"output_file": "{peft}"}, "--output_file .*peft: a folder; give the name of a file"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_user_errors_are_one_message_and_status_2(adapted, roberta, call, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(sys, "stdin", Piped(""))
    monkeypatch.setattr(inference, "HERE", tmp_path)  # where the default adapter would be
    model, _, _, _ = classification.load(roberta, glue.task_of("sst2"), CPU)
    lora.inject_lora(model, r=2, modules_to_save=[])
    lora.save_lora(model, tmp_path / "headless.safetensors", metadata={"task": "sst2"})
    (tmp_path / "lines.txt").write_text("a film\na film\tanother\n", encoding="utf-8")
    whole = adapted["mnli"].forms["whole"]["model"]
    places = {
        **{"peft": adapted["sst2"].forms["peft"]["adapter"], "upstream": adapted["sst2"].forms["upstream"]["adapter"]},
        **{"headless": tmp_path / "headless.safetensors", "lines": tmp_path / "lines.txt", "mnli": whole},
        **{"of_pairs": adapted["mnli"].forms["native"]["adapter"], "weights": f"{roberta}/model.safetensors"},
    }
    values = {**adapted["sst2"].forms["native"], "text": "a film", **changes}
    arguments = []
    for name, value in values.items():
        if value is not None:
            arguments += [f"--{name}", *([str(value).format(**places)] if value != "" else [])]
    status, stdout, stderr = call(inference, *arguments)
    assert (status, stdout) == (2, ""), stderr
    assert stderr.count("error: ") == 1
    assert re.search(message, stderr, re.DOTALL), stderr


def test_a_task_that_is_not_known(call):
    status, _, stderr = call(inference, "--task", "sst", "--text", "a film")
    assert status == 2 and "argument --task: invalid choice: 'sst'" in stderr


def test_the_adapter_that_was_merged_is_the_file(adapted):
    """A broken oracle would make the tests above say nothing: the whole model is base plus scaled product."""
    forms = adapted["sst2"].forms
    tensors, whole, base = (
        load_file(path)
        for path in (
            forms["native"]["adapter"],
            f"{forms['whole']['model']}/model.safetensors",
            f"{forms['native']['model']}/model.safetensors",
        )
    )
    name = "roberta.encoder.layer.1.attention.self.value"
    delta = ALPHA / 2 * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
    torch.testing.assert_close(whole[f"{name}.weight"], base[f"{name}.weight"] + delta)
    assert delta.abs().max() > 0.1


def test_every_knob_is_an_option_with_a_reason(call):
    status, stdout, _ = call(inference, "--help")
    assert status == 0
    text = " ".join(stdout.split())
    for field in inference.Knobs.__dataclass_fields__.values():
        assert f"--{field.name}" in text
        assert " ".join(field.metadata["help"].split()) in text
    assert cli.parse_knobs(inference.Knobs, "", []) == inference.Knobs()
