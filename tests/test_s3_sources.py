"""Sources on a real S3 server."""

import tarfile

from cluster.folders import folder_at
from cluster.ray_runtime import ray_session
from tests.corpora import image_folder
from tests.test_sources import add, class_tar, contents, shard, tars_of


def test_sources_on_s3_are_the_same_whatever_the_network_does(tmp_path, s3, monkeypatch):
    """An image folder, a tar of class tars, and a table with addresses."""
    monkeypatch.setenv("VITFORGE_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "images", classes=3, images=12)
    bucket = s3.bucket()
    there = folder_at(f"{bucket}/pictures", "test")
    for path in folder.rglob("*.JPEG"):
        there.put(path, str(path.relative_to(folder)))
    with tarfile.open(tmp_path / "source.tar", "w") as outer:
        for each in sorted(folder.iterdir()):
            add(outer, f"{each.name}.tar", class_tar(each))
    folder_at(bucket, "test").put(tmp_path / "source.tar", "tars/source.tar")
    lines = [f"{bucket}/pictures/{p.relative_to(folder)},{p.parent.name}" for p in sorted(folder.rglob("*.JPEG"))]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *lines, f"{bucket}/pictures/none.jpg,c1"]) + "\n")
    with ray_session():  # after the settings of the server are there: workers get them from this process
        expected = shard(folder, tmp_path / "expected")
        s3.faults.rates = {"slow_down": 0.1, "reset": 0.05, "short": 0.1}
        assert tars_of(shard(f"{bucket}/pictures", tmp_path / "1")) == tars_of(expected)
        assert tars_of(shard(f"{bucket}/tars/source.tar", tmp_path / "2")) == tars_of(expected)
        third = shard(tmp_path / "table.csv", tmp_path / "3", image_kb=1)
        assert [entry["reason"] for entry in third.quarantined()] == ["there is no such object"]
        assert {image for image, _ in contents(third).values()} == {image for image, _ in contents(expected).values()}
        assert s3.faults.injected.total() > 10
