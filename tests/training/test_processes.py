"""
Two and four gloo processes give the losses, and after three steps the weights, of one process on the same global batch,
whatever way of computing it; the kept positions stay as they are to the bit. All runs are made in one go by processes
that live through them, since starting one costs seconds.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from tests import processes
from training import distributed
from training.checkpoint import whole_model
from training.data.pairs import CaptionedImages, load_pairs
from training.distributed import is_sharded, make_accelerator
from training.loop import Trainer
from training.model import build_model, build_processor, open_start
from training.run import run
from training.train import parse_config


WORLDS = (4, 2, 1)
STEPS = 3
# One process on the whole batch is the reference of each kind of loss; learning rates let every weight move visibly.
LOSSES = {
    "paper": [],
    "all options": [
        *("--loss.pcm_rank", "4", "--loss.label_smoothing", "0.1", "--loss.mask_identical_captions", "true"),
        *("--optim.max_grad_norm", "0.5", "--model.gradient_checkpointing", "true"),
    ],
}
WAYS = {
    "as they come": ["--loop.group_texts", "false"],
    "grouped": [],
    "chunked": ["--loss.chunk_size", "5"],
    "cached": ["--loop.micro_batch_size", "2"],
    "cached, chunked": ["--loop.micro_batch_size", "1", "--loss.chunk_size", "7"],
}
# What `accelerate launch --config_file training/accelerate/fsdp2.yaml` tells its processes.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "CLIPEncoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
SHARDED_WAYS = ("as they come", "grouped", "cached, chunked")
OPTIMIZERS = {"sgd": "5.0e-2", "adamw": "1.0e-3"}
TABLE = "text_model.embeddings.position_embedding.weight"
KEPT = 20


class Killed(Exception):
    pass


def meet(store: Path, rank: int, world: int) -> None:
    """Have the processes meet in a file: a port that is free now may be another program's when they come to use it."""
    group = {"init_method": f"file://{store}", "timeout": distributed.LONGEST_STEP}
    dist.init_process_group("gloo", **group, rank=rank, world_size=world)


def name_of(*words) -> str:
    return "-".join(str(word).replace(", ", "+").replace(" ", "_") for word in words)


def steps_of(arguments: list[str], processor, rows, path: Path) -> None:
    """Some optimizer steps of all processes; the first writes down what came of them."""
    AcceleratorState._reset_state(True)
    accelerator = make_accelerator("no", cpu=True)
    config = parse_config([*arguments, "--output_dir", str(path)])
    torch.manual_seed(0)
    model = build_model(open_start(config.model), processor)
    images = CaptionedImages(rows, config.data, config.seed)
    trainer = Trainer(accelerator, model, processor, images, config)
    assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    assert is_sharded(accelerator) == ("ACCELERATE_USE_FSDP" in os.environ) == is_cut(model)
    log = []
    for batch in trainer.batches():
        assert len(batch["pixel_values"]) == config.loop.batch_size // accelerator.num_processes
        losses, numbers = trainer.step(batch)
        log.append(
            {name: float(torch.as_tensor(value).detach()) for name, value in (losses._asdict() | numbers).items()}
        )
    whole = whole_model(accelerator, model)
    if whole is not None:
        torch.save({"log": log, "weights": whole.state_dict()}, path)


def is_cut(model) -> bool:
    """Whether this process holds a part only of every weight but the logit scale, which is a number everywhere."""
    assert model.logit_scale.shape == () and not isinstance(model.logit_scale, DTensor)
    others = [parameter for name, parameter in model.named_parameters() if name != "logit_scale"]
    cut = {isinstance(parameter, DTensor) and len(parameter.to_local()) < len(parameter) for parameter in others}
    assert len(cut) == 1
    return cut.pop()


def whole_run(arguments: list[str], folder: Path, store: Path) -> None:
    AcceleratorState._reset_state(True)
    meet(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))  # each run ends its process group
    run(parse_config([*arguments, "--output_dir", str(folder)]))


def killed_and_resumed(arguments: list[str], folder: Path, stores: Iterator[Path]) -> None:
    plain_step = Trainer.step

    def step_until_killed(self, batch):
        if self.state.step == 2:
            raise Killed
        return plain_step(self, batch)

    arguments = [*arguments, "--loop.save_every", "1"]
    Trainer.step = step_until_killed
    with contextlib.suppress(Killed):
        whole_run(arguments, folder, next(stores))
    Trainer.step = plain_step
    dist.destroy_process_group()
    whole_run([*arguments, "--resume"], folder, next(stores))


