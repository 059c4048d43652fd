"""The folder of a run: what is there is not the user's, is intact, or is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcli.utils import run_folder
from qcli.utils.errors import QcliError, QcliWarning, StateError, UsageError
from qcli.utils.files import publish
from qcli.utils.run_folder import Replacing, Resume, RunFolder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output of a run that was interrupted after two parts."""
    out = tmp_path / "out"
    with RunFolder(out, {"bits": 3}, "auto") as run:
        for part in ("00000", "00001"):
            run.commit(part, {"x": torch.ones(3)}, {"error": 0.25})
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("resume", ["auto", "required", "never"])
def test_a_folder_of_the_users_is_left_alone(tmp_path: Path, resume: Resume) -> None:
    users = tmp_path / "out.partial"
    (users / "sub").mkdir(parents=True)
    for name in ("thesis", "sub/x", "run.json", "journal.jsonl"):
        (users / name).write_text("{}\n")
    before = contents(users)
    with pytest.raises(StateError, match=r"out\.partial contains files that qcli did not write"):
        RunFolder(tmp_path / "out", {}, resume)
    assert contents(users) == before


def test_links_are_not_followed(tmp_path: Path, out: Path) -> None:
    users = tmp_path / "users"
    users.mkdir()
    (users / "precious").write_text("x")
    (tmp_path / "linked.partial").symlink_to(users)
    with pytest.raises(StateError, match=r"linked\.partial is a symbolic link"):
        RunFolder(tmp_path / "linked", {}, "auto")
    (tmp_path / "out.partial" / "result").symlink_to(users)
    with RunFolder(out, {"bits": 3}, "required") as run:
        (run.result() / "config.json").touch()
        run.publish()
    assert contents(users) == {"precious": b"x"}
    assert contents(out) == {"config.json": b""} and not run.path.exists()


def test_what_the_user_adds_stays(out: Path) -> None:
    notes = out.with_name("out.partial") / "notes"
    notes.write_text("mine")
    with RunFolder(out, {"bits": 3}, "never") as run:
        assert run.done("00000") is None
        run.result()
        with pytest.warns(QcliWarning, match="contains notes, which qcli did not write"):
            run.publish()
    assert out.exists() and notes.read_text() == "mine"


