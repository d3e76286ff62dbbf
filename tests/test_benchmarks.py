"""The benchmark of examples/benchmarks: that the rivals do the same work, and that its counts and bars are right.

    python -m pytest tests/test_benchmarks.py

Upstream's package is an optional download; the tests that need it skip without it.
"""

import cProfile
import dataclasses
import itertools
import json
import math
import os
import pstats
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from nlg_models import ROOT
from torch import nn

BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.append(str(BENCHMARKS))
import adapters_per_row  # noqa: E402
import against_peft  # noqa: E402
import base_dtypes  # noqa: E402
import extraction  # noqa: E402
import growth  # noqa: E402
import measure  # noqa: E402
import run_benchmarks  # noqa: E402
import systems  # noqa: E402
import when_lora_equals_full as equals  # noqa: E402
from common import cli  # noqa: E402
from common.reports import tables  # noqa: E402

import loralib as lora  # noqa: E402

# What PEFT calls in transformers is on its way out there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CPU = torch.device("cpu")
WORKS = [
    systems.Work(architecture, layers=1, batch=2, length=5, targets=targets, r=2)
    for architecture in ("gpt2", "roberta", "llama-1b")
    for targets in ("query, value", "all-linear")
]
needs_upstream = pytest.mark.skipif(
    not (systems.UPSTREAM / "loralib").is_dir(), reason="loralib 0.1.2 is not in examples/benchmarks/output/upstream"
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The same models at a small width."""

    gpt2 = {"n_embd": 24, "n_head": 2, "initializer_range": 0.2}
    others = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
    llama = others | {"num_key_value_heads": 1, "vocab_size": 50000}
    sizes = {"gpt2": gpt2, "gpt2-medium": gpt2, "roberta": others, "llama-1b": llama}
    small = {name: (builder, sizes[name]) for name, (builder, _) in systems.ARCHITECTURES.items()}
    monkeypatch.setattr(systems, "ARCHITECTURES", small)
    # The models of a process of its own would be wide.
    monkeypatch.setattr(measure, "in_own_process", lambda function, *arguments: function(*arguments))


def adapters(model):
    """[(lora_A, lora_B)] of the layers in order, whatever they are called."""
    found = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    return list(zip(found[::2], found[1::2], strict=True))


def logits(model, work):
    return model(input_ids=systems.batch_of(work, CPU)["input_ids"]).logits


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.title)
@pytest.mark.parametrize("rival", ["peft", pytest.param("upstream", marks=needs_upstream)])
def test_rivals_do_the_same_work(work, rival):
    """With the same A and B the same logits, of the frozen model with B zero; and gradients for nothing but them."""
    ours, other, floor = (systems.build(name, work, CPU) for name in ("ours", rival, "floor"))
    torch.testing.assert_close(logits(other, work), logits(floor, work), rtol=1e-4, atol=1e-4)
    fused = work.architecture == "gpt2" and work.targets == "query, value"
    torch.manual_seed(2)
    for (A, B), (other_A, other_B) in zip(adapters(ours), adapters(other), strict=True):
        with torch.no_grad():
            A.normal_(), B.normal_()
            if fused and rival == "peft":  # one update of q, k and v: that of q alone is what both can have
                B[B.shape[0] // 2 :] = 0
                other_B.zero_()
                other_A.copy_(A[: work.r]), other_B[: B.shape[0] // 2].copy_(B[: B.shape[0] // 2])
            else:
                other_A.copy_(A), other_B.copy_(B)
    moved = logits(ours, work)
    assert (moved - logits(floor, work)).abs().max() > 0.1
    torch.testing.assert_close(logits(other, work), moved, rtol=1e-4, atol=1e-3)
    for model in (ours, other):
        model(**systems.batch_of(work, CPU)).loss.backward()
        named = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
        assert named == {name: "lora_" in name for name in named}


@pytest.mark.parametrize("shape", run_benchmarks.SHAPES)
@pytest.mark.parametrize("system", ["floor", "ours", "peft", "full", pytest.param("upstream", marks=needs_upstream)])
def test_layers_have_the_shape(system, shape):
    i, o, groups = run_benchmarks.SHAPES[shape]
    layer = systems.layer_of(system, i, o, groups, 4, 0.0)
    x = torch.randn(3, i, requires_grad=True)
    run_benchmarks.forward_and_backward(layer, x, "fp32")
    assert layer(x).shape == (3, o) and x.grad is None and all(p.grad is None for p in layer.parameters())


def test_counts_of_a_layer_worked_out_by_hand():
    """A frozen layer keeps nothing of its own; tanh keeps its output, once however often it is used."""
    layer, x = nn.Linear(8, 6).requires_grad_(False), torch.randn(5, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: layer(x), layer) == 0
    assert measure.saved_bytes(lambda: (y := layer(x).tanh()) * y, layer) == 5 * 6 * 4
    assert measure.flops(lambda: layer(x)) == 2 * 5 * 8 * 6
    adapted = systems.layer_of("ours", 8, 6, False, 4, 0.0)
    assert measure.flops(lambda: adapted(x)) == 2 * 5 * (8 * 6 + 4 * (8 + 6))
    x = x.detach()
    assert measure.operations(lambda: x + x) == 1 and measure.operations(lambda: (x + x).tanh()) == 2


def test_the_profile_of_narrow_products():
    x, wide, narrow = torch.randn(300, 400), torch.randn(400, 500), torch.randn(400, 4)
    found = measure.narrow_products(lambda: (x @ wide, (x @ narrow).exp()), 4, 3)
    assert 0 < found["share"]["median"] < 0.5
    ((operation, shapes, share),) = found["largest"]
    assert (operation, shapes) == ("aten::mm", "[[300, 400], [400, 4]]")
    assert found["share"]["low"] <= share * 1.5 and share < found["share"]["high"] * 1.5
    assert measure.narrow_products(lambda: x @ narrow, 3, 1) == {"share": measure.spread([0]), "largest": []}


def test_frozen_weights_lie_in_one_place_and_what_trains_does_not():
    work = WORKS[1]
    models = {name: systems.build(name, work, CPU) for name in ("floor", "ours", "peft", "full")}
    before = {name: logits(model, work) for name, model in models.items()}
    systems.share_frozen(models.values())
    places = {name: {p.data_ptr() for p in model.parameters()} for name, model in models.items()}
    for name in ("ours", "peft"):
        trained = {p.data_ptr() for p in models[name].parameters() if p.requires_grad}
        assert places[name] - places["floor"] == trained and trained
    assert not places["full"] & places["floor"]
    assert all(torch.equal(logits(model, work), before[name]) for name, model in models.items())


def test_this_library_keeps_the_mask_of_torch_for_dropout():
    """On a CPU 4 bytes an element, beside the dropped input and x A^T."""
    x, sizes = torch.randn(40, 64, requires_grad=True), {}
    for dropout in (0.0, 0.5):
        layer = systems.layer_of("ours", 64, 64, False, 4, dropout)
        sizes[dropout] = measure.saved_bytes(lambda layer=layer: layer(x).sum(), layer)
    assert sizes[0.0] == 4 * (40 * 64 + 40 * 4) and sizes[0.5] == sizes[0.0] + 4 * 40 * 64


in_own_process = measure.in_own_process


def hold(size):
    return len(b"1" * size), os.getpid()  # zeros would take no memory


def test_a_peak_is_of_a_process_of_its_own(monkeypatch):
    """Which returns what the function does, and has held what it holds but not what this process does."""
    monkeypatch.setattr(measure, "in_own_process", in_own_process)
    size, process = measure.in_own_process(hold, 10)
    assert size == 10 and process != os.getpid()
    here = b"1" * 10**9
    little, much = (measure.peak_bytes(hold, size, device=CPU) for size in (10, 5 * 10**8))
    assert 4 * 10**8 < much - little < 6 * 10**8 and little < len(here)


def test_every_round_times_each_system_once_in_an_order_of_its_own(monkeypatch):
    seen, clock = [], iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = measure.in_turn(calls, 20, CPU, "")
    assert {name: len(values) for name, values in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [seen[start : start + 3] for start in range(6, len(seen), 3)]  # after one to warm up and one to count
    assert len(rounds) == 20 and all(sorted(found) == ["a", "b", "c"] for found in rounds)
    assert len(set(map(tuple, rounds))) > 3


def test_what_is_prepared_is_not_timed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def later(seconds):
        clock[0] += seconds
        return seconds

    times = measure.prepared({"a": (lambda: later(5), lambda got: later(got / 5))}, 3, CPU, "")
    assert times == {"a": [1.0, 1.0, 1.0]}


def test_ratios_are_of_the_same_round():
    times = {"ours": [1.0, 2.0, 30.0], "peft": [2.0, 2.0, 30.0]}
    assert measure.ratio(times, "ours", "peft") == {"median": 1.0, "low": 0.75, "high": 1.0}
    assert measure.spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}


def test_bars_are_judged_by_the_median():
    def case(seconds, saved, ratio):
        spread = {"median": ratio, "low": 0.1, "high": 9.0}
        systems_ = {"ours": {"seconds": {"median": seconds}, "saved_bytes": saved}, "peft": {"saved_bytes": 100}}
        return {"systems": systems_, "ratios": {"peft": spread}}

    levels = {
        "steps": {"gpt2_all_dropout": case(1.0, 86, 0.92)},
        "import": {"import": case(0.051, None, 0.1)},
        "layers": {"tiny": case(1.0, None, 0.61)},
    }
    for entry in levels["import"]["import"]["systems"].values():
        entry["seconds"] = {"median": 0.051, "low": 0.05, "high": 0.06}
    met = {(bar["case"], bar["what"]): bar["met"] for bar in run_benchmarks.judge(levels)}
    dropped = "gpt2_all_dropout"
    assert met == {
        (dropped, "seconds"): True,
        (dropped, "saved_bytes"): False,
        ("tiny", "seconds"): False,
        ("import", "seconds"): False,
    }


def test_a_bar_names_a_case_that_is_measured():
    keys = set()
    for suite in (run_benchmarks.SMALL, run_benchmarks.LARGE):
        keys |= set(suite.steps) | {key + side for key in suite.generations for side in ("", " merged")}
        keys |= set(suite.compiled)
    keys |= {"tiny", "import", "inject", "merge", "unmerge", "save", "load", "switch"}
    keys |= {"q, k, v, r=4, 1024 tokens, fp32"}
    for k, c, mode in itertools.product(run_benchmarks.KERNELS, run_benchmarks.SIDES, ("", ", eval")):
        keys.add(f"Conv2d, k={k}, {c} channels{mode}")
    assert {bar.case for bar in run_benchmarks.BARS} <= keys


SMALL = systems.Work(layers=1, batch=1, length=4)


@pytest.fixture
def small(monkeypatch):
    """The same benchmark on one layer."""
    suite = run_benchmarks.Suite({"gpt2_qv": SMALL}, {"generation_all": SMALL}, {"compiled_all": SMALL}, SMALL)
    monkeypatch.setattr(run_benchmarks, "SMALL", suite)
    monkeypatch.setattr(run_benchmarks, "NEW", 2)
    monkeypatch.setattr(run_benchmarks, "SHAPES", {"q, k, v": (24, 72, True)})
    monkeypatch.setattr(run_benchmarks, "RANKS", (4,))
    monkeypatch.setattr(run_benchmarks, "TOKENS", (1024,))
    monkeypatch.setattr(run_benchmarks, "DROPOUTS", (0.0,))
    monkeypatch.setattr(measure, "STRETCH", 1e-4)
    monkeypatch.setattr(run_benchmarks, "KERNELS", (1,))
    monkeypatch.setattr(run_benchmarks, "SIDES", {32: 4})


def test_the_whole_on_one_layer(small, tmp_path, capsys):
    threads = torch.get_num_threads()
    levels = ",".join(level for level in run_benchmarks.LEVELS if level != "compiled")
    try:
        record = run_benchmarks.measure_all(
            run_benchmarks.Knobs(
                rounds=1,
                systems="floor,peft,full",
                output_dir=str(tmp_path),
                precisions="fp32",
                allow_busy=True,
                levels=levels,
            )
        )
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == record
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    cases = {key: case for level in record["levels"].values() for key, case in level.items()}
    assert set(cases) == {
        *("q, k, v, r=4, 1024 tokens, fp32", "tiny", "gpt2_qv", "generation_all", "generation_all merged"),
        *("inject", "merge", "unmerge", "merge for good", "save", "load", "switch", "import"),
        *("Conv2d, k=1, 32 channels", "Conv2d, k=1, 32 channels, eval"),
    }
    step = cases["gpt2_qv"]["systems"]
    assert list(step) == ["floor", "ours", "peft", "full"]
    assert step["full"]["flops"] > 1.2 * step["floor"]["flops"] and step["ours"]["peak_bytes"] > 10**8
    assert step["ours"]["saved_bytes"] < 1.2 * step["floor"]["saved_bytes"]
    for case in cases.values():
        assert set(case["ratios"]) == set(case["systems"]) - {"ours"}
        for system in case["systems"].values():
            assert 0 < system["seconds"]["low"] <= system["seconds"]["median"] <= system["seconds"]["high"]
    printed = capsys.readouterr().out
    for bar in record["bars"]:
        assert f"{bar['title']}  " in printed
    assert dataclasses.asdict(SMALL) == cases["gpt2_qv"]["work"]


def test_levels_are_kept_of_this_machine_and_of_these_packages_alone(small, tmp_path, monkeypatch):
    """Each with its commit and its configuration; what differs is told before anything is measured."""
    monkeypatch.setattr(run_benchmarks.results, "RESULTS", tmp_path)
    options = {"systems": "floor,peft", "allow_busy": True, "output_dir": str(tmp_path / "out"), "record": "benchmark"}
    threads = torch.get_num_threads()
    try:
        first = run_benchmarks.measure_all(run_benchmarks.Knobs(levels="generation,import", rounds=1, **options))
        again = run_benchmarks.Knobs(levels="import", rounds=2, keep=True, **options)
        second = run_benchmarks.measure_all(again)
        assert second["levels"]["generation"] == first["levels"]["generation"]
        assert second["levels"]["import"] != first["levels"]["import"]
        assert {level: each["rounds"] for level, each in second["configurations"].items()} == {
            "generation": 1,
            "import": 2,
        }
        path = tmp_path / "benchmark.json"
        for change, message in {
            ("rivals", "peft", "0.1"): "peft '0.1', now ",
            ("environment", "threads", 7): "threads 7, now 2",
            ("environment", "device", "cuda"): "device 'cuda', now 'cpu'",
        }.items():
            part, name, value = change
            path.write_text(json.dumps({**second, part: {**second[part], name: value}}), encoding="utf-8")
            with pytest.raises(cli.UserError, match=f"cannot stand beside those of now: {message}.*; measure all lev"):
                run_benchmarks.measure_all(again)
        for content in ("", "{}", json.dumps({**second, "commits": {}})):
            path.write_text(content, encoding="utf-8")
            with pytest.raises(cli.UserError, match="--keep: .*benchmark.json is no record to keep levels of"):
                run_benchmarks.measure_all(again)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_step_is_made_once_for_adapters_in_turn(small):
    knobs = run_benchmarks.Knobs(rounds=1, systems="floor,peft")
    case = run_benchmarks.compiled(knobs, CPU, ["floor", "ours", "peft"], {"compiled_all": SMALL})["compiled_all"]
    assert case["systems"]["ours"]["recompilations"] == 0 and set(case["ratios"]) == {"floor", "peft"}


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"levels": "layers,stairs"},
            "--levels stairs: must be one of layers, convolutions, steps, generation, compiled, operations, import",
        ),
        ({"systems": "theirs"}, "--systems theirs: must be one of floor, ours, upstream, peft, full"),
        ({"precisions": "fp16"}, "--precisions fp16: must be one of fp32, bf16"),
        ({"rounds": 0}, "--rounds 0: must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(cli.UserError) as caught:
        run_benchmarks.check(run_benchmarks.Knobs(**options))
    assert str(caught.value) == message


def test_without_upstream_the_command_that_gets_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "UPSTREAM", tmp_path)
    with pytest.raises(cli.UserError) as caught:
        run_benchmarks.check(run_benchmarks.Knobs())
    assert str(caught.value) == (
        "upstream's package is not there; leave upstream out of --systems, or get it by "
        f"pip install --no-deps --target {tmp_path} loralib==0.1.2"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process anew")
def test_the_dtypes_of_a_base_are_measured_beside_float32(llama, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[test]'")
    knobs = base_dtypes.Knobs(model=str(llama), base_dtypes="nf4", precisions="fp32", rounds=2, length=5)
    record = base_dtypes.measure_all(dataclasses.replace(knobs, threads=1, allow_busy=True, output_dir=str(tmp_path)))
    assert json.loads((tmp_path / "base_dtypes.json").read_text()) == record
    assert list(record["bases"]) == ["float32", "nf4"] and record["quantizers"].keys() == {"bitsandbytes"}
    base, four = record["bases"].values()
    assert base["ratio"]["fp32"]["median"] == 1 < base["base_bytes"] / four["base_bytes"] < 8
    rows = tables.base_rows(record)
    assert rows[""] == ["base, MiB", "time, fp32 products", "peak memory, fp32 products, MiB"] and list(rows)[2:] == [
        "float32",
        "nf4",
    ]


def test_a_dtype_that_is_none_is_refused(tmp_path):
    with pytest.raises(cli.UserError, match="--base_dtypes int4: must be one of float32, bfloat16, int8, nf4"):
        base_dtypes.measure_all(base_dtypes.Knobs(base_dtypes="nf4,int4", output_dir=str(tmp_path)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process anew")
def test_steps_are_measured_beside_peft(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[test]'")
    small = {"hidden_size": 64, "num_layers": 1, "batch_size": 2, "length": 5, "lora_dim": 4, "rounds": 2, "threads": 1}
    small["allow_busy"] = True
    record = against_peft.measure_all(against_peft.Knobs(**small, output_dir=str(tmp_path)))
    assert json.loads((tmp_path / "against_peft.json").read_text()) == record
    assert list(record["cases"]) == ["nf4", "experts"]
    for case in record["cases"].values():
        assert case["trained"]["loralib"] == case["trained"]["peft"] > 0 and case["ratio"]["median"] > 0
    assert len(tables.against_peft_rows(record)) == 4
    with pytest.raises(cli.UserError, match="--cases int8: must be one of nf4, experts"):
        against_peft.measure_all(against_peft.Knobs(cases="int8", output_dir=str(tmp_path)))


def test_growth_is_measured_along_every_axis(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "AXES", {"layers": [1, 2], "adapters": [1, 3], "rank": [2, 4]})
    monkeypatch.setattr(growth, "FIXED", {"layers": 1, "adapters": 1, "rank": 2})
    monkeypatch.setattr(growth, "WIDTH", 16)
    record = growth.measure_all(growth.Knobs(rounds=2, threads=1, allow_busy=True, output_dir=str(tmp_path)))
    assert json.loads((tmp_path / "growth.json").read_text()) == record
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    # The adapters of q and v: A (2 r, 16) and B (32, r) in float32; what a forward keeps does not know of others.
    one, three = (point["memory"] for point in record["axes"]["adapters"]["points"])
    assert three - one == 2 * 4 * (2 * 2 * 16 + 32 * 2)
    assert all(set(axis["exponents"]) == set(axis["points"][0]) for axis in record["axes"].values())
    assert "layers: exponent" in capsys.readouterr().out and len(tables.growth_rows(record)) == 11
    with pytest.raises(cli.UserError, match="--axes depth: must be one of layers, adapters, rank"):
        growth.measure_all(growth.Knobs(axes="depth"))
    with pytest.raises(cli.UserError, match=r"--largest 1: layers are measured at \[1, 2\], two of them at least"):
        growth.measure_all(growth.Knobs(largest=1))


def test_an_exponent_is_the_slope_between_the_last_points():
    points = [{"step": 1.0, "save": 5.0}, {"step": 3.0, "save": 5.0}, {"step": 12.0, "save": 5.0}]
    assert growth.exponents([1, 10, 20], points) == {"step": 2.0, "save": 0.0}


def test_a_busy_machine_is_waited_for_and_refused(monkeypatch, capsys):
    loads, slept = [1.5, 0.9, 0.1], []
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (loads.pop(0), 0, 0))
    monkeypatch.setattr(measure.time, "sleep", slept.append)
    measure.require_quiet(growth.Knobs())
    assert slept == [1, 1] and capsys.readouterr().err == "the load is 1.50; waiting for 0.3\n"
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (1.5, 0, 0))
    with pytest.raises(cli.UserError, match="the load of this machine is 1.50, above 0.3.*--allow_busy"):
        measure.require_quiet(growth.Knobs())
    measure.require_quiet(growth.Knobs(allow_busy=True))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cola", "e2e"])
def test_what_ranks_keep_of_a_full_fine_tune_is_measured(task, tmp_path):
    knobs = extraction.Knobs(task, ranks="1,256", max_steps=3, max_eval_samples=8, output_dir=str(tmp_path))
    record = extraction.measure_all(knobs)
    assert json.loads((tmp_path / "extraction.json").read_text()) == record
    found = record["extracted"][task]
    assert 0 < found["ranks"]["1"]["energy"] < 1 == pytest.approx(found["ranks"]["256"]["energy"])
    assert found["ranks"]["256"]["scores"].keys() == found["full"]["scores"].keys() == found["base"]["scores"].keys()
    metric = "matthews" if task == "cola" else "perplexity"
    assert found["ranks"]["256"]["scores"][metric] == pytest.approx(found["full"]["scores"][metric], rel=1e-3)
    rows = tables.extraction_rows(record)
    assert list(rows) == ["", "---", "base", "rank 1", "rank 256", "full fine-tuning"]
    assert len({len(row) for row in rows.values()}) == 1


@pytest.mark.parametrize(
    "options, message",
    [({"tasks": "e2e,x"}, "--tasks x: must be one of e2e, sst2"), ({"ranks": "1,0"}, "--ranks 1,0: must be positive")],
)
def test_what_cannot_be_extracted_is_refused(options, message, tmp_path):
    with pytest.raises(cli.UserError, match=message):
        extraction.measure_all(extraction.Knobs(**options, output_dir=str(tmp_path)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a process")
def test_rows_of_different_adapters_are_measured_beside_peft(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters_per_row, "MANY", 3)
    small = {"hidden_size": 64, "num_layers": 1, "length": 5, "lora_dim": 4, "rounds": 2, "threads": 1}
    knobs = adapters_per_row.Knobs(**small, adapters="2", rows="1,3", allow_busy=True, output_dir=str(tmp_path))
    with warnings.catch_warnings():
        record = adapters_per_row.measure_all(knobs)
    assert json.loads((tmp_path / "adapters_per_row.json").read_text()) == record
    assert [(cell["adapters"], cell["rows"]) for cell in record["cells"]] == [(2, 1), (2, 3)]
    for cell in record["cells"]:
        assert max(cell["error"].values()) < 1e-5 and cell["token"]["ratio"]["median"] > 0
    assert len(tables.adapters_per_row_rows(record)) == 4
    with pytest.raises(cli.UserError, match="--rows 1,x: must be positive numbers, comma separated"):
        adapters_per_row.measure_all(adapters_per_row.Knobs(rows="1,x"))


def test_twice_as_many_layers_need_twice_as_many_calls(tmp_path):
    """Of Python functions, which is what injecting, saving, loading and switching spend their time on."""

    def calls_of(layers):
        config = {"n_embd": 8, "n_head": 2, "n_positions": 8, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, **config))
        file, counts = tmp_path / "adapter.safetensors", {}
        works = {
            "inject": lambda: lora.inject_lora(model, r=2),
            "save": lambda: lora.save_lora(model, file),
            "load": lambda: lora.load_lora(model, file, adapter_name="second"),
            "switch": lambda: lora.set_adapter(model, "default"),
        }
        for what, work in works.items():
            profiler = cProfile.Profile()
            profiler.runcall(work)
            counts[what] = pstats.Stats(profiler).total_calls
        return counts

    calls_of(1)  # fills what is remembered of classes
    few, many = calls_of(20), calls_of(40)
    assert {what: many[what] / few[what] <= 2.02 for what in few} == dict.fromkeys(few, True), (few, many)


class Valley:
    """Points whose losses are a parabola over the logarithm of the rate."""

    def __init__(self, lowest, diverges_from=1.0):
        self.lowest, self.diverges_from, self.asked = lowest, diverges_from, []
        self.bar = SimpleNamespace(total=0)

    def point(self, method, batch_size, rate):
        self.asked.append(rate)
        return {"losses": [[8, 0.2 + math.log10(rate / self.lowest) ** 2]] if rate < self.diverges_from else []}


@pytest.mark.parametrize("best, first, last", [(1e-3, 3e-4, 3e-3), (2e-5, 1e-5, 3e-3), (0.04, 3e-4, 1e-1)])
def test_a_curve_goes_on_until_the_best_rate_has_neighbours(best, first, last):
    bench = Valley(best)
    losses = equals.measure_losses(bench, equals.Method("query and value", 1), 16)
    assert list(losses) == sorted(bench.asked) and (min(losses), max(losses)) == (first, last)
    assert first < min(losses, key=losses.get) < last


def test_a_rate_that_diverges_ends_a_curve():
    losses = equals.measure_losses(Valley(1e-2, diverges_from=1e-3), equals.FULL, 16)
    assert list(losses) == [3e-5, 1e-4, 3e-4, 1e-3] and losses[1e-3] == math.inf


class Seeds(Valley):
    """Points of which some seeds diverge."""

    def point(self, method, batch_size, rate, seed):
        return {"trained": 5, "losses": [] if seed in self.diverging else [[8, 0.25 + seed]]}


@pytest.mark.parametrize(
    "diverging, ends, mean, shown",
    [((), [0.25, 1.25, 2.25], 1.25, "1.250 +- 1.000"), ((1,), [0.25, 2.25], None, "diverged")],
)
def test_a_seed_that_diverges_leaves_no_mean(diverging, ends, mean, shown):
    bench = Seeds(1e-3)
    bench.diverging = diverging
    curves = [
        equals.repeat_best(bench, equals.Curve(method, size, {1e-3: 0.5}), 3)
        for size in (16, 64)
        for method in (equals.Method("query and value", 1), equals.FULL)
    ]
    assert curves[0]["at_best"] == ends and curves[0]["mean"] == mean
    rows = tables.regret_rows(
        {"curves": curves, "long": [{"targets": None, "r": None, "losses": [[8, 0.5], [16, 0.4]]}]}
    )
    assert rows["query and value, r=1"][3] == shown and rows["query and value, r=1"][7] == ("0.000" if mean else "-")


@pytest.mark.slow
def test_lora_and_full_fine_tuning_are_held_together(tmp_path, capsys):
    """A small run, which goes on from its points, and is refused those of others."""
    small = {"ranks": "1,2", "batch_sizes": "32,16", "lines": 64, "long_lines": 96, "held_out": 64, "seeds": 2}
    knobs = equals.Knobs(**small, output_dir=str(tmp_path))
    record = equals.measure_all(knobs)
    assert json.loads((tmp_path / "when_lora_equals_full.json").read_text()) == record
    assert [(curve["r"], curve["batch_size"]) for curve in record["curves"]] == [
        (r, size) for size in (16, 32) for r in (1, 2, 1, 2, None)
    ]
    for curve in record["curves"]:
        losses = dict(curve["points"])
        assert losses[curve["best_rate"]] == min(losses.values()) == curve["at_best"][0] != curve["at_best"][1]
    # Four layers of width 160, query and value: one more A and B of rank 1 for each.
    assert record["curves"][1]["trained"] - record["curves"][0]["trained"] == 4 * 2 * (160 + 160)
    assert [(run["targets"], run["r"]) for run in record["long"]] == [
        ("query and value", 1), ("all linear layers", 1), ("all linear layers", 2), (None, None)
    ]  # fmt: skip
    assert all([lines for lines, _ in run["losses"]] == [16, 32, 48, 64, 80, 96] for run in record["long"])
    assert len(tables.regret_rows(record)) == 7
    capsys.readouterr()
    points = len(json.loads((tmp_path / "points.json").read_text())["points"])
    assert equals.measure_all(knobs) == record
    assert f"{points} points are taken from" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="points.json has points of another configuration; give another --output"):
        equals.measure_all(dataclasses.replace(knobs, seq_len=16))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ranks": "1,0"}, "--ranks 1,0: must be positive numbers, comma separated"),
        ({"batch_sizes": "8"}, "--batch_sizes 8: must be two, the smaller and the larger"),
        ({"lines": 0}, "--lines 0: must be above 0"),
    ],
)
def test_curves_that_cannot_be_measured_are_refused(options, message, tmp_path):
    with pytest.raises(cli.UserError, match=message):
        equals.measure_all(equals.Knobs(**options, output_dir=str(tmp_path)))
