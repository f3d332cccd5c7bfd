"""Devices and processes. Several GPUs are pretended: no CUDA call is made."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from tiny import trained, write_npz

from mrcnf import runtime
from mrcnf.errors import UserError


@pytest.fixture
def started(monkeypatch):
    """Pretend to be a process of torchrun's, on a host with some GPUs."""

    def start(gpus, **variables):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return start


SECOND_HOST = {"RANK": 7, "WORLD_SIZE": 8, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4}


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_the_gpu_of_its_number_on_the_host(started, name):
    started(4, **SECOND_HOST)
    assert runtime.choose_device(name) == torch.device("cuda:3")


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
    ],
)
def test_one_process_has_the_device_that_it_names(started, gpus, name, device):
    started(gpus)
    assert runtime.choose_device(name) == torch.device(device)


def test_one_process_a_host_may_name_its_gpu(started):
    started(2, RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    assert runtime.choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("gpus", "name", "words"),
    [
        (4, "cuda:1", r"'cuda:1' is one GPU for the 4 processes of this host; use cuda"),
        (2, "cuda", "4 processes on this host need a GPU each, and PyTorch sees 2; .*cpu"),
        (0, "cuda", "sees no CUDA device"),
        (4, "gpu", "unknown device 'gpu'"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(started, monkeypatch, gpus, name, words):
    started(gpus, **SECOND_HOST)
    monkeypatch.setattr(dist, "init_process_group", lambda *_: pytest.fail("a group was made"))
    for refused in (runtime.choose_device, lambda name: runtime.processes(name).__enter__()):
        with pytest.raises(UserError, match=words) as error:
            refused(name)
        assert "\n" not in str(error.value)


def test_a_gpu_that_is_not_there_is_refused(started):
    started(2)
    with pytest.raises(UserError, match="no device 'cuda:5': PyTorch sees 2, cuda:0 to cuda:1"):
        runtime.choose_device("cuda:5")


@pytest.fixture
def calls(monkeypatch):
    """What is called of the process group, in order; nothing is sent."""
    made = []

    def note(module, name, answer=None):
        def called(*arguments, **options):
            made.append((name, *arguments, *options.values()))
            return answer

        monkeypatch.setattr(module, name, called)

    note(torch.cuda, "set_device")
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        note(dist, name)
    return made


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_nccl_talks_over_the_processs_own_gpu(started, calls, name):
    started(4, **SECOND_HOST)
    own = torch.device("cuda:3")
    with runtime.processes(name) as device:
        assert device == own
        assert calls == [("set_device", own), ("init_process_group", "nccl")]
    assert calls[2:] == [("barrier", [3]), ("destroy_process_group",)]


@pytest.mark.parametrize(("gpus", "name"), [(0, "auto"), (4, "cpu")])
def test_gloo_serves_cpus(started, calls, gpus, name):
    started(gpus, **SECOND_HOST)
    with runtime.processes(name) as device:
        assert device == torch.device("cpu")
    assert calls == [
        ("init_process_group", "gloo"), ("barrier", None), ("destroy_process_group",),
    ]  # fmt: skip


def test_an_error_does_not_wait_for_the_others(started, calls):
    started(4, **SECOND_HOST)
    with pytest.raises(ZeroDivisionError), runtime.processes("cpu"):
        raise ZeroDivisionError
    assert [name for name, *_ in calls] == ["init_process_group", "destroy_process_group"]


def test_without_torchrun_there_is_no_group(started, calls):
    started(2)
    with runtime.processes("cuda") as device:
        assert device == torch.device("cuda:0")
    assert calls == []


@pytest.mark.parametrize("others", [0, 1])
def test_the_stop_flag_goes_to_the_processs_own_device(monkeypatch, others):
    tensor, devices = torch.tensor, []

    def on_cpu(value, device):
        devices.append(device)
        return tensor(value)

    monkeypatch.setattr(runtime, "rank_and_world", lambda: (3, 4))
    monkeypatch.setattr(dist, "all_reduce", lambda flag, _: flag.add_(others))
    monkeypatch.setattr(torch, "tensor", on_cpu)
    with runtime.stop_on_signal(torch.device("cuda:3")) as stop:
        assert stop() == bool(others)
    assert devices == [torch.device("cuda:3")]


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(tmp_path):
    """Every batch has seeds of its own, so the numbers are the same whoever takes it."""
    trained(tmp_path / "run", f"data.name={write_npz(tmp_path / 'data')}", "train.steps=3")
    words = ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--batch", "5", "--json"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    tables = []
    for name, launcher in (
        ("one", ["-m", "mrcnf"]),
        ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                 "-m", "mrcnf"]),
    ):  # fmt: skip
        path = tmp_path / f"{name}.json"
        said = subprocess.run(
            [sys.executable, *launcher, *words, str(path)],
            check=True, timeout=240, env=one_thread, capture_output=True, text=True,
        )  # fmt: skip
        assert said.stdout.count("bits/dim on") == 1
        tables.append(json.loads(path.read_text()))
    for table in tables:
        del table["seconds"]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("setting", ["train.compile", "evaluate.compile"])
def test_a_missing_compiler_is_said_with_the_setting_that_wants_it(monkeypatch, setting):
    monkeypatch.setattr(runtime.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=f"{setting} needs a C\\+\\+.*{setting}=false"):
        runtime.require_compiler(torch.device("cpu"), setting)
    runtime.require_compiler(torch.device("cuda"), setting)
