"""Files that have passed the schema check are not checked again; whatever happens to the memory, answers stay."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gatekeeper import RuleError, load_rules, passed, source
from gatekeeper.cli import group
from gatekeeper.data import data_folder
from tests.shipped import CORPUS, ROOT
from tests.small import FEATURE, files


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of digests, in a folder of the test's own."""
    monkeypatch.setenv(passed.VARIABLE, str(tmp_path / "digests"))
    return tmp_path / "digests" / "passed"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """A folder with the small rule set."""
    for name, text in files().items():
        path = tmp_path / "rules" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "rules"


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of file that were checked against their schema, in order."""
    kinds: list[str] = []
    real = source.schema_faults

    def schema_faults(document: source.Document, kind: str) -> Any:
        kinds.append(kind)
        return real(document, kind)

    monkeypatch.setattr(passed, "schema_faults", schema_faults)
    return kinds


ALL = ["facts", "feature", "ruleset"]


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every file of a folder remembered, whatever is in it."""
    with monkeypatch.context() as context:
        context.setattr(passed, "schema_faults", lambda document, kind: iter(()))
        load_rules(folder)


def wrong_key(folder: Path) -> None:
    (folder / "features" / "fused.yaml").write_text(FEATURE + "sumary: Twice.\n", encoding="utf-8")


def test_what_has_passed_is_not_checked_again(rules: Path, checked: list[str]) -> None:
    first = load_rules(rules)
    assert sorted(checked) == ALL
    checked.clear()
    assert load_rules(rules).digest == first.digest
    assert checked == []


def test_only_digests_are_kept(rules: Path, memory: Path) -> None:
    load_rules(rules)
    assert re.fullmatch(r"([0-9a-f]{64}\n){3}", memory.read_text("ascii"))
    assert [path.name for path in memory.parent.iterdir()] == ["passed"]


def test_a_changed_byte_is_checked_again(rules: Path, checked: list[str]) -> None:
    load_rules(rules)
    checked.clear()
    path = rules / "features" / "fused.yaml"
    path.write_text(FEATURE.replace("not 4", "not 5"), encoding="utf-8")
    load_rules(rules)
    assert checked == ["feature"]


def test_a_changed_file_that_is_wrong_is_found(rules: Path) -> None:
    load_rules(rules)
    wrong_key(rules)
    with pytest.raises(RuleError, match="unknown key `sumary`"):
        load_rules(rules)
    # Its fault did not have it remembered.
    with pytest.raises(RuleError, match="unknown key `sumary`"):
        load_rules(rules)


