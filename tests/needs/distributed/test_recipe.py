"""The commands of docs/distributed.md, run as they stand there. About 25 s: two trainings of two processes each."""

import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT

PAGE = ROOT / "docs" / "distributed.md"


def torchrun(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def python(arguments: list[str]) -> None:
    """A script, in this process, which has imported most of what it needs."""
    sys.argv = arguments
    with pytest.raises(SystemExit) as end:
        runpy.run_path(arguments[0], run_name="__main__")
    assert not end.value.code


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 runs on CPUs since torch 2.7")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said to a single process that loads
def test_commands_of_the_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    commands = re.findall(r"^\$ (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands:
        program, *arguments = shlex.split(command)
        {"python": python, "torchrun": torchrun}[program](arguments)
    counts = re.findall(r"(\d+) of 450 test images right as trained, (\d+) as deployed", capsys.readouterr().out)
    assert len(commands) == 2 * len(counts) == 4
    for trained, deployed in counts:
        assert trained == deployed
        assert int(trained) > 0.9 * 450
    shapes = [{name: value.shape for name, value in torch.load(path).items()} for path in tmp_path.glob("*.pt")]
    assert shapes[0] == shapes[1]
