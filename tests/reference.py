"""Literal dense formulas in float64 and the table of layer cases, shared by the test files.

The formulas use nothing of loralib: they rebuild W + scaling * B A from the parameters a layer stores, entry by entry
where the layout matters, and hand it to the plain torch layer. `CASES` holds every layer kind with the arguments that
change its arithmetic; a property is then one test over the table.
"""

import copy
import math
import os
from dataclasses import dataclass, field

import hypothesis
import pytest
import torch
from torch import Tensor, nn

import loralib as lora

R, ALPHA = 3, 5


@dataclass(frozen=True)
class Case:
    """A layer kind with its arguments: `lora` goes to the LoRA layer alone, `base` to the plain torch layer as well."""

    kind: str
    args: tuple
    shape: tuple  # of the input; for an embedding, of the index tensor
    lora: dict = field(default_factory=dict)
    base: dict = field(default_factory=dict)

    def __str__(self) -> str:
        extra = {**self.lora, **self.base}
        return "-".join([self.kind, str(self.args), *(f"{k}={v}" for k, v in extra.items())]).replace(" ", "")

    @property
    def is_embedding(self) -> bool:
        return self.kind == "Embedding"

    @property
    def transposed(self) -> bool:
        return self.lora.get("fan_in_fan_out", False)

    def fresh(self, dtype=torch.float32, **more) -> nn.Module:
        """The LoRA layer as its constructor leaves it."""
        options = {"r": R, "lora_alpha": ALPHA, **self.lora, **self.base, **more}
        return getattr(lora, self.kind)(*self.args, **options).to(dtype)

    def layer(self, dtype=torch.float32, **more) -> nn.Module:
        """The LoRA layer with a non-zero update, as after some training."""
        return randomize(self.fresh(dtype, **more))

    def plain(self, dtype=torch.float64) -> nn.Module:
        return PLAIN[self.kind](*self.args, **self.base).to(dtype)

    def inputs(self, dtype=torch.float32) -> Tensor:
        if self.is_embedding:
            # Repeated rows, and the padding row, in every batch.
            index = torch.randint(0, self.args[0], self.shape)
            index[0, :3] = torch.tensor([1, 1, 2])
            return index
        x = torch.randn(self.shape, dtype=torch.float64).to(dtype)
        if dtype == torch.float16 and "padding_mode" in self.base:
            try:
                nn.functional.pad(x, (1, 1) * int(self.kind[-2]), mode=self.base["padding_mode"])
            except RuntimeError as error:
                pytest.skip(f"this torch does not pad halves on a CPU: {error}")
        return x


PLAIN = {
    "Linear": nn.Linear,
    "MergedLinear": nn.Linear,
    "Embedding": nn.Embedding,
    "Conv1d": nn.Conv1d,
    "Conv2d": nn.Conv2d,
    "Conv3d": nn.Conv3d,
}

IO, QV = {"fan_in_fan_out": True}, [True, False, True]

LINEAR = [
    Case("Linear", (5, 7), (4, 5)),
    Case("Linear", (5, 7), (2, 3, 5), base={"bias": False}),
    Case("Linear", (5, 7), (2, 3, 5), lora=IO),
    Case("Linear", (5, 7), (4, 5), lora=IO, base={"bias": False}),
]
MERGED = [
    Case("MergedLinear", (5, 12), (2, 3, 5), lora={"enable_lora": QV}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": QV, **IO}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": [False, True]}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": [True] * 3}, base={"bias": False}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": [True]}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": [False, True, True, False], **IO}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": QV, "group_sizes": [8, 2, 2]}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": QV, "interleave": 2}),
    Case("MergedLinear", (5, 12), (2, 3, 5), lora={"enable_lora": QV, "group_sizes": [8, 2, 2], "interleave": 2, **IO}),
]
NOTHING_ENABLED = [
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": [False] * 3}),
    Case("MergedLinear", (5, 12), (4, 5), lora={"enable_lora": [False], **IO}),
]
EMBEDDING = [
    Case("Embedding", (9, 4), (2, 6)),
    Case("Embedding", (9, 4), (2, 6), base={"padding_idx": 2}),
    Case("Embedding", (9, 4), (2, 6), base={"max_norm": 1.0}),
    Case("Embedding", (9, 4), (2, 6), base={"max_norm": 1.5, "norm_type": 1.0, "padding_idx": 2}),
    Case("Embedding", (9, 4), (2, 6), base={"scale_grad_by_freq": True}),
    Case("Embedding", (9, 4), (2, 6), base={"sparse": True}),
]
CONV = [
    Case("Conv1d", (4, 6, 1), (2, 4, 8)),
    Case("Conv1d", (4, 6, 3), (2, 4, 8), base={"padding": 1, "bias": False}),
    Case("Conv1d", (4, 6, 3), (2, 4, 9), base={"stride": 2, "dilation": 2, "groups": 2}),
    Case("Conv1d", (4, 6, 4), (2, 4, 8), base={"padding": "same", "padding_mode": "reflect"}),
    Case("Conv1d", (4, 4, 3), (4, 8), base={"padding": 2, "padding_mode": "circular", "groups": 4}),
    Case("Conv2d", (4, 6, 1), (2, 4, 5, 5)),
    Case("Conv2d", (4, 6, 3), (2, 4, 5, 5), base={"padding": 1}),
    Case("Conv2d", (4, 6, (3, 2)), (2, 4, 6, 5), base={"stride": (2, 1), "dilation": (1, 2)}),
    Case("Conv2d", (4, 6, (1, 3)), (2, 4, 5, 5), base={"groups": 2, "bias": False}),
    Case("Conv2d", (4, 6, 3), (2, 4, 5, 5), base={"padding": 1, "padding_mode": "replicate", "stride": 2}),
    Case("Conv2d", (4, 6, 3), (4, 5, 5), base={"padding": (1, 2), "padding_mode": "reflect"}),
    Case("Conv2d", (4, 8, 3), (2, 4, 5, 5), base={"padding": 1, "padding_mode": "circular", "groups": 4}),
    Case("Conv3d", (4, 6, 2), (2, 4, 4, 4, 4)),
    Case("Conv3d", (4, 6, (2, 1, 3)), (2, 4, 4, 4, 4), base={"padding": (1, 0, 1), "padding_mode": "replicate"}),
    Case("Conv3d", (4, 6, (1, 2, 2)), (2, 4, 4, 5, 5), base={"groups": 2, "stride": 2, "bias": False}),
]
CASES = LINEAR + MERGED + EMBEDDING + CONV
# One of each kind, for what depends on the kind alone.
KINDS = [LINEAR[0], LINEAR[2], MERGED[0], EMBEDDING[1], CONV[1], CONV[7], CONV[13]]


