"""E2E files in both official forms, and the script that downloads them, against a server on loopback.

What must come out of a CSV file is what the same rows say in the line form; on the official files, where they are
there, that is checked row by row. The server is http.server's with answers that are written out as bytes, so that it
can break off, say nothing or lie.
Alone: `pytest tests/test_e2e_data.py` (about ten seconds).
"""

import contextlib
import hashlib
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NLG = ROOT / "examples" / "NLG"
DATA = NLG / "data"
REAL_DATA = ROOT.parent / "shared" / "data" / "e2e"
sys.path[:0] = [str(NLG), str(NLG.parent)]

import download_data  # noqa: E402
from common import cli  # noqa: E402
from common.data import e2e  # noqa: E402

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the official E2E files are not in {REAL_DATA}")


# Reading E2E files

GOOD = "name : A | food : B||A serves B . \n"


def write(folder, content):
    path = folder / "data.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "line, message",
    [
        ("name : A | food : B", "expected one `||` between meaning and reference"),
        ("name : A||one||two", "expected one `||`"),
        ("", "expected one `||`"),
        (" ||A text .", "the meaning is empty"),
        ("name : A|| ", "the reference after `||` is empty"),
        ("name : A | food||A text .", "'food' is no `slot : value`"),
        ("name : A | food : ||A text .", "'food :' is no `slot : value`"),
        ("name : A | : B||A text .", "': B' is no `slot : value`"),
        ("name : A | ||A text .", "'' is no `slot : value`"),
        ("name:A||A text .", "'name:A' is no `slot : value`"),
        (b"name : Caf\xe9||A text .", "not UTF-8"),
    ],
)
def test_malformed_line_is_named_with_file_and_number(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, GOOD.encode() + line + b"\n" + GOOD.encode())
    with pytest.raises(cli.UserError, match=re.escape(message)) as error:
        e2e.read_pairs(path)
    assert str(error.value).startswith(f"{path}, line 2: ")


def test_missing_and_empty_file(tmp_path):
    with pytest.raises(cli.UserError, match="nowhere.txt: no such data file.*--data_dir.*make_data.py"):
        e2e.read_pairs(tmp_path / "nowhere.txt")
    with pytest.raises(cli.UserError, match="data.txt: the file is empty"):
        e2e.read_pairs(write(tmp_path, ""))


def test_bom_crlf_and_characters_inside_a_text(tmp_path):
    odd = "name : Café\u2028Brazil | price : £ 20||A\x85text\x0bfor £ 20 . "  # str.splitlines would split these
    plain = e2e.read_pairs(write(tmp_path, GOOD + odd + "\n"))
    assert plain == [("name : A | food : B", "A serves B ."), tuple(part.strip() for part in odd.split("||"))]
    assert e2e.read_pairs(write(tmp_path, b"\xef\xbb\xbf" + (GOOD + odd).replace("\n", "\r\n").encode())) == plain


def test_references_are_grouped_by_meaning_in_order():
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("b", "1")]
    groups = e2e.group_references(pairs)
    assert groups == {"b": ["1", "3", "1"], "a": ["2"]}
    assert list(groups) == ["b", "a"]


def test_meanings_of_a_file_for_inference(tmp_path):
    path = write(tmp_path, "name : B\nname : A | food : C||ignored .\nname : B||\n")
    assert e2e.read_meanings(path) == ["name : B", "name : A | food : C"]
    with pytest.raises(cli.UserError, match="line 2: 'A text' is no"):
        e2e.read_meanings(write(tmp_path, "name : B\nA text\n"))


def test_slots():
    assert e2e.slots("name : A B | customer rating : 5 : 6|near : C") == [
        ("name", "A B"),
        ("customer rating", "5 : 6"),
        ("near", "C"),
    ]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_shipped_files_read_whole(split):
    pairs = e2e.read_pairs(DATA / f"{split}.txt")
    assert len(pairs) == (DATA / f"{split}.txt").read_bytes().count(b"\n") > 0
    assert sum(map(len, e2e.group_references(pairs).values())) == len(pairs)


