"""Client code written for loralib 0.1.2 runs on this library and gives the same numbers.

What: constructing under a seed, extending the classes, writing into weights, merging by hand, exporting, tracing,
pruning, fusing, pickling, training. The last section has what differs on purpose.

How: the oracle is the real 0.1.2, which pip installs once into a folder of its own; where pip cannot get it, what needs
it is skipped. It is imported under another name, so that both are in one process. Each pattern is a function that takes
the library's module, runs a client's code and returns values; one test compares what it returns for both libraries, and
the random numbers that come afterwards. Most patterns run for every kind of layer in `KINDS`.

Run alone: `pytest tests/test_clients.py`; one pattern: `pytest tests/test_clients.py -k pruned`.
"""

import copy
import dataclasses
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import loralib as lora

QV, IO = [True, False, True], {"fan_in_fan_out": True}


# The oracle.


@pytest.fixture(scope="session")
def upstream_folder(tmp_path_factory):
    """The folder with the package loralib 0.1.2, shared by the processes of pytest-xdist and by later runs."""
    shared = tmp_path_factory.getbasetemp().parent / "loralib-0.1.2"
    if not shared.is_dir():
        own = Path(tempfile.mkdtemp(dir=shared.parent))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own)]
        done = subprocess.run([*command, "loralib==0.1.2"], capture_output=True, text=True)
        if done.returncode == 0:
            try:
                os.replace(own, shared)
            except OSError:  # another process was quicker
                assert shared.is_dir()
        shutil.rmtree(own, ignore_errors=True)
        if done.returncode != 0:
            pytest.skip(f"pip cannot get loralib 0.1.2: {done.stderr.strip()[-300:]}")
    return shared


@pytest.fixture(scope="session")
def upstream(upstream_folder):
    """The module of 0.1.2."""
    package = upstream_folder / "loralib"
    spec = importlib.util.spec_from_file_location(
        "upstream", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    sys.modules["upstream"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "upstream"]:
        del sys.modules[name]


def under_upstream(folder, code, *arguments):
    """What a program prints for which `loralib` is 0.1.2; it can import this file."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    return in_own_process(code, *arguments, PYTHONPATH=path)


def in_own_process(code, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr
    return done.stdout


# The kinds of layers, and what clients do with each in a way of its own.


@dataclasses.dataclass(frozen=True)
class Kind:
    """A LoRA layer's arguments, and the shape of its input or, for an embedding, of its indices."""

    name: str
    cls: str
    args: tuple
    shape: tuple
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return self.name

    def make(self, lib, **more):
        return self.of(getattr(lib, self.cls), **more)

    def of(self, cls, **more):
        return cls(*self.args, **{"r": 2, "lora_alpha": 3, **self.options, **more})

    def trained(self, lib, **more):
        return randomize(self.make(lib, **more))

    def x(self, seed=3):
        generator = torch.Generator().manual_seed(seed)
        if self.cls == "Embedding":
            return torch.randint(0, self.args[0], self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)

    @property
    def transposed(self):
        return "fan_in_fan_out" in self.options

    def plain(self):
        """The layer of torch, for the weight that a client takes out."""
        options = {key: value for key, value in self.options.items() if key in ("padding", "groups", "padding_idx")}
        if self.cls == "ConvLoRA":
            return self.args[0](*self.args[1:], **options)
        return {"MergedLinear": nn.Linear}.get(self.cls, getattr(nn, self.cls, None))(*self.args, **options)


LINEAR = Kind("Linear", "Linear", (6, 8), (4, 6))
LINEAR_IO = Kind("Linear_io", "Linear", (6, 8), (2, 3, 6), IO)
MERGED = Kind("MergedLinear", "MergedLinear", (6, 12), (2, 3, 6), {"enable_lora": QV})
MERGED_IO = Kind("MergedLinear_io", "MergedLinear", (6, 12), (4, 6), {"enable_lora": QV, **IO})
EMBEDDING = Kind("Embedding", "Embedding", (10, 4), (2, 6), {"padding_idx": 2})
CONV = Kind("Conv2d", "Conv2d", (4, 6, 3), (2, 4, 5, 5), {"padding": 1})
GROUPED = Kind("Conv2d_groups", "Conv2d", (4, 6, 3), (2, 4, 5, 5), {"groups": 2})
CONV_1D = Kind("Conv1d", "Conv1d", (4, 6, 1), (2, 4, 5))  # upstream's is right for this size only
CONV_LORA = Kind("ConvLoRA", "ConvLoRA", (nn.Conv2d, 4, 6, 3), (2, 4, 5, 5), {"padding": 1})
TRANSPOSED = Kind("ConvTranspose2d", "ConvLoRA", (nn.ConvTranspose2d, 4, 6, 3), (2, 4, 5, 5), {"padding": 1})

LINEARS = [LINEAR, LINEAR_IO]
MERGED_LINEARS = [MERGED, MERGED_IO]
CONVS = [CONV, GROUPED, CONV_1D, CONV_LORA]
KINDS = [*LINEARS, *MERGED_LINEARS, EMBEDDING, *CONVS]
WITHOUT_CONVS = [*LINEARS, *MERGED_LINEARS, EMBEDDING]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def randomize(model):
    """Values for the adapters, as after some training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    return model


def holder(layer):
    """The module with `weight` and `bias`: 0.1.2 has it within a convolution."""
    return layer.conv if hasattr(layer, "conv") else layer


def weight(layer):
    """A copy, since 0.1.2 merges in place."""
    return holder(layer).weight.detach().clone()


def parameters(layer):
    return {key: parameter.detach().clone() for key, parameter in layer.named_parameters()}


def update(layer):
    """What 0.1.2's train() adds to and subtracts from the weight."""
    if hasattr(layer, "merge_AB"):
        return layer.merge_AB() * layer.scaling
    delta = layer.lora_B @ layer.lora_A
    if hasattr(layer, "conv"):
        return delta.view(layer.conv.weight.shape) * layer.scaling
    return (delta.T if isinstance(layer, nn.Embedding) or layer.fan_in_fan_out else delta) * layer.scaling


def own_train(self, mode=True):
    """The train() of 0.1.2, as clients have it in their own classes."""
    nn.Module.train(self, mode)
    if mode:
        if self.merge_weights and self.merged:
            if self.r > 0:
                holder(self).weight.data -= update(self)
            self.merged = False
    elif self.merge_weights and not self.merged:
        if self.r > 0:
            holder(self).weight.data += update(self)
        self.merged = True


def run(layer, x, modes=(True, False, True, False)):
    """The outputs in these modes, one after another: training, evaluation, ..."""
    outputs = []
    for mode in modes:
        layer.train(mode)
        outputs.append(layer(x))
    return outputs


def train_steps(model, loss, steps=3):
    """A few steps of what trains; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        losses.append(loss())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses


def trained_names(model):
    return sorted(our_key(name) for name, parameter in model.named_parameters() if parameter.requires_grad)


def our_key(key):
    """A convolution's own tensors are one level down in 0.1.2."""
    return key.replace("conv.weight", "weight").replace("conv.bias", "bias")


# One table of patterns, one test.

PATTERNS = []


def label(value):
    return getattr(value, "__name__", str(value)).replace(" ", "")


def pattern(*choices, marks=(), exact=False):
    """Enter a function `pattern(lib, *given)` into the table, once for each combination of the choices."""

    def enter(function):
        for given in itertools.product(*choices):
            name = "-".join(map(label, (function, *given)))
            PATTERNS.append(pytest.param(function, given, exact, id=name, marks=marks))
        return function

    return enter


def compare(got, wanted, exact=False):
    """Equal but for rounding: tensors, numbers, texts, lists, and dicts with our names of keys."""
    if isinstance(wanted, dict):
        got, wanted = ({our_key(key): value for key, value in values.items()} for values in (got, wanted))
        assert sorted(got) == sorted(wanted)
        for key, value in wanted.items():
            compare(got[key], value, exact)
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), (got, wanted)
        for one, other in zip(got, wanted, strict=True):
            compare(one, other, exact)
    elif isinstance(wanted, torch.Tensor):
        bounds = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 2e-6}
        torch.testing.assert_close(got.detach(), wanted.detach(), **bounds)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=0 if exact else 1e-6)
    else:
        assert got == wanted


