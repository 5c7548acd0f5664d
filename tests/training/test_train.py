"""Whole runs: what they leave behind, resumed ones, and two processes against one."""

import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

from tests import processes
from tests.conftest import tower_configs
from training import NOT_FINITE, distributed, train
from training.loop import Trainer
from training.model import ModelConfig, build_model, open_start
from training.optim import OptimConfig, build_optimizer, build_scheduler, follow_schedule
from training.run_folder import check_run_folder


ROOT = Path(__file__).parents[2]
TABLE = "text_model.embeddings.position_embedding.weight"


def log_of(folder: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_a_run_leaves_behind(run_arguments, captioned_folder, tmp_path, capsys):
    train.main([*run_arguments, "--loop.steps", "30", "--data.validation", str(captioned_folder)])
    folder = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "note: validation is on the training pairs themselves" in printed
    last_line = printed.strip().splitlines()[-1]
    assert last_line == str(folder / "final")

    model, processor = AutoModel.from_pretrained(last_line), AutoProcessor.from_pretrained(last_line)
    assert model.dtype == torch.float32
    assert model(**processor(text="a red roof", return_tensors="pt")).text_embeds.shape == (1, 24)
    assert AutoModel.from_pretrained(folder / "best").config.text_config.max_position_embeddings == 248

    records = log_of(folder)
    assert [record["step"] for record in records] == list(range(1, 31))
    assert {"loss", "long_loss", "short_loss", "logit_scale", "learning_rate", "seconds"} <= records[0].keys()
    for record in records:
        assert record["loss"] == pytest.approx(0.8 * record["long_loss"] + 0.2 * record["short_loss"], rel=1e-5)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    (validation,) = log_of(folder, "validation")
    assert validation["step"] == 30 and validation["long_text_to_image_R@1"] > 100 / 12
    assert yaml.safe_load((folder / "config.yaml").read_text())["loop"]["batch_size"] == 4
    assert list(folder.rglob("events.out.tfevents*")), "TensorBoard"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000030"]


def test_resumed_equals_uninterrupted_to_the_bit(run_arguments, tmp_path, monkeypatch):
    arguments = [*run_arguments, "--loop.steps", "7", "--loop.save_every", "2", "--data.shuffle_sentences", "true"]
    text = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, attention_dropout: 0.2}"
    arguments += ["--model.text", text, "--loss.long_weight", "{start: 0.9, end: 0.1, start_share: 0, end_share: 0.3}"]
    train.main([*arguments, "--output_dir", str(tmp_path / "whole")])

    class Killed(Exception):
        pass

    plain_step = Trainer.step

    def step_until_killed(self, batch):
        if self.state.step == 5:
            raise Killed
        return plain_step(self, batch)

    monkeypatch.setattr(Trainer, "step", step_until_killed)
    with pytest.raises(Killed):
        train.main([*arguments, "--output_dir", str(tmp_path / "parts")])
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    train.main([*arguments, "--output_dir", str(tmp_path / "parts"), "--resume"])

    whole, parts = weights_of(tmp_path / "whole/final"), weights_of(tmp_path / "parts/final")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    losses = [(record["step"], record["loss"]) for record in log_of(tmp_path / "parts")]  # no step twice
    assert losses == [(record["step"], record["loss"]) for record in log_of(tmp_path / "whole")]
    with pytest.raises(SystemExit, match="parts holds a run already; go on with it by --resume,"):
        train.main([*arguments, "--output_dir", str(tmp_path / "parts")])

    weights = [record["long_weight"] for record in log_of(tmp_path / "parts")]  # the curriculum's, too
    assert weights[0] == 0.9 and weights[-1] == pytest.approx(0.1) and weights == sorted(weights, reverse=True)
    for record in log_of(tmp_path / "parts"):
        parted = record["long_weight"] * record["long_loss"] + (1 - record["long_weight"]) * record["short_loss"]
        assert record["loss"] == pytest.approx(parted, rel=1e-5)
    recorded = json.loads((tmp_path / "parts/final/run.json").read_text())["config"]["loss"]["long_weight"]
    assert recorded == {"start": 0.9, "end": 0.1, "start_share": 0, "end_share": 0.3}
    assert AutoModel.from_pretrained(tmp_path / "parts/final").config.long_weight == 0.1