@needs_real_data
@pytest.mark.parametrize("split, texts, meanings", [("train", 42061, 4862), ("valid", 4672, 547), ("test", 4693, 630)])
def test_official_files_read_whole(split, texts, meanings):
    pairs = e2e.read_pairs(REAL_DATA / f"{split}.txt")
    assert (len(pairs), len(e2e.group_references(pairs))) == (texts, meanings)


# The CSV form

CSV_GOOD = 'mr,ref\r\n"name[A], food[B]",A serves B.\r\n'
PAIR = ("name : A | food : B", "A serves B .")


def write_csv(folder, content):
    path = folder / "data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "slots, meaning",
    [
        ("name[Blue Spice]", "name : Blue Spice"),
        ("eatType[coffee shop]", "Type : coffee shop"),
        ("priceRange[£20-25]", "price : £ 20 - 25"),
        ("priceRange[less than £20]", "price : less than £ 20"),
        ("customer rating[5 out of 5]", "customer rating : 5 out of 5"),
        ("near[Café Rouge],familyFriendly[no]", "near : Café Rouge | family friendly : no"),
        ("  name[ Blue  Spice ] ,\n area[riverside] ", "name : Blue Spice | area : riverside"),
        ("name[Salt, Pepper]", "name : Salt , Pepper"),  # a comma that separates no slots
        ("view[of the sea]", "view : of the sea"),
    ],
)
def test_slots_of_csv_are_those_of_the_line_form(tmp_path, slots, meaning):
    assert e2e.read_pairs(write_csv(tmp_path, f'mr,ref\n"{slots}",Text\n')) == [(meaning, "Text")]
    e2e.check_meaning(meaning, "here")


@pytest.mark.parametrize(
    "text, tokenised",
    [
        ("It isn't family-friendly.", "It isn 't family - friendly ."),
        ("It's £20-25, cheap; 'The Mill' (a pub)!", "It 's £ 20 - 25 , cheap ; ' The Mill ' ( a pub ) !"),
        ("Prices from £30.99, or £20-£25", "Prices from £ 30.99 , or £ 20- £ 25"),
        ("A fair rating... food .price  5-star,,", "A fair rating ... food .price 5 - star , ,"),
        ("The Punter' is not family -friendly\r\n.", "The Punter ' is not family -friendly ."),
    ],
)
def test_texts_of_csv_are_tokenised_as_the_official_lines(text, tokenised):
    """The expected forms are those of valid.txt and train.txt for the words of devset.csv."""
    assert e2e.tokenise(text) == tokenised


def test_quotes_commas_line_breaks_bom_and_line_ends_of_csv(tmp_path):
    rows = '"mr","ref"\n"name[A], food[B]","A ""great"" place\nserving B."\nname[C],C is "a" pub\n'
    expected = [("name : A | food : B", 'A " great " place serving B .'), ("name : C", 'C is " a " pub')]
    for content in (rows, rows.removesuffix("\n"), rows.replace("\n", "\r\n"), "\ufeff" + rows):
        assert e2e.read_pairs(write_csv(tmp_path, content)) == expected


def test_the_suffix_tells_the_form(tmp_path):
    (tmp_path / "lines.CSV").write_text(CSV_GOOD, encoding="utf-8")
    (tmp_path / "csv").write_text(GOOD, encoding="utf-8")
    assert e2e.read_pairs(tmp_path / "lines.CSV") == e2e.read_pairs(tmp_path / "csv") == [PAIR]


