"""Whole, smaller batches, layer by layer: planned by sizes, and mended where memory runs out."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_nexus
from safetensors.torch import load_file, save_file

from nexus_ds.checkpoint import pieces
from nexus_ds.checkpoint.inspection import describe
from nexus_ds.checkpoint.loading import load_model
from nexus_ds.checkpoint.needs import Need, Way
from nexus_ds.checkpoint.pieces import in_pieces, need_of, open_way, planned_way, warn_of_time
from nexus_ds.checkpoint.tensors import TensorReader
from nexus_ds.errors import CheckpointError, InsufficientMemoryError, LoadingMemoryError

CPU = torch.device("cpu")


@pytest.fixture
def need():
    return Need(
        weights=1000.0,
        layer=100.0,
        outside=50.0,
        resident=30.0,
        token=1.0,
        hidden=2.0,
        cache=3.0,
        active=600.0,
        stored=500.0,
        vocabulary=0,
        width=2.0,
    )


def test_what_runs_out_begins_anew_in_smaller_pieces(capsys):
    tried = []

    def work(way):
        tried.append(way)
        if not way.streamed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert in_pieces("score m", Way(False, 4), work) == "done"
    # without the weights, there may be room for the whole batch
    assert tried == [Way(False, 4), Way(False, 2), Way(False, 1), Way(True, 4)]
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "score m: memory ran out (whole, 1 sequence at once); it goes on layer by layer, "
        "4 sequences at once"
    )


@pytest.mark.parametrize("said", [MemoryError("no more"), CheckpointError("can't load")])
def test_weights_that_do_not_fit_are_loaded_whole_only_once(nexus_dir, monkeypatch, said):
    """transformers' own error of a lack of memory is told as one of the checkpoint."""
    tried = []

    def load(*asked):
        tried.append("whole")
        raise said from torch.OutOfMemoryError("CUDA out of memory")

    def work(way):
        open_way(nexus_dir, "auto", CPU, way)
        tried.append(way)
        if way.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    monkeypatch.setattr(pieces, "load_model", load)
    assert in_pieces("m", Way(False, 8), work) == "done"
    assert tried == ["whole", Way(True, 8), Way(True, 4), Way(True, 2)]
    with pytest.raises(LoadingMemoryError, match=r"were loaded \(.*\); run it layer by layer, or"):
        open_way(nexus_dir, "auto", CPU, Way(False, 8))


def test_a_checkpoint_that_is_damaged_is_no_lack_of_memory(nexus_dir, monkeypatch):
    def load(*asked):
        raise CheckpointError("damaged")

    monkeypatch.setattr(pieces, "load_model", load)
    with pytest.raises(CheckpointError, match="damaged"):
        open_way(nexus_dir, "auto", CPU, Way(False, 8))


def test_nothing_smaller_is_an_error_and_other_errors_pass():
    def fail(way):
        raise MemoryError("no more")

    with pytest.raises(
        InsufficientMemoryError, match=r"m: memory ran out with one layer .*\(no more\); give short"
    ):
        in_pieces("m", Way(True, 1), fail)
    with pytest.raises(ZeroDivisionError):
        in_pieces("m", Way(False, 8), lambda way: 1 / 0)


