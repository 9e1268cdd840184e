"""Compiled blocks: one graph per width and number of tokens, the same numbers, the same names, nothing made twice."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny_dtm
import tiny_lut
import torch
from runs import Finished, train_together
from torch._dynamo.utils import counters
from torch.optim import SGD

from engine.checkpoints.comparing import check_same_run, other_circumstances
from engine.compiling import (
    INDUCTOR,
    announced,
    compile_blocks,
    compile_note,
    compiles,
    explained,
    transformer_blocks,
)
from engine.console import Console
from engine.objectives.contract import AVERAGE, Objective
from engine.objectives.lut import ContextualAutoencoder
from engine.objectives.mae import MaskedAutoencoder
from engine.shell import OnThisRank
from engine.start_up import is_structural, may_differ
from recipes import registry
from recipes.methods import Lut, Mae
from recipes.overrides import apply_overrides
from recipes.schema import Recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEPTH = 10  # more blocks than the graphs that a function may have
LIMIT = torch._dynamo.config.recompile_limit


def recipe(*overrides: str) -> Recipe:
    return apply_overrides(registry.load("vit_ti_lut_demo"), list(overrides))


def lut(**changes: object) -> ContextualAutoencoder:
    torch.manual_seed(0)
    settings = Lut(**tiny_lut.DECODER | {"decoder_depth": 9}, head_hidden=24)
    return ContextualAutoencoder(settings, replace(tiny_lut.TINY, depth=DEPTH, **changes), 32).train()


def mae(**changes: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(Mae(**tiny_lut.DECODER), replace(tiny_lut.TINY, depth=DEPTH, **changes), 32).train()


def dtm(**changes: object) -> Objective:
    return tiny_dtm.tiny(model=replace(tiny_dtm.TINY, depth=DEPTH, **changes)).train()


# Objective, its batch, and its graphs: LUT's are the average's, the student's, the decoder's.
OBJECTIVES = {
    "mae": (mae, tiny_lut.batch_of(), 2),
    "lut": (lut, tiny_lut.batch_of(), 3),
    "dtm": (dtm, tiny_dtm.batch_of(4), 1),
}


def losses(objective: Objective, batch: object, steps: int = 3) -> list[float]:
    """Of as many steps of training, each with its own seed, as the loop sets it."""
    optimizer, found = SGD(objective.parameters(), lr=0.01), []
    for step in range(steps):
        torch.manual_seed(step)
        loss = objective(batch, step)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step, 10)
        found.append(loss.item())
    return found


@pytest.fixture(autouse=True)
def afresh():
    """What others compiled is forgotten, and what is compiled here."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", [n if n == "lut" else pytest.param(n, marks=pytest.mark.long) for n in OBJECTIVES])
def test_blocks_share_graphs_and_compute_the_same(name):
    make, batch, expected = OBJECTIVES[name]
    plain, compiled = make(), make()
    names = list(compiled.state_dict()), list(compiled.outside_state())
    num_blocks = compile_blocks(compiled, recipe("compile=blocks"), backend="aot_eager")
    assert num_blocks == sum(1 for network in (plain, *plain.outside.values()) for _ in transformer_blocks(network))
    assert losses(compiled, batch) == losses(plain, batch)
    assert num_graphs() == expected
    assert (list(compiled.state_dict()), list(compiled.outside_state())) == names
    assert losses(compiled, batch) and num_graphs() == expected  # nothing is compiled again


def test_drop_path_has_one_graph_for_all_rates():
    """Of blocks with it and the first, without; the same images lose their branches as without compiling."""
    plain, compiled = dtm(drop_path=0.4), dtm(drop_path=0.4)
    compile_blocks(compiled, recipe("compile=blocks"), backend="aot_eager")
    assert losses(compiled, tiny_dtm.batch_of(4)) == losses(plain, tiny_dtm.batch_of(4))
    assert num_graphs() == 2


def test_evaluation_adds_a_graph_per_batch_size():
    """Both modes, whole batches and the last one, stay below the limit at which torch gives up compiling."""
    compiled = lut()
    compile_blocks(compiled, recipe("compile=blocks"), backend="aot_eager")
    losses(compiled, tiny_lut.batch_of(), steps=1)
    for _ in range(2):
        compiled.eval()
        with torch.no_grad():
            for count in (4, 4, 3):
                compiled.encoder(torch.zeros(count, 3, 32, 32))
        losses(compiled.train(), tiny_lut.batch_of(), steps=1)
    assert num_graphs() == 5 < LIMIT


def test_a_copy_is_not_compiled():
    compiled = lut()
    compile_blocks(compiled, recipe("compile=blocks"), backend="aot_eager")
    deepcopy(compiled.encoder)(torch.zeros(2, 3, 32, 32))
    assert num_graphs() == 0


