"""Files of strangers: damaged, hostile and odd ones, of adapters in all three formats and of the examples' data.

Whatever the bytes, an adapter loads as the file says, which is read here by other means, or one of the documented
errors names the file, the model is the same as before, nothing from the file has run, and time and memory were
bounded. Whatever the text, data are read right or a UserError names file and line. Random cases come from hypothesis.
Alone: `pytest tests/test_fuzz.py`; with thousands of cases for each test: `LORALIB_CASES=40 pytest tests/test_fuzz.py`.
"""

import contextlib
import copy
import functools
import io
import json
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from reference import examples, randomize
from safetensors.torch import save_file
from small_model import INDEX, TARGETS, assert_unchanged, small_model, snapshot
from torch import nn

import loralib as lora

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.append(str(EXAMPLES))

from common import cli  # noqa: E402
from common.data import e2e, glue  # noqa: E402

OPTIONS = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "modules_to_save": ["head"]}
FORMATS = ["native", "peft", "upstream", "legacy"]
ALPHA = {"upstream": {"lora_alpha": 6}, "legacy": {"lora_alpha": 6}}
LINUX = sys.platform == "linux"
each_format = pytest.mark.parametrize("kind", FORMATS)
fuzz = functools.partial(examples, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


# The files, whole, and what is asked of loading them


@functools.cache
def adapted():
    model = small_model()
    lora.inject_lora(model, **OPTIONS, enable_lora=[True, False, True])
    return randomize(model)


@functools.cache
def models():
    """A model without adapter, one with the adapter, merged, and one with another."""
    other = small_model().train()
    lora.inject_lora(other, r=1, target_modules=["first"], modules_to_save=["norm"])
    merged = copy.deepcopy(adapted())
    with torch.no_grad():
        merged(INDEX)
    return small_model(), merged, other


def write(kind, folder):
    """Write a whole file of that format; return what to load, and the one file of it that is to be damaged."""
    if kind == "native":
        path = file = folder / "adapter.safetensors"
        lora.save_lora(adapted(), path)
    elif kind == "peft":
        path, file = folder / "peft", folder / "peft" / "adapter_model.safetensors"
        lora.save_lora(adapted(), path, format="peft")
    else:
        path = file = folder / "adapter.bin"
        torch.save(lora.lora_state_dict(adapted()), path, _use_new_zipfile_serialization=kind == "upstream")
    return path, file


FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}
FORBIDDEN |= {"socket.connect", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree", "ctypes.dlopen"}
watched: list | None = None


@functools.cache  # a hook cannot be taken away
def install_hook():
    def hook(event, arguments):
        if watched is not None and (event in FORBIDDEN or (event == "open" and "w" in str(arguments[1]))):
            watched.append((event, arguments))

    sys.addaudithook(hook)


@contextlib.contextmanager
def nothing_runs():
    global watched
    install_hook()
    watched = []
    try:
        yield
        assert watched == []
    finally:
        watched = None


def attempt(path, model=0, errors=(ValueError, OSError), **options):
    """Load; return the model, or the error, after a look at what it left behind."""
    model = copy.deepcopy(models()[model])
    before, started = snapshot(model), time.perf_counter()
    try:
        with nothing_runs():
            lora.load_lora(model, path, **options)
    except errors as error:
        assert str(path) in str(error), error
        assert_unchanged(model, before)
        return error
    finally:
        assert time.perf_counter() - started < 10
    return model


def assert_loaded(model, tensors, scalings=None):
    """The active adapter is these tensors, finite; `scalings` by layer, 3 if not given."""
    now = {name: tensor for name, tensor in lora.lora_state_dict(model).items() if name in tensors}
    assert now.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert now[name].isfinite().all() and torch.equal(now[name], tensor.to(now[name].dtype)), name
    for name, layer in model.named_modules():
        if isinstance(layer, lora.LoRALayer):
            assert layer.scaling == (scalings or {}).get(name, 3.0)
    with torch.no_grad():
        model.eval()(INDEX)


def read_safetensors(data):
    """Tensors and metadata, by the book: the length of a header, the JSON header, the bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.pop("__metadata__", {})
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    names |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    names |= {"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}
    tensors = {}
    for name, entry in header.items():
        first, last = (end + offset for offset in entry["data_offsets"])
        content = torch.tensor(list(data[first:last]), dtype=torch.uint8)
        tensors[name] = content.view(names[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def assert_loaded_as_written(model, kind, path, file):
    """The model holds what the damaged file says, if it says anything."""
    if kind == "native":
        tensors, metadata = read_safetensors(file.read_bytes())
        layers = json.loads(metadata["loralib"])["layers"]
        assert_loaded(model, tensors, {name: layer["scaling"] for name, layer in layers.items()})
    elif kind == "peft":
        ours = {name: tensor for name, tensor in read_safetensors(file.read_bytes())[0].items() if ".first." in name}
        tensors = {f"first.lora_{half}": ours[f"base_model.model.first.lora_{half}.weight"] for half in "AB"}
        assert_loaded(model, tensors)
    else:
        assert_loaded(model, torch.load(file, map_location="cpu", weights_only=True))


# Random damage

POSITION = st.floats(0, 1, exclude_max=True)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), POSITION, st.integers(0, 7)),
    st.tuples(st.just("flip in front"), POSITION, st.integers(0, 7)),
    st.tuples(st.just("cut"), POSITION, st.just(0)),
    st.tuples(st.just("insert"), POSITION, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("delete"), POSITION, st.integers(1, 80)),
    st.tuples(st.just("repeat"), POSITION, st.integers(1, 80)),
    st.tuples(st.just("number"), POSITION, st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])),
    st.tuples(st.just("length"), st.just(0.0), st.integers(0, 2**64 - 1) | st.integers(0, 5000)),
)


def damaged(data, damages):
    data = bytearray(data)
    for kind, position, value in damages:
        at = int(position * len(data)) if kind != "flip in front" else int(position * min(len(data), 2000))
        if kind.startswith("flip") and data:
            data[at] ^= 1 << value
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = value
        elif kind == "delete":
            del data[at : at + value]
        elif kind == "repeat":
            data[at:at] = data[at : at + value]
        elif kind in ("number", "length"):
            data[at : at + 8] = value.to_bytes(8, "little")
    return bytes(data)


@fuzz(50)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3), model=st.integers(0, 2))
@each_format
def test_damaged_bytes(tmp_path, kind, damages, model):
    path, file = write(kind, tmp_path)
    file.write_bytes(damaged(file.read_bytes(), damages))
    result = attempt(path, model, **ALPHA.get(kind, {}))
    if isinstance(result, nn.Module):
        assert_loaded_as_written(result, kind, path, file)


@pytest.mark.parametrize("model", range(3))
@each_format
def test_every_kind_of_length(tmp_path, kind, model):
    """Cut after so many bytes: none, within the number, the header, the last tensor, before the last byte."""
    path, file = write(kind, tmp_path)
    content = file.read_bytes()
    for length in (*range(0, 20), 100, 1000, len(content) // 2, len(content) - 9, len(content) - 1):
        file.write_bytes(content[:length])
        assert isinstance(attempt(path, model, **ALPHA.get(kind, {})), ValueError)
    file.write_bytes(content)
    if model < 2:
        assert_loaded_as_written(attempt(path, model, **ALPHA.get(kind, {})), kind, path, file)


def repacked(data, name, change, **options):
    """A file of torch.save with one of its records changed."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w", **options) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith(name) else content)
    return packed.getvalue()


