"""Stages: what each takes over, that they resume to the last bit, and the sentences before them."""

import gc
import itertools
import json
import re
import shutil
import signal
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the folder off the path

import pytest
import torch
from forked_runs import Forked, ForkedRun, exit_status_without_pictures, two_ranks
from tiny_runs import (
    checkpoint_of,
    differences,
    metrics_of,
    snapshot,
    summary_of,
    tensors_of,
    tiny_command,
)

from dinov3core.train import pretrain as command
from dinov3core.train.engine import checkpoint, stages
from dinov3core.train.engine.config import ConfigError
from dinov3core.train.engine.monitor import Monitor
from dinov3core.train.engine.parallel import World
from dinov3core.train.engine.stopping import TrainingStopped
from dinov3core.train.engine.trainer import Trainer
from dinov3core.train.pretrain import main, parse, stages_of
from dinov3core.train.recipes.registry import CHAINS, RECIPES, following

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 6
SHORT = ("--run.epoch-steps", str(STEPS), "--run.checkpoint-every", "2", "--data.scenes", "32")
NAMES = ("quickstart", "quickstart_gram", "quickstart_highres")
# names of the run folders beside --run.out=.../run
FOLDERS = ("run", "run_gram", "run_highres")


def arguments(out: Path, *more: str, name: str = "quickstart") -> list[str]:
    """A command line of 6 steps for each stage."""
    return [name, *tiny_command(out, *SHORT, *more)[1:]]


def stage(out: Path, number: int, *more: str) -> list[str]:
    """The command line of one stage of the chain whose first run is `out`/run, alone."""
    before = (*("--run.from", str(out / FOLDERS[number - 1])),) if number else ()
    return arguments(out / FOLDERS[number], *before, *more, name=NAMES[number])


def without_pictures(argv: list[str], log: Path) -> Forked:
    """A run in a process of its own that draws nothing."""
    return Forked(log, exit_status_without_pictures, argv)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second of every run."""
    monkeypatch.setattr(Monitor, "report", lambda *_: None)
    monkeypatch.setattr(Monitor, "snapshot_before", lambda *_: None)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages in one go, in a process of its own."""
    out = tmp_path_factory.mktemp("chain")
    run = ForkedRun([*arguments(out / "run"), "--stages", "all"], out / "log")
    assert run.wait() == 0, run.said()
    return out


@pytest.fixture
def earlier(chain: Path, tmp_path: Path) -> Path:
    """A folder with the first run alone, in `run`."""
    shutil.copytree(chain / "run", tmp_path / "run")
    return tmp_path


def taken(earlier: Path, number: int, *more: str) -> Trainer:
    """A stage as it is before its first step."""
    recipe = parse(stage(earlier, number, *more))
    trainer = Trainer(recipe, ALONE)
    stages.take_over(recipe, trainer)
    return trainer


# --- what is taken over


def test_a_continued_run_has_the_weights_heads_and_moments_of_the_earlier_one(
    earlier: Path, tmp_path: Path
) -> None:
    before = tensors_of(earlier / "run", STEPS, tmp_path / "before.pt")
    trainer = taken(earlier, 1)
    now = {name: tensor for name, tensor in snapshot(trainer).items() if "gram_" not in name}
    assert differences(now, {name: t for name, t in before.items() if "buffers" not in name}) == []
    counts = {float(now[name]) for name in now if name.endswith(".step")}
    assert counts == {float(STEPS)}


def test_a_teacher_taken_is_student_and_teacher_and_the_optimizer_is_new(
    chain: Path, tmp_path: Path
) -> None:
    before = tensors_of(chain / "run_gram", STEPS, tmp_path / "before.pt")
    trainer = taken(chain, 2)
    now = snapshot(trainer)
    assert not any(name.startswith("optimizer.") for name in now)
    for name, tensor in before.items():
        group, _, rest = name.partition(".")
        if group == "teacher":
            assert torch.equal(now[f"student.{rest}"], tensor), name
            assert torch.equal(now[f"teacher.{rest}"], tensor), name
    assert any(
        not torch.equal(before[f"student.{name.partition('.')[2]}"], tensor)
        for name, tensor in before.items()
        if name.startswith("teacher.")
    )