def test_a_run_lengthened_equals_one_that_was_longer_from_the_start(run_arguments, tmp_path, capsys):
    constant = [*run_arguments, "--optim.schedule", "constant", "--loop.save_every", "2"]
    train.main([*constant, "--loop.steps", "6", "--output_dir", str(tmp_path / "long")])
    for steps in ("4", "6"):
        train.main([*constant, "--loop.steps", steps, "--output_dir", str(tmp_path / "grown"), "--resume"])
    assert "the run was to have 4 steps and goes on as one of 6 from here on: learning rate" in capsys.readouterr().out
    long, grown = weights_of(tmp_path / "long/final"), weights_of(tmp_path / "grown/final")
    assert all(torch.equal(tensor, grown[name]) for name, tensor in long.items())
    assert [record["step"] for record in log_of(tmp_path / "grown")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SystemExit, match="loop.steps was 6 and is 5; set another output_dir"):
        train.main([*constant, "--loop.steps", "5", "--output_dir", str(tmp_path / "grown"), "--resume"])


def test_the_schedule_of_a_lengthened_run(run_arguments, tmp_path):
    cosine = [*run_arguments, "--optim.schedule", "cosine", "--optim.learning_rate", "0.01"]
    for steps in ("2", "4"):
        train.main([*cosine, "--loop.steps", steps, "--resume"])
    rates = [record["learning_rate"] for record in log_of(tmp_path / "run")]
    assert rates == pytest.approx([0.01, 0.005, 0.005, 0.005 * (1 - math.sqrt(0.5))])


@pytest.mark.parametrize("warmup", [0, 6])
def test_the_first_step_of_a_longer_run_has_its_rate(warmup, tmp_path):
    parameter = torch.nn.Linear(2, 2)
    config = OptimConfig(schedule="cosine", warmup_steps=warmup, learning_rate=0.1)
    optimizers = [build_optimizer(parameter, config) for _ in range(2)]
    short, long = (build_scheduler(optimizer, config, steps) for optimizer, steps in zip(optimizers, (4, 8)))
    for _ in range(4):
        short.optimizer.step(), short.step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    long.load_state_dict(short.state_dict())
    follow_schedule(long)
    whole = build_scheduler(build_optimizer(parameter, config), config, 8)
    for _ in range(4):
        whole.optimizer.step(), whole.step()
    for _ in range(4):
        assert long.get_last_lr() == whole.get_last_lr() == [group["lr"] for group in optimizers[1].param_groups]
        for schedule in (long, whole):
            schedule.optimizer.step(), schedule.step()


def launch(arguments: list[str], world: int) -> str:
    """What the processes of torchrun print, which itself is started in test_survival.py and test_launch.py."""
    command = [sys.executable, "-m", "training.train", *arguments]
    results = processes.run_ranks(command, world, cwd=ROOT, project=True)
    assert all(result.returncode == 0 for result in results), "\n".join(result.stderr[-3000:] for result in results)
    return "".join(result.stdout for result in results)