@fuzz(100)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=2), model=st.integers(0, 2))
def test_damaged_pickles_in_a_whole_zip(tmp_path, damages, model):
    path, file = write("upstream", tmp_path)
    file.write_bytes(repacked(file.read_bytes(), "data.pkl", lambda content: damaged(content, damages)))
    result = attempt(path, model, lora_alpha=6)
    if isinstance(result, nn.Module):
        assert_loaded_as_written(result, "upstream", path, file)


# Lies in a header and in a configuration

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=True),
    st.sampled_from(["", "2", "first", "../../etc/passwd", "a\0b", "\ud800", "x" * 10_000, "(a+)+", "é\u2028"]),
)  # fmt: skip
KEYS = st.sampled_from(["first", "r", "x"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
NATIVE_KEYS = ["format_version", "base_model", "bias", "modules_to_save", "layers", "metadata", "x"]
LAYER_KEYS = ["r", "lora_alpha", "scaling", "lora_dropout", "enable_lora", "group_sizes", "interleave", "x"]


def with_header(data, change):
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    text = json.dumps(change(header) or header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[end:]


def with_config(data, change):
    def in_header(header):
        config = json.loads(header["__metadata__"]["loralib"])
        header["__metadata__"]["loralib"] = json.dumps(change(config) or config)

    return with_header(data, in_header)


@fuzz(150)
@given(layer=st.none() | st.sampled_from(TARGETS), position=st.integers(0, 7), value=VALUES, model=st.integers(0, 2))
def test_lies_in_our_configuration(tmp_path, layer, position, value, model):
    path, file = write("native", tmp_path)

    def change(config):
        if layer is None:
            config[NATIVE_KEYS[position % len(NATIVE_KEYS)]] = value
        else:
            config["layers"][layer][LAYER_KEYS[position]] = value

    file.write_bytes(with_config(file.read_bytes(), change))
    result = attempt(path, model)
    if isinstance(result, nn.Module):
        assert_loaded_as_written(result, "native", path, file)
    with contextlib.suppress(ValueError):
        assert all(isinstance(text, str) for text in lora.read_metadata(path).values())


DTYPES = ["F4", "F6_E2M3", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64", "BF16", "F16", "F64", "I8", "I64", "BOOL", "x"]
NUMBERS = st.integers(0, 900) | st.integers(0, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, -1])
ENTRIES = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(DTYPES)),
    st.tuples(st.sampled_from(["shape", "data_offsets"]), st.lists(NUMBERS, max_size=4)),
    st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), VALUES),
)


