"""Token morphing in fixed shapes: the groups, losses and gradients of morphing.py, one graph, and no waiting."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dtm import tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from engine.fixed_morphing import fixed_comparison, join_step, padded_counts, stacked_groups
from engine.morphing import group_tokens, membership_of, step_counts
from engine.objectives.comparison import MorphedComparison
from recipes.methods import Dtm
from tools.benchmarks.operators import operators

MOST_STEPS = 6


def made(kind: str, num_images: int, num_tokens: int, seed: int) -> Tensor:
    """Tokens [B, N, 3 or 8] in fp32: without likeness, alike among neighbours, or whole numbers with many ties."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "tied":
        return torch.randint(-1, 2, (num_images, num_tokens, 3), generator=generator).float()
    tokens = torch.randn(num_images, num_tokens, 8, generator=generator)
    return tokens.cumsum(dim=1) if kind == "smooth" else tokens


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30), st.data(), st.integers(0, 2**31), st.sampled_from(["gaussian", "smooth", "tied"]),
    st.booleans(), st.sampled_from(["released", "exact"]),
)  # fmt: skip
def test_groups_are_those_of_the_plain_form(num_tokens, data, seed, kind, protect_first, counts):
    """Every image with its own schedules; equal similarities go to the lower place in both."""
    targets, way = made(kind, 3, num_tokens, seed), dict(counts=counts, protect_first=protect_first)
    draw = st.tuples(st.integers(0, num_tokens), st.integers(1, MOST_STEPS))
    draws = data.draw(st.lists(draw, min_size=6, max_size=6))  # two for each image
    schedules = [step_counts(*drawn, num_tokens, **way) for drawn in draws]
    stacked = stacked_groups(
        targets, padded_counts(schedules, MOST_STEPS).unflatten(1, (3, 2)), protect_first=protect_first
    )
    assert stacked.membership.shape == (3, 2 * num_tokens, num_tokens) and not stacked.membership.requires_grad
    for number, drawn in enumerate(draws):
        image, schedule = divmod(number, 2)
        plain = group_tokens(targets[image : image + 1], *drawn, **way)
        labels = stacked.labels[image, schedule]
        assert torch.equal(labels, plain.labels[0])
        part = slice(schedule * num_tokens, (schedule + 1) * num_tokens)
        expected = membership_of(labels[None], num_tokens, torch.float32)[0]
        assert torch.equal(stacked.membership[image, part], expected)
        assert torch.equal(stacked.sizes[image, part], expected.sum(dim=1))


@pytest.mark.parametrize("kind", ["gaussian", "smooth", "tied"])
def test_groups_of_images_at_full_size(kind):
    """196 tokens and schedules from one long step to fourteen that leave eight groups."""
    targets = made(kind, 2, 196, seed=1)
    draws = [(98, 1), (100, 4), (98, 7), (98, 14), (196, 14), (196, 1), (0, 3)]
    schedules = [step_counts(*draw, 196, counts="released", protect_first=True) for draw in draws]
    stacked = stacked_groups(targets, padded_counts(schedules, 14)[:, None].expand(-1, 2, -1))
    for number, draw in enumerate(draws):
        assert torch.equal(stacked.labels[:, number], group_tokens(targets, *draw).labels), draw


def test_tokens_that_are_not_finite_stay_in_range():
    """The loss says that a step is bad; the groups must not send an index out of the image before that."""
    targets = made("gaussian", 4, 21, seed=0)
    targets[0, 3], targets[1], targets[2, 0], targets[3, :, 2] = torch.nan, torch.nan, torch.inf, -torch.inf
    counts = padded_counts([[7, 3, 1]] * 4, MOST_STEPS)[..., None]
    labels = stacked_groups(targets, counts).labels
    assert labels.min() >= 0 and labels.max() < 21
    predictions = made("gaussian", 4, 21, seed=1)
    way = dict(protect_first=True, kind="smooth_l1", beta=2.0, normalize_target=False)
    assert not fixed_comparison(predictions, targets, counts, None, **way)[0].isfinite()


# --- the comparison -------------------------------------------------------------------------------------------------