def randomize(layer: nn.Module, scale: float = 0.5) -> nn.Module:
    """Give A and B random values; the column of a padding index stays zero, as training leaves it."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.rpartition(".")[2] in ("lora_A", "lora_B"):
                parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float64))
        if getattr(layer, "padding_idx", None) is not None and layer.r > 0:
            layer.lora_A[:, layer.padding_idx] = 0
    return layer


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    """What the layer stores, as float64 copies."""
    return {name: value.detach().double().clone() for name, value in layer.state_dict().items()}


def delta(case: Case, shape: torch.Size, A: Tensor, B: Tensor) -> Tensor:
    """B A in the layout of a weight of that shape, written out; A and B in float64."""
    if case.kind == "MergedLinear":
        enabled, (inputs, outputs), r = case.lora["enable_lora"], case.args, B.shape[1]
        turns = case.lora.get("interleave", 1)
        sizes = case.lora.get("group_sizes", [outputs // len(enabled)] * len(enabled))
        result = A.new_zeros(outputs, inputs)
        row, taken = 0, [0] * len(enabled)
        # Row by row of the output: the turn it is in, the group, and the how-many-th row of that group.
        for _turn in range(turns):
            for group, size in enumerate(sizes):
                for _ in range(size // turns):
                    if enabled[group]:
                        j = sum(enabled[:group])
                        first = sum(s for s, on in zip(sizes[:group], enabled[:group], strict=True) if on)
                        result[row] = B[first + taken[group]] @ A[j * r : (j + 1) * r]
                    taken[group] += 1
                    row += 1
    else:
        result = torch.einsum("or,ri->oi", B, A)
    if case.is_embedding or case.transposed:
        return result.T
    return result.reshape(shape)


def dense_weight(case: Case, state: dict[str, Tensor], scaling: float) -> Tensor:
    """W + scaling * B A; for an embedding with `max_norm`, with the rows of W bounded first."""
    weight = state["weight"]
    if case.base.get("max_norm") is not None:
        weight = torch.renorm(weight, case.base.get("norm_type", 2.0), 0, case.base["max_norm"])
    if "lora_A" not in state:
        return weight
    return weight + scaling * delta(case, weight.shape, state["lora_A"], state["lora_B"])


def dense_forward(case: Case, state: dict[str, Tensor], scaling: float, x: Tensor) -> Tensor:
    """The plain torch layer's output with the dense weight; float64 in and out."""
    weight = dense_weight(case, state, scaling)
    plain = PLAIN[case.kind](*case.args, **{k: v for k, v in case.base.items() if k not in ("max_norm", "sparse")})
    given = {"weight": weight.T if case.transposed else weight}
    if "bias" in state:
        given["bias"] = state["bias"]
    return torch.func.functional_call(plain.double(), given, (x.double() if x.is_floating_point() else x,))


def expected(case: Case, layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer has to return for x, from what it stores, in float64."""
    return dense_forward(case, tensors(layer), layer.scaling, x)


# Bounds on the difference from the float64 result, for values of the order of one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float16: 0.02}


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    bound = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(actual.detach().double(), wanted.detach().double(), rtol=bound, atol=bound)


def assert_same_bits(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state dict."""
    return {name: copy.deepcopy(value.detach()) for name, value in module.state_dict().items()}


def assert_laws(case: Case, layer: nn.Module, base: Tensor, x: Tensor | None = None) -> None:
    """Law 1 (output) and law 2 (stored weight) for a layer whose base weight has to be `base`."""
    if case.base.get("max_norm") is None:  # torch itself bounds the rows of such a table in place
        assert torch.equal(layer.state_dict()["weight"], base)
    x = case.inputs(base.dtype) if x is None else x
    wanted = expected(case, layer, x)
    with torch.no_grad():  # first, because a forward with gradients forgets the merged weight
        assert_close(layer(x), wanted)
    assert_close(layer(x), wanted)


def kaiming_bound(fan_in: int) -> float:
    """The largest value `nn.Linear` draws for its weight."""
    return 1 / math.sqrt(fan_in)


def examples(number: int, **options) -> hypothesis.settings:
    """So many random cases for a test, times the environment's LORALIB_CASES."""
    return hypothesis.settings(max_examples=number * int(os.environ.get("LORALIB_CASES", "1")), **options)
