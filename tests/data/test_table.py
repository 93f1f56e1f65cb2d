"""Tables of paths and labels."""

import csv

import pytest

from pipeline.data.pack import pack
from pipeline.data.source import open_source
from pipeline.errors import UserError
from tests.data.source_toys import jpeg, read, write


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nx/1.jpg,cat\nx/2.jpg,dog\n",
        "Label;id;File_Name\ncat;7;x/1.jpg\ndog;8;x/2.jpg\n",
        "x/1.jpg\tcat\r\nx/2.jpg\tdog\r\n",
        '﻿image,class\n"x/1.jpg",cat\n\n"x/2.jpg",dog',
    ],
)
def test_a_table_of_paths_and_labels(tmp_path, text):
    contents = write(tmp_path, ["x/1.jpg", "x/2.jpg"])
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    found = read(open_source(str(tmp_path / "list.csv")))
    assert found == {"x/1.jpg": ("cat", contents["x/1.jpg"]), "x/2.jpg": ("dog", contents["x/2.jpg"])}


def test_a_table_whose_files_are_missing_says_so(tmp_path):
    write(tmp_path, ["1.jpg", "2.jpg"])
    (tmp_path / "list.csv").write_text("path\n1.jpg\n2.jpg\ngone.jpg\n")
    packed = pack(str(tmp_path / "list.csv"), tmp_path / "cache")
    assert (packed.images, packed.classes) == (2, ())
    with packed.rejected.open(newline="") as file:
        assert [*csv.DictReader(file)] == [{"path": "gone.jpg", "reason": "unreadable: No such file or directory"}]
    (tmp_path / "list.csv").write_text("who,what\na,b\n")
    with pytest.raises(UserError, match="no column of paths among who, what"):
        read(open_source(str(tmp_path / "list.csv")))


def test_a_table_changes_its_identity_with_its_files(tmp_path):
    write(tmp_path, ["1.jpg"])
    (tmp_path / "list.csv").write_text("path\n1.jpg\n")
    before = list(open_source(str(tmp_path / "list.csv")).identity())
    (tmp_path / "1.jpg").write_bytes(jpeg(9) + b"more")
    assert list(open_source(str(tmp_path / "list.csv")).identity()) != before