def under_seed(lib, function, given):
    torch.manual_seed(0)
    return [*function(lib, *given), torch.rand(3)]


# Construction.


@pattern(KINDS, [{}, {"r": 0}, {"merge_weights": False}, {"bias": False}, {"lora_dropout": 0.1}], exact=True)
def constructed(lib, kind, more):
    """The same initial values, attributes and random stream."""
    if kind is EMBEDDING and more.keys() & {"bias", "lora_dropout"}:
        more = {}
    layer = kind.make(lib, **more)
    scaling = layer.scaling if layer.r > 0 else None
    attributes = [layer.r, layer.lora_alpha, scaling, layer.merged, layer.merge_weights, layer.training]
    is_parameter = isinstance(holder(layer).weight, nn.Parameter)
    return [parameters(layer), trained_names(layer), attributes, is_parameter]


@pattern(KINDS)
def trained_a_little(lib, kind):
    """Steps with the outputs between them, in training and evaluation in turn."""
    layer, x = kind.trained(lib), kind.x()
    lib.mark_only_lora_as_trainable(layer)
    outputs = []
    for _ in range(2):
        layer.train()
        outputs += train_steps(layer, lambda: layer(x).square().mean())
        outputs += run(layer, x)
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters() if parameter.requires_grad}
    return [*outputs, weight(layer), gradients]


@pattern([LINEAR, LINEAR_IO, MERGED, MERGED_IO])
def dropped(lib, kind):
    """The same mask of lora_dropout, in the same numbers."""
    layer, x = kind.trained(lib, lora_dropout=0.3), kind.x()
    return run(layer, x, (True, True, False, True))


@pattern(KINDS, [0, 2])
def not_merging(lib, kind, r):
    """`merge_weights=False`, and a layer without adapter."""
    layer = kind.trained(lib, merge_weights=False, r=r)
    return [*run(layer, kind.x()), layer.merged, weight(layer)]


@pattern([CONV_LORA, TRANSPOSED, Kind("Conv3d", "ConvLoRA", (nn.Conv3d, 4, 6, 1), (2, 4, 3, 3, 3))])
def conv_lora(lib, kind):
    """ConvLoRA of a class of torch; a transposed one works on 0.1.2 merged only."""
    layer, x = kind.trained(lib), kind.x()
    layer.eval()
    out = layer(x)
    layer.train()
    kinds = [isinstance(layer, cls) for cls in (lib.ConvLoRA, lib.LoRALayer, nn.Module)]
    outputs = [] if kind is TRANSPOSED else run(layer, x)
    return [out, *outputs, *kinds, isinstance(layer.conv, kind.args[0]), weight(layer), *run(layer, x, (False,))]


@pattern(["own class", "partial", "function"])
def conv_made_by_something_else(lib, how):
    """ConvLoRA of a client's own convolution, of functools.partial, of a function."""

    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    def circular(*args, **options):
        return nn.Conv2d(*args, padding_mode="circular", **options)

    make = {"own class": Doubled, "partial": partial(nn.Conv2d, padding_mode="reflect"), "function": circular}[how]
    layer = randomize(lib.ConvLoRA(make, 4, 6, 3, padding=1, r=2, lora_alpha=3))
    return [*run(layer, CONV.x()), weight(layer)]


@pattern([(4, 6, 2), (64, 64, 1)])
def conv_with_standardised_weights(lib, sizes):
    """A convolution of the client's that computes with a function of the weight, which no branch adds up to."""

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            weight = weight - weight.mean((1, 2, 3), keepdim=True)
            return super()._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), bias)

    inputs, outputs, r = sizes
    layer = randomize(lib.ConvLoRA(Standardised, inputs, outputs, 3, padding=1, r=r, lora_alpha=3)).double()
    return run(layer, torch.randn(2, inputs, 8, 8, dtype=torch.float64))


@pattern([nn.Conv2d, nn.ConvTranspose2d])
def subclass_of_conv_lora(lib, conv):
    """Other classes of convolutions, as 0.1.2 suggests in a comment."""

    class Mine(lib.ConvLoRA):
        def __init__(self, *args, **kwargs):
            super(Mine, self).__init__(conv, *args, **kwargs)  # noqa: UP008 (as 0.1.2 has it)

    layer, x = randomize(Mine(4, 6, 3, r=2, lora_alpha=3, stride=2)), CONV.x()
    modes = (True, False, True, False) if conv is nn.Conv2d else (False, False)
    plain = Mine(4, 6, 3)
    return [*run(layer, x, modes), weight(layer), isinstance(layer, lib.ConvLoRA), *run(plain, x)]