def test_what_cannot_be_cleaned_up_after_publishing_is_a_warning(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with RunFolder(out, {"bits": 3}, "required") as run:
        (run.result() / "config.json").touch()
        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.warns(QcliWarning, match=r"is no longer needed but cannot be removed: Permission denied"):
            run.publish()
    assert contents(out) == {"config.json": b""}


def test_what_is_left_of_a_published_run_is_removed(out: Path) -> None:
    out.mkdir()
    run_folder.remove_remainder(out)
    assert not out.with_name("out.partial").exists()
    users = out.with_name("other.partial")
    users.mkdir()
    run_folder.remove_remainder(out.with_name("other"))
    assert users.exists()


def flipped(content: bytes) -> bytes:
    return content.replace(b"0.25", b"0.24", 1).replace(b'"bits": 3', b'"bits": 4')


@pytest.mark.parametrize("name", ["journal.jsonl", "run.json"])
@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda content: content[:40] + b"\xff" + content[41:],
        lambda content: b"{" + content,
        lambda content: b"[" * 100_000 + b"\n" + content,
        lambda content: b"[]\n" + content,
        lambda content: content.replace(b'"', b"'", 1),
    ],
)
def test_damaged_records_are_named_and_not_believed(out: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    file = out.with_name("out.partial") / name
    file.write_bytes(damage(file.read_bytes()))
    damaged = file.read_bytes()
    with pytest.raises(StateError, match=rf"out\.partial/{name}(:1:)? .*damaged") as caught:
        RunFolder(out, {"bits": 3}, "auto")
    assert caught.value.hint == "start over: --force, or remove it"
    assert file.read_bytes() == damaged
    with pytest.raises(StateError, match="damaged"):
        RunFolder(out, {"bits": 3}, "required", Replacing(own, force=True))
    with (
        pytest.warns(QcliWarning, match="damaged.*: starting over"),
        RunFolder(out, {"bits": 3}, "auto", Replacing(own, force=True)) as run,
    ):
        assert run.done("00000") is None


def test_a_run_with_other_settings_starts_over_where_results_are_replaced(out: Path) -> None:
    with RunFolder(out, {"bits": 3}, "auto", Replacing(own, force=True)) as run:
        assert run.done("00000") is not None, "what can be continued is"
    with pytest.raises(StateError, match="bits was 3, is 4") as caught:
        RunFolder(out, {"bits": 4}, "auto", Replacing(own))
    assert caught.value.hint == "repeat its settings to continue it, or start over: --force"
    with pytest.raises(StateError, match="bits was 3, is 4"):
        RunFolder(out, {"bits": 4}, "required", Replacing(own, force=True))
    with (
        pytest.warns(QcliWarning, match="bits was 3, is 4: starting over"),
        RunFolder(out, {"bits": 4}, "auto", Replacing(own, force=True)) as run,
    ):
        assert run.done("00000") is None


def test_records_of_earlier_versions_and_lost_ones_are_refused(out: Path) -> None:
    folder = out.with_name("out.partial")
    (folder / "run.json").unlink()
    with pytest.raises(StateError, match=r"run\.json is missing"):
        RunFolder(out, {"bits": 3}, "auto")
    (folder / "run.json").write_text(json.dumps({"bits": 3}))
    with pytest.raises(StateError, match="earlier version: it has no checksum"):
        RunFolder(out, {"bits": 3}, "auto")


def test_damaged_parts_are_made_again_and_told(out: Path) -> None:
    part = out.with_name("out.partial") / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with RunFolder(out, {"bits": 3}, "auto") as run:
        assert run.done("00000") is not None and run.report("00000") == {"error": 0.25}
        with pytest.warns(QcliWarning, match=r"part-00001\.safetensors is damaged or missing: recomputing it"):
            assert run.done("00001") is None


@pytest.mark.parametrize(
    ("out", "kind", "problem"),
    [
        ("/", StateError, "/ exists"),
        ("link", StateError, "link is a dangling symbolic link"),
        ("file/x", UsageError, "file/x cannot be written: .*file is not a folder"),
        ("n" * 300, UsageError, "File name too long"),
        ("n" * 250, UsageError, "File name too long"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, kind: type[QcliError], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    Path("file").touch()
    before = os.listdir()
    with pytest.raises(kind, match=problem):
        run_folder.refuse_existing(Path(out))
    with pytest.raises(kind, match=problem):
        RunFolder(Path(out), {}, "auto")
    assert os.listdir() == before


def result(folder: Path, content: str = "new") -> Path:
    """A result that `own` takes for qcli's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


def own(folder: Path) -> None:
    """Stands for the check of a manifest: a result has one file, `config.json`."""
    if [entry.name for entry in folder.iterdir()] != ["config.json"]:
        raise StateError(f"{folder} is not ours")


def test_an_empty_folder_is_no_result_yet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with RunFolder(out, {}, "auto") as run:
        result(run.result())
        run.publish()
    assert contents(out) == {"config.json": b"new"} and not run.path.exists()


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out := tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    with pytest.raises(StateError, match="out is a mount point"):
        run_folder.refuse_existing(out)


def test_a_result_is_replaced_only_where_it_is_asked_for_and_is_qclis(tmp_path: Path) -> None:
    out = result(tmp_path / "out", "old")
    with pytest.raises(StateError, match="out exists") as caught:
        RunFolder(out, {}, "auto", Replacing(own))
    assert caught.value.hint == "choose another --out, or replace it: --force"
    (out / "thesis").touch()
    with pytest.raises(StateError, match="out exists") as caught:
        RunFolder(out, {}, "auto", Replacing(own))
    assert caught.value.hint == "choose another --out, or remove it", "--force would not replace it"
    with pytest.raises(StateError, match="out is not ours"):
        RunFolder(out, {}, "auto", Replacing(own, force=True))
    (out / "thesis").unlink()
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(StateError, match="link is a symbolic link"):
        RunFolder(tmp_path / "link", {}, "auto", Replacing(own, force=True))
    for read in (out, out / "config.json"):
        with pytest.raises(StateError, match="out has what this command reads"):
            RunFolder(out, {}, "auto", Replacing(own, force=True, reads=("org/name", str(read))))
    assert contents(out) == {"config.json": b"old"} and not (tmp_path / "out.partial").exists()
    with RunFolder(out, {}, "auto", Replacing(own, force=True)) as run:
        result(run.result())
        assert contents(out) == {"config.json": b"old"}, "until the new one is complete"
        run.publish()
    assert contents(out) == {"config.json": b"new"} and not run.path.exists()


def test_what_was_put_into_a_result_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = result(tmp_path / "out", "old")
    with RunFolder(out, {}, "auto", Replacing(own, force=True)) as run:
        result(run.result())
        (out / "thesis").touch()
        with pytest.raises(StateError, match="out is not ours"):
            run.publish()
    assert sorted(contents(out)) == ["config.json", "thesis"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failure_while_replacing_leaves_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, nth: int
) -> None:
    """Of the two renames, the first or the second fails."""
    out, rename, calls = result(tmp_path / "out", "old"), Path.rename, [0]

    def fail(path: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == nth:
            raise error
        return rename(path, target)

    with RunFolder(out, {}, "auto", Replacing(own, force=True)) as run:
        result(run.result())
        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises((QcliError, KeyboardInterrupt)):
            run.publish()
        monkeypatch.undo()
        run.remove()
    assert contents(out) == {"config.json": b"old"}


def test_a_result_whose_place_is_taken_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = result(tmp_path / "out", "old")

    def taken(partial: Path, out: Path) -> None:
        if not out.exists():
            out.mkdir()
            (out / "thesis").touch()
        publish(partial, out)

    with RunFolder(out, {}, "auto", Replacing(own, force=True)) as run:
        result(run.result())
        monkeypatch.setattr("qcli.utils.run_folder.publish", taken)
        with pytest.raises(StateError, match="created by something else"):
            run.publish()
        monkeypatch.undo()
        with pytest.warns(QcliWarning, match="has what was in"):
            run.remove()
    assert sorted(contents(out)) == ["thesis"]
    out.rename(tmp_path / "thesis")
    with pytest.raises(StateError, match="out exists"):
        RunFolder(out, {}, "auto")
    assert contents(out) == {"config.json": b"old"}


@pytest.mark.parametrize("made_again", [False, True], ids=["missing", "empty"])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_kill_between_the_renames_loses_no_result(tmp_path: Path, resume: Resume, made_again: bool) -> None:
    out = result(tmp_path / "out", "old")
    with RunFolder(out, {}, "auto", Replacing(own, force=True)) as run:
        result(run.result())
    out.rename(tmp_path / "out.partial" / "replaced")  # and no further
    if made_again:
        out.mkdir()  # as scripts do before they start a command
    with pytest.raises(StateError, match="out exists"):
        RunFolder(out, {}, resume)
    assert contents(out) == {"config.json": b"old"}
    out.rename(tmp_path / "out.partial" / "replaced")
    with RunFolder(out, {}, resume, Replacing(own, force=True)) as run:
        assert contents(out) == {"config.json": b"old"}
        result(run.result())
        run.publish()
    assert contents(out) == {"config.json": b"new"} and not run.path.exists()