@pytest.mark.parametrize("number", [1, 2])
def test_steps_count_from_0_and_moments_go_on(chain: Path, number: int, tmp_path: Path) -> None:
    out = chain / FOLDERS[number]
    rows = [row for row in metrics_of(out) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    after = tensors_of(out, STEPS, tmp_path / "after.pt")
    counts = {float(after[name]) for name in after if name.endswith(".step")}
    assert counts == {float(STEPS * (2 if number == 1 else 1))}


@pytest.mark.parametrize(("asked", "held"), [(4, 4), (5, 4), (6, 6), (1, 2), (100, 6)])
def test_patches_are_held_to_an_earlier_teacher(
    earlier: Path, asked: int, held: int, tmp_path: Path
) -> None:
    """Its newest checkpoint of at most so many steps, else its oldest."""
    trainer = taken(earlier, 1, "--gram.teacher.step", str(asked))
    then = tensors_of(earlier / "run", held, tmp_path / "then.pt")
    anchor = trainer.gram_teacher.state_dict()
    assert anchor
    for name, tensor in anchor.items():
        assert torch.equal(tensor, then[f"teacher.backbone.{name}"]), name


def test_the_anchor_is_named_and_needs_no_earlier_run_on_resume(earlier: Path) -> None:
    argv = stage(earlier, 1, "--gram.teacher.step", "4")
    main(argv)
    summary = summary_of(earlier / "run_gram")
    assert summary["began"].endswith("after step 6, its patches held to those after step 4")
    shutil.rmtree(earlier / "run")
    assert Trainer(parse(argv), ALONE).gram_teacher is not None


def test_a_gram_snapshot_is_the_teacher_of_the_earlier_run(earlier: Path, tmp_path: Path) -> None:
    trainer = taken(earlier, 1, "--gram.teacher", "snapshot")
    assert trainer.resolved.refreshes.begins_before(0)
    trainer._begin_gram_teacher(0)
    before = tensors_of(earlier / "run", STEPS, tmp_path / "before.pt")
    for name, tensor in trainer.gram_teacher.state_dict().items():
        assert torch.equal(tensor, before[f"teacher.backbone.{name}"]), name


def test_the_start_is_evaluated_as_the_earlier_run_ended(chain: Path) -> None:
    ends = [summary_of(chain / folder) for folder in FOLDERS]
    assert ends[1]["knn_before"] == ends[0]["knn_after"]  # on the same images


def test_a_stage_says_what_it_began_as(chain: Path) -> None:
    anchored = f"its patches held to those after step {STEPS}"
    words = [f"continues {chain / 'run'} after step {STEPS}, {anchored}"]
    words += [f"begins as the teacher of {chain / 'run_gram'} after step {STEPS}"]
    assert summary_of(chain / "run")["began"] == ""
    for folder, sentence in zip(FOLDERS[1:], words, strict=True):
        summary = summary_of(chain / folder)
        record = json.loads((chain / folder / "config.json").read_text())
        assert summary["began"] == record["began"] == sentence
        assert summary["beginning"]["step"] == STEPS and len(summary["beginning"]["weights"]) == 16
        page = (chain / folder / "report.html").read_text()
        assert sentence in page and "the start of this stage" in page
        assert "ntrained network" not in page
    assert "At the start of this stage" not in (chain / "run" / "report.html").read_text()
    assert record["recipe"]["run"]["from"] == str(chain / "run_gram")


def test_networks_of_a_stage_are_gone_before_the_next(
    tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop freezes garbage; what is frozen would stay for ever."""
    alive: list[Any] = []
    initialise = Trainer.__init__

    def init(self: Trainer, *args: Any, **named: Any) -> None:
        assert not any(earlier() for earlier in alive)
        alive.append(weakref.ref(self))
        self.itself = self  # wrapped and compiled networks hold such circles
        initialise(self, *args, **named)

    monkeypatch.setattr(Trainer, "__init__", init)
    with patch.object(command, "following", lambda name: list(NAMES[1:2])):
        main([*arguments(tmp_path / "run", "--run.epoch-steps", "2"), "--stages", "all"])
    gc.collect()
    assert len(alive) == 2 and not any(earlier() for earlier in alive)


# --- one command


def test_the_chain_says_what_came_of_it(chain: Path) -> None:
    said = (chain / "log").read_text()
    change = r"[\d.]+ -> [\d.]+ %( \(within two standard errors\))?"
    for number, (name, folder) in enumerate(zip(NAMES, FOLDERS, strict=True), 1):
        assert f"stage {number} of 3, {name}\n" in said
        row = (
            rf"  {name}: {STEPS} steps in \d+ s, k-NN {change}, patch agreement {change}; "
            rf".*/{folder}/report\.html"
        )
        assert re.search(row, said), said[-600:]
    assert "all 3 stages are finished:" in said
    assert f"this run continues {chain / 'run'} after step {STEPS}" in said
    assert "at its start" in said


def test_finished_stages_are_passed_over(
    chain: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "step", None)
    main([*arguments(chain / "run"), "--stages=all"])
    said = capsys.readouterr()
    for number, folder in enumerate(FOLDERS, 1):
        assert re.search(rf"stage {number} of 3, \w+: finished in .*/{folder}\n", said.err)
    assert said.out.startswith("all 3 stages are finished:") and said.out.count("\n") == 4


def begins_as(stage: Path, run: Path, weights: str) -> None:
    """Let the last checkpoint of a stage say that it began with these weights of that run."""
    file = checkpoint_of(stage, STEPS) / "state.json"
    state = json.loads(file.read_text())
    state["beginning"] |= {"run": str(run), "weights": weights}
    state["recipe"]["run.from"] = str(run)
    del state["digest"]
    file.write_text(json.dumps(state | {"digest": checkpoint._seal(state)}))


def test_stages_of_another_run_are_not_passed_over(
    earlier: Path, chain: Path, no_pictures: None, capsys: pytest.CaptureFixture
) -> None:
    """A stage is finished when it is of this recipe, and began from what is there now."""
    for folder in FOLDERS[1:]:
        shutil.copytree(chain / folder, earlier / folder)
    begins_as(earlier / "run_gram", earlier / "run", "of another run")
    main([*arguments(earlier / "run"), "--stages", "all"])
    said = capsys.readouterr().err
    assert "stage 1 of 3, quickstart: finished" in said
    assert (
        "stage 2 of 3, quickstart_gram\n" in said and "stage 3 of 3, quickstart_highres\n" in said
    )
    assert f"the earlier run in {earlier / 'run_gram'} is kept as" in said

    main([*arguments(earlier / "run", "--run.seed", "1"), "--stages", "all"])
    assert "stage 1 of 3, quickstart\n" in capsys.readouterr().err


HALVES = ("--run.accumulation", "2")


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages with two micro-batches."""
    out = tmp_path_factory.mktemp("accumulated")
    run = without_pictures([*arguments(out / "run", *HALVES), "--stages", "all"], out / "log")
    assert run.wait() == 0, run.said()
    return out


@pytest.mark.parametrize("more", [(), HALVES], ids=["whole", "accumulated"])
def test_a_chain_killed_in_every_stage_comes_to_the_same_bits(
    more: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    straight: Path = request.getfixturevalue("accumulated" if more else "chain")
    argv = [*arguments(tmp_path / "run", *more), "--stages", "all"]
    for number, folder in enumerate(FOLDERS):
        killed = without_pictures(argv, tmp_path / f"log{number}")
        killed.until(checkpoint_of(tmp_path / folder, 4).is_dir)
        killed.signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert not (tmp_path / folder / "summary.json").exists()
        assert len(re.findall(": finished in", killed.said())) == max(number - 1, 0)

    last = without_pictures(argv, tmp_path / "log3")
    assert last.wait() == 0, last.said()
    assert re.search(rf"resuming after step [46] from {tmp_path / FOLDERS[2]}", last.said())
    for folder in FOLDERS:
        want = tensors_of(straight / folder, STEPS, tmp_path / "want.pt")
        assert differences(tensors_of(tmp_path / folder, STEPS, tmp_path / "got.pt"), want) == []
        losses = [row.get("loss") for row in metrics_of(tmp_path / folder)]
        assert losses == [row.get("loss") for row in metrics_of(straight / folder)]


def test_a_stage_alone_is_that_of_the_chain_and_needs_the_earlier_run_no_more(
    earlier: Path, chain: Path, tmp_path: Path
) -> None:
    argv = stage(earlier, 1)
    killed = without_pictures(argv, tmp_path / "log")
    killed.until(checkpoint_of(earlier / "run_gram", 2).is_dir)
    killed.signal(signal.SIGKILL)
    killed.wait()
    shutil.rmtree(earlier / "run")
    run = without_pictures(argv, tmp_path / "again")
    assert run.wait() == 0, run.said()
    assert "resuming after step" in run.said()
    want = tensors_of(chain / "run_gram", STEPS, tmp_path / "want.pt")
    assert differences(tensors_of(earlier / "run_gram", STEPS, tmp_path / "got.pt"), want) == []
    assert summary_of(earlier / "run_gram")["began"].startswith(
        f"continues {earlier / 'run'} after step 6"
    )


def test_two_processes_continue_the_run_of_one(earlier: Path, chain: Path, tmp_path: Path) -> None:
    """Together they have the weights that one process would have begun with."""
    half = ("--run.batch-size", "2")
    argv = [*arguments(earlier / "run", *half), "--stages", "all"]
    with two_ranks(tmp_path / "rank", exit_status_without_pictures, argv) as ranks:
        assert [rank.wait(120) for rank in ranks] == [0, 0], "\n".join(r.said() for r in ranks)
        assert "stage 1 of 3, quickstart: finished" in ranks[0].said()
        assert "stage" not in ranks[1].said()
    first, want = (metrics_of(out / "run_gram")[0] for out in (earlier, chain))
    assert first["step"] == want["step"] == 0 and first["knn"] == want["knn"]
    assert summary_of(earlier / "run_highres")["steps"] == STEPS
    grown = tensors_of(earlier / "run_gram", STEPS, tmp_path / "grown.pt")
    steps = {float(grown[name]) for name in grown if name.endswith(".step")}
    assert steps == {2.0 * STEPS}


# --- names and folders


@pytest.mark.parametrize(
    ("line", "folders"),
    [
        ("", "runs/quickstart runs/quickstart_gram runs/quickstart_highres"),
        ("quickstart_gram", "runs/quickstart_gram runs/quickstart_highres"),
        ("vits16_1gpu", "runs/vits16_1gpu runs/vits16_gram runs/vits16_highres"),
        ("quickstart --run.out a/b", "a/b a/b_gram a/b_highres"),
        ("quickstart --run.out=b", "b b_gram b_highres"),
        (
            "quickstart --data.source x/cats",
            "runs/quickstart-cats runs/quickstart_gram-cats runs/quickstart_highres-cats",
        ),
        ("quickstart --data.source x/cats --run.out c", "c c_gram c_highres"),
    ],
)
def test_folders_of_a_chain(line: str, folders: str) -> None:
    chain = list(stages_of(line.split()))
    assert [str(stage.recipe.folder) for stage in chain] == folders.split()
    for before, stage in itertools.pairwise(chain):
        assert stage.recipe.earlier == before.recipe.folder
    for stage in chain:
        assert parse(stage.origin.argv) == stage.recipe  # its own command, alone


def test_options_count_for_all_stages_and_some_for_the_first() -> None:
    line = "quickstart_gram --run.seed 3 --run.from runs/mine --run.take teacher --optim.clip 2"
    first, second = (stage.recipe for stage in stages_of(line.split()))
    assert first.run.seed == second.run.seed == 3 and first.optim.clip == second.optim.clip == 2
    assert (str(first.earlier), first.run.take) == ("runs/mine", "teacher")
    assert (str(second.earlier), second.run.take) == ("runs/quickstart_gram", "teacher")
    first, *others = (s.recipe for s in stages_of("quickstart --run.init weights.pt".split()))
    assert first.run.init == "weights.pt" and not any(other.run.init for other in others)


def test_a_chain_states_the_earlier_run_of_each_recipe() -> None:
    for chain in CHAINS:
        names = [recipe.__name__ for recipe in chain]
        assert [recipe().run.from_ for recipe in chain] == ["", *names[:-1]]
        assert following(names[0]) == names[1:] and following(names[-1]) == []
    assert following("photos") == []
    assert all(recipe().run.from_ in ("", *RECIPES) for recipe in RECIPES.values())


def test_a_stage_on_images_of_ones_own_continues_the_run_on_them() -> None:
    recipe = parse(["quickstart_gram", "--data.source", "x/cats"])
    assert (str(recipe.folder), str(recipe.earlier)) == (
        "runs/quickstart_gram-cats",
        "runs/quickstart-cats",
    )
    given = parse(["quickstart_gram", "--data.source", "x/cats", "--run.from", "y/z"])
    assert str(given.earlier) == "y/z"


# --- sentences


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "quickstart_gram",
            "run.from: there is no run in runs/quickstart; make it first: "
            "python train/pretrain.py quickstart",
        ),
        (
            "quickstart_gram --data.source x/cats",
            "run.from: there is no run in runs/quickstart-cats; make it first: python "
            "train/pretrain.py quickstart --data.source x/cats --run.out runs/quickstart-cats",
        ),
        (
            "quickstart_highres --run.from a/b",
            "run.from: there is no run in a/b; make it first: "
            "python train/pretrain.py quickstart_gram --run.out a/b",
        ),
        (
            "quickstart_gram --run.out runs/quickstart",
            "run.from: the stage would write into runs/quickstart, the folder of the run it starts "
            "from; give it another one with --run.out",
        ),
        (
            "quickstart_gram --run.init w.pt",
            "run.init w.pt and run.from quickstart both say what to start from; give one of them",
        ),
        (
            "quickstart --stages some",
            "--stages: expected all, got 'some'; for one stage alone give its name: "
            "python train/pretrain.py quickstart_gram",
        ),
        ("quickstart --stages", "--stages: expected all, got ''; for one stage alone give its "),
        (
            "photos --stages all",
            "--stages all: no recipe continues photos; stages that are continued: quickstart, "
            "quickstart_gram, vits16_1gpu, vits16_gram, vit7b16_pretrain, vit7b16_gram",
        ),
    ],
)
def test_what_cannot_start_is_refused_in_a_sentence(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        main(line.split())
    assert str(refused.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


def refusal(argv: list[str]) -> str:
    with pytest.raises((ConfigError, TrainingStopped)) as refused:
        main(argv)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_unfinished_run_is_named_with_the_command_that_finishes_it(earlier: Path) -> None:
    run = earlier / "run"
    (run / "summary.json").unlink()
    said = refusal(stage(earlier, 1))
    begins = f"run.from: the run in {run} is not finished (it is saved after step {STEPS}); "
    assert said.startswith(f"{begins}finish it first: python train/pretrain.py quickstart --backbo")
    assert said.endswith(f"--data.scenes 32 --run.out {run}")  # which was made elsewhere

    shutil.rmtree(run / "checkpoints")
    assert refusal(stage(earlier, 1)).startswith(f"run.from: the run in {run} is not finished; ")
    (run / "summary.json").write_text('{"steps": 5}')
    assert "is not finished; finish" in refusal(stage(earlier, 1))
    (run / "summary.json").write_text('{"steps": 6}')
    assert "has no checkpoint of its last step 6 that can be read" in refusal(stage(earlier, 1))
    for damaged in ("{", "[]", '{"steps": "all"}'):
        (run / "summary.json").write_text(damaged)
        assert "is not finished" in refusal(stage(earlier, 1))
    (run / "config.json").write_text('{"resolved": 1, "argv": [1], "recipe": []}')
    assert "finish it first: python train/pretrain.py quickstart --run.out" in refusal(
        stage(earlier, 1)
    )
    assert not (earlier / "run_gram").exists()


def test_a_damaged_last_checkpoint_is_no_start(earlier: Path) -> None:
    newest = checkpoint_of(earlier / "run", STEPS)
    tensors = next((newest / "tensors").glob("*.distcp"))
    tensors.write_bytes(tensors.read_bytes()[:-9])
    said = refusal(stage(earlier, 1))
    assert f"the last checkpoint of {earlier / 'run'} is damaged (step_00000006: tensors/" in said
    (newest / "state.json").write_text("{")
    assert "no checkpoint of its last step 6" in refusal(stage(earlier, 1))


@pytest.mark.parametrize(
    ("field", "was", "value"),
    [
        ("backbone.width", 32, 64),
        ("backbone.patch_size", 8, 4),
        ("backbone.heads", 2, 1),
        ("backbone.norm", "layernorm_eps5", "layernorm"),
        ("dino.prototypes", 24, 25),
        ("ibot.bottleneck", 8, 9),
    ],
)
def test_the_first_field_of_another_architecture_is_named(
    earlier: Path, field: str, was: object, value: object
) -> None:
    option = field.replace("_", "-")
    said = refusal(stage(earlier, 1, f"--{option}", str(value)))
    was = checkpoint.newest_stated(earlier / "run" / "checkpoints").state["recipe"][field]
    assert said == (
        f"run.from: {earlier / 'run'} was trained with {field} {was} and this stage has {value}; "
        f"give it --{option} {was}, or another run to start from"
    )


def test_taking_over_compares_the_networks_itself(earlier: Path) -> None:
    """Another norm has the same tensors, so that they would fit."""
    with pytest.raises(ConfigError, match=r"run was trained with backbone\.norm \w+ and"):
        taken(earlier, 1, "--backbone.norm", "layernorm")


def test_what_acts_in_training_alone_may_differ(earlier: Path) -> None:
    assert stages.MAY_DIFFER <= stages.changes.stated(parse(["quickstart"]), 1).keys()
    values = dict.fromkeys(stages.MAY_DIFFER, "0.0") | {"backbone.rope.draw": "forward"}
    more = [word for name in values for word in (f"--{name.replace('_', '-')}", values[name])]
    drawing = ("--backbone.drop-path", "0.3", "--backbone.rope.rescale", "2")
    assert taken(earlier, 1, *more, *drawing).student.backbone.settings.drop_path == 0.3


def test_a_retrained_earlier_run_is_noticed_by_an_unfinished_stage(
    earlier: Path, chain: Path, tmp_path: Path, no_pictures: None
) -> None:
    argv = stage(earlier, 1)
    killed = without_pictures(argv, tmp_path / "log")
    killed.until(checkpoint_of(earlier / "run_gram", 2).is_dir)
    killed.signal(signal.SIGKILL)
    killed.wait()
    shutil.rmtree(earlier / "run")
    main(arguments(earlier / "run", "--run.seed", "1"))
    said = refusal(argv)
    assert f"another recipe: {earlier / 'run'} holds another run than this stage took over." in said
    main([*argv, "--run.accept-changes", "True"])


def test_a_name_and_its_folder_are_the_same_run(tmp_path: Path) -> None:
    named, given = (
        stages.changes.stated(parse(["quickstart_gram", "--run.from", text]), 1)
        for text in ("quickstart", "./runs/quickstart/")
    )
    assert named == given and named["run.from"] == "runs/quickstart"


def test_stages_of_unlike_networks_are_refused_before_the_first_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wider() -> Any:
        recipe = RECIPES["vits16_gram"]()
        return replace(recipe, run=replace(recipe.run, from_="quickstart"))

    monkeypatch.setitem(RECIPES, "wider", wider)
    monkeypatch.setattr(command, "following", lambda name: ["wider"])
    said = refusal(["quickstart", "--run.out", str(tmp_path / "run"), "--stages", "all"])
    assert "was trained with backbone.width 96 and this stage has 384" in said
    assert list(tmp_path.iterdir()) == []