LINE_3 = {
    "one field": ('"name[A]"', "1 fields where `mr,ref` are needed"),
    "unquoted comma": ("name[A],food[B],A serves B.", "3 fields where `mr,ref` are needed.*stands in quotes"),
    "blank line": ("", "0 fields where `mr,ref` are needed"),
    "empty meaning": (",A serves B.", "the meaning is empty.*name.Blue Spice., food"),
    "empty reference": ('name[A]," "', "the reference is empty.*name.Blue Spice., food"),
    "no bracket": ("name,Text", "'name' is no `slot.value.`; slots are separated by `, `"),
    "open bracket": ('"name[A, food[B]",Text', r"'name\[A, food\[B\]' is no `slot.value.`"),
    "no comma": ("name[A] food[B],Text", r"'name\[A\] food\[B\]' is no `slot.value.`"),
    "trailing comma": ('"name[A],",Text', "'' is no `slot.value.`"),
    "empty value": ('"name[A], food[ ]",Text', r"'food\[ \]' is no `slot.value.`"),
    "empty slot": ('"name[A], [B]",Text', r"'\[B\]' is no `slot.value.`"),
    "bracket in value": ("name[A[B]],Text", r"'name\[A\[B\]\]' is no `slot.value.`"),
    "bar in value": ("name[A|B],Text", r"'name\[A\|B\]' is no `slot.value.`"),
    "line form": ("name : A||A text .", "1 fields where"),
    "text after quote": ('"name[A]" ,Text', "broken CSV .*expected after.*each quote in it doubled"),
    "not UTF-8": (b"name[Caf\xe9],Text", "not UTF-8"),
    "NUL": (b"name[A],Te\0xt", "a NUL byte"),
}


@pytest.mark.parametrize("row, message", LINE_3.values(), ids=LINE_3)
def test_malformed_row_is_named_with_file_and_line(tmp_path, row, message):
    row = row if isinstance(row, bytes) else row.encode()
    path = write_csv(tmp_path, CSV_GOOD.encode() + row + b"\r\n" + b"name[C],C\r\n")
    with pytest.raises(cli.UserError, match=message) as error:
        e2e.read_pairs(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


def test_lines_are_physical_ones_and_rows_of_several_name_all(tmp_path):
    two_lines = '"name[A], food[B]","A\nserves B."\n'
    with pytest.raises(cli.UserError, match=r"data\.csv, line 6: 'food' is no"):
        e2e.read_pairs(write_csv(tmp_path, "mr,ref\n" + 2 * two_lines + "food,Text\n"))
    with pytest.raises(cli.UserError, match=r"data\.csv, lines 4 to 5: 3 fields"):
        e2e.read_pairs(write_csv(tmp_path, "mr,ref\n" + two_lines + 'name[A],"A\nB",C\n'))
    with pytest.raises(cli.UserError, match=r"data\.csv, lines 4 to 5: broken CSV \(unexpected end of data\)"):
        e2e.read_pairs(write_csv(tmp_path, "mr,ref\n" + two_lines + 'name[A],"never closed\nname[B],Text\n'))


@pytest.mark.parametrize(
    "header, shown", [("meaning,text", "meaning,text"), ("ref,mr", "ref,mr"), ("name[A],Text", r"name\[A\],Text")]
)
def test_wrong_or_missing_header(tmp_path, header, shown):
    path = write_csv(tmp_path, f"{header}\nname[A],Text\n")
    with pytest.raises(cli.UserError, match=rf"data\.csv, line 1: the header must be `mr,ref`, not `{shown}`"):
        e2e.read_pairs(path)


def test_csv_files_without_rows(tmp_path):
    for content in ("", "\ufeff"):
        with pytest.raises(cli.UserError, match=r"data\.csv: the file is empty; expected the header `mr,ref` and rows"):
            e2e.read_pairs(write_csv(tmp_path, content))
    for read in (e2e.read_pairs, e2e.read_meanings):
        with pytest.raises(cli.UserError, match=r"data\.csv: no row below the header; expected for example: .name"):
            read(write_csv(tmp_path, "mr,ref\n"))


def test_meanings_of_a_csv_file(tmp_path):
    rows = ["mr,ref", "name[B],", "name[A],Text", "name[B],Text"]
    for content in ("\n".join(rows), "MR\nname[B]\nname[A]\nname[B]\n"):
        assert e2e.read_meanings(write_csv(tmp_path, content)) == ["name : B", "name : A"]
    with pytest.raises(cli.UserError, match="line 1: the header must be `mr` or `mr,ref`, not `ref`"):
        e2e.read_meanings(write_csv(tmp_path, "ref\nname[B]\n"))


@needs_real_data
@pytest.mark.parametrize(
    "lines, table, other_references", [("valid.txt", "devset.csv", 1), ("test.txt", "testset_w_refs.csv", 126)]
)
def test_official_files_of_both_forms_say_the_same_row_by_row(lines, table, other_references):
    lines, table = e2e.read_pairs(REAL_DATA / lines), e2e.read_pairs(REAL_DATA / table)
    assert [meaning for meaning, _ in table] == [meaning for meaning, _ in lines]
    differing = [(one, other) for (_, one), (_, other) in zip(lines, table, strict=True) if one != other]
    assert len(differing) == other_references
    for one, other in differing:  # in spaces only
        assert one.replace(" ", "") == other.replace(" ", "")


@needs_real_data
def test_official_training_texts_are_tokenised_alike():
    """Words joined again at their apostrophes are taken apart at the same places; all but 64 of 42,061 texts."""
    texts = [text for _, text in e2e.read_pairs(REAL_DATA / "train.txt")]
    assert sum(e2e.tokenise(re.sub(r" '(?=\w)", "'", text)) != text for text in texts) == 64


# Finding the files

SPLITS = ("train", "valid", "test")
LINE_NAMES, CSV_NAMES = (list(e2e.OFFICIAL_NAMES[form].values()) for form in ("lines", "csv"))


def make_files(folder, *names):
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    "there, found",
    [
        (LINE_NAMES, LINE_NAMES),
        (CSV_NAMES, CSV_NAMES),
        (LINE_NAMES + CSV_NAMES, LINE_NAMES),
        (LINE_NAMES[:2] + CSV_NAMES, CSV_NAMES),
    ],
    ids=["lines", "CSV", "both", "lines incomplete"],
)
def test_files_are_found_by_their_official_names(tmp_path, there, found):
    make_files(tmp_path, *there)
    assert e2e.find_files(tmp_path) == {split: tmp_path / name for split, name in zip(SPLITS, found, strict=True)}


