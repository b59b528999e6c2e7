"""Converting, verifying and timing on the command line: the files that are written, and what they say."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed.checkpoint
import torchvision
import transformers
from torch import nn

import structrep
from structrep.cli.app import _working
from structrep.cli.doctor import DoctorRecord
from structrep.deliver import formats
from structrep.deliver.formats import FORMATS, checksum
from structrep.records.delivery import ExportRecord
from structrep.records.latency import LatencyRecord
from structrep.records.verification import Verification
from tests.cli.running import failed, files, local, randomized, read, run

PROGRAMS = [suffix for suffix, form in FORMATS.items() if form.program]

# --- convert ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("source", "make", "shape"),
    [
        ("timm:resnet10t", lambda: timm.create_model("resnet10t"), (1, 3, 33, 40)),
        ("torchvision:resnet18", lambda: torchvision.models.resnet18(), (1, 3, 33, 40)),
        ("nets:Net", lambda: local("Net"), (2, 3, 9, 7)),
        ("nets:Tied", lambda: local("Tied"), (2, 3, 9, 7)),
    ],
)
def test_round_trip(
    here: Path, source: str, make: Callable[[], nn.Module], shape: tuple[int, ...], suffix: str
) -> None:
    trained, weights, out = randomized(make()), here / f"trained{suffix}", here / f"deploy{suffix}"
    if suffix == ".pt":
        torch.save(trained.state_dict(), weights)
    else:
        safetensors.torch.save_file({key: value.clone() for key, value in trained.state_dict().items()}, weights)
    result = run("convert", source, "--weights", weights, "--out", out, "--shape", "x".join(map(str, shape)))
    assert result.exit_code == 0, result.output
    assert "outputs compared on" in result.stdout

    deploy = structrep.reparameterize(make().eval())
    deploy.load_state_dict(read(out))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert structrep.verify(trained, deploy, x).ok
    assert len(deploy.state_dict()) < len(trained.state_dict())
    assert set(files(here)) == {"nets.py", "fails.py", "wrong.py", weights.name, out.name}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("source", "shape", "more"), [("nets:Net", (2, 3, 9, 7), 5), ("timm:test_resnet", (1, 3, 64, 64), 3)]
)
def test_what_was_written_says_what_it_is_and_holds(
    here: Path, source: str, shape: tuple[int, ...], more: int, suffix: str
) -> None:
    trained = randomized(local("Net") if source == "nets:Net" else timm.create_model("test_resnet"))
    torch.save(trained.state_dict(), here / "trained.pt")
    given = [source, "--weights", "trained.pt"]
    out, size = f"net{suffix}", "x".join(map(str, shape))
    result = run("convert", *given, "--out", out, "--shape", size, "--json")
    assert result.exit_code == 0, result.output
    written = ExportRecord.model_validate_json(result.stdout)
    record = formats.read(here / out).record
    assert record == written.provenance
    assert record.weights_sha256 == checksum(trained)
    assert record.versions["torch"] == torch.__version__
    assert sum(record.rules.values()) == written.merges > 0
    assert record.verification is not None
    assert record.verification.ok
    assert (written.runtime is not None) == (suffix in PROGRAMS)
    size = "x".join(map(str, (more, *shape[1:])))  # another batch than it was made with
    result = run("verify", *given, "--file", out, "--shape", size, "--json")
    assert result.exit_code == 0, result.output
    assert Verification.model_validate_json(result.stdout).outputs[0].shape[0] == more
    said = failed(2, "verify", source, "--file", out, "--shape", size)
    assert "was made of other weights" in said


def test_a_file_that_differs_is_found(here: Path) -> None:
    torch.save(local("Net").state_dict(), here / "trained.pt")
    given = ["nets:Net", "--weights", "trained.pt", "--shape", "2x3x9x7"]
    assert run("convert", *given, "--out", "net.pt").exit_code == 0
    state = torch.load(here / "net.pt")
    state["head.bias"] += 1e-3
    torch.save(state, here / "net.pt")
    result = run("verify", *given, "--file", "net.pt")
    assert result.exit_code == 1
    assert "OFF" in result.stdout
    assert "net.pt differs from the original by more than rounding" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere.pt", None, "nowhere.pt is not there: give a file"),
        ("nowhere.onnx", None, "nowhere.onnx is not there: give a file"),
        (".", None, "has the suffix '': convert writes .safetensors, .pt, .pt2, .onnx"),
        ("nets.py", None, "has the suffix '.py': convert writes"),
        ("bad.pt", b"no program", "bad.pt is damaged, or no torch file"),
        ("bad.safetensors", b"no program", "bad.safetensors is damaged, or no safetensors file"),
        ("bad.pt2", b"no program", "bad.pt2: it is no program of torch.export"),
        ("bad.onnx", b"no program", "bad.onnx: onnxruntime cannot run it"),
    ],
)
def test_files_to_verify_that_are_none(here: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (here / name).write_bytes(content)
    message = failed(2, "verify", "nets:Net", "--shape", "2x3x9x7", "--file", name)
    assert said in message
    assert "weights_only" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_program_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    torch.save(local("Net").state_dict(), here / "trained.pt")
    given = ["nets:Net", "--weights", "trained.pt", "--shape", "2x3x9x7"]
    assert run("convert", *given, "--out", f"net{suffix}").exit_code == 0
    reads, read = [], Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path.name)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    result = run("verify", *given, "--file", f"net{suffix}")
    assert result.exit_code == 0, result.output
    assert reads.count(f"net{suffix}") == 1
    assert not result.stderr  # torch warns of its own deprecations


@pytest.mark.parametrize(
    "option",
    [["--dtype", "float16"], ["--autocast", "bfloat16"], ["--device", "cuda"], ["--channels-last"], ["--tf32"]],
)
def test_an_onnx_program_runs_as_it_was_written(here: Path, option: list[str]) -> None:
    message = failed(2, "verify", "nets:Net", "--shape", "2x3x9x7", "--file", "net.onnx", *option)
    assert f"so {option[0]} says nothing of it: leave that out, or verify a .pt2 file" in message


def test_norms_that_were_kept_are_verified_so(here: Path) -> None:
    torch.save(local("Wide").state_dict(), here / "wide.pt")
    given = ["nets:Wide", "--weights", "wide.pt", "--shape", "2x3x9x7"]
    assert run("convert", *given, "--out", "net.pt", "--norms", "keep").exit_code == 0
    result = run("verify", *given, "--file", "net.pt", "--norms", "keep", "--json")
    assert result.exit_code == 0, result.output
    assert Verification.model_validate_json(result.stdout).ok
    assert "net.pt does not fit" in failed(2, "verify", *given, "--file", "net.pt")
    assert "give 'fold' or 'keep'" in failed(2, "verify", *given, "--norms", "lose")


def test_dtypes_and_devices(here: Path) -> None:
    given = ["verify", "nets:Net", "--shape", "2x3x9x7"]
    result = run(*given, "--dtype", "bfloat16", "--channels-last", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    record = Verification.model_validate_json(result.stdout)
    assert (record.dtype, record.channels_last, record.device) == ("bfloat16", True, "cpu")
    assert "is no floating-point dtype" in failed(2, *given, "--dtype", "int8")
    assert "--device 'nowhere' cannot be used" in failed(2, *given, "--device", "nowhere")
    assert "torch has no autocast to float64 on cpu" in failed(2, *given, "--autocast", "float64", "--device", "cpu")
    assert "give its --shape" in failed(2, "verify", "nets:Net")


def test_reports_and_files_stay_apart(here: Path) -> None:
    given = ["convert", "nets:Net", "--shape", "2x3x9x7"]
    assert "are the same file" in failed(2, *given, "--out", "a.pt", "--report", "a.pt")
    assert run(*given, "--out", "a.pt", "--report", "a.html").exit_code == 0
    assert (here / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert "exists" in failed(2, *given, "--out", "b.pt", "--report", "a.html")
    assert "give it with --weights" in failed(2, *given, "--out", "b.pt", "--entry", "ema")


def test_inputs_that_have_no_batch_in_common(here: Path) -> None:
    result = run("convert", "nets:Pair", "--out", "pair.pt2", "--shape", "2x3x9x7", "--shape", "1x5")
    assert result.exit_code == 0, result.output
    result = run("verify", "nets:Pair", "--shape", "2x3x9x7", "--shape", "1x5")
    assert result.exit_code == 0, result.output


def test_half_precision(here: Path) -> None:
    torch.save(local("Net").half().state_dict(), here / "half.pt")
    for command in (["bench"], ["convert", "--out", "half.onnx"]):
        result = run(command[0], "nets:Net", *command[1:], "--weights", "half.pt", "--shape", "2x3x9x7")
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("record", ["garbage", "{}", "[1]", '{"source": 1}'])
def test_records_that_are_damaged(here: Path, record: str) -> None:
    state = structrep.reparameterize(local("Net").eval()).state_dict()
    safetensors.torch.save_file(state, here / "net.safetensors", {"structrep": record})
    assert "net.safetensors has a record that is damaged" in failed(
        2, "verify", "nets:Net", "--shape", "2x3x9x7", "--file", "net.safetensors"
    )


def test_bench(here: Path) -> None:
    result = run("bench", "nets:Net", "--shape", "2x3x9x7", "--rounds", "3", "--json")
    assert result.exit_code == 0, result.output
    record = LatencyRecord.model_validate_json(result.stdout)
    assert list(record.models) == ["training-time", "deploy"]
    assert all(len(one.seconds) == 3 for one in record.models.values())
    assert record.models["training-time"].faster == 1
    assert "times as fast" in run("bench", "nets:Net", "--shape", "2x3x9x7", "--rounds", "1").stdout
    assert "does not accept inputs of shape" in failed(2, "bench", "nets:Net", "--shape", "2x5x9x7")


def test_doctor(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    record = DoctorRecord.model_validate_json(result.stdout)
    assert not any(record.rules.values())
    assert {part.package for part in record.parts if part.version} >= {"torch", "timm", "onnxruntime"}
    for package in ("timm", "numpy"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("structrep.cli.doctor.registry.resolve", lambda rules: iter(()))
    told = run("doctor").stdout.replace("\n", " ")
    assert "there is no module named 'timm'" in told
    assert "there is no module named 'numpy'" in told


def test_models_in_files(here: Path) -> None:
    net = local("Net").eval()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 9, 7),), dynamic_shapes=({0: batch},)), "net.pt2")
    result = run("convert", "net.pt2", "--out", "deploy.onnx", "--shape", "2x3x9x7")
    assert result.exit_code == 0, result.output
    torch.save(net, "module.pt")
    assert "say --trusted" in failed(2, "explain", "module.pt")
    assert run("explain", "module.pt", "--trusted").exit_code == 0
    torch.save(net.state_dict(), "state.pt")
    assert "not an nn.Module: name the model" in failed(2, "explain", "state.pt", "--trusted")
    (here / "broken.pt2").write_text("no program")
    assert "is no program of torch.export" in failed(2, "explain", "broken.pt2")
    assert "is not there" in failed(2, "explain", "none.pt2")


def test_models_of_transformers(here: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = randomized(transformers.ResNetForImageClassification(config))
    model.save_pretrained(here / "resnet")
    result = run("convert", "hf:resnet", "--out", "deploy.pt", "--shape", "1x3x32x32")
    assert result.exit_code == 0, result.output
    assert formats.read(here / "deploy.pt").record.weights_sha256 == checksum(model)  # type: ignore[union-attr]
    assert run("explain", "hf:resnet/config.json").exit_code == 0
    assert "allow a download, --download" in failed(2, "explain", "hf:microsoft/resnet-50")
    (here / "empty").mkdir()
    assert "transformers makes no model of empty" in failed(2, "explain", "hf:empty")


def test_residuals_and_norms(here: Path) -> None:
    assert "norms='keep' gives back a model that structrep.expand" in failed(
        2, "convert", "nets:Net", "--out", "net.pt", "--norms", "keep"
    )
    assert "give 'fold' or 'keep'" in failed(2, "convert", "nets:Net", "--out", "net.pt", "--norms", "lose")
    assert run("convert", "nets:Wide", "--out", "net.pt", "--norms", "keep").exit_code == 0
    assert set(read(here / "net.pt")) == set(local("Plain").state_dict())
    assert "the model has no module named 'x'" in failed(2, "explain", "nets:Net", "--reserve", "x")


def test_without_a_shape_every_merge_is_proved(here: Path) -> None:
    result = run("convert", "nets:Net", "--out", "net.pt")
    assert result.exit_code == 0
    assert "every merge proved on its own" in result.stdout
    assert "not proved" in run("convert", "nets:Net", "--out", "again.pt", "--no-verify").stdout


def test_a_file_is_replaced_only_by_force(here: Path) -> None:
    out = here / "net.pt"
    out.write_text("precious")
    assert "net.pt exists: force its replacement (--force" in failed(2, "convert", "nets:Net", "--out", out)
    assert run("convert", "nets:Net", "--out", out, "--force").exit_code == 0
    assert "head.weight" in read(out)


def test_a_link_goes_on_pointing_where_it_did(here: Path) -> None:
    (here / "store").mkdir()
    (here / "net.pt").symlink_to(here / "store" / "real.pt")
    assert run("convert", "nets:Net", "--out", "net.pt").exit_code == 0
    assert (here / "net.pt").is_symlink()
    assert "head.weight" in read(here / "store" / "real.pt")


def test_files_may_be_read_by_whom_the_umask_lets(here: Path) -> None:
    (here / "plain").write_text("")
    for suffix in FORMATS:
        assert run("convert", "nets:Net", "--out", f"net{suffix}", "--shape", "2x3x9x9").exit_code == 0
        assert (here / f"net{suffix}").stat().st_mode == (here / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_write_that_fails_midway_leaves_the_old_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    (here / f"net{suffix}").write_text("precious")
    monkeypatch.setattr(os, "fsync", full)
    said = failed(2, "convert", "nets:Net", "--out", f"net{suffix}", "--force", "--shape", "2x3x9x9")
    assert "could not be written: OSError: [Errno 28] No space left" in said


def test_a_file_that_appears_meanwhile_is_not_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = structrep.Plan.apply

    def meanwhile(plan: structrep.Plan) -> nn.Module:
        (here / "net.pt").write_text("precious")
        return apply(plan)

    monkeypatch.setattr(structrep.Plan, "apply", meanwhile)
    assert run("convert", "nets:Net", "--out", "net.pt").exit_code == 2
    assert (here / "net.pt").read_text() == "precious"
    assert not list(here.glob(".net*"))


def test_a_failed_proof_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = structrep.Plan.apply

    def wrongly(plan: structrep.Plan) -> nn.Module:
        deploy = apply(plan)
        deploy.head.bias.data += 1.0  # type: ignore[operator, union-attr]
        return deploy

    (here / "net.pt").write_text("precious")
    monkeypatch.setattr(structrep.Plan, "apply", wrongly)
    said = failed(1, "convert", "nets:Net", "--out", "net.pt", "--force", "--shape", "1x3x8x8")
    assert said.startswith("refused: the merged model differs from the original by more than rounding")


@pytest.mark.parametrize("method", ["prove", "apply", "verify"])
def test_an_interrupt_ends_in_a_sentence_and_leaves_no_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(structrep.Plan, method, interrupted)
    said = failed(130, "convert", "nets:Net", "--out", "net.pt", "--shape", "1x3x8x8")
    assert said == "interrupted: before the command was done\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_what_is_done_but_beside_a_record(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with _working("merging", quiet):
        pass
    assert ("merging" in sys.stderr.getvalue()) != quiet  # type: ignore[attr-defined]


def test_nothing_to_merge_is_said_with_the_reasons(here: Path) -> None:
    assert "there is nothing to merge in Sequential" in failed(1, "convert", "nets:empty", "--out", "net.pt")
    assert "nothing to merge" in failed(1, "convert", "nets:plain", "--out", "net.pt")
    assert "or padded with it, the two would be one" in failed(1, "convert", "nets:Border", "--out", "net.pt")