# The convolution within.


@pattern([*CONVS, TRANSPOSED])
def inner_convolution(lib, kind):
    """`conv.conv(x)` is the base in training and the sum in evaluation; its sizes can be read."""
    layer, x = kind.trained(lib), kind.x()
    inner = [layer.conv(x)]
    layer.eval()
    inner.append(layer.conv(x))
    layer.train()
    inner.append(layer.conv(x))
    sizes = [getattr(layer.conv, key) for key in ("in_channels", "out_channels", "kernel_size", "padding", "groups")]
    return [*inner, *sizes, isinstance(layer.conv, nn.Module), len(list(layer.conv.parameters()))]


@pattern(CONVS, [True, False])
def inner_convolution_loaded(lib, kind, mode):
    """`conv.conv.load_state_dict(old.state_dict())`; in evaluation what is loaded counts as merged."""
    layer, x, old = kind.trained(lib), kind.x(), kind.plain()
    layer.train(mode)
    result = layer.conv.load_state_dict(old.state_dict())
    return [layer(x), *run(layer, x), list(result.missing_keys), weight(layer), list(layer.conv.state_dict())]


@pattern(CONVS)
def inner_convolution_frozen(lib, kind):
    """Freezing `conv.conv.parameters()`, and what then trains."""
    layer, x = kind.trained(lib), kind.x()
    for parameter in layer.conv.parameters():
        parameter.requires_grad = False
    losses = train_steps(layer, lambda: layer(x).square().mean())
    return [trained_names(layer), *losses, *run(layer, x)]


@pattern(CONVS, ["in training", "in evaluation"])
def inner_convolution_replaced(lib, kind, when):
    """`conv.conv = old`; in evaluation it counts as merged."""
    layer, x, old = kind.trained(lib), kind.x(), kind.plain()
    layer.train(when == "in training")
    layer.conv = old
    same = layer.conv.weight is old.weight
    return [same, layer(x), layer.conv(x), *run(layer, x)]


@pattern(CONVS, ["conv", "functional"])
def forward_by_the_inner_convolution(lib, kind, how):
    """A subclass whose forward uses `self.conv`, `self.conv._conv_forward` or the functions of torch."""

    class Mine(getattr(lib, kind.cls)):
        def forward(self, x):
            if self.r > 0 and not self.merged:
                weight = self.conv.weight + update(self)
                if how == "conv":
                    return self.conv._conv_forward(x, weight, self.conv.bias)
                conv, function = self.conv, getattr(F, f"conv{x.dim() - 2}d")
                return function(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            return self.conv(x)

    layer, x = randomize(kind.of(Mine)), kind.x()
    lib.mark_only_lora_as_trainable(layer)
    losses = train_steps(layer, lambda: layer(x).square().mean())
    return [*losses, *run(layer, x)]


# LoRALayer in classes of the client's own.


def client_model(lib):
    """Three classes that have LoRALayer beside one of torch, with a layer of the library and plain ones."""

    class Scale(nn.Module, lib.LoRALayer):
        def __init__(self, width, r):
            nn.Module.__init__(self)
            lib.LoRALayer.__init__(self, r=r, lora_alpha=4, lora_dropout=0.1, merge_weights=True)
            self.bias = nn.Parameter(torch.randn(width))
            self.lora_A = nn.Parameter(torch.randn(r, width))
            self.lora_B = nn.Parameter(torch.randn(width, r))
            self.scaling = self.lora_alpha / self.r

        def forward(self, x):
            return x + self.bias + self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T * self.scaling

    class Own(nn.Linear, lib.LoRALayer):
        train = own_train

        def __init__(self, inputs, outputs, r):
            nn.Linear.__init__(self, inputs, outputs)
            lib.LoRALayer.__init__(self, r=r, lora_alpha=4, lora_dropout=0.0, merge_weights=True)
            self.fan_in_fan_out = False
            self.lora_A = nn.Parameter(torch.randn(r, inputs))
            self.lora_B = nn.Parameter(torch.randn(outputs, r))
            self.scaling = self.lora_alpha / self.r
            self.weight.requires_grad = False

        def forward(self, x):
            out = nn.Linear.forward(self, x)
            if not self.merged:
                out += self.lora_dropout(x) @ self.lora_A.T @ self.lora_B.T * self.scaling
            return out

    class Attention(nn.MultiheadAttention, lib.LoRALayer):
        def __init__(self, width, heads, r):
            nn.MultiheadAttention.__init__(self, width, heads, batch_first=True)
            lib.LoRALayer.__init__(self, r=r, lora_alpha=4, lora_dropout=0.0, merge_weights=True)
            self.lora_A = nn.Parameter(torch.randn(r, width))
            self.lora_B = nn.Parameter(torch.randn(3 * width, r))
            self.scaling = self.lora_alpha / self.r

        def train(self, mode=True):
            nn.MultiheadAttention.train(self, mode)
            if self.merge_weights and self.merged == mode:
                change = self.lora_B @ self.lora_A * self.scaling
                self.in_proj_weight.data += -change if mode else change
                self.merged = not mode
            return self

        def forward(self, x):
            weight = self.in_proj_weight
            if not self.merged:
                weight = weight + self.lora_B @ self.lora_A * self.scaling
            q, k, v = F.linear(x, weight, self.in_proj_bias).chunk(3, -1)
            return self.out_proj((q @ k.mT).softmax(-1) @ v)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.own, self.attention = Scale(8, 2), Own(8, 8, 2), Attention(8, 2, 2)
            self.ours = lib.Linear(8, 8, r=2)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.ours(self.attention(self.own(self.scale(x))))))

    return Model()


@pattern(["none", "all", "lora_only"])
def mixed_in(lib, bias):
    """What trains and what is saved of such a model, its losses, and its outputs in both modes."""
    model, x = client_model(lib), torch.randn(2, 3, 8)
    lib.mark_only_lora_as_trainable(model, bias=bias)
    losses = train_steps(model, lambda: model(x).square().mean())
    saved = {key: value.clone() for key, value in lib.lora_state_dict(model, bias=bias).items()}
    attributes = [(m.r, m.lora_alpha, m.merged) for m in model.modules() if isinstance(m, lib.LoRALayer)]
    return [trained_names(model), *losses, saved, attributes, *run(model, x)]