def compared(
    way: dict, fixed: bool, predictions: Tensor, targets: Tensor, positions: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, number of groups and gradient by one of the two forms."""
    objective = tiny(Dtm(num_masked=6, images_per_draw=4, **way))
    objective.fixed_shapes = fixed
    predictions = predictions.clone().requires_grad_()
    metrics = objective.compare(predictions, targets, positions, 3, mask)
    assert not metrics["groups"].requires_grad
    return metrics["loss"], metrics["groups"], *torch.autograd.grad(metrics["loss"], predictions)


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"loss": "negcosine", "loss_on": "masked", "num_schedules": 3},
        {"loss": "l1", "normalize_target": True, "counts": "exact", "protect_first": False},
        {"loss": "l2", "loss_on": "visible", "max_removed": 0},
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_of_the_plain_form(way):
    """Three blocks of the global batch, each with its own draws, in one batch."""
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 9, 16, 8, generator=generator, dtype=torch.float64)
    mask, positions = torch.rand(9, 16, generator=generator).argsort(1) < 6, torch.arange(6, 15)
    plain, fixed = (compared(way, form, predictions, targets, positions, mask) for form in (False, True))
    for ours, expected in zip(fixed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_the_device_decides_which_form_it_is():
    objective, gpu, cpu = tiny(), torch.device("cuda"), torch.device("cpu")
    assert objective.in_fixed_shapes(gpu) and not objective.in_fixed_shapes(cpu)
    for way in ({"split": "random"}, {"weighting": "step"}, {"morphing": "kmeans"}):
        other = tiny(Dtm(num_masked=6, **way))
        assert not other.in_fixed_shapes(gpu)
        other.fixed_shapes = True
        with pytest.raises(ValueError, match="needs morphing=bipartite"):
            other.in_fixed_shapes(cpu)


# --- what a GPU needs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [MorphedComparison.compare_at_once, MorphedComparison.compare_blocks])
@pytest.mark.parametrize("way", [{}, {"split": "random", "loss_on": "masked"}, {"morphing": "kmeans"}], ids=str)
def test_nothing_waits_for_the_device(form, way):
    """A meta tensor has no values to read: neither the draws nor the shapes may ask for any."""
    if way and form is MorphedComparison.compare_at_once:
        way = {"loss_on": "visible", "counts": "exact"}
    objective, positions = tiny(Dtm(num_masked=6, images_per_draw=4, **way)), torch.arange(10)
    predictions, targets = (torch.empty(10, 16, 8, device="meta", requires_grad=grad) for grad in (True, False))
    chosen = objective.chosen_tokens(torch.empty(10, 16, dtype=torch.bool, device="meta"))

    def step() -> None:
        loss, num_groups = form(objective, predictions, targets, positions, chosen, 3)
        assert loss.device.type == num_groups.device.type == "meta"
        loss.backward()

    step()
    assert predictions.grad.shape == predictions.shape
    predictions.grad = None
    assert "aten.nonzero" not in operators(step).names


def graph_inputs(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and targets [B, N, T], and the counts of that step's draws."""
    objective = tiny(Dtm(num_masked=6, images_per_draw=4, max_steps=4))
    generator = torch.Generator().manual_seed(step)
    predictions, targets = torch.randn(2, 6, 16, 8, generator=generator)
    return predictions.requires_grad_(), targets, objective.counts(torch.arange(6), step, 16)


def check_compiled(compiled, num_steps: int) -> None:
    """Several draws: the loss, the number of groups and the gradient of the function as it is written."""
    way, different = dict(protect_first=True, kind="smooth_l1", beta=2.0, normalize_target=False), set()
    for step in range(num_steps):
        predictions, targets, counts = graph_inputs(step)
        results = [function(predictions, targets, counts, None, **way) for function in (compiled, fixed_comparison)]
        gradients = [torch.autograd.grad(loss, predictions)[0] for loss, _ in results]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
        different.add(results[0][1].item())
    assert len(different) > 2  # the draws were not all alike


def test_all_draws_give_one_graph():
    """The whole comparison, without a break."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fixed_comparison, backend=counter, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_compiled(compiled, num_steps=5)
    assert counter.frame_count == 1


def test_all_steps_of_all_draws_are_one_graph():
    """What compiles faster: one step, used for all of them. Each objective has its own."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(join_step, backend=counter, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_compiled(partial(fixed_comparison, step=step), num_steps=5)
        objective = tiny(Dtm(num_masked=6, images_per_draw=4, max_steps=4))
        objective.fixed_shapes, objective.join_step = True, step
        predictions, targets, _ = graph_inputs(0)
        objective.compare(predictions, targets, torch.arange(6), 0)["loss"].backward()
    assert counter.frame_count == 1 and predictions.grad.isfinite().all()


@pytest.mark.long
def test_what_inductor_makes_of_it():
    torch._dynamo.reset()
    step = torch.compile(join_step, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check_compiled(partial(fixed_comparison, step=step), num_steps=4)