def test_named_files_go_before_the_official_ones(tmp_path):
    make_files(tmp_path, "trainset.csv", "testset_w_refs.csv")
    found = e2e.find_files(str(tmp_path), {"train": None, "valid": "my.txt", "test": None})
    assert {split: path.name for split, path in found.items()} == {
        "train": "trainset.csv",
        "valid": "my.txt",
        "test": "testset_w_refs.csv",
    }
    assert e2e.find_files(tmp_path, {"test": None}) == {"test": tmp_path / "testset_w_refs.csv"}
    assert e2e.find_files(tmp_path, dict.fromkeys(SPLITS, "x.csv")) == dict.fromkeys(SPLITS, tmp_path / "x.csv")


def test_missing_files_are_named_with_what_is_accepted(tmp_path):
    make_files(tmp_path, "train.txt", "valid.txt", "devset.csv")
    with pytest.raises(cli.UserError) as error:
        e2e.find_files(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: needed are train.txt, valid.txt, test.txt or trainset.csv, devset.csv, testset_w_refs.csv; "
        "missing: test.txt, trainset.csv, testset_w_refs.csv. examples/NLG/download_data.py gets the official files; "
        "files of other names are named one by one (--train_file, --valid_file, --test_file)"
    )
    with pytest.raises(cli.UserError, match=r"needed are test\.txt or testset_w_refs\.csv; missing: .*--test_file\)"):
        e2e.find_files(tmp_path, {"train": "x.txt", "test": None})
    with pytest.raises(cli.UserError, match="nowhere: no such folder of E2E files; check --data_dir"):
        e2e.find_files(tmp_path / "nowhere")


# Downloading


class Answers(http.server.BaseHTTPRequestHandler):
    """Writes the bytes that the test has put into server.answers[path], or calls what it has put there."""

    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path)
        if answer is None:
            self.send_error(404)
        elif callable(answer):
            answer(self.wfile)
        else:
            self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.answers, server.asked = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ok(body, *headers):
    lines = ["HTTP/1.1 200 OK", *(headers or [f"Content-Length: {len(body)}"]), "", ""]
    return "\r\n".join(lines).encode() + body