def test_two_processes_equal_one(run_arguments, tmp_path):
    # SGD: Adam's division by tiny second moments would blow up the last bits of the sums.
    arguments = [*run_arguments, "--optim.name", "sgd", "--optim.learning_rate", "0.05", "--optim.warmup_steps", "2"]
    arguments += ["--optim.schedule", "cosine", "--data.validation", "0.25"]
    train.main([*arguments, "--output_dir", str(tmp_path / "one")])
    printed = launch([*arguments, "--output_dir", str(tmp_path / "two")], world=2)
    assert "on 2 x cpu" in printed
    assert printed.strip().splitlines()[-1] == str(tmp_path / "two/final")
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a["learning_rate"] == b["learning_rate"]
        for name in ("loss", "long_loss", "short_loss", "logit_scale"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert [record["learning_rate"] for record in one] == pytest.approx([0.0, 0.025, 0.05, 0.025])
    assert one[-1]["logit_scale"] != one[0]["logit_scale"]
    theirs = weights_of(tmp_path / "two/final")
    for name, tensor in weights_of(tmp_path / "one/final").items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_kept_positions_stay_frozen(run_arguments, tiny_clip, tiny_processor, tmp_path, optimizer):
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.save_pretrained(tmp_path / "clip")
    arguments = [*run_arguments, "--model.init", str(tmp_path / "clip"), "--model.tokenizer", "null"]
    arguments += ["--optim.name", optimizer, "--optim.weight_decay", "0.1", "--optim.max_grad_norm", "1"]
    train.main(arguments)
    before, after = tiny_clip.state_dict()[TABLE], weights_of(tmp_path / "run/final")[TABLE]
    assert after.shape == (248, 32)
    assert torch.equal(after[:20], before[:20])
    assert not torch.equal(after[20:60:4], before[20:30])


@pytest.mark.parametrize(("scale", "held"), [(4.8, True), (4.6, False)])  # log 100 is 4.605
def test_the_logit_scale_is_held_to_100_and_free_below(
    run_arguments, tiny_clip, tiny_processor, tmp_path, scale, held
):
    tiny_clip.logit_scale.data.fill_(scale)
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.save_pretrained(tmp_path / "clip")
    arguments = ["--model.init", str(tmp_path / "clip"), "--model.tokenizer", "null", "--loop.steps", "1"]
    train.main([*run_arguments, *arguments, "--optim.learning_rate", "1e-6"])
    after = weights_of(tmp_path / "run/final")["logit_scale"]
    expected = torch.tensor(math.log(100) if held else scale)
    assert torch.equal(after, expected) if held else 0 < (after - expected).abs() < 1e-4


@pytest.mark.parametrize(("weight", "absent"), [(0.0, "long_loss"), (1.0, "short_loss")])
def test_one_kind_of_text_alone(run_arguments, tmp_path, weight, absent):
    train.main([*run_arguments, "--loss.long_weight", str(weight)])
    assert all(absent not in record and record["loss"] > 0 for record in log_of(tmp_path / "run"))
    assert AutoModel.from_pretrained(tmp_path / "run/final").config.long_weight == weight


def test_a_77_position_model_is_stretched_and_trained_on(run_arguments, tmp_path):
    text = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 77}"
    train.main([*run_arguments, "--model.text", text, "--output_dir", str(tmp_path / "first")])
    first = AutoModel.from_pretrained(tmp_path / "first/final")
    assert first.config.text_config.max_position_embeddings == 77
    second = ["--model.init", str(tmp_path / "first/final"), "--model.tokenizer", "null"]
    train.main([*run_arguments, *second, "--output_dir", str(tmp_path / "second")])
    third = ["--model.init", str(tmp_path / "second/final"), "--model.tokenizer", "null"]  # stretched: taken as it is
    train.main([*run_arguments, *third, "--output_dir", str(tmp_path / "third")])
    for name in ("second", "third"):
        text_config = AutoModel.from_pretrained(tmp_path / name / "final").config.text_config
        assert (text_config.max_position_embeddings, text_config.stretch_ratio) == (248, 4)
        assert AutoProcessor.from_pretrained(tmp_path / name / "final").tokenizer.model_max_length == 248


def test_memory_saving_options_change_nothing(run_arguments, tmp_path):
    arguments = [*run_arguments, "--loop.batch_size", "12", "--optim.name", "sgd", "--optim.learning_rate", "0.05"]
    options = ["--loop.micro_batch_size", "5", "--loss.chunk_size", "5", "--model.gradient_checkpointing", "true"]
    train.main([*arguments, "--output_dir", str(tmp_path / "plain"), "--loop.group_texts", "false"])
    train.main([*arguments, "--output_dir", str(tmp_path / "saving"), *options])
    for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "saving"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    saving = weights_of(tmp_path / "saving/final")
    for name, tensor in weights_of(tmp_path / "plain/final").items():
        torch.testing.assert_close(tensor, saving[name], atol=1e-5, rtol=1e-5, msg=name)


