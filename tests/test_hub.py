"""Adapters by the name of a repository on the Hub.

huggingface_hub's download is replaced, since a test has no network; the errors are its own. Run alone:
`pytest tests/test_hub.py`.
"""

import importlib
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn

import loralib as lora


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def adapted():
    model = base()
    lora.inject_lora(model, r=2, target_modules=["0"])
    nn.init.normal_(model[0].lora_B)
    return model


class Hub:
    """What snapshot_download does: copy the files that match, and say where they are."""

    def __init__(self, monkeypatch, source, cache):
        self.source, self.cache, self.calls, self.error = source, cache, [], None
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
        self.calls.append((repo_id, revision))
        if self.error:
            raise self.error
        self.cache.mkdir(exist_ok=True)
        for path in self.source.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, self.cache)
        return str(self.cache)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Hub(monkeypatch, tmp_path / "source", tmp_path / "cache")


@pytest.mark.parametrize("format", ["peft", "diffusers"])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_downloaded_and_loaded(hub, format, revision):
    """Only the files of an adapter are fetched: checkpoints of whole models stay where they are."""
    model, x = adapted(), torch.ones(1, 4)
    lora.save_lora(model, hub.source, format=format)
    (hub.source / "model.safetensors").write_bytes(b"large")
    loaded = base()
    assert lora.load_lora(loaded, "some-user/my.adapter", revision=revision) == ["0"]
    assert hub.calls == [("some-user/my.adapter", revision)]
    assert not (hub.cache / "model.safetensors").exists()
    torch.testing.assert_close(loaded(x), model(x))


def test_what_is_here_comes_first(hub, tmp_path):
    lora.save_lora(adapted(), tmp_path / "user" / "name", format="peft")
    lora.load_lora(base(), "user/name")
    assert not hub.calls
    with pytest.raises(
        ValueError, match=r"revision='v2' is for an adapter on the Hub \('user/name'\), which user/name is"
    ):
        lora.load_lora(base(), "user/name", revision="v2")


@pytest.mark.parametrize(
    "path",
    [
        "none.safetensors",
        "folder/none.safetensors",
        "a/b.bin",
        "/a/b",
        "./a/b",
        "../b",
        "a/b/c",
        "name",
        "a/",
        "a\\b/c",
    ],
)
def test_paths_that_are_no_repository(hub, path):
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        lora.load_lora(base(), path)
    assert not hub.calls


HTTP = importlib.import_module(errors.Response.__module__.partition(".")[0])  # httpx, or its successor
NOT_FOUND = HTTP.Response(404, request=HTTP.Request("GET", "https://huggingface.co/api/models/user/name"))
ERRORS = {
    "no such repository": RepositoryNotFoundError("404 Client Error.\nMore", response=NOT_FOUND),
    "no network": LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known\nAn error happened"),
    "no name of one": HFValidationError("Cannot have -- or .. in repo_id: 'user/name'."),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_what_the_hub_says_is_passed_on(hub, error):
    hub.error, model = error, base()
    with pytest.raises(FileNotFoundError) as raised:
        lora.load_lora(model, "user/name")
    said = str(error).partition("\n")[0]
    assert str(raised.value) == f"user/name: no such file or folder here, and from the Hub: {said}"
    assert raised.value.__cause__ is error and not lora.list_adapters(model)


def test_a_repository_without_an_adapter(hub):
    hub.source.mkdir()
    (hub.source / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="a folder without adapter_config.json holds no adapter"):
        lora.load_lora(base(), "user/name")


def test_without_huggingface_hub(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        FileNotFoundError, match="if it is the name of an adapter on the Hub: pip install huggingface_hub"
    ):
        lora.load_lora(base(), "user/name")


def test_not_imported_before_it_is_needed():
    code = "import sys, loralib; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
