"""The launch files as their users start them: several processes on the CPU give the model of one process."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModel

from tests import processes
from training.distributed import check_checkpoint, check_launch
from training.run import run
from training.train import parse_config


ROOT = Path(__file__).parents[2]
FILES = ROOT / "training" / "accelerate"
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
ENGINE = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
SEVERAL = ["ddp", "fsdp2", pytest.param("deepspeed_zero2", marks=ENGINE)]
RATE = ["--optim.name", "sgd", "--optim.learning_rate", "5.0e-2"]  # every weight moves visibly, and no further


@pytest.fixture(scope="module")
def alone(tmp_path_factory, run_options, captioned_folder) -> dict[str, torch.Tensor]:
    """The weights that one process ends with."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return load_file(run(parse_config([*options(folder, run_options, captioned_folder)])) / "model.safetensors")


def options(folder: Path, run_options: list[str], data: Path) -> list[str]:
    words = ["--output_dir", str(folder), *run_options, *RATE, "--data.validation", str(data)]
    return [*words, "--optim.max_grad_norm", "2", "--loop.save_every", "2"]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_processes_are_one(name, alone, run_options, captioned_folder, tmp_path):
    command = [*LAUNCHER, str(FILES / f"{name}.yaml"), "-m", "training.train"]
    command += options(tmp_path / "run", run_options, captioned_folder)
    # The launcher is forked. It starts the two as new interpreters, each with a hash seed of its own, and waits until
    # they have ended: one that hangs at its very end, which a forked process does not come to, is seen here.
    done = processes.run(command, cwd=ROOT, env=environment(), project=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == str(tmp_path / "run" / "final") and any("4 steps of 4 on 2 x cpu" in line for line in lines)
    got = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert got.keys() == alone.keys() and got["logit_scale"].shape == ()
    for weight, tensor in alone.items():
        torch.testing.assert_close(got[weight], tensor, atol=1e-5, rtol=1e-5, msg=weight)
    assert AutoModel.from_pretrained(tmp_path / "run" / "best").logit_scale.shape == ()


def environment() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_says_how_it_is_used(path):
    text = path.read_text()
    assert text.startswith(f"# accelerate launch --config_file training/accelerate/{path.name} ")
    assert yaml.safe_load(text)["mixed_precision"] == "no"  # the run's own `precision` decides


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def told(self, precision: str = "no", **variables: str) -> str:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)
        with pytest.raises(ValueError) as caught:
            check_launch(precision)
        return str(caught.value)

    def test_fsdp1(self):
        assert "set fsdp_version to 2" in self.told(ACCELERATE_USE_FSDP="true")

    def test_loading_by_the_first_process_only(self):
        message = self.told(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
        assert "set it to false" in message and "logit_scale" in message

    def test_fp16(self):
        assert "set it to bf16 or fp32" in self.told("fp16", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")

    def test_without_deepspeed(self):
        self.monkeypatch.setattr("training.distributed.is_deepspeed_available", lambda: False)
        assert "pip install deepspeed" in self.told(ACCELERATE_USE_DEEPSPEED="true")

    def test_zero3(self):
        self.monkeypatch.setattr("training.distributed.is_deepspeed_available", lambda: True)
        message = self.told(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
        assert "stage is 3" in message and "fsdp2.yaml" in message


def test_a_checkpoint_of_another_launch_is_refused(tmp_path):
    accelerator = Accelerator(cpu=True)
    for name, launch in (("pytorch_model_fsdp_0", "under FSDP2"), ("pytorch_model", "under DeepSpeed")):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"was saved {launch} .* resume it with that"):
            check_checkpoint(accelerator, tmp_path / name)
    check_checkpoint(accelerator, tmp_path / "plain")