def test_first_sentence_as_short_text(run_arguments, captioned_folder, tmp_path):
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        del row["short_text"]
    (captioned_folder / "long_only.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(captioned_folder / "long_only.jsonl")
    train.main([*run_arguments, "--data.train", source, "--loss.short_text", "first_sentence"])
    record = log_of(tmp_path / "run")[0]
    assert record["short_loss"] > 0 and record["identical_short"] == 1.0  # "A field lies in the north."
    assert record["identical_long"] == 0.0


def test_compile_reaches_the_layers(run_arguments, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: compiled.append((layer, options)))
    train.main([*run_arguments, "--loop.compile", "true", "--loop.steps", "1"])
    assert len(compiled) == 4 and all(options == {"dynamic": True} for _, options in compiled)


def test_several_captions_an_image(run_arguments, captioned_folder, tmp_path):
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        row["short_text"] = [row["short_text"], row["short_text"].replace("A ", "One ")]
    (captioned_folder / "several.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(captioned_folder / "several.jsonl")
    train.main([*run_arguments, "--data.train", source, "--data.validation", source])
    assert log_of(tmp_path / "run", "validation")[0]["short_text_to_image_R@10"] > 0


def test_workers_change_nothing(run_arguments, tmp_path):
    for workers in (0, 2):
        folder = str(tmp_path / f"workers{workers}")
        train.main(
            [
                *run_arguments,
                "--data.workers",
                str(workers),
                "--data.shuffle_sentences",
                "true",
                "--output_dir",
                folder,
            ]
        )
    losses = [[record["loss"] for record in log_of(tmp_path / f"workers{workers}")] for workers in (0, 2)]
    assert losses[0] == losses[1]


class TestErrors:
    def test_another_configuration_is_not_resumed(self, run_arguments):
        train.main(run_arguments)
        with pytest.raises(SystemExit, match="optim.learning_rate was 0.001 and is 0.5; set another output_dir"):
            train.main([*run_arguments, "--optim.learning_rate", "0.5", "--resume"])
        train.main([*run_arguments, "--loop.log_every", "3", "--resume"])

    def test_a_section_that_is_gone_is_another_configuration(self, tmp_path):
        before = {"model": {"lora": {"rank": 4}}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
        check_run_folder(tmp_path, before, resume=True)
        with pytest.raises(ValueError, match="model.lora.rank was 4 and is None"):
            check_run_folder(tmp_path, {"model": {"lora": None}}, resume=True)

    def test_malformed_file(self, run_arguments, captioned_folder):
        (captioned_folder / "malformed.jsonl").write_text('{"image": "0.png", "long_text"')
        with pytest.raises(SystemExit, match="error: "):
            train.main([*run_arguments, "--data.train", str(captioned_folder / "malformed.jsonl")])

    def test_non_finite_loss_stops_the_run(self, run_arguments, capsys):
        with pytest.raises(SystemExit) as caught:
            train.main([*run_arguments, "--optim.name", "sgd", "--optim.learning_rate", "1e30"])
        assert caught.value.code == NOT_FINITE
        assert re.search("The loss is nan at step [23]; lower optim.learning_rate", capsys.readouterr().err)

    def test_weights_that_are_not_finite_are_not_saved(self, run_arguments, tmp_path, capsys, monkeypatch):
        plain_step = Trainer.step

        def step_with_a_broken_end(self, batch):
            record = plain_step(self, batch)
            if self.state.step == 2:
                self.model.visual_projection.weight.data[0, 0] = math.inf
            return record

        monkeypatch.setattr(Trainer, "step", step_with_a_broken_end)
        with pytest.raises(SystemExit) as caught:
            train.main([*run_arguments, "--loop.save_every", "1"])
        assert caught.value.code == NOT_FINITE
        assert "The largest weight is inf at step 3" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
            "step-00000001",
            "step-00000002",
        ]
        record = json.loads((tmp_path / "run/nonfinite.json").read_text())
        assert record["step"] == 3 and len(record["ids"]) == 4 and record["checkpoint"].endswith("step-00000002")

    def test_batch_larger_than_the_data(self, run_arguments):
        with pytest.raises(SystemExit, match="512 is more than the 12 training pairs"):
            train.main([*run_arguments, "--loop.batch_size", "512"])

    def test_tokenizer_of_another_vocabulary(self, tiny_tokenizer, tiny_processor, tmp_path):
        configs = tower_configs(tiny_tokenizer)
        configs["text_config"]["vocab_size"] = 600
        CLIPModel(CLIPConfig(**configs)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="tokenizer has .* entries"):
            build_model(open_start(ModelConfig(init=str(tmp_path))), tiny_processor)

    @pytest.mark.parametrize(
        ("launcher", "threads"),
        [
            ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 6),
            ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 3),
            ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, None),  # the user's own 1
            ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "2"}, None),
            ({}, None),
        ],
    )
    def test_processes_share_the_cores(self, monkeypatch, launcher, threads):
        for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        chosen = [None]
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        distributed.use_all_cores(SimpleNamespace(device=torch.device("cpu")))
        assert chosen[-1] == threads

    def test_emulated_bf16_is_refused(self, monkeypatch):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
        with pytest.raises(ValueError, match="no bf16 arithmetic"):
            distributed.choose_precision("bf16", "cpu")
        assert distributed.choose_precision("auto", "cpu") == distributed.choose_precision("fp32", "cpu") == "no"
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
        for matrix_units, auto in (
            (False, "no"),
            (True, "bf16"),
        ):  # without them it is no faster, but can be asked for
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)  # noqa: B023
            assert distributed.choose_precision("auto", "cpu") == auto
            assert distributed.choose_precision("bf16", "cpu") == "bf16"