@fuzz(150)
@given(
    tensor=st.integers(0, 11),
    entry=ENTRIES,
    resize=st.booleans(),
    kind=st.sampled_from(["native", "peft"]),
    model=st.integers(0, 2),
)
def test_lies_in_a_header(tmp_path, tensor, entry, resize, kind, model):
    """A dtype, shape or offsets that the bytes do not have, or, resized, a smaller tensor that they do have."""
    path, file = write(kind, tmp_path)

    def change(header):
        names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
        lied = header[names[-1] if resize else names[tensor]]
        lied[entry[0]] = entry[1]

    content = with_header(file.read_bytes(), change)
    file.write_bytes(content + bytes(200) if resize else content)
    result = attempt(path, model)
    if isinstance(result, nn.Module):
        assert_loaded_as_written(result, kind, path, file)


PEFT_KEYS = ["r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "modules_to_save", "rank_pattern"]
PEFT_KEYS += [
    "alpha_pattern",
    "init_lora_weights",
    "target_modules",
    "base_model_name_or_path",
    "peft_type",
    "use_dora",
]


@fuzz(150)
@given(changes=st.dictionaries(st.sampled_from(PEFT_KEYS), VALUES, min_size=1, max_size=2), model=st.integers(0, 2))
def test_lies_in_the_configuration_of_peft(tmp_path, changes, model):
    path, _ = write("peft", tmp_path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    result = attempt(path, model)
    if isinstance(result, nn.Module):
        layers = [module for module in result.modules() if isinstance(module, lora.LoRALayer)]
        assert len(layers) == len(TARGETS) and all(abs(layer.scaling) < float("inf") for layer in layers)


@pytest.mark.filterwarnings("ignore:.*is no entry of PEFT's:UserWarning")  # a damaged name
@fuzz(50)
@given(damages=st.lists(DAMAGE, min_size=1, max_size=3), model=st.integers(0, 2))
def test_damaged_configuration_of_peft(tmp_path, damages, model):
    path, _ = write("peft", tmp_path)
    config = path / "adapter_config.json"
    config.write_bytes(damaged(config.read_bytes(), damages))
    attempt(path, model)


def test_a_configuration_of_another_editor(tmp_path):
    """A BOM, Windows line ends and another encoding of Unicode change nothing; other bytes are refused."""
    path, file = write("peft", tmp_path)
    config = path / "adapter_config.json"
    text = config.read_text()
    config.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert_loaded_as_written(attempt(path), "peft", path, file)
    config.write_bytes(text.encode("utf-16"))
    assert_loaded_as_written(attempt(path), "peft", path, file)
    config.write_bytes(text.encode("cp037"))
    assert "adapter_config.json is no configuration this library reads" in str(attempt(path))


# Hostile on purpose


def lines_up(*names):
    return lambda header: [header.setdefault(name, header["first.lora_A"]) for name in names] and None


def huge(header):
    header["first.lora_A"]["shape"] = [2**40, 8]


def overlapping(header):
    header["first.lora_A"]["data_offsets"] = header["embed.lora_A"]["data_offsets"]


def renamed(name):
    def change(header):
        header[name] = header.pop("first.lora_A")

    return change


def duplicated(data):
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].replace(b'"first.lora_A":', b'"first.lora_B":', 1)
    return len(text).to_bytes(8, "little") + text + data[end:]


def layer(**changes):
    return lambda data: with_config(data, lambda config: config["layers"]["first"].update(changes))


NO_FILE = "is no whole safetensors file"
NATIVE = {
    "terabytes in the header": (lambda data: with_header(data, huge), NO_FILE),
    "overlapping": (lambda data: with_header(data, overlapping), NO_FILE),
    "one name twice": (duplicated, NO_FILE),
    "header of 2**63": (lambda data: (2**63).to_bytes(8, "little") + data[8:], NO_FILE),
    "nested header": (lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5, NO_FILE),
    "nested configuration": (
        lambda data: with_header(data, lambda h: h["__metadata__"].update(loralib="[" * 10**5)),
        "malformed loralib configuration",
    ),
    "endless alpha": (layer(lora_alpha=10**400), "lora_alpha=10+: must be finite"),
    "endless scaling": (layer(scaling=-(10**400)), "must be finite"),
    "terabytes in the configuration": (layer(r=2**40), r"first.lora_A: \(2, 8\) in the file, \(1099511627776, 8\)"),
    "many groups": (layer(enable_lora=[True] * 10**5), "must divide out_features=8"),
    "above the folder": (lambda data: with_header(data, renamed("../../etc/passwd")), "../../etc/passwd: unexpected"),
    "absolute": (lambda data: with_header(data, renamed("/etc/passwd.lora_A")), "/etc/passwd.lora_A: unexpected"),
    "NUL in a name": (lambda data: with_header(data, renamed("a\0.lora_A")), "a\0.lora_A: unexpected in the file"),
    "a name of a megabyte": (lambda data: with_header(data, renamed("x" * 10**6)), "x: unexpected in the file"),
    "an attribute": (lambda data: with_header(data, renamed("__class__.lora_A")), "__class__.lora_A: unexpected"),
    "a layer by a path": (
        lambda data: with_config(data, lambda c: c["layers"].update({"../first": c["layers"].pop("first")})),
        "../first: the model has no such layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, message", NATIVE.values(), ids=NATIVE)
def test_hostile_files_of_ours(tmp_path, damage, message):
    path, file = write("native", tmp_path)
    content = damage(file.read_bytes())
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        raise attempt(path)
    for model in (1, 2):
        assert isinstance(attempt(path, model), ValueError)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["conv.lora_A", "first.lora_B", "head.weight"])
@each_format
def test_numbers_that_are_none(tmp_path, kind, name, value):
    """NaN or infinity anywhere in an adapter is refused, and the tensor named."""
    model = copy.deepcopy(adapted())
    with torch.no_grad():
        lora.lora_state_dict(model)[name].view(-1)[-1] = value
    path = tmp_path / "a.bin"
    if kind == "peft":
        path = tmp_path / "peft"
        lora.save_lora(model, path, format="peft")
    elif kind == "native":
        path = tmp_path / "a.safetensors"
        lora.save_lora(model, path)
    else:
        torch.save(lora.lora_state_dict(model), path, _use_new_zipfile_serialization=kind == "upstream")
    for number in range(2):
        error = attempt(path, number, **ALPHA.get(kind, {}))
        assert f"{name}: NaN or infinity in the file; load an earlier adapter" in str(error)


A, B = torch.ones(2, 8), torch.ones(8, 2)
ODD_TENSORS = {
    "expanded": lambda: (torch.ones(1).expand(10**12, 8), torch.ones(1).expand(8, 10**12)),
    "meta": lambda: (A.to("meta"), B),
    "sparse": lambda: (A.to_sparse(), B),
    "compressed sparse": lambda: (A.to_sparse_csr(), B),
    "nested": lambda: (torch.nested.nested_tensor([A[0], A[1]]), B),
    "two in a byte": lambda: (A.to(torch.uint8).view(torch.float4_e2m1fn_x2), B),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_that_cannot_be_copied_or_are_larger_than_the_file(tmp_path, name):
    first, second = ODD_TENSORS[name]()
    torch.save({"first.lora_A": first, "first.lora_B": second}, tmp_path / "a.bin")
    for model in range(3):
        error = attempt(tmp_path / "a.bin", model, lora_alpha=1)
        assert isinstance(error, ValueError)
        assert "first.lora_A" in str(error) and "no dense tensor with each of its numbers in the file" in str(error)


@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize(
    "alpha", [float("nan"), float("inf"), 10**400, True, "6", [6]], ids=lambda alpha: str(alpha)[:5]
)
def test_alpha_that_is_no_number(tmp_path, alpha, model):
    """Refused before anything is done, whether or not the model has the layers."""
    path, _ = write("upstream", tmp_path)
    model = copy.deepcopy(models()[model])
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="lora_alpha=.*: must be"):
        lora.load_lora(model, path, lora_alpha=alpha)
    with pytest.raises(TypeError, match="enable_lora=.*: must be a list of booleans"):
        lora.load_lora(model, path, lora_alpha=1, enable_lora="qv")
    assert_unchanged(model, before)


@contextlib.contextmanager
def bounded_memory(megabytes):
    """Fail if the block takes more memory than that at any moment, on top of what the process has."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (LINUX and os.access(clear, os.W_OK)):
        pytest.skip("the peak of memory is told by /proc")

    def peak():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024

    clear.write_text("5")
    before = peak()
    yield
    assert peak() - before < megabytes


def test_zip_bomb(tmp_path):
    """A record of 400 MB in a file of 400 kB."""
    path, file = write("upstream", tmp_path)
    content = repacked(
        file.read_bytes(), "data/0", lambda _: bytes(400 << 20), compression=zipfile.ZIP_DEFLATED, compresslevel=1
    )
    assert len(content) < 4 << 20
    file.write_bytes(content)
    with bounded_memory(100):
        assert "unpack to 419,4" in str(attempt(path, lora_alpha=6))


def test_large_numbers_in_pickles(tmp_path):
    """A storage that is said to be of terabytes, and a `bytearray`, which torch lets through, of as many."""
    path, file = write("legacy", tmp_path)
    assert b"K\x10" in (content := file.read_bytes())  # 16 elements
    file.write_bytes(content.replace(b"K\x10", b"\x8a\x06" + (2**44).to_bytes(6, "little")))
    with bounded_memory(100):
        assert isinstance(attempt(path, lora_alpha=6), ValueError)
        bomb = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (2**44).to_bytes(6, "little") + b"\x85R."
        write("upstream", tmp_path)
        file.write_bytes(repacked(file.read_bytes(), "data.pkl", lambda _: bomb))
        assert isinstance(attempt(path, lora_alpha=6), ValueError)


def test_a_kernel_of_20000_rows(tmp_path):
    """What turns into a matrix of gigabytes on conversion from PEFT is refused before that."""
    path, file = write("peft", tmp_path)
    prefix = "base_model.model.image.lora_"
    save_file({prefix + "A.weight": torch.ones(2, 1, 20_000, 1), prefix + "B.weight": torch.ones(4, 2, 1, 1)}, file)
    with bounded_memory(100):
        error = attempt(path)
    assert "image: a kernel of (1, 20000, 1) in the file, (2, 1, 2) in the model" in str(error)


PATTERNS = {
    "nested": r"(\w+)+!",
    "a group repeated": r"(a|b){9}",
    "many repetitions": ".*" * 5 + "!",
    "many optional ones": "x?" * 30 + "x" * 30,
    "many choices": "(.|.)" * 30 + "!",
    "a comment between": r"(\w+)(?#)+!",
    "spaces between": r"(?x:(\w+) +)!",
    "flags": "(?i)first",
    "long": "x" * 1000,
}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns_that_match_for_ever(tmp_path, pattern, key):
    path, _ = write("peft", tmp_path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: {pattern: 2}}))
    assert "could take for ever to match; give names" in str(attempt(path))


@pytest.mark.parametrize(
    "pattern", ["first", "^first", r"model\.(0|1|2)\..*\.(q|v)_proj", r"h\.[0-9]+\.attn\.\w+", "first?"]
)
def test_patterns_that_people_write(tmp_path, pattern):
    path, file = write("peft", tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["alpha_pattern"][pattern] = 6
    (path / "adapter_config.json").write_text(json.dumps(config))
    assert_loaded_as_written(attempt(path), "peft", path, file)


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.bin", "adapter.pt", "peft", "adapter"])
def test_pickles_by_any_name(tmp_path, monkeypatch, name):
    """Bare pickles, under the names of all formats; and the watch that nothing is run sees it when something is."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    file = path
    if name == "peft":
        path, _ = write("peft", tmp_path)
        (path / "adapter_model.safetensors").unlink()
        file = path / "adapter_model.bin"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps({"first.lora_A": Code()}, protocol=protocol))
        for model in range(3):
            error = attempt(path, model, **({"lora_alpha": 6} if path.suffix in (".bin", ".pt") else {}))
            assert isinstance(error, ValueError)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(AssertionError), nothing_runs():
        pickle.loads(file.read_bytes())
    assert (tmp_path / "executed").exists()


