"""The command line: exit codes, answers on stdout, events on stderr, JSON as the schemas say, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result

from gatekeeper.cli import group, main
from gatekeeper.errors import GatekeeperError
from gatekeeper.source import check_data
from tests.shipped import CORPUS, ROOT
from tests.small import files
from tests.test_decision_json import faults as schema_faults

KIMI = str(CORPUS / "moonshotai__Kimi-K2.5")
DEEPSEEK = str(CORPUS / "deepseek-ai__DeepSeek-V3")
FUSION = ("--feature", "shared_experts_fusion")


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def gatekeeper(*arguments: str, stdin: bytes | str | None = None) -> Result:
    """Run a command in this process, as `main` does: an error of ours is one message and exit code 1."""
    result = CliRunner().invoke(group, list(arguments), input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, GatekeeperError), result.exception
        result.exit_code = 1
    return result


def run(*arguments: str, stdin: bytes = b"", cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "gatekeeper", *arguments],
        input=stdin, cwd=cwd, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    stdout, stderr = done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in stderr, stderr
    return subprocess.CompletedProcess(done.args, done.returncode, stdout, stderr)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A folder with the small rule set."""
    return write(tmp_path / "rules", files())


def write(folder: Path, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(folder)


# --------------------------------------------------------------------------------------------------- usage: exit 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["decid", KIMI],
        ["decide"],
        ["decide", KIMI, "--facts", "-"],
        ["decide", "--facts", "-"],
        ["decide", "--facts", "/nowhere/x.jsonl", "--json"],
        ["decide", "--facts", "/", "--json"],
        ["decide", "--facts", "-", "--json", "--platform", "h200"],
        ["decide", "--facts", "-", "--json", "--set", "parallel.tp_size=8"],
        ["decide", KIMI, "--runner", "both"],
        ["decide", KIMI, "--feature", "shared_expert_fusion"],
        ["decide", KIMI, "--platform", "h2000"],
        ["decide", KIMI, "--set", "parallel.tp_size"],
        ["decide", KIMI, "--set", "=8"],
        ["decide", KIMI, "--set", "parallel.tp_sise=8"],
        ["decide", KIMI, "--set", "parallel.tp_size=eight"],
        ["decide", KIMI, "--set", "parallel.tp_size=8", "--set", "parallel.tp_size=4"],
        ["decide", KIMI, "--set", "model.n_routed_experts=256"],
        ["decide", KIMI, "--set", "moe.shard_width=3"],
        ["decide", KIMI, "--set", "parallel.moe_tp_size=4"],
        ["facts", "--platform", "h200"],
        ["facts", KIMI, KIMI],
        ["check", "--format", "xml"],
        ["test", "/nowhere"],
        ["decide", KIMI, "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2_with_a_hint_on_stderr(arguments: list[str]) -> None:
    result = gatekeeper(*arguments, stdin="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["decide", KIMI, "--feature", "shared_expert_fusion"], "did you mean `shared_experts_fusion`?"),
        (["decide", KIMI, "--platform", "h2000"], "did you mean `h200`?"),
        (["decide", KIMI, "--set", "parallel.tp_sise=8"], "did you mean `parallel.tp_size`?"),
        (["decide", KIMI, "--set", "parallel.tp_size=eight"], "expected an integer, not the text `eight`"),
        (["decide", KIMI, "--set", "model.n_routed_experts=256"], "is read from the checkpoint and can't be set"),
        (["decid", KIMI], "there is no command `decid`, did you mean `decide`?"),
        (["decide", KIMI, "--set", "parallel.moe_tp_size=4"], "set what it is derived from: `parallel.ep_size`, `par"),
        (["decide", KIMI, "--set", "parallel.tp_size"], "--set takes FACT=VALUE, such as parallel.tp_size=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_named_with_what_to_do(arguments: list[str], hint: str) -> None:
    assert hint in " ".join(gatekeeper(*arguments).stderr.split())


# ------------------------------------------------------------------------------------------------------- decide


def test_decide_prints_the_answer_and_logs_beside_it() -> None:
    done = run("decide", KIMI, "--platform", "mi355x", "--set", "parallel.tp_size=8", *FUSION)
    assert done.returncode == 0
    assert "shared_experts_fusion: off by " in done.stdout
    assert "rules/requirements.yaml:" in done.stdout or "rules/gates/" in done.stdout
    (event,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (event["event"], event["feature"], event["level"]) == ("gate.decided", "shared_experts_fusion", "info")


def test_decide_json_fits_its_schema() -> None:
    result = gatekeeper("decide", KIMI, DEEPSEEK, "--json")
    answers = json.loads(result.stdout)
    assert [(answer["target"], answer["runner"]) for answer in answers] == [
        (KIMI, "target"),
        (DEEPSEEK, "target"),
        (DEEPSEEK, "draft"),
    ]
    assert schema_faults(answers, "answers") == []


def test_one_runner_and_one_feature_can_be_asked_for() -> None:
    result = gatekeeper("decide", DEEPSEEK, "--runner", "draft", *FUSION, "--json")
    (answer,) = json.loads(result.stdout)
    assert answer["runner"] == "draft"
    assert [one["feature"] for one in answer["decisions"]] == ["shared_experts_fusion"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 0),
        (["--strict"], 3),
        (["--set", "server.enforce_shared_experts_fusion=true"], 1),
        (["--set", "server.enforce_shared_experts_fusion=true", "--strict"], 1),
        (["--set", "server.disable_shared_experts_fusion=true", "--strict"], 0),
    ],
)
def test_exit_codes_of_decide(arguments: list[str], code: int, tmp_path: Path) -> None:
    # A rule set whose one gate depends on the platform, so that it is pending here.
    gate = "feature: f\nsummary: A feature.\nrequest: {force: server.enforce_shared_experts_fusion, "
    gate += "forbid: server.disable_shared_experts_fusion}\nrequires:\n"
    gate += "  - {id: here, protects: support, that: {platform.vendor: cuda}, reason: Not here.}\n"
    if code == 1:
        gate += "  - {id: never, protects: correctness, that: {model.n_routed_experts: 1}, reason: Never.}\n"
    # The features of the shipped set are there too; only this one has a gate that says so.
    folder = write(
        tmp_path, {"ruleset.yaml": "name: x\nversion: 1\nlanguage: 1\nextends: shipped\n", "features/f.yaml": gate}
    )
    assert gatekeeper("decide", KIMI, "--rules", folder, "--feature", "f", *arguments).exit_code == code


# ------------------------------------------------------------------------------------------------- bad targets: exit 1


def bad_targets(folder: Path) -> dict[str, Path]:
    """Targets that are no checkpoint, by what is wrong."""

    def config(name: str, raw: bytes) -> Path:
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(raw)
        return folder / name

    (folder / "empty").mkdir()
    (folder / "as-folder" / "config.json").mkdir(parents=True)
    return {
        "missing": folder / "missing",
        "too long": folder / ("x" * 300),
        "without a config": folder / "empty",
        "a folder as config": folder / "as-folder",
        "an empty config": config("nothing", b""),
        "torn": config("torn", (CORPUS / "moonshotai__Kimi-K2.5" / "config.json").read_bytes()[:200]),
        "not JSON": config("text", b"model_type: kimi"),
        "binary": config("binary", bytes(range(256))),
        "a list": config("list", b"[1, 2]"),
        "deep": config("deep", b"[" * 100_000),
        "of the wrong type": config("type", b'{"architectures": ["MixtralForCausalLM"], "num_local_experts": "eight"}'),
        "without architectures": config("names", b'{"architectures": 3, "num_local_experts": 8}'),
        "a key twice": config("twice", b'{"hidden_size": 1, "hidden_size": 2}'),
        "a surrogate": config("surrogate", b'{"model_type": "\\ud800", "architectures": ["X"]}'),
    }


BAD = [
    "missing", "too long", "without a config", "a folder as config", "an empty config", "torn", "not JSON", "binary",
    "a list", "deep", "of the wrong type", "without architectures", "a key twice", "a surrogate",
]  # fmt: skip


@pytest.mark.parametrize("command", ["decide", "facts"])
@pytest.mark.parametrize("name", BAD)
def test_a_target_that_can_not_be_read_is_exit_1_with_one_message(name: str, command: str, tmp_path: Path) -> None:
    targets = bad_targets(tmp_path)
    assert sorted(targets) == sorted(BAD)
    result = gatekeeper(command, str(targets[name]), "--json")
    assert result.exit_code == 1
    if command == "facts":
        assert result.stdout == ""
    else:
        (answer,) = json.loads(result.stdout)
        assert answer.keys() == {"target", "error"}
        assert f"error: {answer['error']}\n" == result.stderr
    assert str(result.exception)
    assert "\n" not in str(result.exception)


def test_the_message_goes_to_stderr_without_a_traceback(tmp_path: Path) -> None:
    done = run("decide", str(tmp_path / "missing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: `")
    assert "no such file or folder; expected a checkpoint folder or a config.json" in done.stderr


@pytest.mark.parametrize("name", [b"caf\xe9", "né".encode()])
def test_a_folder_whose_name_is_odd_is_answered(name: bytes, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for encoding in ("utf-8", "ascii"):
        done = run("decide", str(folder), "--json", PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
        assert run("decide", str(folder), PYTHONIOENCODING=encoding).returncode == 0


def test_a_config_without_experts_is_off_for_a_stated_cause(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": '{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}'})
    result = gatekeeper("decide", folder, *FUSION, "--json")
    (decided,) = json.loads(result.stdout)[0]["decisions"]
    assert (result.exit_code, decided["state"]) == (0, "off")
    assert decided["reason"]


# ------------------------------------------------------------------------------------------------------------ --facts

LINES: list[tuple[bytes, str]] = [
    (b'{"id": "good", "facts": {"model.n": 4}}', "good on"),
    (b'{"facts": {"model.n": 3}}', "2 off"),
    (b"", ""),
    (b"   ", ""),
    (b'{"id": "torn", "facts": {', "5 error"),
    (b"[]", "6 error"),
    (b"3", "7 error"),
    (b"null", "8 error"),
    (b'{"id": null}', "9 error"),
    (b'{"id": [1]}', "10 error"),
    (b'{"id": true}', "11 error"),
    (b'{"id": 77, "fact": {}}', "77 error"),
    (b'{"id": "a", "id": "b"}', "13 error"),
    (b'{"id": "type", "facts": {"model.n": "4"}}', "type error"),
    (b'{"id": "name", "facts": {"model.nn": 4}}', "name error"),
    (b'{"id": "nan", "facts": {"model.rate": NaN}}', "16 error"),
    (b'{"id": "inf", "facts": {"model.rate": 1e999}}', "inf error"),
    (b'{"id": "huge", "facts": {"model.n": ' + b"9" * 5000 + b"}}", "18 error"),
    (b'{"id": "big", "facts": {"model.n": ' + b"9" * 400 + b"}}", "big on"),
    (b'{"id": "deep", "facts": {"model.n": ' + b"[" * 5000 + b"]" * 5000 + b"}}", "20 error"),
    (b'{"id": "deepish", "facts": {"model.n": ' + b"[" * 400 + b"]" * 400 + b"}}", "deepish error"),
    (b'{"id": "\\ud800"}', "22 error"),
    (b'{"id": "bytes \xff"}', "23 error"),
    (b'{"id": "nul \\u0000", "facts": {"model.family": "\\u0000"}}', "nul \x00 pending"),
    (b'{"id": "layers", "layers": null}', "layers error"),
    (b'{"id": "layer", "layers": [null]}', "layer error"),
    (b'{"id": "facts", "facts": null}', "facts error"),
    (b'{"id": "assume", "assume": "server"}', "assume error"),
    (b'{"id": "runner", "runner": "both"}', "runner error"),
    (b'{"id": "\xc3\xa9t\xc3\xa9"}', "été pending"),
    (b"{}", "31 pending"),
]


def answered(stdout: str) -> list[str]:
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [fault for line in lines for fault in schema_faults(line, "line")] == []
    return [f"{line['id']} {'error' if 'error' in line else line['decisions'][0]['state']}" for line in lines]


def test_each_line_has_one_answer_in_order(small: str) -> None:
    text = b"\xef\xbb\xbf" + b"\n".join(line for line, _ in LINES)
    done = run("decide", "--rules", small, "--facts", "-", "--json", stdin=text)
    assert answered(done.stdout) == [answer for _, answer in LINES if answer]
    assert done.returncode == 1


@pytest.mark.parametrize(("line", "answer"), [(line, answer) for line, answer in LINES if answer.endswith("error")])
def test_an_error_says_in_which_line_and_what(line: bytes, answer: str, small: str) -> None:
    result = gatekeeper("decide", "--rules", small, "--facts", "-", "--json", stdin=line)
    (error,) = [json.loads(one)["error"] for one in result.stdout.splitlines()]
    assert error
    assert "\n" not in error
    assert len(error) < 400


def test_lines_come_from_a_file_too_and_exit_codes_are_as_elsewhere(small: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for line, options, code in (
        (b'{"facts": {"model.n": 3}}', (), 0),
        (b"{}", (), 0),
        (b"{}", ("--strict",), 3),
        (b"{}\n{", ("--strict",), 1),
        (b"", (), 0),
    ):
        path.write_bytes(line)
        result = gatekeeper("decide", "--rules", small, "--facts", str(path), "--json", *options)
        assert result.exit_code == code, (line, options)


def test_a_torn_line_names_the_file_and_the_line(small: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{}\n{"facts": ')
    result = gatekeeper("decide", "--rules", small, "--facts", str(path), "--json")
    assert f"{path}:2: not a line of JSON" in json.loads(result.stdout.splitlines()[1])["error"]


# ------------------------------------------------------------------------------------------------- facts, test


@pytest.mark.parametrize("command", [["check"], ["decide", KIMI], ["facts"], ["test"]], ids=lambda one: one[0])
def test_a_rule_set_that_is_none_is_exit_1(command: list[str], tmp_path: Path) -> None:
    result = gatekeeper(*command, "--rules", str(tmp_path))
    assert result.exit_code == 1
    told = result.stdout + str(result.exception)
    assert "not a rule set: expected a folder with `ruleset.yaml`" in told


def test_facts_lists_the_catalogue() -> None:
    result = gatekeeper("facts", "--json")
    catalogue = {one["name"]: one for one in json.loads(result.stdout)}
    assert catalogue["model.n_routed_experts"]["type"] == "integer"
    assert "model.n_routed_experts" in gatekeeper("facts").stdout


def test_facts_of_a_target_have_witnesses() -> None:
    (found,) = json.loads(gatekeeper("facts", KIMI, "--json").stdout)
    reading = found["facts"]["model.n_routed_experts"]
    assert (reading["known"], reading["value"]) == ("known", 384)
    assert reading["witness"] == "config.json: text_config.n_routed_experts"
    text = gatekeeper("facts", KIMI).stdout
    assert "model.n_routed_experts = 384  [config.json: text_config.n_routed_experts]" in text
    assert "unknown: " in text


def test_layers_that_agree_are_explained_once(tmp_path: Path) -> None:
    rules = write(
        tmp_path / "rules",
        {
            "ruleset.yaml": "{name: own, version: 1, language: 1, extends: shipped}",
            "features/own.yaml": "feature: own\nsummary: Our own.\nrequires: [{id: plain, protects: speed, "
            "that: {any_layer: {that: {layer.routed_storage.format: nvfp4}}}, reason: No layer is so.}]",
        },
    )
    text = gatekeeper("explain", "own", KIMI, "--rules", rules).stdout
    assert text.count("layer.routed_storage.format is int4_g32, expected nvfp4") == 1
    assert "which --full shows" not in text


def test_the_catalogue_says_what_a_rule_may_compare_with() -> None:
    lines = {line.split()[0]: line for line in gatekeeper("facts").stdout.splitlines()}
    assert lines["model.runner"].endswith(" One of target, draft.")
    assert " One of bailing_moe, " in lines["model.family"]
    assert " Seen so far: none, deepep, " in lines["server.moe_a2a_backend"]
    assert lines["server.moe_a2a_backend"].endswith(" Default: none.")
    assert lines["moe.shard_width"].endswith(" Derived: model.moe_intermediate_size / parallel.moe_tp_size.")


TABLE = "table: fused\nrows:\n  - {name: four are enough, facts: {model.n: 4}, expect: {state: on}}\n"


def test_tables_are_run(small: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tables", {"x.table.yaml": TABLE})
    passed = gatekeeper("test", folder, "--rules", small)
    assert (passed.exit_code, passed.stdout) == (0, "1 passed, 0 failed\n")
    write(tmp_path / "tables", {"x.table.yaml": TABLE.replace("state: on", "state: off")})
    failed = gatekeeper("test", folder, "--rules", small)
    assert failed.exit_code == 1
    assert "four are enough\n    state: expected off, got on\n0 passed, 1 failed" in failed.stdout
    (row,) = json.loads(gatekeeper("test", folder, "--rules", small, "--json").stdout)
    assert (row["passed"], row["mismatches"]) == (False, [{"key": "state", "expected": "off", "actual": "on"}])


LATER = "not known yet (stage config). Should it fail:"


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ("model.n: 3", "off by enough: There are 3, not 4."),
        ("", f"pending by enough: Depends on `model.n`, {LATER} There are unknown, not 4."),
    ],
)
def test_a_row_that_fails_says_why_it_was_decided_so(facts: str, why: str, small: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tables", {"x.table.yaml": TABLE.replace("model.n: 4", facts)})
    assert (
        f"    state: expected on, got {why.split()[0]}\n    {why}\n"
        in gatekeeper("test", folder, "--rules", small).stdout
    )


@pytest.mark.parametrize("text", ["table: fused\nrows: []\n", "table: [", "", None])
def test_nothing_tested_is_a_failure(text: str | None, small: str, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    if text is not None:
        write(tmp_path / "tables", {"x.table.yaml": text})
    result = gatekeeper("test", str(tmp_path / "tables"), "--rules", small)
    assert result.exit_code == 1
    assert "passed" not in result.stdout


# --------------------------------------------------------------------------------------------- the whole program


def test_help_names_the_commands_and_their_options() -> None:
    assert gatekeeper("--help").exit_code == 0
    for command in ("check", "decide", "facts", "test"):
        assert command in gatekeeper("--help").stdout
        assert gatekeeper(command, "--help").exit_code == 0


def test_an_error_of_ours_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gatekeeper", "decide", "/nowhere/at/all"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: `/nowhere/at/all`: no such file or folder")


def test_it_runs_from_any_folder_and_says_its_version(tmp_path: Path) -> None:
    done = run("decide", KIMI, *FUSION, cwd=tmp_path)
    assert done.returncode == 0
    assert run("--version", cwd=tmp_path).returncode == 0


def test_a_reader_that_goes_away_is_no_crash(small: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n" * 2000)
    command = [sys.executable, "-m", "gatekeeper", "decide", "--rules", small, "--facts", str(path), "--json"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_a_record_is_checked_by_its_schema() -> None:
    record: Any = {"id": "a", "facts": {"model.n": 1}, "layers": [], "assume": [], "unknown": [], "runner": "draft"}
    assert check_data(record, "record", "line") == []


def test_a_torn_target_does_not_cost_the_others_their_answers(tmp_path: Path) -> None:
    result = gatekeeper("decide", str(KIMI), str(tmp_path / "nowhere"), str(KIMI), "--json")
    assert result.exit_code == 1
    assert [list(answer) for answer in json.loads(result.stdout)] == [
        ["target", "runner", "decisions"],
        ["target", "error"],
        ["target", "runner", "decisions"],
    ]


def test_of_several_targets_an_error_names_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, {"config.json": '{"architectures": ["MixtralForCausalLM"], "num_local_experts": "eight"}'})
    result = gatekeeper("decide", KIMI, folder, *FUSION)
    assert result.exit_code == 1
    assert f"error: `{folder}`: `model.n_routed_experts`: expected an integer, not the text `eight`" in result.stderr
    assert f"{KIMI} (target)\n" in result.stdout


# --------------------------------------------------------------------------------------------- what a person is told


def test_values_of_a_stranger_can_not_steer_a_terminal(tmp_path: Path) -> None:
    hostile, escaped = "\x1b[5mblink\nline\x07\u202e", "\\x1b[5mblink\\nline\\x07\\u202e"
    config = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 1, "first_k_dense_replace": 0}
    config |= {"n_routed_experts": 384, "n_shared_experts": 1}
    quantized = {"quant_method": hostile, "bits": 4}
    folder = write(tmp_path, {"config.json": json.dumps({**config, "quantization_config": quantized})})
    torn = write(tmp_path / "torn", {"config.json": json.dumps({**config, "n_routed_experts": hostile})})
    for arguments in (["decide", folder], ["facts", folder], ["explain", FUSION[1], folder, "--full"]):
        told = CliRunner().invoke(group, arguments, color=True).stdout
        assert escaped in told
        assert not re.search(r"\x1b\[5m|\x07|\u202e|\nline", told)
    error = run("facts", torn).stderr
    assert error.startswith(f"error: `model.n_routed_experts`: expected an integer, not the text `{escaped}`")


def one_feature(folder: Path, text: str, *, overlay: str = "") -> tuple[str, ...]:
    """The options that name a rule set of one feature `f`, and an overlay of it."""
    manifest = "name: x\nversion: 1\nlanguage: 1\n"
    rules = write(folder / "rules", {"ruleset.yaml": f"{manifest}extends: shipped\n", "features/f.yaml": text})
    if not overlay:
        return ("--rules", rules)
    return ("--rules", rules, "--overlay", write(folder / "o", {"ruleset.yaml": manifest, "gates/f.yaml": overlay}))


NEVER = "feature: f\nsummary: A feature.\nrequest: {force: server.enforce_shared_experts_fusion}\nmode: shadow\n"
NEVER += "requires: [{id: never, protects: correctness, that: {model.n_routed_experts: 1}, reason: Never so.}]\n"


def test_a_shadow_decision_says_so_and_refuses_nothing(tmp_path: Path) -> None:
    rules = one_feature(tmp_path, NEVER)
    for command in (["decide", KIMI, "--feature", "f"], ["explain", "f", KIMI]):
        result = gatekeeper(*command, *rules, "--set", "server.enforce_shared_experts_fusion=true")
        assert result.exit_code == 0
        assert "error" in result.stdout
        assert "in shadow mode: consumers see it as off" in result.stdout


def test_a_dropped_protection_is_told_at_every_decision(tmp_path: Path) -> None:
    overlay = "amends: f/f\ndrop: [{requirement: never, because: We have tried it.}]\n"
    rules = one_feature(tmp_path, NEVER, overlay=overlay)
    result = gatekeeper("decide", KIMI, "--feature", "f", *rules)
    assert "warning: `never`, which protects correctness, is dropped at " in result.stdout


def test_what_is_unknown_says_from_which_stage_on_it_is_known() -> None:
    result = gatekeeper("decide", KIMI, "--feature", "moe_backend")
    assert "? torch-has-grouped-mm of option grouped_mm [correctness] (known from stage platform on)" in result.stdout


def test_a_record_over_several_lines_is_told_to_be_one(small: str) -> None:
    result = gatekeeper("decide", "--rules", small, "--facts", "-", "--json", stdin='{"id": 1,\n"facts": {}}\n')
    errors = [json.loads(line)["error"] for line in result.stdout.splitlines()]
    assert [error.rpartition("; ")[2] for error in errors] == ["write each record in one line"] * 2
    assert "at column 11" in errors[0]


# ------------------------------------------------------------------------------------------------- streams and folders


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("decide --facts - --json <&-", 2, "stdin is closed; name a file"),
        (f"decide {KIMI} --feature moe_backend 2>&-", 0, ""),
        ("facts >/dev/full", 1, "error: No space left on device\n"),
    ],
)
def test_a_stream_that_is_closed_or_full_is_no_crash(command: str, code: int, told: str) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' -m gatekeeper {command}"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert told in done.stderr
    assert done.stdout or code


@pytest.mark.parametrize("command", ["schema", "docs"])
def test_a_folder_that_can_not_be_written_is_named_as_it_was_given(command: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for out in ("loop", "file/below", "x" * 300):
        done = run(command, out, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: `{out}` can't be written: ")
