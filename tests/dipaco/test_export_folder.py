from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.schema import LevelConfig, TopologyConfig
from dipaco.ending import Refused
from dipaco.export_folder import MANIFEST, Manifest, read_manifest, whole_folder

LEVELS = [LevelConfig(modules=2, blocks=[0], embedding=True, head=True)]


def manifest(run: str) -> str:
    return Manifest(
        dipaco_export=1,
        run=run,
        format="hf",
        version="last",
        topology=TopologyConfig(levels=LEVELS),
        sequence_length=64,
        prefix_tokens=8,
        router=None,
        paths={},
    ).model_dump_json()


def fill(out: Path, run: str, *, overwrite: bool = False) -> None:
    with whole_folder(out, overwrite=overwrite) as folder:
        (folder / MANIFEST).write_text(manifest(run), encoding="utf-8")


def test_it_appears_whole_with_the_usual_rights_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "out", overwrite=False) as folder:
        (folder / "file").write_text("x", encoding="utf-8")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == plain.stat().st_mode


def test_after_an_error_nothing_is_there_and_the_former_export_stays(tmp_path: Path) -> None:
    def interrupted(out: Path, overwrite: bool) -> None:
        with whole_folder(out, overwrite=overwrite) as folder:
            (folder / "half").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "out", "first")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    kept = read_manifest(tmp_path / "out")
    assert kept is not None
    assert kept.run == "first"


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=["refused", "interrupted"])
@pytest.mark.parametrize("broken", [1, 2])
def test_the_former_export_stays_where_a_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, broken: int
) -> None:
    out, renames, rename = tmp_path / "out", [0], os.rename
    fill(out, "first")

    def breaks(source: Path, target: Path) -> None:
        renames[0] += 1
        if renames[0] == broken:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", breaks)
    with pytest.raises(type(error)):
        fill(out, "second", overwrite=True)
    assert (kept := read_manifest(out)) is not None
    assert kept.run == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_where_nothing_can_be_put_back_both_exports_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", os.rename
    fill(out, "first")

    def breaks(source: Path, target: Path) -> None:
        if target == out:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", breaks)
    with pytest.raises(Refused, match="nor put back: the former export is") as told:
        fill(out, "second", overwrite=True)
    (hidden,) = tmp_path.iterdir()
    assert str(hidden / "replaced") in str(told.value)
    found = [read_manifest(hidden / name) for name in ("replaced", "made")]
    assert [each.run for each in found if each is not None] == ["first", "second"]


def test_only_an_export_is_replaced_and_only_where_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "first")
    with pytest.raises(Refused, match="exists and is not empty; name another OUT, or give --overwrite"):
        fill(out, "second")
    fill(out, "second", overwrite=True)
    assert (found := read_manifest(out)) is not None
    assert found.run == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    fill(mine, "into an empty folder")
    (mine / MANIFEST).unlink()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(Refused, match=r"is not an exported folder \(it has no export.json\)"):
        fill(mine, "x", overwrite=True)
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    with pytest.raises(Refused, match="exists and is no folder"):
        fill(mine / "thesis.txt", "x", overwrite=True)
    (tmp_path / "link").symlink_to(mine)
    with pytest.raises(Refused, match="exists and is no folder"):
        fill(tmp_path / "link", "x", overwrite=True)


def test_a_name_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"path\.gguf is to be a folder"):
        fill(tmp_path / "path.gguf", "x")


def test_a_manifest_that_was_not_written_here_is_told_from_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    for text, why in (("{", "the file: Invalid JSON"), (manifest("x").replace(":1,", ":2,", 1), "dipaco_export: ")):
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
        with pytest.raises(Refused, match=f"is not one that this version of dipaco wrote \\({why}"):
            read_manifest(tmp_path)