class TestOptimizer:
    def test_decay_spares_what_is_not_a_matrix(self, tiny_model):
        decayed, plain = build_optimizer(tiny_model, OptimConfig(weight_decay=0.1)).param_groups
        names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
        spared = {names[id(parameter)] for parameter in plain["params"]}
        assert {"logit_scale", TABLE, "vision_model.embeddings.class_embedding"} <= spared
        assert all(name.endswith(".weight") and "norm" not in name for name in names.values() if name not in spared)
        assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
        assert len(decayed["params"]) + len(spared) == len(names)

    def test_both_are_fused(self, tiny_model):
        for name in ("sgd", "adamw"):
            assert build_optimizer(tiny_model, OptimConfig(name=name)).defaults["fused"]

    def test_table_x_is_the_default(self, tiny_model):
        optimizer = build_optimizer(tiny_model, OptimConfig())
        assert isinstance(optimizer, torch.optim.SGD)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["momentum"], group["dampening"], group["weight_decay"]) == (3e-4, 0.9, 0.1, 0.0)

    def test_cosine_with_warmup(self, tiny_model):
        config = OptimConfig(learning_rate=1.0, schedule="cosine", warmup_steps=5)
        optimizer = build_optimizer(tiny_model, config)
        scheduler = build_scheduler(optimizer, config, steps=25)
        rates = []
        for _ in range(25):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        expected = [s / 5 if s < 5 else (1 + math.cos(math.pi * (s - 5) / 20)) / 2 for s in range(25)]
        assert rates == pytest.approx(expected)


def test_logit_scale_is_clamped(run_arguments, tmp_path):
    train.main(
        [*run_arguments, "--optim.name", "sgd", "--optim.learning_rate", "50", "--model.initial_logit_scale", "99.9"]
    )
    assert max(record["logit_scale"] for record in log_of(tmp_path / "run")) <= 100.0 + 1e-3