def work(rank: int, folder: Path, arguments: list[str], clip: Path) -> None:
    """The runs of one of four processes; the first ones go on with fewer."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    (folder / "stores").mkdir(exist_ok=True)
    stores = (folder / "stores" / str(number) for number in itertools.count())  # one a process group, of all processes
    config = parse_config([*arguments, "--output_dir", str(folder)])
    rows = load_pairs(config.data, ["long", "short"])
    processor = build_processor(open_start(config.model), rows.all_texts())
    for world in WORLDS:
        if rank >= world:
            return
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        meet(next(stores), rank, world)
        for loss, options in LOSSES.items():
            for way, how in WAYS.items():
                steps_of([*arguments, *options, *how], processor, rows, folder / name_of(loss, way, world))
        dist.destroy_process_group()
        if world != 2:
            continue
        stretched = [*arguments, "--model.init", str(clip), "--model.tokenizer", "null"]
        stretched += ["--optim.weight_decay", "0.1", *WAYS["cached"]]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for optimizer, rate in OPTIMIZERS.items():
                chosen = [*stretched, "--optim.name", optimizer, "--optim.learning_rate", rate]
                whole_run(chosen, folder / name_of(optimizer, "whole"), next(stores))
                killed_and_resumed(chosen, folder / name_of(optimizer, "resumed"), stores)
        sharded_runs(arguments, stretched, processor, rows, folder, stores)


def sharded_runs(
    arguments: list[str], stretched: list[str], processor, rows, folder: Path, stores: Iterator[Path]
) -> None:
    """Of two processes under FSDP2."""
    os.environ |= SHARDED
    meet(next(stores), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    for loss, options in LOSSES.items():
        for way in SHARDED_WAYS:
            steps_of([*arguments, *options, *WAYS[way]], processor, rows, folder / name_of("sharded", loss, way))
    dist.destroy_process_group()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        chosen = [*stretched, "--optim.name", "adamw", "--optim.learning_rate", OPTIMIZERS["adamw"]]
        whole_run(chosen, folder / name_of("sharded", "adamw", "whole"), next(stores))
        killed_and_resumed(chosen, folder / name_of("sharded", "adamw", "resumed"), stores)
    for name in SHARDED:
        del os.environ[name]


@pytest.fixture(scope="module")
def captions(captioned_folder):
    """The captioned pictures with texts of many lengths, some of them alike."""
    rows = [json.loads(line) for line in (captioned_folder / "captions.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["long_text"] = row["long_text"][: 60 + 15 * index] + "."
        row["short_text"] = f"A roof. {'Trees. ' * (index // 4)}"
    path = captioned_folder / "of_many_lengths.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_options, captions, clip):
    folder = tmp_path_factory.mktemp("runs")
    arguments = [*run_options, "--data.train", str(captions), "--loop.batch_size", "12", "--loop.steps", str(STEPS)]
    arguments += ["--optim.name", "sgd", "--optim.learning_rate", OPTIMIZERS["sgd"]]
    with (folder / "output").open("w+") as output:
        ranks = [processes.call(work, rank, folder, arguments, clip, stderr=output) for rank in range(max(WORLDS))]
        assert processes.wait_for_all(ranks) == [0] * len(ranks), (folder / "output").read_text()[-5000:]
    return folder


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equal_to_one_process(runs, loss, way, world):
    compare(runs / name_of(loss, "as they come", 1), runs / name_of(loss, way, world))


@pytest.mark.parametrize("way", SHARDED_WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_sharded_equal_to_one_process(runs, loss, way):
    compare(runs / name_of(loss, "as they come", 1), runs / name_of("sharded", loss, way))


def compare(reference: Path, other: Path) -> None:
    expected, got = torch.load(reference), torch.load(other)
    assert len(expected["log"]) == len(got["log"]) == STEPS
    for a, b in zip(expected["log"], got["log"]):
        assert b["identical_short"] == 1.0 and b["identical_long"] == 0.0
        assert a.keys() == b.keys() >= {"loss", "long_loss", "short_loss", "logit_scale"}
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
    assert len({record["logit_scale"] for record in got["log"]}) == STEPS
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_the_losses_differ(runs):
    paper, other = (torch.load(runs / name_of(loss, "as they come", 1))["log"][0] for loss in LOSSES)
    assert all(abs(paper[name] - other[name]) > 1e-4 for name in ("long_loss", "short_loss"))


@pytest.mark.parametrize("run_of", [("sgd",), ("adamw",), ("sharded", "adamw")], ids="-".join)
def test_kept_positions_stay_as_they_are(runs, clip, run_of):
    before = load_file(clip / "model.safetensors")[TABLE]
    whole, resumed = (
        load_file(runs / name_of(*run_of, how) / "final/model.safetensors") for how in ("whole", "resumed")
    )
    for after in (whole[TABLE], resumed[TABLE]):
        assert after.shape == (248, 32)
        assert torch.equal(after[:KEPT], before[:KEPT])
        assert not torch.equal(after[KEPT : KEPT + 40 : 4], before[KEPT : KEPT + 10])
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def gathered_in(rank: int, store: Path, outcome: Path) -> None:
    meet(store, rank, 2)
    local = torch.arange(6.0).reshape(2, 3) + 10 * rank
    leaf = local.clone().requires_grad_()
    everything = distributed.gather_with_gradient(leaf)
    (everything * torch.arange(4.0)[:, None]).sum().backward()
    scale = torch.nn.Parameter(torch.zeros(()))
    scale.grad = torch.tensor(1.0 + 2 * rank)
    distributed.average_gradient(scale)
    distributed.average_gradient(torch.nn.Parameter(torch.zeros(())))  # without a gradient, nothing is asked
    said = {
        "plain": distributed.gather(local).tolist(),
        "everything": everything.tolist(),
        "gradient": leaf.grad.tolist(),
        "none": distributed.gather_with_gradient(None),
        "smallest": distributed.smallest_count(5 - rank, local.device),
        "largest": distributed.largest(5 + rank, distributed.cpu_group()),
        "average": scale.grad.item(),
    }
    outcome.with_name(f"{rank}.json").write_text(json.dumps(said))
    os._exit(0)


def test_what_two_processes_gather(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=gathered_in, args=(rank, tmp_path / "store", tmp_path / "x")) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    rows = [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]
    for rank in (0, 1):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["plain"] == said["everything"] == rows and said["none"] is None
        # Of the whole batch, times the two processes that DistributedDataParallel divides by.
        assert said["gradient"] == [[2.0 * weight] * 3 for weight in ((0, 1), (2, 3))[rank]]
        assert (said["smallest"], said["largest"], said["average"]) == (4, 6, 2.0)


def test_a_process_alone_gathers_nothing():
    rows = torch.ones(2, 3)
    assert distributed.gather(rows) is rows and distributed.gather_with_gradient(rows) is rows
    assert distributed.cpu_group() is None and distributed.largest(3, None) == 3