@pattern(["none", "all", "lora_only"])
def marked_and_saved(lib, bias):
    """The same of a model with a layer of every kind."""
    kinds = WITHOUT_CONVS if bias == "lora_only" else KINDS  # 0.1.2 does not see the bias within a convolution
    model = nn.ModuleDict({kind.name: kind.trained(lib) for kind in kinds} | {"head": nn.Linear(4, 3)})
    lib.mark_only_lora_as_trainable(model, bias)
    return [trained_names(model), lib.lora_state_dict(model, bias)]


# Subclasses of the layers.


@pattern(KINDS)
def subclass_with_own_train(lib, kind):
    """A subclass with 0.1.2's own train(), which writes into weight.data."""

    class Mine(getattr(lib, kind.cls)):
        train = own_train

    layer, x = randomize(kind.of(Mine)), kind.x()
    outputs = run(layer, x, (True, False, False, True, True, False, True))
    outputs += train_steps(layer, lambda: layer(x).square().mean())
    outputs += run(layer, x, (False,))
    merged = weight(layer)
    return [*outputs, layer.merged, merged, *run(layer, x, (True,)), layer.merged, weight(layer)]


@pattern(KINDS)
def subclass_that_extends_train(lib, kind):
    """A subclass whose train() and reset_parameters() call those of the library, and whose forward calls forward."""

    class Mine(getattr(lib, kind.cls)):
        calls = 0

        def train(self, mode=True):
            super().train(mode)
            self.calls += 1
            return self

        def reset_parameters(self):
            super().reset_parameters()
            nn.init.constant_(holder(self).weight, 0.5)

        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = randomize(kind.of(Mine)), kind.x()
    return [*run(layer, x), layer.calls, layer.merged, weight(layer)]


@pattern([LINEAR, MERGED, EMBEDDING], exact=True)
def reset_by_super(lib, kind):
    """`super(lora.Linear, self).reset_parameters()` is that of torch: the adapter is left alone."""
    cls = getattr(lib, kind.cls)

    class Mine(cls):
        def reset_parameters(self):
            super(cls, self).reset_parameters()
            if hasattr(self, "lora_A"):
                nn.init.normal_(self.lora_A)
                nn.init.ones_(self.lora_B)

    layer = kind.of(Mine)
    first = parameters(layer)
    layer.reset_parameters()
    return [first, parameters(layer)]


@pattern([LINEAR, MERGED, EMBEDDING])
def forward_by_super(lib, kind):
    """`super(lora.Linear, self).forward(x)` is that of torch, on whatever `weight` is."""
    cls = getattr(lib, kind.cls)

    class Mine(cls):
        def forward(self, x):
            out = super(cls, self).forward(x)
            if self.r > 0 and not self.merged:
                change = update(self)
                out = out + (F.embedding(x, change) if isinstance(self, nn.Embedding) else F.linear(x, change))
            return out

    layer, x = randomize(kind.of(Mine)), kind.x()
    lib.mark_only_lora_as_trainable(layer)
    losses = train_steps(layer, lambda: layer(x).square().mean())
    return [*losses, *run(layer, x)]