def test_one_file_is_remembered_for_its_own_kind(rules: Path, checked: list[str]) -> None:
    load_rules(rules)
    checked.clear()
    shutil.copy(rules / "features" / "fused.yaml", rules / "facts" / "fused.yaml")
    with pytest.raises(RuleError, match=re.escape("facts/fused.yaml:1:1")):
        load_rules(rules)
    assert checked == ["facts"]


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Forget before and after what was read of schemas and checkers."""
    caches = (passed._checker, source.load_schema, source._validator)
    for one in caches:
        one.cache_clear()
    yield
    for one in caches:
        one.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_a_changed_schema_checks_every_file_again(
    rules: Path, tmp_path: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_rules(rules)
    checked.clear()
    folder = tmp_path / "schema"
    shutil.copytree(data_folder("schema"), folder)
    changed = json.loads((folder / "feature.schema.json").read_text("utf-8"))
    changed["required"] = [*changed.get("required", []), "owner"]
    (folder / "feature.schema.json").write_text(json.dumps(changed), encoding="utf-8")
    for module in (passed, source):
        monkeypatch.setattr(module, "data_folder", lambda name: folder)
    for one in (passed._checker, source.load_schema, source._validator):
        one.cache_clear()
    with pytest.raises(RuleError, match="missing key `owner`"):
        load_rules(rules)
    assert sorted(checked) == ALL


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff" * 500, b"0" * 63, b"\n" * 1000, b"0" * 64 + b"\n" + b"f" * 10, "é".encode() * 64, b"x" * 10**6],
    ids=["empty", "binary", "torn", "lines", "torn end", "no hex", "long"],
)
def test_a_broken_memory_is_none(rules: Path, memory: Path, checked: list[str], content: bytes) -> None:
    memory.parent.mkdir()
    memory.write_bytes(content)
    load_rules(rules)
    assert sorted(checked) == ALL
    load_rules(rules)
    assert sorted(checked) == ALL, "it was made good"


def test_a_torn_digest_is_no_digest(rules: Path, memory: Path, checked: list[str]) -> None:
    load_rules(rules)
    memory.write_bytes(memory.read_bytes()[:-10])
    checked.clear()
    load_rules(rules)
    assert len(checked) == 1


@pytest.mark.skipif(os.name != "posix", reason="owner and mode are POSIX's")
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_memory_that_others_can_write_is_not_believed(
    rules: Path, memory: Path, checked: list[str], mode: int
) -> None:
    load_rules(rules)
    memory.chmod(mode)
    checked.clear()
    load_rules(rules)
    assert sorted(checked) == ALL
    assert memory.stat().st_mode & 0o777 == 0o600, "it is the user's alone again"


@pytest.mark.skipif(os.name != "posix", reason="owner and mode are POSIX's")
def test_a_memory_of_another_user_is_not_believed(
    rules: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_rules(rules)
    checked.clear()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    load_rules(rules)
    assert sorted(checked) == ALL


def test_a_folder_that_can_not_be_made_is_no_memory(
    rules: Path, tmp_path: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(passed.VARIABLE, str(tmp_path / "file" / "digests"))
    for _ in range(2):
        checked.clear()
        load_rules(rules)
        assert sorted(checked) == ALL


def test_a_disk_that_can_not_be_written_is_no_memory(
    rules: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as context:
        context.setattr("tempfile.mkstemp", refuse)
        load_rules(rules)
    assert not memory.exists()
    with monkeypatch.context() as context:
        context.setattr(Path, "replace", refuse)
        load_rules(rules)
    assert list(memory.parent.iterdir()) == [], "nothing is left lying there"


@pytest.mark.parametrize("what", ["folder", "pipe", "loop"])
def test_something_else_in_its_place_is_no_memory(rules: Path, memory: Path, what: str) -> None:
    memory.parent.mkdir()
    if what == "folder":
        memory.mkdir()
    elif what == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no named pipes here")
        os.mkfifo(memory)
    else:
        memory.symlink_to(memory)
    assert load_rules(rules).name == "small"


def test_the_oldest_make_room(rules: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_rules(rules)
    first = memory.read_text("ascii").split()
    monkeypatch.setattr(passed, "MAX_DIGESTS", 4)
    for number in range(3):
        (rules / "features" / "fused.yaml").write_text(f"{FEATURE}# {number}\n", encoding="utf-8")
        load_rules(rules)
    found = memory.read_text("ascii").split()
    assert len(found) == 4
    assert len(set(found)) == 4
    assert first[1] not in found


def test_switched_off_there_is_none(
    rules: Path, memory: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(passed.VARIABLE, "off")
    for _ in range(2):
        load_rules(rules)
    assert sorted(checked) == sorted(ALL * 2)
    assert not memory.exists()


def test_check_asks_no_memory(rules: Path, checked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_key(rules)
    plant(rules, monkeypatch)
    load_rules(rules)  # it is believed, and does no harm
    assert checked == []
    result = CliRunner().invoke(group, ["check", "--rules", str(rules)])
    assert result.exit_code == 1
    assert "unknown key `sumary`" in result.stdout
    assert sorted(checked) == ALL


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "text",
        "feature: fused",
        "feature: [1]\nsummary: {}\n",
        "requires: {}\n",
        "feature: fused\nrequires: 7\n",
    ],
)
def test_a_wrong_shape_that_was_planted_is_a_fault_all_the_same(
    rules: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rules / "features" / "fused.yaml").write_text(text, encoding="utf-8")
    document, _ = source.scan_file(rules / "features" / "fused.yaml")
    with monkeypatch.context() as context:
        context.setattr(passed, "schema_faults", lambda document, kind: iter(()))
        with passed.remembering():
            passed.shape_faults(document, "feature")
    with pytest.raises(RuleError):
        load_rules(rules)


def test_processes_at_once_do_each_other_no_harm(rules: Path, memory: Path) -> None:
    code = "import sys, gatekeeper; print(gatekeeper.load_rules(sys.argv[1]).digest)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rules)], stdout=subprocess.PIPE, env=environment)
        for _ in range(4)
    ]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert answers == {f"{load_rules(rules).digest}\n".encode()}
    assert re.fullmatch(r"([0-9a-f]{64}\n){3}", memory.read_text("ascii"))


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "/users/me/.cache/model-gatekeeper/passed"),
        ("linux", {"XDG_CACHE_HOME": "/var/cache/me"}, "/var/cache/me/model-gatekeeper/passed"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/users/me/.cache/model-gatekeeper/passed"),
        ("darwin", {"XDG_CACHE_HOME": "/var/cache/me"}, "/users/me/Library/Caches/model-gatekeeper/passed"),
        ("win32", {"LOCALAPPDATA": "/users/me/local"}, "/users/me/local/model-gatekeeper/passed"),
        ("win32", {}, None),
        ("linux", {passed.VARIABLE: "/elsewhere"}, "/elsewhere/passed"),
        ("linux", {passed.VARIABLE: "relative"}, None),
        ("linux", {passed.VARIABLE: "off"}, None),
    ],
)
def test_where_digests_are_kept(
    platform: str, environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name in (passed.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/users/me", **environment}.items():
        monkeypatch.setenv(name, value)
    found = passed._digest_file()
    assert (found and found.as_posix()) == expected


def test_without_a_home_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (passed.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does where it knows of none
    assert passed._digest_file() is None


# ------------------------------------------------------------------------------------------------- what a start costs

RUN = """
import json, sys
from gatekeeper.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
BARE = "import json, sys, yaml, click, structlog; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"


def modules(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_a_warm_start_imports_little_of_its_own() -> None:
    config = str(CORPUS / "moonshotai__Kimi-K2.5" / "config.json")
    command = ("-c", RUN, "decide", config, "--set", "parallel.tp_size=8")
    cold, warm = modules(*command), modules(*command)
    assert "jsonschema" in cold
    added = warm - modules("-c", BARE)
    assert added & {"jsonschema", "referencing", "torch", "email", "tempfile", "zipfile", "importlib.metadata"} == set()
    assert "gatekeeper.decide" in added
