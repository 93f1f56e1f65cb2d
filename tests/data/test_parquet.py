"""Parquet files: images in every shape, and what labels they have."""

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.beton import BetonReader
from pipeline.data.pack import open_split, pack
from pipeline.data.source import open_source
from pipeline.data.workers import Unreadable
from pipeline.errors import UserError
from tests.data.source_toys import jpeg, read


def test_parquet_images_in_every_shape(tmp_path):
    contents = [jpeg(i) for i in range(150)]
    (tmp_path / "files").mkdir()
    for i, content in enumerate(contents):
        (tmp_path / "files" / f"{i}.jpg").write_bytes(content)
    labels = [f"c{i % 3}" for i in range(150)]
    shapes = {
        "bytes": {"id": range(150), "jpg": contents, "label": labels},
        "struct": {"image": [{"bytes": c, "path": None} for c in contents], "label": labels},
        "struct_path": {"image": [{"bytes": None, "path": f"files/{i}.jpg"} for i in range(150)], "label": labels},
        "path": {"file_name": [f"files/{i}.jpg" for i in range(150)], "label": labels},
        "unnamed": {"text": labels, "blob": contents, "label": labels},
    }
    for name, columns in shapes.items():
        schema = None
        if name == "struct_path":  # pyarrow would take a column of None for one of no type
            image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            schema = pa.schema([("image", image), ("label", pa.string())])
        table = pa.table({k: list(v) for k, v in columns.items()}, schema=schema)
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=64)
        found = read(open_source(str(tmp_path / f"{name}.parquet")))
        assert list(found) == [f"{name}.parquet/{i}" for i in range(150)], name
        assert list(found.values()) == list(zip(labels, contents)), name


@pytest.mark.parametrize("struct", [False, True])
def test_a_file_changes_its_identity_with_the_images_that_it_names(tmp_path, struct):
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    rows: list = ["1.jpg", "gone.jpg"]
    kind = pa.string()
    if struct:
        rows, kind = [{"bytes": None, "path": row} for row in rows], pa.struct({"bytes": pa.binary(), "path": kind})
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
    before = list(open_source(str(tmp_path / "a.parquet")).identity())
    assert list(open_source(str(tmp_path / "a.parquet")).identity()) == before
    (tmp_path / "1.jpg").write_bytes(jpeg(9) + b"more")
    assert list(open_source(str(tmp_path / "a.parquet")).identity()) != before


def test_only_wanted_rows_are_read_and_an_empty_one_is_named(tmp_path):
    images = [{"bytes": jpeg(i), "path": None} for i in range(200)]
    images[70] = None
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=50)
    source = open_source(str(tmp_path / "a.parquet"))
    wanted = [3, 49, 50, 70, 199]
    found = dict(source.payloads(wanted))
    assert list(found) == wanted
    assert found[70] == Unreadable("empty: no image in this row")
    assert all(found[i] == jpeg(i) for i in wanted if i != 70)


def test_hugging_face_names_its_classes_and_parts(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    (tmp_path / "data").mkdir()
    for part, rows in (("train", 6), ("validation", 4)):
        table = pa.table(
            {"image": [{"bytes": jpeg(i), "path": ""} for i in range(rows)], "label": [0, 1] * (rows // 2)}
        )
        path = tmp_path / "data" / f"{part}-00000-of-00001.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), path)
    train, val, note = open_split(str(tmp_path), None, tmp_path / "cache")
    assert (train.images, val.images, note) == (6, 4, "its own validation part")
    assert train.classes == ("ant", "bee")


def test_integer_labels_keep_their_order_and_minus_one_is_none(tmp_path):
    pd.DataFrame({"image": [jpeg(i) for i in range(14)], "label": [*range(12), -1, 3]}).to_parquet(
        tmp_path / "a.parquet"
    )
    packed = pack(str(tmp_path / "a.parquet"), tmp_path / "cache")
    assert BetonReader(packed.path).metadata["label"].tolist() == [*range(12), -1, 3]
    assert packed.classes == tuple(map(str, range(12)))


def test_a_parquet_without_images_is_a_sentence(tmp_path):
    pd.DataFrame({"a": [1], "b": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of images among a, b"):
        read(open_source(str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match=r"b\.parquet: a parquet file that cannot be read"):
        read(open_source(str(tmp_path / "b.parquet")))