@pattern(["Linear", "Linear_io", "MergedLinear", "MergedLinear_io", "Embedding"])
def constructed_by_super(lib, kind):
    """A subclass that goes past the constructor: `super(lora.Linear, self).__init__(i, o)`, the rest by itself."""
    name, transposed = kind.removesuffix("_io"), kind.endswith("_io")
    cls = getattr(lib, name)

    class Mine(cls):
        def __init__(self, inputs, outputs, r):
            super(cls, self).__init__(inputs, outputs)
            lib.LoRALayer.__init__(self, r=r, lora_alpha=3, lora_dropout=0.0, merge_weights=True)
            self.fan_in_fan_out = transposed
            new = self.weight.new_zeros
            if name == "MergedLinear":
                self.enable_lora = QV
                self.lora_A = nn.Parameter(new((r * 2, inputs)))
                self.lora_B = nn.Parameter(new((outputs // 3 * 2, r)))
                self.lora_ind = new((outputs,), dtype=torch.bool).view(3, -1)
                self.lora_ind[QV, :] = True
                self.lora_ind = self.lora_ind.view(-1)
            else:
                self.lora_A, self.lora_B = nn.Parameter(new((r, inputs))), nn.Parameter(new((outputs, r)))
            self.scaling = self.lora_alpha / self.r
            self.weight.requires_grad = False
            self.reset_parameters()
            if transposed:
                self.weight.data = self.weight.data.transpose(0, 1)

        def reset_parameters(self):
            super(cls, self).reset_parameters()
            if hasattr(self, "lora_A"):
                nn.init.normal_(self.lora_A)
                nn.init.normal_(self.lora_B)

    layer = Mine(10, 6, 2)
    x = EMBEDDING.x() if name == "Embedding" else torch.randn(4, 10)
    return [parameters(layer), *run(layer, x)]


@pattern([*MERGED_LINEARS, Kind("all", "MergedLinear", (5, 12), (4, 5), {"enable_lora": [True, True]})])
def methods_of_merged_linear(lib, kind):
    """`merge_AB()`, `zero_pad(x)` and `lora_ind`, which clients call, in both modes."""
    layer, values = kind.trained(lib), []
    for mode in (True, False):
        layer.train(mode)
        values += [layer.merge_AB(), layer.zero_pad(torch.ones(len(layer.lora_B), 2)), layer.lora_ind]
        values += [layer.zero_pad(layer.lora_B), list(layer.enable_lora)]
    layer.train()
    layer.merge_AB().square().sum().backward()
    return [*values, layer.lora_A.grad, layer.lora_B.grad]


# Merging and stripping by hand.


@pattern(KINDS, ["merge_weights", "no merge_weights"])
def merged_by_hand(lib, kind, how):
    """`layer.weight.data += ...; layer.merged = True`, then train(), which subtracts."""
    layer, x = kind.trained(lib, merge_weights=how == "merge_weights"), kind.x()
    if how != "merge_weights":
        layer.eval()
    holder(layer).weight.data += update(layer)
    layer.merged = True
    values = [layer(x), weight(layer)]
    layer.merge_weights = True
    layer.train()
    return [*values, layer.merged, layer(x), weight(layer), *run(layer, x)]


@pattern(KINDS)
def stripped_by_hand(lib, kind):
    """`del m.lora_A, m.lora_B; m.r = 0` in evaluation: the sum is the weight from then on, also in the state dict."""
    layer, x = kind.trained(lib), kind.x()
    layer.eval()
    del layer.lora_A, layer.lora_B
    layer.r = 0
    values = [layer(x)]
    layer.train()
    return [*values, layer.merged, layer(x), dict(layer.state_dict()), *run(layer, x), dict(layer.state_dict())]


@pattern(KINDS)
def stripped_and_saved(lib, kind):
    """The same, with the state dict read while still in evaluation."""
    layer, x = kind.trained(lib), kind.x()
    layer.eval()
    del layer.lora_A, layer.lora_B
    layer.r = 0
    return [dict(layer.state_dict()), layer(x), *run(layer, x)]


@pattern(KINDS, [(True,), (True, False), (True, False, True)])
def rank_set_to_zero(lib, kind, modes):
    """`layer.r = 0` switches the adapter off, or leaves it merged, until `r` is set again."""
    layer, x, rank = kind.trained(lib), kind.x(), 2
    values = run(layer, x, modes)
    layer.r = 0
    values += [layer(x), *run(layer, x)]
    layer.train()
    layer.r = rank
    return [*values, layer(x), weight(layer)]


@pattern(KINDS)
def switched_off_by_merged(lib, kind):
    """`layer.merged = True` gives the base alone, `layer.merged = False` the sum again."""
    layer, x = kind.trained(lib), kind.x()
    values = [layer(x)]
    layer.merged = True
    values.append(layer(x))
    layer.merged = False
    return [*values, layer(x), *run(layer, x)]


@pattern(KINDS)
def merged_without_merging(lib, kind):
    """`layer.merged = True` in training, and then train(), which subtracts what was never added."""
    layer, x = kind.trained(lib), kind.x()
    layer.merged = True
    layer.train()
    return [layer.merged, layer(x), weight(layer), *run(layer, x)]


# The weight in evaluation.


@pattern(KINDS)
def merged_weight_is_a_parameter(lib, kind):
    """`layer.weight` in evaluation is the registered Parameter with the sum, under its name."""
    model = nn.Sequential(kind.trained(lib))
    lib.mark_only_lora_as_trainable(model)
    model.eval()
    owner = holder(model[0])
    found = {our_key(name): parameter for name, parameter in model.named_parameters()}
    same = [found["0.weight"] is owner.weight, owner.get_parameter("weight") is owner.weight]
    return [*same, isinstance(owner.weight, nn.Parameter), owner.weight.requires_grad, owner.weight, found]


@pattern(KINDS)
def exported(lib, kind):
    """The weights in evaluation, by named_parameters(), into a plain layer; and by `other.weight = layer.weight`."""
    layer, x, plain, other = kind.trained(lib), kind.x(), kind.plain(), kind.plain()
    layer.eval()
    found = {our_key(name): p.data for name, p in layer.named_parameters() if "lora_" not in name}
    if kind.transposed:
        found["weight"] = found["weight"].T
        outputs = [F.linear(x, weight(layer).T, holder(layer).bias)]
    else:
        other.weight = holder(layer).weight
        outputs = [other(x), other.weight is holder(layer).weight]
    plain.load_state_dict(found)
    return [*outputs, plain(x), layer(x)]


@pattern([EMBEDDING])
def tied_in_evaluation(lib, kind):
    """An output layer on the merged table."""
    layer, head = kind.trained(lib), nn.Linear(4, 10, bias=False)
    layer.eval()
    head.weight = layer.weight
    return [head(layer(kind.x()))]


def batch_norm(cls, width):
    norm = cls(width).eval()
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pattern([LINEAR, MERGED])
def fused_linear(lib, kind):
    """torch's fusion of a linear layer in evaluation with the batch normalisation after it."""
    layer, x, norm = kind.trained(lib), kind.x().flatten(0, -2), batch_norm(nn.BatchNorm1d, kind.args[1])
    layer.eval()
    fused = fuse_linear_bn_eval(layer, norm)
    return [fused(x), norm(layer(x)), fused.weight, *run(layer, x)]


@pattern([CONV, GROUPED, CONV_LORA])
def fused_convolution(lib, kind):
    """The same for the convolution within, which the client then uses by itself or puts back."""
    layer, x, norm = kind.trained(lib), kind.x(), batch_norm(nn.BatchNorm2d, 6)
    layer.eval()
    fused = fuse_conv_bn_eval(layer.conv, norm)
    return [fused(x), norm(layer(x)), fused.weight]


@pattern([CONV, GROUPED, CONV_LORA])
def fused_convolution_put_back(lib, kind):
    """`conv.conv = fused` in evaluation: the update is in it already."""
    layer, x, norm = kind.trained(lib), kind.x(), batch_norm(nn.BatchNorm2d, 6)
    layer.eval()
    layer.conv = fuse_conv_bn_eval(layer.conv, norm)
    return [layer(x), *run(layer, x, (False,))]


@pattern([*WITHOUT_CONVS, *CONVS], ["l1", "mask"])
def pruned(lib, kind, how):
    """torch's pruning in evaluation, of the sum, by rank or by a mask of the client's."""
    layer, x = kind.trained(lib), kind.x()
    layer.eval()
    if how == "l1" and not kind.transposed:  # torch does not rank a view, as 0.1.2 has it
        prune.l1_unstructured(holder(layer), "weight", amount=0.4)
    else:
        prune.custom_from_mask(holder(layer), "weight", holder(layer).weight.abs() > 0.3)
    values = [layer(x), prune.is_pruned(holder(layer))]
    prune.remove(holder(layer), "weight")
    return [*values, layer(x), weight(layer) == 0, *run(layer, x, (False, True, False))]


# Writes into the weight of a merged layer.


# Each gets the module with the weight, and a tensor of the weight's shape.
WRITES = {
    "data.copy_": lambda owner, new: owner.weight.data.copy_(new),
    "data=": lambda owner, new: setattr(owner.weight, "data", new),
    "data+=": lambda owner, new: owner.weight.data.add_(new),
    "data[]=": lambda owner, new: owner.weight.data.__setitem__(slice(2), new[:2]),
    "rows_swapped": lambda owner, new: owner.weight.data.copy_(owner.weight.data.flip(0)),
    "copy_": lambda owner, new: owner.weight.copy_(new),
    "mul_": lambda owner, new: owner.weight.mul_(0.5),
    "neg_": lambda owner, new: owner.weight.neg_(),
    "init": lambda owner, new: nn.init.constant_(owner.weight, 0.5),
    "Parameter": lambda owner, new: setattr(owner, "weight", nn.Parameter(new, requires_grad=False)),
}


@pattern(KINDS, WRITES, [torch.float32, torch.float64])
def written_while_merged(lib, kind, write, dtype):
    """What is written counts, in this evaluation and in what follows."""
    layer, x = kind.trained(lib).to(dtype), kind.x()
    x = x.to(dtype) if x.is_floating_point() else x
    layer.eval()
    owner = holder(layer)
    with torch.no_grad():
        WRITES[write](owner, torch.randn(owner.weight.shape).to(dtype))
    values = [layer(x), weight(layer)]
    layer.train()
    values += [layer(x), weight(layer)]
    layer.eval()
    return [*values, layer(x), *run(layer, x)]


# What is done with whole models.


@pattern(KINDS)
def as_numpy(lib, kind):
    """`model.eval()(x).numpy()` where only adapters train."""
    model = nn.Sequential(kind.trained(lib), nn.Tanh())
    lib.mark_only_lora_as_trainable(model)
    values = [torch.from_numpy(model.eval()(kind.x()).numpy())]
    train_steps(model.train(), lambda: model(kind.x()).square().mean())
    return [*values, torch.from_numpy(model.eval()(kind.x()).numpy())]


# torch cannot trace an embedding with a padding index without a warning.
@pattern(
    [*LINEARS, *MERGED_LINEARS, dataclasses.replace(EMBEDDING, options={}), *CONVS],
    marks=pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning"),
)
def traced_by_jit(lib, kind):
    """torch.jit.trace with its default arguments, in evaluation."""
    model = nn.Sequential(kind.trained(lib), nn.Tanh())
    traced = torch.jit.trace(model.eval(), kind.x())
    return [traced(kind.x()), traced(kind.x(seed=4)), model(kind.x())]


@pattern(KINDS, [True, False])
def traced_by_fx(lib, kind, mode):
    """torch.fx; ours is always traced, 0.1.2's layer stands for itself where it cannot be. Training is followed."""
    model = nn.Sequential(kind.trained(lib), nn.Tanh()).double()  # a whole sum rounds otherwise than its parts
    model.train(mode)
    inputs = [x.double() if x.is_floating_point() else x for x in (kind.x(), kind.x(seed=4))]
    try:
        traced = torch.fx.symbolic_trace(model)
    except (torch.fx.proxy.TraceError, TypeError):
        if lib is lora:
            raise
        traced = model
    values = list(map(traced, inputs))
    if mode:
        with torch.no_grad():
            model[0].lora_B.add_(1)
            model[0].lora_A.mul_(2)
        values += [traced(inputs[0]), model(inputs[0])]
    return values


def numpy_booleans(values):
    return list(map(np.bool_, values))


@pattern([MERGED, MERGED_IO], [list, np.array, numpy_booleans])
def enabled_by_numpy(lib, kind, make):
    """`enable_lora` as a list, an array, a list of numpy's booleans."""
    layer, x = kind.trained(lib, enable_lora=make(QV)), kind.x()
    return [*run(layer, x), layer.merge_AB(), layer.lora_ind]


@pattern(KINDS, [torch.tensor(3.0), torch.tensor([3.0]), torch.tensor(3), torch.tensor([[1.5]])])
def alpha_as_a_tensor(lib, kind, alpha):
    """`lora_alpha` as a tensor of one element."""
    layer, x = kind.trained(lib, lora_alpha=alpha), kind.x()
    return [*run(layer, x), float(layer.scaling), float(layer.lora_alpha)]


@pattern(WITHOUT_CONVS, [0.0, 0.1])
def leaves_counted(lib, kind, dropout):
    """A layer is one leaf module, of torch's class, with the dropout as its only child."""
    layer = kind.make(lib, **({} if kind is EMBEDDING else {"lora_dropout": dropout}))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 4))
    leaves = [module for module in model.modules() if not list(module.children())]
    linear = [isinstance(module, nn.Linear) for module in model.modules()]
    return [len(leaves), linear, [name for name, _ in layer.named_children()], isinstance(layer, nn.Embedding)]


@pattern(KINDS)
def called_by_keyword(lib, kind):
    """The argument of forward is called `x`."""
    layer = kind.trained(lib)
    values = [layer(x=kind.x())]
    layer.eval()
    return [*values, layer(x=kind.x())]


@pattern(KINDS)
def deep_copied(lib, kind):
    """copy.deepcopy in both modes."""
    layer, x = kind.trained(lib), kind.x()
    first = copy.deepcopy(layer)
    layer.eval()
    second = copy.deepcopy(layer)
    return [second.merged, second(x), *run(first, x), *run(second, x)]


@pattern(KINDS)
def saved_and_loaded(lib, kind):
    """Pretrained weights loaded with strict=False, then an adapter; both in training, as 0.1.2 needs it."""
    layer, x, base, adapter = kind.make(lib), kind.x(), kind.plain(), kind.trained(lib)
    pretrained = base.state_dict()
    if kind.transposed:
        pretrained["weight"] = pretrained["weight"].T
    missing, unexpected = holder(layer).load_state_dict(pretrained, strict=False)
    values = [sorted(missing), sorted(unexpected), *run(layer, x)]
    layer.train()
    layer.load_state_dict(lib.lora_state_dict(adapter), strict=False)
    return [*values, *run(layer, x)]


# Training, as microsoft's two examples do it.


class Decoder(nn.Module):
    """The shape of their GPT-2: query and value of `c_attn` are adapted, the output layer is the embedding."""

    def __init__(self, lib, width=16, heads=2, layers=2, words=32, places=12):
        super().__init__()
        self.heads, self.words = heads, words
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(places, width)
        options = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "enable_lora": QV, "fan_in_fan_out": True}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "c_attn": lib.MergedLinear(width, 3 * width, merge_weights=False, **options),
                    "c_proj": nn.Linear(width, width),
                    "ln_2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
                }
            )
            for _ in range(layers)
        )
        self.ln_f, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, ids):
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
        for block in self.blocks:
            q, k, v = block["c_attn"](block["ln_1"](x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
                torch.ones(ids.shape[1], ids.shape[1]).triu(1) > 0, -1e4
            )
            mixed = self.drop(scores.softmax(-1)) @ v
            x = x + self.drop(block["c_proj"](mixed.transpose(1, 2).flatten(2)))
            x = x + self.drop(block["mlp"](block["ln_2"](x)))
        return self.ln_f(x) @ self.wte.weight.T


class Encoder(nn.Module):
    """The shape of their RoBERTa: query and value are adapted, and the classifier is trained as well."""

    def __init__(self, lib, width=16, words=32, labels=3):
        super().__init__()
        self.embeddings, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        options = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
        self.query, self.value = lib.Linear(width, width, **options), lib.Linear(width, width, **options)
        self.key, self.dense = nn.Linear(width, width), nn.Linear(width, width)
        self.drop, self.classifier = nn.Dropout(0.1), nn.Linear(width, labels)

    def forward(self, ids):
        x = self.drop(self.norm(self.embeddings(ids)))
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        x = x + self.drop(self.dense(self.drop(scores.softmax(-1)) @ self.value(x)))
        return self.classifier(self.drop(x[:, 0].tanh()))


def smoothed_loss(logits, labels, mask, smoothing=0.1):
    """That of microsoft's NLG example, whose mean is over the labels of a batch."""
    log_probabilities = F.log_softmax(logits.flatten(0, 1), -1)
    nll = -log_probabilities.gather(-1, labels.flatten()[:, None]).squeeze(1)
    loss = (1 - smoothing) * nll - smoothing * log_probabilities.mean(-1)
    return (loss * mask.flatten()).sum() / (mask.sum() + 1e-4)


def fit(lib, model, loss, batches):
    """20 steps of AdamW under a linear schedule with warm-up, and evaluation before, between and after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.01)
    steps, warmup = 20, 5
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else max(0.0, (steps - step) / (steps - warmup))
    )
    losses = []
    for step in range(steps):
        model.train()
        losses.append(loss(batches[step % len(batches)]))
        losses[-1].backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                losses += [loss(batch) for batch in batches]
    # In float64, where rounding cannot show, what a client prints has to be the same text.
    double = losses[0].dtype == torch.float64
    return [f"{value:.4f}" for value in losses] if double else losses


@pattern([torch.float32, torch.float64])
def language_model_trained(lib, dtype):
    """Microsoft's NLG training: label smoothing 0.1, dropout everywhere; the printed losses."""
    model = Decoder(lib).to(dtype)
    lib.mark_only_lora_as_trainable(model)
    batches = torch.randint(0, 32, (4, 8, 10))
    masks = (torch.rand(4, 8, 9) < 0.8).to(dtype)

    def loss(i):
        return smoothed_loss(model(batches[i, :, :-1]), batches[i, :, 1:], masks[i])

    return [trained_names(model), *fit(lib, model, loss, range(4))]


@pattern([torch.float32, torch.float64], ["none", "lora_only"])
def classifier_trained(lib, dtype, bias):
    """Microsoft's NLU training: query, value and the classifier; the printed losses."""
    model = Encoder(lib).to(dtype)
    lib.mark_only_lora_as_trainable(model, bias)
    for parameter in model.classifier.parameters():
        parameter.requires_grad = True
    ids, labels = torch.randint(0, 32, (4, 8, 7)), torch.randint(0, 3, (4, 8))

    def loss(i):
        return F.cross_entropy(model(ids[i]), labels[i])

    return [trained_names(model), *fit(lib, model, loss, range(4)), parameters(model)]


@pytest.mark.parametrize("function, given, exact", PATTERNS)
def test_same_numbers(upstream, function, given, exact):
    """The pattern, run under one seed with 0.1.2 and with this library, returns the same."""
    wanted, got = (under_seed(lib, function, given) for lib in (upstream, lora))
    compare(got, wanted, exact)


# Files of whole models, and names.

PICKLED = [*LINEARS, *MERGED_LINEARS, *CONVS, TRANSPOSED]


def pickled_model(lib, kind):
    """With dropout, since 0.1.2 can pickle no layer without."""
    torch.manual_seed(1)
    return nn.Sequential(kind.trained(lib, lora_dropout=0.1), nn.Tanh())


def write_pickles(folder):
    """What the process of 0.1.2 does; it also writes the names of `from loralib import *`."""
    for kind, mode in itertools.product(PICKLED, (True, False)):
        torch.save(pickled_model(lora, kind).train(mode), Path(folder) / f"{kind}-{mode}.pt")
    names = {}
    exec("from loralib import *", names)
    (Path(folder) / "names.json").write_text(json.dumps(sorted(names.keys() - {"__builtins__"})))


@pytest.fixture(scope="module")
def files_of_upstream(upstream_folder, tmp_path_factory):
    """A folder with what a process with 0.1.2 has pickled."""
    folder = tmp_path_factory.mktemp("pickles")
    code = "import sys, test_clients; test_clients.write_pickles(sys.argv[1]); print(test_clients.lora.__file__)"
    assert Path(under_upstream(upstream_folder, code, folder).strip()).parent.parent == upstream_folder
    return folder


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", PICKLED, ids=str)
def test_pickled_models(upstream, files_of_upstream, kind, mode):
    """A whole model that 0.1.2 wrote, in training or evaluation, loads as one of ours and computes the same."""
    loaded = torch.load(files_of_upstream / f"{kind}-{mode}.pt", weights_only=False)
    assert isinstance(loaded[0], getattr(lora, kind.cls)) and loaded.training == mode and loaded[0].merged != mode
    wanted, x = pickled_model(upstream, kind).train(mode), kind.x()
    compare(dict(loaded.named_parameters()), dict(wanted.named_parameters()))
    for training in (False, True, False):
        loaded.train(training)
        wanted.train(training)
        if not training:  # convolutions drop here, and those of 0.1.2 do not
            compare(loaded(x), wanted(x))
        compare(holder(loaded[0]).weight, holder(wanted[0]).weight)
        assert sorted(loaded.state_dict()) == sorted(map(our_key, wanted.state_dict()))


def test_names_of_a_star_import(files_of_upstream):
    """`from loralib import *` gives every name that it gives on 0.1.2."""
    code = "import json; names = {}; exec('from loralib import *', names); print(json.dumps(list(names)))"
    path = str(Path(lora.__file__).parents[1])
    ours = json.loads(in_own_process(code, PYTHONPATH=path))
    wanted = json.loads((files_of_upstream / "names.json").read_text())
    assert "Linear" in wanted and [name for name in wanted if name not in ours] == []


# What differs on purpose.


def bits(layer):
    return {key: tensor.detach().clone() for key, tensor in holder(layer).named_parameters() if "lora_" not in key}


@each_kind
def test_state_dict_of_a_merged_layer_holds_the_base(kind, monkeypatch):
    """The base beside the adapter, in every mode; one warning in a process says so. 0.1.2 holds the sum."""
    layer = kind.trained(lora)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    monkeypatch.setattr("loralib.core._told", set())
    with pytest.warns(UserWarning, match="holds the base weight, without the update"):
        state = layer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.state_dict()
    compare(state, before, exact=True)
    assert not torch.allclose(layer.weight, state["weight"])


@pytest.mark.parametrize("kind", [*CONVS, TRANSPOSED], ids=str)
def test_keys_of_convolutions(kind):
    """`weight` and `bias`, as in torch, and no module within; 0.1.2 has `conv.weight` and `conv.bias`, which load."""
    layer, x = kind.trained(lora).eval(), kind.x()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"} and not list(layer.children())
    nested = {key if "lora_" in key else f"conv.{key}": value for key, value in kind.trained(lora).state_dict().items()}
    layer.load_state_dict(nested)
    compare(layer(x), layer.train()(x))
    assert torch.equal(layer.weight, nested["conv.weight"])


@each_kind
def test_state_loaded_while_merged(kind):
    """A state dict loaded in evaluation is base and adapter; on 0.1.2 the update would be subtracted from the base."""
    layer, other, x = kind.trained(lora), kind.trained(lora), kind.x()
    layer.eval().load_state_dict(other.state_dict())
    compare(layer(x), other(x))
    compare(bits(layer.train()), bits(other), exact=True)


@pytest.mark.parametrize("kind", CONVS, ids=str)
def test_biases_of_convolutions_train(kind):
    """`bias="lora_only"` trains and saves them; 0.1.2 does not see them one level down."""
    model = nn.Sequential(kind.make(lora))
    lora.mark_only_lora_as_trainable(model, "lora_only")
    assert trained_names(model) == sorted(lora.lora_state_dict(model, "lora_only"))
    assert trained_names(model) == ["0.bias", "0.lora_A", "0.lora_B"]


CHANGES = {
    "mul_": lambda layer: (layer.lora_B.mul_(2), layer.lora_A.add_(1)),
    "data*=": lambda layer: layer.lora_B.data.mul_(2),
    "data.neg_": lambda layer: layer.lora_B.data.neg_(),
    "data=": lambda layer: setattr(layer.lora_A, "data", torch.ones_like(layer.lora_A)),
    "rows_swapped": lambda layer: layer.lora_B.data.copy_(layer.lora_B.data.flip(0)),
    "reset_lora_parameters": lambda layer: layer.reset_lora_parameters(),
    "load_state_dict": lambda layer: layer.load_state_dict({"lora_B": layer.lora_B + 1}, strict=False),
    "Parameter": lambda layer: setattr(layer, "lora_B", nn.Parameter(layer.lora_B + 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@each_kind
def test_adapters_changed_while_merged(kind, change, dtype):
    """What an adapter becomes in evaluation counts at once, and the base stays to the last bit."""
    layer, x = kind.trained(lora).to(dtype), kind.x()
    x = x.to(dtype) if x.is_floating_point() else x
    before = bits(layer)
    layer.eval()
    with torch.no_grad():
        CHANGES[change](layer)
    out = layer(x)
    layer.train()
    compare(bits(layer), before, exact=True)
    compare(out, layer(x))


@pytest.mark.parametrize("kind", [LINEAR_IO, MERGED_IO], ids=str)
def test_transposed_weights_are_contiguous(kind):
    """0.1.2 keeps a view of the other layout."""
    layer = kind.trained(lora)
    assert layer.weight.is_contiguous() and layer.eval().weight.is_contiguous()


@pytest.mark.parametrize("kind", [*CONVS, TRANSPOSED], ids=str)
def test_convolutions_drop(kind):
    """`lora_dropout` acts in training, on the update alone; 0.1.2 forgets it in convolutions."""
    layer, x = kind.trained(lora, lora_dropout=0.5), kind.x()
    assert not torch.equal(layer(x), layer(x))
    with lora.disable_adapters(layer):
        assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("name", ["input", "x"])
@each_kind
def test_input_has_both_names(kind, name):
    """forward's argument is called as in torch and as in 0.1.2."""
    layer, x = kind.trained(lora), kind.x()
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(layer(**{name: x}), layer(x))


WRONG_CALLS = {
    "mark": lambda model: lora.mark_only_lora_as_trainable(model, "lora"),
    "save": lambda model: lora.lora_state_dict(model, "lora"),
    "other sizes": lambda model: setattr(model[1], "conv", nn.Conv2d(4, 6, 5)),
    "no convolution": lambda model: setattr(model[1], "conv", nn.Linear(4, 6)),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_wrong_calls_change_nothing(call):
    """They raise ValueError first; 0.1.2 freezes everything and then raises NotImplementedError."""
    model = nn.Sequential(nn.Linear(5, 5), CONV.trained(lora))
    before, trained = copy.deepcopy(model.state_dict()), trained_names(model)
    with pytest.raises(ValueError, match="bias='lora'|conv=.*own sizes"):
        WRONG_CALLS[call](model)
    compare(model.state_dict(), before, exact=True)
    assert trained_names(model) == trained


@pytest.mark.parametrize(
    "kind, more, error",
    [
        (LINEAR, {"r": -1}, ValueError),
        (EMBEDDING, {"r": 1.5}, TypeError),
        (CONV, {"lora_alpha": float("nan")}, ValueError),
        (LINEAR, {"lora_dropout": 1.5}, ValueError),
        (MERGED, {"enable_lora": [1, 0, 1]}, TypeError),
        (MERGED, {"enable_lora": [True] * 5}, ValueError),
    ],
)
def test_wrong_arguments_draw_nothing(kind, more, error):
    """A constructor raises before it has drawn anything."""
    before = torch.get_rng_state()
    with pytest.raises(error, match=next(iter(more)) if "r" not in more else "r="):
        kind.make(lora, **more)
    assert torch.equal(torch.get_rng_state(), before)