def test_the_way_is_said_where_it_is_not_the_one_asked_for(need, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "host_room", lambda: 10**9)
    monkeypatch.setattr(pieces, "room_on", lambda place: 10**9)
    assert planned_way(need, [CPU], 8, 10, "score m") == Way(False, 8)
    assert not capsys.readouterr().err
    # two copies on one machine share its memory
    monkeypatch.setattr(pieces, "room_on", lambda place: 1500)
    assert planned_way(need, [CPU], 8, 10, "score m") == Way(False, 8)
    assert planned_way(need, [CPU, CPU], 8, 10, "score m") == Way(True, 8)
    assert "score m: whole it takes 0.00 GB, free on cpu are 0.00 GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("room", "host", "said"),
    [
        (5e8, 1e12, "whole it takes 1.02 GB, free on cuda are 0.50 GB; it runs layer by layer"),
        (1.13e9, 1e12, "whole it takes 1.02 GB, free on cuda are 1.13 GB; it runs whole, 1 "),
        (
            1e12,
            9e8,
            "whole it takes 1.10 GB, free on the CPU, through which weights come, are 0.90 GB; "
            "it runs layer by layer, 2 sequences",
        ),
    ],
)
def test_what_is_short_is_named(monkeypatch, capsys, need, room, host, said):
    need = replace(need, weights=1e9, layer=1e8, token=1e6)
    monkeypatch.setattr(pieces, "host_room", lambda: host)
    monkeypatch.setattr(pieces, "room_on", lambda place: room)
    planned_way(need, [torch.device("cuda")], 2, 10, "m")
    assert said in capsys.readouterr().err


def test_sizes_are_read_off_the_files(tmp_path):
    make_nexus(tmp_path / "m")
    facts = describe(tmp_path / "m")
    found = need_of(tmp_path / "m", "fp32", CPU)
    reader = TensorReader(tmp_path / "m")
    # tied: the output layer is the embeddings, whatever else stands in the file
    infos = [reader.info(name) for name in reader.names() if name != "lm_head.weight"]
    assert found.weights == sum(4 * torch.Size(info.shape).numel() for info in infos)
    assert found.stored == sum(info.end - info.start for info in infos)
    assert found.outside + 2 * found.layer == found.weights
    assert found.active == facts["parameters"]["active"]
    assert need_of(tmp_path / "m", "stored", CPU).weights == found.stored


def test_a_mixture_with_a_dense_layer_is_counted_layer_by_layer(uneven_moe_dir):
    model = load_model(uneven_moe_dir)
    found = need_of(uneven_moe_dir, "fp32", CPU)
    # two experts of 24 are idle, in one layer
    assert found.active == model.num_parameters() - 2 * 3 * 24 * 16
    # 120 in the dense layer; 2 x 24 and the shared 32 in the other
    assert found.token == 4 * (8 * 16 + 3 * 120)


def test_only_long_work_that_is_slow_by_its_kind_is_told_of(need, monkeypatch, capsys):
    monkeypatch.setattr(pieces, "cpu_speed", lambda: 1200.0)
    assert not warn_of_time("m", need, 100, CPU)
    assert not warn_of_time("m", need, 10**6, torch.device("cuda"))
    assert not capsys.readouterr().err
    assert warn_of_time("m", need, 1000, CPU)
    said = capsys.readouterr().err
    threads = torch.get_num_threads()
    assert f"parameters and 1,000 tokens take about 16m40s on {threads} of " in said
    assert pieces.cpu_speed() > 0
    monkeypatch.setattr(pieces, "DISK_SPEED", 500.0)
    assert not warn_of_time("m", need, 1000, torch.device("cuda"), reads=120)
    assert warn_of_time("m", need, 1000, torch.device("cuda"), reads=121)
    said = capsys.readouterr().err
    assert said == "m: layer by layer; 121 times 0.0 GB are read, which takes about 2m01s\n"


def test_a_tied_output_layer_that_stands_in_the_file_counts_once(nexus_dir, tmp_path):
    """And one that differs from the embeddings is what transformers computes with: it counts."""
    once, other = (shutil.copytree(nexus_dir, tmp_path / name) for name in ("once", "other"))
    for directory, change in ((once, None), (other, 1.0)):
        tensors = load_file(directory / "model.safetensors")
        head = tensors.pop("lm_head.weight")
        if change:
            tensors["lm_head.weight"] = head + change
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    place = torch.device("cuda")
    twice, alone, odd = (need_of(path, "fp32", place) for path in (nexus_dir, once, other))
    assert twice == alone
    assert odd.outside == alone.outside + 4 * head.numel()