FILES = {
    "train.txt": GOOD.encode() * 20000,  # more than one block
    "valid.txt": GOOD.encode() * 2,
    "test.txt": GOOD.encode(),
    "trainset.csv": CSV_GOOD.encode(),
    "devset.csv": CSV_GOOD.encode() + b"name[C],C\r\n",
    "testset_w_refs.csv": CSV_GOOD.encode(),
}


@pytest.fixture
def mirror(server, monkeypatch):
    """A server of small files that stand for the official ones, and their SHA-256 for those."""
    for name, body in FILES.items():
        server.answers[f"/e2e/{name}"] = ok(body)
        if name in download_data.SHA256:
            monkeypatch.setitem(download_data.SHA256, name, hashlib.sha256(body).hexdigest())
    return server


def fetch_all(server, folder, **knobs):
    download_data.download_files(download_data.Knobs(url=f"{server.url}/e2e", output_dir=str(folder), **knobs))


def content(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parametrize("form, names", [("lines", LINE_NAMES), ("csv", CSV_NAMES)])
def test_the_files_arrive_whole(mirror, tmp_path, capsys, form, names):
    folder = tmp_path / "new" / "folder"
    fetch_all(mirror, folder, form=form)
    assert content(folder) == {name: FILES[name] for name in names}
    assert e2e.find_files(folder) == {split: folder / name for split, name in zip(SPLITS, names, strict=True)}
    out, err = capsys.readouterr()
    assert f"written {folder / 'test.txt'}: 1 texts of 1 meanings\n" in out or form == "csv"
    assert f"written {folder / 'devset.csv'}: 2 texts of 2 meanings\n" in out or form == "lines"
    assert re.search(rf"{names[0]}: 100%", err)
    unknown = re.findall(r"written (\S+): .*its official SHA-256 is not known here", out)
    assert unknown == ([str(folder / "trainset.csv")] if form == "csv" else [])


def test_a_trailing_slash_and_a_redirection_are_followed(mirror, tmp_path):
    moved = b"HTTP/1.1 302 Found\r\nLocation: /e2e/test.txt\r\nContent-Length: 0\r\n\r\n"
    mirror.answers.update({f"/moved/{name}": moved for name in LINE_NAMES})
    for name in LINE_NAMES:
        download_data.SHA256[name] = download_data.SHA256["test.txt"]  # the fixture puts them back
    knobs = download_data.Knobs(url=f"{mirror.url}/moved/", output_dir=str(tmp_path))
    download_data.download_files(knobs)
    assert content(tmp_path) == dict.fromkeys(LINE_NAMES, FILES["test.txt"])


def test_files_that_are_there_are_kept_unless_forced(mirror, tmp_path, capsys):
    fetch_all(mirror, tmp_path)
    (tmp_path / "valid.txt").write_bytes(b"mine")
    mirror.asked.clear()
    capsys.readouterr()
    fetch_all(mirror, tmp_path)
    assert mirror.asked == []
    assert content(tmp_path)["valid.txt"] == b"mine"
    assert capsys.readouterr().out.splitlines() == [
        f"kept {tmp_path / 'train.txt'}",
        f"kept {tmp_path / 'valid.txt'}, which is not the official file; --force replaces it",
        f"kept {tmp_path / 'test.txt'}",
    ]
    fetch_all(mirror, tmp_path, force=True)
    assert content(tmp_path) == {name: FILES[name] for name in LINE_NAMES}


def reset(wfile):
    """End without a word."""


BODY = FILES["valid.txt"]
CHUNKED = "Transfer-Encoding: chunked"
BAD_ANSWERS = {
    "not there": (None, "the server answered 404 Not Found; name another address with --url"),
    "server error": (b"HTTP/1.1 503 Busy\r\n\r\n", "the server answered 503 Busy"),
    "truncated": (ok(BODY[:-9], f"Content-Length: {len(BODY)}"), "cut off after 61 of 70 bytes; run the command again"),
    "truncated to nothing": (ok(b"", "Content-Length: 70"), "cut off after 0 of 70 bytes"),
    "chunk truncated": (ok(b"40\r\n" + BODY[:9], CHUNKED), r"nothing came or not all of it \(IncompleteRead"),
    "end of chunks missing": (ok(b"46\r\n" + BODY + b"\r\n", CHUNKED), r"not all of it \(IncompleteRead"),
    "no length": (ok(BODY, "Connection: close"), "does not tell the length, so a cut would go unnoticed"),
    "web page": (ok(b"\n <!DOCTYPE html><title>Log in"), "a web page came instead of data"),
    "other text": (ok(b"404: Not Found"), r"no E2E file: valid\.txt, line 1: expected one `\|\|`"),
    "malformed line": (ok(BODY + b"name\n"), r"no E2E file: valid\.txt, line 3: expected one `\|\|`"),
    "not UTF-8": (ok(b"name : Caf\xe9||A"), r"no E2E file: valid\.txt, line 1: not UTF-8"),
    "empty": (ok(b""), r"no E2E file: valid\.txt: the file is empty"),
    "other data": (ok(BODY + GOOD.encode()), r"not the official valid\.txt: SHA-256 \w{64} instead of \w{64}; name"),
    "connection closed": (reset, r"nothing came or not all of it \(RemoteDisconnected.*HTTPS_PROXY.*--url.*by hand"),
    "not HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", r"nothing came or not all of it \(BadStatusLine"),
}