def test_who_is_compiled():
    """auto: on a GPU; stage 3: only what ZeRO does not divide."""
    wanted = {"auto": (False, True), "off": (False, False), "blocks": (True, True)}
    for how, where in wanted.items():
        assert tuple(compiles(recipe(f"compile={how}"), device) for device in (CPU, GPU)) == where
    objective = lut()
    assert compile_blocks(objective, recipe()) == 0 and compile_note(recipe(), CPU) == ""
    divided = recipe("compile=blocks", "zero.stage=3")
    assert compile_blocks(objective, divided, backend="eager") == DEPTH
    assert all(block._compiled_call_impl for block in objective.outside[AVERAGE]["encoder"].blocks)
    assert not any(block._compiled_call_impl for block in transformer_blocks(objective))
    assert "stage=3" in compile_note(divided, CPU) and "every" in compile_note(recipe(), GPU)


def test_another_choice_is_said_when_a_run_goes_on():
    """As far as it is another: auto compiles nothing on a CPU."""

    def facts(hardware: str, **fields: str) -> dict:
        same = {"dataset": "d", "objective": {}, "world_size": 1, "versions": {}}
        return same | {"step": 7, "recipe": fields, "hardware": hardware}

    def told(was: dict, now: dict) -> list[str]:
        check_same_run(was, now, harmless=may_differ, structural=is_structural, allow_changes=False)
        return other_circumstances(was, now)

    cpu, gpu, before = "cpu, x86_64", "NVIDIA H200, x86_64", {}  # a checkpoint from before there was a choice
    assert told(facts(cpu, **before), facts(cpu, compile="auto")) == []
    assert told(facts(gpu, compile="blocks"), facts(gpu, compile="auto")) == []
    for now in (facts(gpu, compile="auto"), facts(gpu, compile="blocks")):
        (line,) = told(facts(gpu, **before), now)
        assert line == "compile     was off, now blocks: equal to rounding, not bitwise"


# --- what a user is told --------------------------------------------------------------------------------------------


def test_what_the_compiler_cannot_do_is_said_in_a_line():
    """With the way out; other errors pass as they are."""

    def failing(*_: object) -> None:
        raise FileNotFoundError("no compiler for C++\nand more")

    compiled = mae()
    compile_blocks(compiled, recipe("compile=blocks"), backend=failing)
    with pytest.raises(OnThisRank) as raised, explained(recipe("compile=blocks"), rank=3):
        compiled(tiny_lut.batch_of(), 0)
    text = str(raised.value)
    assert text.startswith("rank 3: compile=blocks: ") and "no compiler for C++" in text and "compile=off" in text
    assert "\n" not in text
    with pytest.raises(RuntimeError, match="^another$"), explained(recipe(), rank=0):
        raise RuntimeError("another")


def test_the_step_that_compiles_is_announced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.console.PATIENCE", 0.01)
    console = Console(tmp_path, enabled=True, total_steps=3, start_step=0)
    for step, long in ((1, True), (2, False)):
        with announced(console, step, compiles=long):
            time.sleep(0.2)
    console.close()
    assert capsys.readouterr().out.split("\n") == ["step 1: compiling ...", ""]


@pytest.mark.long
@pytest.mark.parametrize("name", OBJECTIVES)
def test_inductor_computes_the_same_to_rounding_and_twice_the_same_bits(name):
    make, batch, _ = OBJECTIVES[name]
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        compiled = make()
        compile_blocks(compiled, recipe("compile=blocks"))
        found.append(losses(compiled, batch))
    assert found[0] == found[1] == pytest.approx(losses(make(), batch), rel=1e-5)
    assert INDUCTOR["options"] == {"deterministic": True}


@pytest.mark.long
def test_compiled_runs_at_every_stage(shards, tmp_path):
    """The losses of a run that is not compiled but for rounding; resumed in another process, the same bits."""
    settings = (
        "--recipe", "vit_ti_dtm_demo", "teacher=pixels", f"data.train={shards}/train", "data.val=", "data.threads=1",
        "model.embed_dim=32", "model.depth=3", "model.num_heads=4", "optim.global_batch=16", "optim.micro_batch=8",
        "run.log_every=1", "run.save_every=0", "run.steps=4", "zero.param_persistence_threshold=0",
    )  # fmt: skip
    stages = {f"stage{stage}": f"compile=blocks,zero.stage={stage},precision=fp32" for stage in range(4)}
    runs = ["plain=precision=fp32", *(f"{name}={fields}" for name, fields in stages.items()), "bf16=compile=blocks"]
    train_together(tmp_path, *runs, "part=compile=blocks,run.stop_after=2", "--", *settings)
    train_together(tmp_path, "part=compile=blocks,--resume", "--", *settings)

    def metrics(name: str) -> list[float]:
        return [line["loss"] for line in Finished(0, "", tmp_path / name).metrics]

    for name in stages:
        assert metrics(name) == pytest.approx(metrics("plain"), rel=1e-5), name
    assert metrics("part") == metrics("bf16") == pytest.approx(metrics("plain"), rel=2e-2)
