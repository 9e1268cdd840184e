"""What a recipe is said to cost, against what is counted and measured on the real networks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, TINY, environment, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.checkpoints.manifests import total_bytes
from engine.console import format_record, loss_names
from engine.meter import Meter, peak_flops
from engine.objectives.contract import AVERAGE, Objective
from engine.objectives.dtm import DynamicTokenMorphing
from engine.objectives.lut import ContextualAutoencoder
from engine.objectives.mae import MaskedAutoencoder
from engine.objectives.mae_dtm import MorphedAutoencoder
from engine.plan import make_plan
from engine.runtime import Runtime
from engine.teachers import PixelTeacher, Teacher, clip_network
from recipes import registry
from recipes.costs.gpus import GPUS, known_gpu
from recipes.costs.memory import checkpoint_bytes, kept_bytes, memory_of
from recipes.costs.prediction import Prediction, predict
from recipes.costs.training import PIXELS, training_cost
from recipes.methods import Dtm, Lut, Mae, MaeDtm
from recipes.overrides import apply_overrides
from recipes.schema import Recipe
from tools import recipe as recipe_tool
from tools.benchmarks.gpu import TARGETS
from tools.recipe import between, plan_lines

OBJECTIVES = {
    Mae: MaskedAutoencoder, Lut: ContextualAutoencoder, Dtm: DynamicTokenMorphing, MaeDtm: MorphedAutoencoder
}  # fmt: skip
GFLOP = {  # ../shared/specs/performance.md, section 1: counted on the released modules
    "vit_s_lut": 63.8, "vit_b_lut": 154.4, "vit_l_lut": 461.7,
    "vit_s_dtm": 63.0, "vit_b_dtm": 140.9, "vit_l_dtm": 404.9,
}  # fmt: skip


def build(recipe: Recipe) -> Objective:
    """The objective, with CLIP's tower of random weights where it has a teacher."""
    settings, arguments = recipe.objective, {}
    if settings.has_teacher:
        size, patch = recipe.data.image_size, recipe.model.patch_size
        pixels = recipe.teacher == PIXELS
        teacher = (
            PixelTeacher(patch, recipe.num_patches) if pixels else bare_teacher(clip_network(size, patch_size=patch))
        )
        arguments = {"teacher": teacher, "seed": 0}
    return OBJECTIVES[type(settings)](settings, recipe.model, recipe.data.image_size, **arguments)


def bare_teacher(network: torch.nn.Module) -> Teacher:
    """A teacher whose weights, which are not real, cannot be hashed."""
    teacher = Teacher.__new__(Teacher)
    torch.nn.Module.__init__(teacher)
    teacher.network, teacher.dtype, teacher.factor, teacher.identity = network, torch.float32, None, ""
    teacher.num_patches, teacher.width = network.patch_embed.num_patches, network.num_classes
    return teacher