@pytest.mark.parametrize("answer, message", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_nothing_is_put_in_place_by_a_bad_answer_and_the_next_run_goes_on(mirror, tmp_path, answer, message):
    good = mirror.answers["/e2e/valid.txt"]
    mirror.answers["/e2e/valid.txt"] = answer
    with pytest.raises(cli.UserError, match=message) as error:
        fetch_all(mirror, tmp_path)
    assert str(error.value).startswith(f"{mirror.url}/e2e/valid.txt: ")
    assert content(tmp_path) == {"train.txt": FILES["train.txt"]}

    (tmp_path / "valid.txt").write_bytes(b"earlier")
    with pytest.raises(cli.UserError, match=message):
        fetch_all(mirror, tmp_path, force=True)
    assert content(tmp_path) == {"train.txt": FILES["train.txt"], "valid.txt": b"earlier"}

    (tmp_path / "valid.txt").unlink()
    mirror.answers["/e2e/valid.txt"] = good
    mirror.asked.clear()
    fetch_all(mirror, tmp_path)
    assert mirror.asked == ["/e2e/valid.txt", "/e2e/test.txt"]
    assert content(tmp_path) == {name: FILES[name] for name in LINE_NAMES}


@contextlib.contextmanager
def stalled(server, path, start):
    """The server sends `start` for a path, sets the event that this gives, and then waits until the block ends."""
    sent, leave = threading.Event(), threading.Event()

    def answer(wfile):
        wfile.write(start)
        wfile.flush()
        sent.set()
        leave.wait()

    server.answers[path] = answer
    try:
        yield sent
    finally:
        leave.set()


def test_silence_ends(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(download_data, "TIMEOUT", 0.2)
    for start in (b"", ok(BODY[:9], "Content-Length: 70")):
        with (
            stalled(mirror, "/e2e/train.txt", start),
            pytest.raises(cli.UserError, match=r"nothing came or not all of it \(TimeoutError\('timed out'\)\)"),
        ):
            fetch_all(mirror, tmp_path)
    assert content(tmp_path) == {}


def test_knobs_are_checked_before_anything_is_made(tmp_path):
    folder = tmp_path / "folder"
    for knobs, message in (
        ({"form": "xml"}, "--form xml: must be lines or csv"),
        ({"url": "ftp://127.0.0.1/e2e"}, "--url ftp://127.0.0.1/e2e: must begin with http:// or https://"),
    ):
        with pytest.raises(cli.UserError, match=message):
            download_data.download_files(download_data.Knobs(output_dir=str(folder), **knobs))
    assert not folder.exists()


def test_a_folder_that_cannot_be_written(mirror, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cli.UserError, match="File exists: .*file"):
        fetch_all(mirror, tmp_path / "file")
    assert mirror.asked == []
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(cli.UserError, match="Is a directory: .*train.txt"):
        fetch_all(mirror, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file", "train.txt"]


def test_files_can_be_read_by_whom_the_umask_lets(mirror, tmp_path):
    fetch_all(mirror, tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "train.txt").stat().st_mode == plain.stat().st_mode


def start(*arguments):
    # A process that the shell started in the background ignores Ctrl-C, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "download_data.py", *map(str, arguments)],
            cwd=NLG,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_whole_files_only(mirror, tmp_path):
    half = ok(FILES["devset.csv"][:20], f"Content-Length: {len(FILES['devset.csv'])}")
    with (
        stalled(mirror, "/e2e/devset.csv", half) as sent,
        start("--form", "csv", "--url", f"{mirror.url}/e2e", "--output_dir", tmp_path) as process,
    ):
        assert sent.wait(60), process.stderr.read()
        seen = ""
        while "devset.csv:   0%" not in seen:
            piece = process.stderr.read(1)
            assert piece, seen
            seen += piece
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("\ninterrupted; no file was left half-written\n")
    assert "Traceback" not in stderr
    assert content(tmp_path) == {"trainset.csv": FILES["trainset.csv"]}


def test_without_network_the_script_says_so_and_ends_with_status_2(tmp_path):
    with socket.socket() as taken:  # a port where nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with start("--url", url, "--output_dir", tmp_path) as process:
            stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    refused = re.escape(f"error: {url}/train.txt: nothing came or not all of it (ConnectionRefusedError(")
    advice = (
        r"Check the address, the network and the proxy \(HTTPS_PROXY\), name a mirror with --url, or copy .* by hand"
    )
    assert re.fullmatch(rf"{refused}.*\)\)\. {advice}\n", stderr)
    assert content(tmp_path) == {}


@needs_real_data
def test_the_official_files_have_the_known_sha256(server, tmp_path):
    """The script as it is, with the files that a mirror would have."""
    for name in LINE_NAMES:
        server.answers[f"/{name}"] = ok((REAL_DATA / name).read_bytes())
    with start("--url", server.url, "--output_dir", tmp_path) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"written {tmp_path / 'train.txt'}: 42,061 texts of 4,862 meanings\n" in stdout
    assert content(tmp_path) == {name: (REAL_DATA / name).read_bytes() for name in LINE_NAMES}
    assert all(download_data.is_official(REAL_DATA / name) for name in CSV_NAMES[1:])
    assert set(download_data.SHA256) == {*LINE_NAMES, *CSV_NAMES[1:]}


def test_every_knob_is_an_option():
    arguments = ["--form", "csv", "--output_dir", "o", "--url", "u", "--force"]
    expected = download_data.Knobs(form="csv", output_dir="o", url="u", force=True)
    assert cli.parse_knobs(download_data.Knobs, download_data.__doc__, arguments) == expected


def test_a_meaning_may_be_given_in_either_form(tmp_path):
    """In that of the CSV files its marks are set apart, as in what a model has learnt from."""
    assert e2e.read_meaning("name[Ann's], priceRange[£20-25]", "here") == "name : Ann 's | price : £ 20 - 25"
    assert e2e.read_meaning(" name : Ann 's | food : Soup ", "here") == "name : Ann 's | food : Soup"
    assert e2e.read_meaning("name : The [Old] Inn | food : Soup", "here") == "name : The [Old] Inn | food : Soup"
    assert e2e.read_meaning("name[The : Inn], food[Soup]", "here") == "name : The : Inn | food : Soup"
    (tmp_path / "in.txt").write_text("name[Ann's], food[Soup]\nname : Ann 's | food : Soup\n", encoding="utf-8")
    assert e2e.read_meanings(tmp_path / "in.txt") == ["name : Ann 's | food : Soup"]
    assert e2e.written_together(["name : Ann's | food : Soup", "name : Ann 's"]) == ["Ann's"]
