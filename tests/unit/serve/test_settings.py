"""Where settings come from, and what is said of wrong ones; and the command as a process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.errors import one_line
from support.serving import running

from stca import commands
from stca.errors import UsageError
from stca.serve.log import LOG, JsonLines
from stca.serve.models import Served
from stca.serve.settings import Settings, named, settings
from stca.specs import EventInput, Padding, TensorSpec


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('http-port = 1\ngrpc_port = 1\nadmin_port = 1\nttl_seconds = 5\n[models]\nm = "/a"\n')
    environment = {"STCA_SERVE_GRPC_PORT": "2", "STCA_SERVE_ADMIN_PORT": "2", "STCA_SERVE_TRUNCATE": "true", "X": "y"}
    made = settings(str(file), environment, {"admin_port": 3})
    assert (made.http_port, made.grpc_port, made.admin_port) == (1, 2, 3)
    assert (made.ttl_seconds, made.truncate, made.models) == (5.0, True, {"m": "/a"})
    assert settings(None, {"STCA_SERVE_MODELS": "a=/x b/2=/y"}, {}).models == {"a": "/x", "b/2": "/y"}


@pytest.mark.parametrize(
    ("text", "environment", "flags", "word"),
    [
        ("http_port = 'x'", {}, {}, "http_port"),
        ("http_prt = 1", {}, {}, "http_prt"),
        ("http_port = ", {}, {}, "TOML"),
        ("queue = " + "9" * 5000, {}, {}, "TOML"),
        ("queue = " + "[" * 10**5, {}, {}, "TOML"),
        ("body_seconds = " + "9" * 400, {}, {}, "body_seconds"),
        ("\0" * (1 << 21), {}, {}, "TOML"),
        ("queue = 1\n" + "#" * (1 << 20), {}, {}, "larger than 1 MiB"),
        ("", {"STCA_SERVE_HTTP_PRT": "1"}, {}, "STCA_SERVE_HTTP_PRT"),
        ("", {"STCA_SERVE_HTTP_PORT": "x"}, {}, "STCA_SERVE_HTTP_PORT"),
        ("", {"STCA_SERVE_TRUNCATE": "perhaps"}, {}, "STCA_SERVE_TRUNCATE"),
        ("", {}, {"http_port": 70_000}, "http_port"),
        ("", {}, {"workers": 0}, "workers"),
        ("", {}, {"queue": -1}, "queue"),
        ("", {}, {"body_seconds": float("nan")}, "body_seconds"),
        ("", {}, {"log_level": "loud"}, "log_level"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, environment, flags, word):
    (tmp_path / "serve.toml").write_text(text)
    with one_line(UsageError, word):
        settings(str(tmp_path / "serve.toml"), environment, flags)


def test_each_bundle_has_a_folder_of_states_of_its_own(bundle_dir, tmp_path):
    made = Settings(state_folder=str(tmp_path), state_folder_mib=1)
    folders = {made.of_session(label)["state_folder"] for label in ("a/1", "a/2", "../b/1", "../1", "a/..")}
    assert len(folders) == 5
    assert all(Path(f).resolve().parent.parent == tmp_path.resolve() for f in folders)
    assert str(tmp_path / "a" / "1") in folders
    assert "state_folder" not in Settings().of_session("a/1")
    with running(bundle_dir, state_folder=str(tmp_path)) as server:
        assert server.http("/v2/health/ready")[0] == 200
        assert b"stca_state_file_" in server.http("/metrics")[2]


def test_bundles_have_names(tmp_path, monkeypatch):
    (tmp_path / "a=b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named(["a=b"]) == {"a=b": "a=b"}  # a folder of that name
    assert named(["x=y", "x/2=z"]) == {"x": "y", "x/2": "z"}
    assert named([str(tmp_path)], "m") == {"m": str(tmp_path)}
    for wrong in (["x=1", "x=2"], ["=1"], ["x="]):
        with pytest.raises(UsageError):
            named(wrong)


def test_the_log_tells_nothing_of_what_an_exception_says():
    try:
        raise ValueError("ann's secret")
    except ValueError:
        record = LOG.makeRecord(LOG.name, 40, "f", 1, "failed", (), sys.exc_info(), extra={"fields": {"code": "x"}})
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["error"], line["code"]) == ("failed", "ValueError", "x")
    assert "secret" not in json.dumps(line)


@pytest.mark.parametrize("arguments", [[], ["a", "b", "--name", "m"], ["x=nowhere"], ["x=y", "--http-port", "z"]])
def test_bad_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ports = ["--http-port", "0", "--grpc-port", "0", "--admin-port", "0"]
    assert commands.main(["serve", *ports, *arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(said) == 1
    assert "unexpected" not in said[0]


@pytest.mark.parametrize("which", ["http", "grpc", "admin"])
def test_a_port_that_is_taken_is_named(which: str, bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        ports = [x for p in ("http", "grpc", "admin") for x in (f"--{p}-port", number if p == which else "0")]
        assert commands.main(["serve", *ports, f"m={bundle_dir}"]) == 2
    assert f"port {number} of 127.0.0.1 cannot be taken" in (said := capsys.readouterr().err)
    assert f"choose another with --{which}-port" in said


def test_the_command_serves_until_it_is_told_to_end(bundle_dir: Path) -> None:
    command = [sys.executable, "-m", "stca", "serve", f"m={bundle_dir}", "--json"]
    for port in ("http", "grpc", "admin"):
        command += [f"--{port}-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        told: dict[str, Any] = json.loads(process.stdout.readline())
        assert told["models"] == ["m/1"]
        with urllib.request.urlopen(f"http://127.0.0.1:{told['ports']['http']}/v2/health/ready") as answer:
            assert json.load(answer) == {"ready": True}
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert [json.loads(line)["event"].split()[0] for line in err.splitlines()] == [
        "listening", "loaded", "ready", "draining", "ended",
    ]  # fmt: skip


def test_a_second_signal_ends_the_drain_and_says_so(bundle_dir: Path) -> None:
    """A request whose body never comes keeps its place, and the drain waiting."""
    command = [sys.executable, "-m", "stca", "serve", f"m={bundle_dir}", "--json", "--drain-seconds", "60"]
    for port in ("http", "grpc", "admin"):
        command += [f"--{port}-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stderr
        port = json.loads(process.stdout.readline())["ports"]["http"]
        with socket.create_connection(("127.0.0.1", port)) as stuck:
            stuck.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: m\r\nContent-Length: 99\r\n\r\n")
            while not _admitted(port):
                pass
            process.send_signal(signal.SIGTERM)
            while json.loads(process.stderr.readline())["event"] != "draining":
                pass
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    (ended,) = [json.loads(line) for line in err.splitlines()]
    assert (ended["event"], ended["finished"], ended["unanswered"]) == ("ended", False, 1)
    assert "second signal" in ended["why"]


def _admitted(port: int) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return b"stca_admitted_requests 1.0" in answer.read()


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["serve", "--help"])
    said = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert name == "models" or f"--{name.replace('_', '-')}" in said


@pytest.mark.parametrize(("side", "events"), [("left", -1), (None, 50)])
def test_metadata_tells_that_a_padded_history_has_any_length(side, events):
    inputs = (TensorSpec("hist", "int64", (1, 50), "user", 9), TensorSpec("item", "int64", ("N_t",), "target", 9))
    padding = (Padding((EventInput("hist", 1, 0),), side, None),)
    served = Served("m", "1", "bundle")
    graphs = {"request": SimpleNamespace(inputs=inputs, outputs=())}
    served.loaded = SimpleNamespace(manifest=SimpleNamespace(graphs=graphs, padding=padding))  # type: ignore[assignment]
    assert [told["shape"] for told in served.metadata()["inputs"]] == [[1, events], [-1]]
