"""run.compile: one graph per block on any GPU, and evaluations that leave compiled blocks alone."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # --import-mode=importlib leaves the test folder off the path

import pytest
import torch
from tiny_runs import made_up_batch, tiny_recipe, with_run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from dinov3core.data.sizes import CropSizes
from dinov3core.ops import dispatch, rope_attention, rope_table, table_cache
from dinov3core.train.engine.loop import open_training_images
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.trainer import Trainer

CPU = torch.device("cpu")


def test_a_gpu_without_a_table_breaks_no_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line about it is written while tracing, once."""
    monkeypatch.setattr(dispatch, "is_gpu", lambda device: True)
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: "these kernels have no table")
    sin, cos = rope_table(2, 3, 8)

    def attention(qkv: Tensor) -> Tensor:
        return rope_attention(qkv, sin, cos, prefix_tokens=1)

    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    qkv = torch.randn(2, 7, 3, 2, 8)
    with caplog.at_level(logging.INFO, logger="dinov3core.ops"):
        torch.testing.assert_close(compiled(qkv), attention(qkv))
    lines = [record.getMessage() for record in caplog.records]
    sentence = "rope_attention: torch operations instead of the Triton kernels: "
    assert lines == [sentence + "these kernels have no table"]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts the graphs of modules that are compiled; a graph break is an error."""
    counter, compile_module = CompileCounter(), nn.Module.compile
    options = {"backend": counter, "fullgraph": True}
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **own: compile_module(self, **options, **own)
    )
    torch._dynamo.reset()
    return counter


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_evaluations_do_not_compile(graphs: CompileCounter, tmp_path: Path) -> None:
    """Batches and sizes of their own would use up torch's limit of 8 variants of a block."""
    recipe = with_run(tiny_recipe(), compile=True)
    trainer = Trainer(recipe, World(0, 1, CPU))
    monitor = Monitor(recipe, open_training_images(recipe)[0], tmp_path, CPU)
    counts, backbone = trainer.method.prototype_counts, trainer.teacher.backbone
    monitor.evaluate(backbone, counts, 0)
    monitor.snapshot_before(backbone)
    assert graphs.frame_count == 0
    for step in range(3):
        trainer.step(made_up_batch(recipe, 4, seed=step), step)
    trained = graphs.frame_count
    assert trained > 0
    monitor.evaluate(backbone, counts, 3)
    trainer.step(made_up_batch(recipe, 4, seed=3), 3)
    assert graphs.frame_count == trained


FIVE_SIZES = (
    *(CropSizes(0.3, 40, 16), CropSizes(0.3, 40, 24)),
    *(CropSizes(0.05, 40, 32), CropSizes(0.05, 32, 16)),
)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_size_has_graphs_of_its_own_and_no_more(
    graphs: CompileCounter, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Five sizes once exceeded torch's limit of 8 variants; what followed was not compiled."""
    monkeypatch.setattr(table_cache, "_entries", type(table_cache._entries)())
    recipe = with_run(tiny_recipe(), compile=True, accumulation=accumulation, epoch_steps=40)
    recipe = replace(
        recipe,
        backbone=replace(recipe.backbone, depth=3),
        crops=replace(recipe.crops, other_sizes=FIVE_SIZES),
    )
    trainer = Trainer(recipe, World(0, 1, CPU))
    of_each_size = [replace(recipe, crops=crops) for crops in recipe.crops.of_each_size]
    graphs_after = []
    tables_after = []
    for passing in range(3):
        for place, of_size in enumerate(of_each_size):
            step = passing * len(of_each_size) + place
            trainer.step(made_up_batch(of_size, 4, seed=step), step)
        graphs_after.append(graphs.frame_count)
        tables_after.append(len(table_cache._entries))

    # Of blocks: the student's and, per size of global crops, the teachers', each with its last one.
    # Of heads: those of student and teacher, then once more for any number of rows.
    blocks = 2 * 5 + 2 * 3
    assert graphs_after[0] <= trainer.student.backbone.graphs_of_a_size * len(of_each_size)
    if accumulation == 1:
        assert blocks < graphs_after[0] <= blocks + 4
        assert graphs_after == graphs_after[:1] * 3
    assert graphs_after[2] == graphs_after[1]
    assert tables_after == tables_after[:1] * 3 and tables_after[0] < table_cache.LIMIT
