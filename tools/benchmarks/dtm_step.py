"""A step of DTM (ViT-S, CLIP ViT-B/16 of random weights, batch 8, fp32), against the released program or textbook form.

The textbook way: attention is written out with both tables of relative positions added in every block, groups are dense
matrices of 0 and 1 that products go to and fro through, and the optimizer goes tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.morphing import SIZE_EPS
from engine.objectives.comparison import Draw
from engine.objectives.dtm import DynamicTokenMorphing
from engine.params import parameter_groups
from engine.teachers import Teacher, clip_network, load_clip
from engine.weights.initial import Source, place
from engine.weights.released import DTM
from recipes.methods import Dtm
from recipes.schema import Optim
from tools.benchmarks.released import released
from tools.benchmarks.side_by_side import Row, Settings
from tools.benchmarks.steps import OurStep, Size, Step, on_this_machine, scaler, step_rows, without_fused_attention

OPTIM = Optim(global_batch=8, micro_batch=8, lr=1e-4, betas=(0.9, 0.98), clip_grad=3.0)
BEIT = dict(architecture="beit", init_values=0.1)
MASKED = 3 / 8  # of the patches: about 75 of 196


def suite(settings: Settings) -> Iterator[Row]:
    """Operators and images per CPU second of a step."""
    torch.manual_seed(0)
    size = Size.of(settings, **BEIT)
    mask = torch.rand(size.images, size.num_patches).argsort(1) < round(MASKED * size.num_patches)
    images = torch.randn(size.images, 3, size.image_size, size.image_size)
    batch = SimpleNamespace(views=(images,), mask=mask, positions=torch.arange(size.images))
    ours = OurStep(objective_of(size), batch, OPTIM)
    yield from step_rows("DTM", ours, settings, size, released_step, textbook_step)


def objective_of(size: Size) -> DynamicTokenMorphing:
    settings = Dtm(num_masked=round(MASKED * size.num_patches), min_block=1)
    teacher = Teacher(clip_network(size.image_size, **tower(size)), torch.float32)
    return DynamicTokenMorphing(settings, size.model, size.image_size, teacher=teacher, seed=0)


def tower(size: Size) -> dict[str, int]:
    """Arguments of CLIP's tower: ViT-B/16, or a small one beside a small student."""
    return {} if size.image_size == 224 else {"embed_dim": 128, "depth": 2, "num_heads": 2}


def draws(ours: OurStep, number: int) -> list[Draw]:
    return ours.objective.draws(0, number, ours.objective.teacher.num_patches)


# --- the released program -------------------------------------------------------------------------------------------


def released_step(settings: Settings, size: Size, ours: OurStep) -> Step:
    """Its own training loop over one batch; its weights, the teacher's too, become ours, and our draws its own."""
    model, objective = size.model, ours.objective
    with released(settings.reference, "dtm") as load:
        with on_this_machine():
            network = load("models.modeling_dtm").DTM(
                img_size=size.image_size, patch_size=16, embed_dim=model.embed_dim, depth=model.depth,
                num_heads=model.num_heads, init_values=model.init_values, use_abs_pos_emb=False, use_rel_pos_bias=True,
                use_shared_rel_pos_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
            ).train()  # fmt: skip
        clip = released_clip(load("vqkd_teacher.clip.model"), size, objective)
        loop, grad_scaler = load("engines.engine_for_dtm"), load("utils.utils").NativeScalerWithGradNormCount
    place(objective, Source("released", DTM.translate(network.state_dict()), None))
    optimizer = plain_adamw(network)
    switches = dict(use_clip=True, no_clip_proj=False, loss_type="smoothl1", normalize_target=False, loss_mim=False)
    args = SimpleNamespace(**switches, accum_iter=1, n1=196, n2=196, k1=14, k2=14, L=2, w_dtm=1.0)
    args.n1 = args.n2 = size.num_patches  # most tokens that its schedule removes
    images, mask = ours.batch.views[0], ours.batch.mask
    with on_this_machine():
        loss_scaler = scaler(grad_scaler)

    def step(number: int) -> dict[str, float]:
        drawn = draws(ours, number)
        answers = iter([draw.removed for draw in drawn] + [draw.num_steps for draw in drawn])
        loop.random = SimpleNamespace(randint=lambda least, most: next(answers))
        with on_this_machine():
            found = loop.train_one_epoch(
                network, clip, [((images, images, mask), None)], optimizer, torch.device("cpu"), number,
                loss_scaler, OPTIM.clip_grad, start_steps=0, args=args,
            )  # fmt: skip
        return {"loss": found["loss"]}

    return step


def released_clip(module: object, size: Size, objective: DynamicTokenMorphing) -> nn.Module:
    """The released program's CLIP with random weights, which become our teacher's; its tower for texts is small."""
    shape = {"embed_dim": 768, "depth": 12} | tower(size)
    clip = module.CLIP(
        512, size.image_size, shape["depth"], shape["embed_dim"], 16, context_length=4, vocab_size=4,
        transformer_width=64, transformer_heads=1, transformer_layers=1,
    )  # fmt: skip
    load_clip(objective.teacher.network, clip.state_dict(), "released")
    return clip.eval().requires_grad_(False)


def plain_adamw(network: nn.Module) -> torch.optim.AdamW:
    """One tensor after the other."""
    groups = parameter_groups(network, OPTIM.weight_decay, {"cls_token", "pos_embed"})
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False, fused=False)


# --- the textbook way -----------------------------------------------------------------------------------------------


def textbook_step(ours: OurStep) -> Step:
    student = without_fused_attention(deepcopy(ours.objective)).train()
    teacher = without_fused_attention(deepcopy(ours.objective.teacher))
    optimizer, (images,), mask = plain_adamw(student), ours.batch.views, ours.batch.mask

    def step(number: int) -> dict[str, float]:
        optimizer.zero_grad()
        targets, outputs = teacher(images), student.predict(images, mask)
        groupings = draws(ours, number)
        loss = sum(dense_loss(ours.objective, outputs, targets, draw) for draw in groupings) / len(groupings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), OPTIM.clip_grad)
        optimizer.step()
        return {"loss": loss.item()}

    return step


def dense_loss(objective: DynamicTokenMorphing, outputs: Tensor, targets: Tensor, draw: Draw) -> Tensor:
    """Every token gets its group's mean by two products with the membership matrix (dtm.md 1.5), then smooth L1."""
    groups = objective.group(targets, draw, torch.arange(len(targets)), 0, 0)
    members = F.one_hot(groups.labels).to(targets.dtype).transpose(1, 2)  # [B, G, N]
    sizes = members.sum(-1, keepdim=True) + SIZE_EPS
    ours, theirs = (members.mT @ (members @ tokens / sizes) for tokens in (outputs, targets))
    return F.smooth_l1_loss(ours, theirs, beta=objective.settings.beta)