# Paths


def test_what_is_there_in_place_of_a_file(tmp_path):
    """Folders, links to nothing and in a circle, devices, pipes, impossible names."""
    native, _ = write("native", tmp_path)
    (tmp_path / "link.safetensors").symlink_to(native)
    assert_loaded_as_written(attempt(tmp_path / "link.safetensors"), "native", native, native)
    (tmp_path / "x\udcff.safetensors").symlink_to(native)
    assert "is not valid UTF-8" in str(attempt(tmp_path / "x\udcff.safetensors"))  # which safetensors insists on
    odd = native.rename(tmp_path / "na\u00efve \u2028\U0001f600.safetensors")
    assert_loaded_as_written(attempt(odd), "native", odd, odd)
    lora.save_lora(adapted(), odd)
    assert isinstance(attempt(tmp_path / "link.safetensors"), FileNotFoundError)
    (tmp_path / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("loop.bin", "pipe.safetensors", "folder.safetensors", "a\0b.safetensors", "none/../none.pt"):
        assert isinstance(attempt(tmp_path / name), FileNotFoundError), name
    assert isinstance(attempt(tmp_path / ("x" * 5000)), OSError)
    assert isinstance(attempt("/dev/zero"), FileNotFoundError)
    for inner in ("adapter_config.json", "adapter_model.safetensors"):
        path, _ = write("peft", tmp_path)
        (path / inner).unlink()
        (path / inner).mkdir()
        assert isinstance(attempt(path), FileNotFoundError)
        (path / inner).rmdir()


@each_format
def test_empty_files(tmp_path, kind):
    path, file = write(kind, tmp_path)
    file.write_bytes(b"")
    for model in range(3):
        assert isinstance(attempt(path, model, **ALPHA.get(kind, {})), ValueError)


# Data of the examples

BOM = b"\xef\xbb\xbf"
ROWS = {
    "lines": (b"", [b"name : A | food : B||A serves B .", "name : Café||\u2028Café . ".encode(), b"a : b||c||d", b"x"]),
    "csv": (b"mr,ref\n", [b'"name[A], food[B]",A serves B.', '"name[Café]","Café,\u2028"'.encode(), b"a,b,c", b'"a']),
    "sst2": (b"sentence\tlabel\n", [b"good\t1", "na\u00efve\u2028\x85\t0".encode(), b"\t1", b"a\t2", b"a\tb\t1"]),
    "stsb": (b"sentence1\tsentence2\tscore\n", [b'a "b\tc\t3.5', b"a\tb\tnan", b"a\tb\t9", b"a\tb\t0"]),
    "cola": (b"", [b"gj04\t1\t\tA sentence.", b"gj04\t0\t*\tA other.", b"gj04\t2\t\tA.", b"A sentence."]),
}  # fmt: skip
ODD = [b"", b"\xff", b"\0", BOM, "\u2028\u2029\x85\x0b\x0c\x1c".encode(), b"\t", b"||", b'"', b"|", b" ", b"x" * 300]


def reader(kind, folder):
    """A function from bytes to what the file holds, or to the error."""
    path = folder / {"lines": "data.txt", "csv": "data.csv"}.get(kind, "data.tsv")

    def read(content):
        path.write_bytes(content)
        try:
            return e2e.read_pairs(path) if kind in ("lines", "csv") else glue.read_examples(path, glue.TASKS[kind])
        except cli.UserError as error:
            assert str(error).startswith(str(path)), error
            return str(error)

    return read


@fuzz(60)
@given(
    rows=st.lists(st.integers(0, 4) | st.tuples(st.integers(0, 4), POSITION, st.sampled_from(ODD)), max_size=5),
    random=st.just(b"") | st.binary(max_size=30),
)
@pytest.mark.parametrize("kind", ROWS)
def test_data_are_read_or_refused_whatever_marks_and_line_ends(tmp_path, kind, rows, random):
    """A BOM, Windows line ends, and a missing last line end change nothing; each row gives one example or an error."""
    read, (header, known) = reader(kind, tmp_path), ROWS[kind]
    lines = []
    for row in rows:
        number, position, odd = row if isinstance(row, tuple) else (row, 0, b"")
        text = known[number % len(known)]
        at = int(position * len(text))
        lines.append(text[:at] + odd + text[at:])
    content = header + b"".join(line + b"\n" for line in lines)
    result = read(content)
    assert read(BOM + content) == result or content.startswith(BOM)
    assert read(content.replace(b"\n", b"\r\n")) == result
    if lines:
        assert read(content[:-1]) == result or not lines[-1]
    if isinstance(result, str):
        assert ", line" in result or "the file is empty" in result or "no row" in result or "no labelled row" in result
    elif kind != "csv":
        assert len(result) == len(lines)
        for (texts, label, *_), line in zip(result, lines, strict=True):
            for text in [texts, label] if kind == "lines" else texts:
                assert text in line.decode() and text == text.strip() != ""
    read(content + random)


@pytest.mark.parametrize("kind", ROWS)
def test_very_long_lines_and_files_in_another_encoding(tmp_path, kind):
    read, (header, known) = reader(kind, tmp_path), ROWS[kind]
    words = b"word " * 20_000
    at = known[0].rindex(b"A") + 1 if b"A" in known[0] else 1
    started = time.perf_counter()
    (example,) = read(header + known[0][:at] + words + known[0][at:] + b"\n")
    assert sum(str(part).count("word") for part in example) == 20_000
    for junk in (b" " * 10**6, b"," * 10**6, b"]" * 10**6, b"[" * 10**6, b"a" * 10**6, b"|" * 10**6, b"'" * 10**6):
        assert isinstance(read(header + junk), str)
        read(header + known[0][:at] + junk + known[0][at:])
    assert time.perf_counter() - started < 20
    text = (header + known[0]).decode()
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        assert ", line 1: " in read(text.encode(encoding))
    assert "empty" in read(b"") and "empty" in read(BOM) and "empty" in read(b"\n")
