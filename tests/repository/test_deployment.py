"""The Dockerfile and the systemd unit: what can be known of them without running either."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benthic.cli.serve import make_parser
from benthic.config.serve import ServeConfig

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "benthic.service"
IGNORED = (ROOT / ".dockerignore").read_text().split()


def instructions():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def arguments_of(name):
    return [text for instruction, text in instructions() if instruction == name]


def service():
    unit = configparser.RawConfigParser(strict=True)
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    return dict(unit["Service"])


def test_the_container_starts_the_server_as_nobody_in_particular():
    last = max(place for place, (name, _) in enumerate(instructions()) if name == "FROM")
    users = [text for name, text in instructions()[last:] if name == "USER"]
    assert users == ["10001:10001"]
    command = eval(arguments_of("ENTRYPOINT")[0])
    assert command[:2] == ["benthic", "serve"]
    options = make_parser().parse_args([*command[2:], "--api-key-file", "/run/secrets/api-keys"])
    assert (options.host, options.port) == ("0.0.0.0", int(arguments_of("EXPOSE")[0]))


def test_the_container_s_health_is_the_server_s():
    (check,) = arguments_of("HEALTHCHECK")
    code = eval(check.split("CMD", 1)[1])[2]
    compile(code, "healthcheck", "exec")
    assert f"127.0.0.1:{arguments_of('EXPOSE')[0]}/health" in code


def test_what_is_copied_exists_and_is_not_left_out_of_the_build():
    for text in arguments_of("COPY"):
        for source in text.split()[:-1]:
            if not source.startswith("--") and not text.startswith("--from"):
                assert (ROOT / source).exists()
                assert f"!{source}" in IGNORED
    assert IGNORED[0] == "*"


def test_nothing_secret_is_built_in():
    for name, text in instructions():
        assert not re.search(r"(?i)key|token|secret|password", text) or name == "HEALTHCHECK"
    assert arguments_of("ARG") == ["PYTHON_VERSION=3.12", "TORCH_INDEX=https://download.pytorch.org/whl/cpu"]


def test_the_unit_stops_as_the_server_drains():
    unit = service()
    assert (unit["Type"], unit["KillSignal"], unit["KillMode"]) == ("exec", "SIGTERM", "mixed")
    command = shlex.split(unit["ExecStart"])
    options = make_parser().parse_args(command[2:])
    assert int(unit["TimeoutStopSec"]) > options.drain_seconds
    assert int(unit["TimeoutStopSec"]) > ServeConfig.model_fields["drain_seconds"].default


def test_the_unit_s_keys_are_a_credential_and_its_user_has_no_rights():
    unit = service()
    name = unit["LoadCredential"].split(":")[0]
    assert f"--api-key-file %d/{name}" in unit["ExecStart"]
    assert unit["DynamicUser"] == "yes"
    assert unit["CapabilityBoundingSet"] == ""
    assert unit["ProtectSystem"] == "strict"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/benthic/bin/benthic", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
