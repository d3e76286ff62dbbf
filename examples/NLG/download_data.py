"""Download the official E2E files for run_training.py.

    cd examples/NLG
    python download_data.py
    python download_data.py --form csv --output_dir output/e2e_csv
    python download_data.py --url http://mirror.example/e2e

Fetches train.txt, valid.txt and test.txt (12 MB), as microsoft/LoRA uses them, or the E2E challenge's own trainset.csv,
devset.csv and testset_w_refs.csv. Then `python run_training.py --data_dir output/e2e` trains on them.

A file appears under its name when it is whole, reads as E2E data and has the known SHA-256. What is there already is
kept, so that after a failure the same command goes on with the file that is missing. The data are distributed under
CC BY-SA 4.0 (Novikova et al. 2017).
"""

import http.client
import os
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for the package common
from common.cli import UserError, as_user_error, knob, parse_knobs, run
from common.data import e2e
from common.files import sha256

HERE = Path(__file__).resolve().parent
TIMEOUT = 30  # seconds without a byte
ADDRESSES = {
    "lines": "https://raw.githubusercontent.com/microsoft/LoRA/main/examples/NLG/data/e2e",
    "csv": "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master",
}
SHA256 = {  # of the official files; that of trainset.csv is not known here
    "train.txt": "eae319082237310913d9f37f6a891d48fb3f821f29d86870d2cb4f92ddd72c5a",
    "valid.txt": "ba963113c8401d3d26216c0dc0a6dae1ea6ea927de3bf830e32c41f65401c80d",
    "test.txt": "81b1bcd40c4f12845ec4eb61a77bf43765d112483cd9b2f91ef10bfc1b3d8f13",
    "devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    "testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}


@dataclass
class Knobs:
    form: str = knob("lines", "lines for meaning||reference files as the paper's code has them, csv for the raw ones")
    output_dir: str = knob(str(HERE / "output" / "e2e"), "folder for the three files")
    url: str | None = knob(None, "address of a folder with the same files, instead of the official one on GitHub")
    force: bool = knob(False, "download again what is there already")


def download(url, path):
    """Put the E2E file at an address into its place, whole and checked or not at all; return its pairs."""
    content = fetch(url)
    # A folder rather than a name of its own: the suffix tells the form.
    with as_user_error(OSError), tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(content)
        try:
            pairs = e2e.read_pairs(partial)
        except UserError as error:
            raise UserError(f"{url}: no E2E file: {str(error).replace(str(partial), path.name)}") from error
        if not is_official(partial):
            raise UserError(
                f"{url}: not the official {path.name}: SHA-256 {sha256(partial)} instead of "
                f"{SHA256[path.name]}; name another address with --url"
            )
        os.replace(partial, path)
    return pairs


def fetch(url):
    """The bytes at an address, all of them."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            length = response.length
            if length is None and not response.chunked:
                raise UserError(f"{url}: the server does not tell the length, so a cut would go unnoticed; use another")
            content = receive(response, length, url.rsplit("/", 1)[1])
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(
            f"{url}: the server answered {error.code} {error.reason}; name another address with --url"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url}: nothing came or not all of it ({reason!r}). Check the address, the network and the proxy "
            "(HTTPS_PROXY), name a mirror with --url, or copy the files to --output_dir by hand"
        ) from error
    if length is not None and len(content) < length:
        raise UserError(f"{url}: cut off after {len(content):,} of {length:,} bytes; run the command again")
    if content.lstrip().startswith(b"<"):
        raise UserError(f"{url}: a web page came instead of data, as from a login page or proxy; check --url")
    return content


def receive(response, length, name):
    content = bytearray()
    with tqdm(total=length, desc=name, unit="B", unit_scale=True) as bar:
        while block := response.read(1 << 16):
            content += block
            bar.update(len(block))
    return bytes(content)


def is_official(path):
    """Whether a file has the SHA-256 of the official file of its name, as far as that is known."""
    return path.name not in SHA256 or sha256(path) == SHA256[path.name]


def download_files(knobs):
    """Download those of the three files that are not there yet, or with --force all."""
    if knobs.form not in ADDRESSES:
        raise UserError(f"--form {knobs.form}: must be {' or '.join(ADDRESSES)}")
    address = (knobs.url or ADDRESSES[knobs.form]).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--url {knobs.url}: must begin with http:// or https://")
    folder = Path(knobs.output_dir)
    with as_user_error(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    for name in e2e.OFFICIAL_NAMES[knobs.form].values():
        path = folder / name
        if path.is_file() and not knobs.force:
            note = "" if is_official(path) else ", which is not the official file; --force replaces it"
            print(f"kept {path}{note}")
            continue
        pairs = download(f"{address}/{name}", path)
        note = "" if name in SHA256 else "; its official SHA-256 is not known here, so it was not compared"
        print(f"written {path}: {len(pairs):,} texts of {len(e2e.group_references(pairs)):,} meanings{note}")


def main():
    download_files(parse_knobs(Knobs, __doc__))


if __name__ == "__main__":
    run(main)