def imagine(module: torch.nn.Module) -> None:
    """Weights on a CPU that is only imagined, in the place of those on the meta device, which has no autocast."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(part, name, torch.nn.Parameter(empty, requires_grad=weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


@pytest.mark.parametrize("name", [n for n in registry.recipes() if not n.endswith("dtm_demo")])
def test_parameters_are_those_of_the_network(name):
    recipe = registry.load(name)
    with torch.device("meta"):
        objective = build(recipe)
    cost = training_cost(recipe)
    assert cost.trained == sum(p.numel() for p in objective.parameters() if p.requires_grad)
    outside = {key: sum(p.numel() for p in module.parameters()) for key, module in objective.outside.items()}
    assert (cost.average.parameters, cost.teacher.parameters) == (outside.get(AVERAGE, 0), outside.get("teacher", 0))


def forward(objective: Objective, recipe: Recipe, batch: int) -> torch.Tensor:
    """What is differentiated, for DTM without the comparison: a scalar."""
    size, patches = recipe.data.image_size, recipe.num_patches
    images = [torch.rand(batch, 3, size, size) for _ in range(recipe.objective.num_views)]
    noise = torch.rand(batch, objective.masks.num_noise)
    match objective:
        case MaskedAutoencoder():
            return objective(SimpleNamespace(views=images, noise=noise), 0)["loss"]
        case MorphedAutoencoder():
            objective.teacher(images[0])
            return objective.predict(images[0], noise)[0].sum()
    objective.teacher(images[0])
    mask = torch.zeros(batch, patches, dtype=torch.bool)
    return objective.predict(images[0], mask).sum()


@pytest.mark.parametrize(
    "name",
    [*GFLOP, "vit_b_mae", "vit_b_mae_dtm", "vit_b_dtm_pixels", "vit_b_dtm_absolute_positions", "vit_b_lut_400ep_masked",
     "vit_b_lut_400ep_pooled_tokenwise", "vit_b_lut_400ep_one_way", "vit_b_lut_400ep_teacher_mask_50",
     "vit_b_lut_400ep_no_predictor"],
)  # fmt: skip
def test_flops_are_those_that_torch_counts(name):
    """Without computing anything; attention as plain products, whose backward pass computes nothing twice."""
    recipe = registry.load(name)
    with torch.device("meta"):
        objective = build(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (*objective.outside.values(), objective):
            imagine(module)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            forward(objective, recipe, 2).backward()
    counted, cost = counter.get_total_flops() / 2, training_cost(recipe)
    assert cost.flops == pytest.approx(counted, rel=1e-6)
    if name in GFLOP:
        assert cost.flops / 1e9 == pytest.approx(GFLOP[name], rel=3e-3)


def small(name: str, *overrides: str) -> Recipe:
    return apply_overrides(
        registry.load(name),
        ["model.embed_dim=192", "model.num_heads=3", "model.depth=2", "data.image_size=112", *overrides],
    )


def saved_bytes(objective: Objective, recipe: Recipe, batch: int) -> float:
    """Bytes of the storages that autograd keeps, without the weights."""
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    weights = {p.untyped_storage().data_ptr() for p in [*objective.parameters(), *objective.buffers()]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor too, or its place is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = forward(objective, recipe, batch)
        assert loss.requires_grad
        return float(sum(size for size, _ in kept.values()))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["vit_s_mae", "vit_s_lut", "vit_s_dtm_absolute_positions"])
def test_what_is_kept_for_the_backward_pass(name, precision):
    """Per image, from two batch sizes: what is kept once (copies of weights) falls out, and is compared too."""
    positions = [
        "teacher=pixels",
        "objective.num_masked=20",
        "model.rel_pos_bias=false",
        "model.shared_rel_pos_bias=false",
        "model.abs_pos_emb=true",
    ]
    overrides = positions if name.endswith("positions") else []
    recipe = small(name.removesuffix("_absolute_positions"), f"precision={precision}", *overrides)
    objective = build(recipe)
    few, many = (saved_bytes(objective, recipe, batch) for batch in (2, 6))
    student = training_cost(recipe).student
    assert kept_bytes(recipe, student) == pytest.approx((many - few) / 4, rel=0.05)
    if precision == "bf16":
        assert 2 * student.matrices == pytest.approx(few - (many - few) / 2, rel=0.05)


@pytest.mark.long
def test_what_deepspeed_holds(tmp_path):
    """Weights, gradients and optimizer of one rank; what it gathers gradients in is freed or, at stage 3, kept."""
    names = ["fp32:0", "fp32:1", "bf16:1", "bf16:2", "bf16_params:1", "bf16_params:2"]
    command = [sys.executable, str(ROOT / "tests" / "states_worker.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    for name, held in json.loads(done.stdout.splitlines()[-1]).items():
        precision, stage = name.split(":")
        recipe = apply_overrides(registry.load("vit_b_mae"), [f"precision={precision}", f"zero.stage={stage}"])
        assert memory_of(recipe, gpus=1).states / training_cost(recipe).trained == pytest.approx(held, rel=0.03), name


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2])
def test_the_size_of_a_checkpoint(stage, shards, tmp_path):
    overrides = [
        "model.embed_dim=192", "model.num_heads=3", "objective.head_hidden=512", f"zero.stage={stage}",
        f"data.train={shards / 'train'}", "run.steps=1", "optim.global_batch=4", "precision=fp32",
    ]  # fmt: skip
    run = train(tmp_path / "run", *overrides, recipe="vit_ti_lut_demo")
    manifest = json.loads((run.newest_checkpoint() / "manifest.json").read_text())
    recipe = apply_overrides(registry.load("vit_ti_lut_demo"), [*TINY, *overrides])
    assert checkpoint_bytes(recipe) == pytest.approx(total_bytes(manifest), rel=0.03)


# --- while training -------------------------------------------------------------------------------------------------


def test_mfu_is_what_had_to_be_computed_by_what_could_have_been(monkeypatch):
    recipe, runtime = registry.load("vit_b_lut"), Runtime(0, 8, 0, 8, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    meter, metrics = Meter(make_plan(recipe, 50_000, 8), recipe, runtime), {"loss": 1.0, "grad_norm": 1.0}
    clock = iter([0.0, 20.0])
    monkeypatch.setattr("engine.meter.time.perf_counter", lambda: next(clock))
    meter.restart(0)
    record, _ = meter.record(10, metrics, 0.0)
    assert record["images_per_second"] == 2048
    assert record["mfu"] == pytest.approx(2048 * training_cost(recipe).flops / (8 * 989e12), abs=1e-4)
    assert "mfu 4 %" in format_record(record) and "mfu" not in loss_names(record)


@pytest.mark.parametrize(("device", "precision", "name"), [("cpu", "bf16", ""), ("cuda", "fp32", "NVIDIA H200"),
                                                           ("cuda", "bf16", "NVIDIA GeForce RTX 4090")])  # fmt: skip
def test_without_a_known_peak_there_is_no_mfu(device, precision, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    recipe = apply_overrides(registry.load("vit_b_mae"), [f"precision={precision}"])
    assert peak_flops(recipe, Runtime(0, 1, 0, 1, torch.device(device))) is None


# --- the prediction -------------------------------------------------------------------------------------------------


def test_without_communication_the_rate_is_the_planned_share_of_the_floor():
    """../shared/specs/performance.md, section 1: images/s of one H200 at 100 %."""
    for name, floor in {"vit_s_lut": 12384, "vit_b_lut": 5116, "vit_l_lut": 1711, "vit_b_dtm": 5607}.items():
        found = predict(registry.load(name), gpus=1)
        assert found.slowest == found.fastest == pytest.approx(floor * found.share, rel=4e-3)
        assert found.mfu == pytest.approx(found.share * 790 / 989)


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
     ("NVIDIA H100 PCIe", None), ("NVIDIA GH200 480GB", None), ("Tesla V100-SXM2-16GB", None),
     ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None)],
)  # fmt: skip
def test_gpus_are_known_by_name(name, key):
    assert known_gpu(name) is (GPUS[key] if key else None)


def test_more_gpus_send_more_and_take_less_time():
    recipe, alone = registry.load("vit_b_lut"), predict(registry.load("vit_b_lut"), gpus=1)
    assert alone.message == 0 and alone.accumulation == 32
    found = [predict(recipe, gpus=number) for number in (8, 64, 512)]
    assert [p.accumulation * p.recipe.optim.micro_batch * p.gpus for p in found] == [4096] * 3
    assert [p.recipe.optim.micro_batch for p in found] == [128, 64, 8]
    for fewer, more in zip(found, found[1:], strict=False):
        assert fewer.message < more.message and fewer.hours[0] > more.hours[0]
        assert more.slowest / more.gpus < fewer.slowest / fewer.gpus and more.slowest <= more.fastest
    assert found[0].message == pytest.approx(2 * 4 * 124_254_976 * 7 / 8)  # fp32 gradients and weights, once each
    halves = replace(registry.load("vit_b_mae"), precision="bf16_params")
    assert predict(halves, gpus=8).message == pytest.approx(2 * 2 * 111_655_680 * 7 / 8)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_divides_more(stage):
    recipe = registry.load("vit_l_dtm")
    one, many = (memory_of(replace(recipe, zero=replace(recipe.zero, stage=stage)), gpus=n) for n in (1, 64))
    divided = {name for name in ("weights", "gradients", "optimizer") if getattr(one, name) != getattr(many, name)}
    assert divided == set(("optimizer", "gradients", "weights")[:stage])
    assert all(getattr(one, name) == pytest.approx(64 * getattr(many, name)) for name in divided)


def test_what_does_not_fit_is_said():
    found = predict(apply_overrides(registry.load("vit_l_mae"), ["optim.micro_batch=4096"]), gpus=1, gpu="a100")
    assert not found.fits and "TOO MUCH, lower optim.micro_batch" in "\n".join(plan_lines("vit_l_mae", found))
    assert predict(registry.load("vit_l_mae"), gpus=8).fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_b_dtm", "--gpus", "3"], "--gpus 3: optim.global_batch=1024 cannot be shared equally; choose a divisor"),
        (["vit_b_dtm", "--gpus", "0"], "--gpus 0: at least 1 is needed"),
        (["vit_b_dtm", "--gpus", "8", "--gpu", "h900"], "--gpu h900: not known; choose one of h200, h100, a100"),
        (["vit_b_dtm", "--gpus", "8", "--images", "7"], "--images 7: fewer than optim.global_batch=1024"),
        (["vit_b_dmt", "--gpus", "8"], "no such recipe; did you mean vit_b_dtm?"),
    ],
)
def test_impossible_plans_are_named(arguments, message, capsys):
    assert recipe_tool.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def answered(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        recipe_tool.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_plan_in_words_and_as_numbers(capsys):
    command = ["plan", "vit_b_dtm", "--gpus", "64", "zero.stage=2"]
    found = predict(apply_overrides(registry.load("vit_b_dtm"), ["zero.stage=2"]), gpus=64)
    text = answered(command, capsys)
    assert "predicted, not measured" in text and "140.9 GFLOP per image" in text and "ZeRO stage 2" in text
    assert "micro 16 x 64 GPUs x accumulation 1" in text and GPUS["h200"].source in text
    written = json.loads(answered([*command, "--json"], capsys))
    assert written["flops_per_image"] == found.cost.flops and written["memory_bytes"]["total"] == found.memory.total
    assert written["images_per_second"] == [found.slowest, found.fastest]


def test_recipes_are_listed_shown_and_compared(capsys):
    assert "  vit_b_dtm " in answered(["list"], capsys)
    assert "zero.stage=3" in answered(["show", "vit_b_dtm", "zero.stage=3"], capsys)
    assert answered(["diff", "vit_b_lut", "vit_b_lut_400ep"], capsys) == "run.epochs  1600  ->  400\n"
    assert "are the same" in answered(["diff", "vit_b_lut", "vit_b_lut"], capsys)
    with pytest.raises(SystemExit, match="2"):
        recipe_tool.main(["list", "more"])
    assert "unrecognized arguments: more" in capsys.readouterr().err


def plan_row(name: str, prediction: Prediction) -> str:
    """The prediction as a row of the page's table."""
    columns = [
        f"`{name}`",
        f"{prediction.gpus}",
        f"{prediction.recipe.optim.micro_batch} x {prediction.accumulation}",
        f"{prediction.memory.total / 1e9:.1f}",
        f"{prediction.message / 1e9:.2f}",
        between(prediction.slowest, prediction.fastest),
        between(*prediction.hours, ".1f"),
        f"{prediction.mfu:.0%}".replace("%", " %"),
    ]
    return f"| {' | '.join(columns)} |"


def test_the_tables_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "performance.md").read_text()
    for name, share in TARGETS.items():
        recipe = registry.load(name)
        for gpus in (8, 64, 512):
            assert plan_row(name, predict(recipe, gpus=gpus)) in page
        flops = training_cost(recipe).flops
        assert re.search(rf"^\| `{name}` \|.* {flops / 1e9:.2f} \|$", page, re.MULTILINE)
        assert re.search(
            rf"^\| `{name}` \| {share} \| \d+ \| {share / 100 * 790e12 / flops:,.0f} \|", page, re.MULTILINE
        )
