"""Frozen teachers: where weights come from, what is said without. CLIP's numbers: test_golden.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from clip_towers import patch_targets, random_tower
from golden_files import read, state
from safetensors.torch import save_file
from tiny_dtm import TINY, Widen
from torch import Tensor, nn

from engine.checkpoints.comparing import check_same_run
from engine.checkpoints.folders import CheckpointError
from engine.models.beit import MaskedBeit
from engine.start_up import is_harmless, is_structural
from engine.teacher_sources import MissingTeacher, find_teacher, require_teacher
from engine.teachers import CLIP_MEAN, CLIP_STD, Teacher, clip_network, load_clip, open_teacher, to_input
from engine.weights.export import write_encoder
from engine.weights.released import from_clip
from recipes import registry
from recipes.overrides import apply_overrides

# isort: split
import timm

TINY_TOWER = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 16}


def tower(golden: dict[str, np.ndarray], image_size: int, *, rename: Callable = lambda weights: weights) -> nn.Module:
    network = clip_network(image_size, **TINY_TOWER)
    weights = {name: value.float() for name, value in state(golden, "w.").items()}
    load_clip(network, rename(weights), "teacher=golden")
    return network.eval()


def test_clip_weights_under_all_their_names():
    """Alone, beside a text tower, in half precision, and as timm saves them."""
    golden = read("dtm_teacher_clip.npz")
    identity = Teacher(tower(golden, 32), torch.float32).identity

    def beside_text(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"visual.{name}": value for name, value in weights.items()} | {"token_embedding.weight": torch.zeros(3)}

    assert Teacher(tower(golden, 32, rename=beside_text), torch.float32).identity == identity
    assert Teacher(tower(golden, 32, rename=from_clip), torch.float32).identity == identity
    half = Teacher(tower(golden, 32, rename=lambda weights: {k: v.half() for k, v in weights.items()}), torch.float32)
    assert half.identity != identity
    with pytest.raises(ValueError, match="teacher=golden: not an image tower of CLIP's "):
        tower(golden, 32, rename=lambda weights: {"a": torch.zeros(1)})


def test_teacher_input_can_be_normalised_as_clips():
    data, pixels = registry.load("vit_b_dtm").data, torch.rand(2, 3, 4, 4)
    mean, std, clip_mean, clip_std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std, CLIP_MEAN, CLIP_STD))
    factor, offset = to_input(data, CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close((pixels - mean) / std * factor + offset, (pixels - clip_mean) / clip_std)
    plain, rescaled = Teacher(Widen(), torch.float32), Teacher(Widen(), torch.float32, (factor, offset))
    rescaled.network.load_state_dict(plain.network.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(rescaled(images), plain(images * factor + offset))


def test_bf16_teacher_is_close_and_gives_fp32():
    golden = read("dtm_teacher_clip.npz")
    images = torch.from_numpy(golden["x"])
    exact, rounded = (Teacher(tower(golden, 32), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert exact.identity == rounded.identity
    features = rounded(images)
    assert features.dtype == torch.float32
    assert (features - exact(images)).norm() < 0.03 * exact(images).norm()


# --- where a teacher comes from -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """An exported encoder of 16 patches, in a run folder with one complete and one unfinished checkpoint."""
    run = tmp_path_factory.mktemp("run")
    network = MaskedBeit(TINY, 32)
    for step in ("step_00000010", "step_00000020"):
        recipe = apply_overrides(demo(), ["model.embed_dim=32", "model.depth=2", "model.num_heads=4"])
        write_encoder(run / "checkpoints" / step / "encoder", recipe, network.state_dict())
    (run / "checkpoints" / "step_00000010" / "manifest.json").write_text("{}")
    return run


def demo(*overrides: str):
    return apply_overrides(registry.load("vit_ti_dtm_demo"), list(overrides))


def test_a_run_of_ours_is_a_teacher(encoder_folder):
    """By the folder of the run, of a checkpoint or of the encoder: targets are its tokens after the last norm."""
    complete = encoder_folder / "checkpoints" / "step_00000010"
    for folder in (encoder_folder, complete, complete / "encoder"):
        assert find_teacher(str(folder)).place == str(complete / "encoder")
    teacher = open_teacher(demo(f"teacher={encoder_folder}"))
    assert (teacher.width, teacher.num_patches, teacher.dtype) == (32, 16, torch.float32)
    images = torch.randn(2, 3, 32, 32)
    network = timm.create_model(f"local-dir:{complete / 'encoder'}", pretrained=True).eval()
    torch.testing.assert_close(teacher(images), network.forward_features(images)[:, 1:].detach())
    assert open_teacher(demo(f"teacher={encoder_folder}", "precision=bf16")).dtype == torch.bfloat16


def test_opening_a_teacher_draws_nothing(encoder_folder):
    """The student's initial weights depend on the seed alone, whatever teaches it."""
    torch.manual_seed(5)
    open_teacher(demo(f"teacher={encoder_folder}"))
    after = torch.rand(4)
    torch.manual_seed(5)
    assert (torch.rand(4) == after).all()


def nothing_is_built(monkeypatch) -> None:
    def refuse(*arguments, **keywords):
        raise AssertionError("a network was built")

    monkeypatch.setattr("engine.teachers.timm.create_model", refuse)


def test_a_folder_with_another_grid_is_refused_by_its_config(encoder_folder, monkeypatch):
    """Before a network is built, whether the program's start or somebody else asks."""
    nothing_is_built(monkeypatch)
    for change, reason in (
        ("data.image_size=64", "takes images of 32 pixels where data.image_size=64"),
        ("model.patch_size=4", "sees 16 patches where the student has 64"),
    ):
        recipe = demo(f"teacher={encoder_folder}", change)
        with pytest.raises(ValueError, match=reason):
            require_teacher("vit_ti_dtm_demo", recipe, download=False)
        with pytest.raises(ValueError, match=reason):
            open_teacher(recipe)


def test_a_folder_with_a_broken_config_is_named(encoder_folder, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"teacher={tmp_path}: config.json is no JSON"):
        require_teacher("vit_ti_dtm_demo", demo(f"teacher={tmp_path}"), download=False)


def test_a_timm_model_with_another_grid_is_refused_by_its_name(monkeypatch):
    nothing_is_built(monkeypatch)
    for name, patches in (
        ("vit_large_patch14_clip_quickgelu_224.openai", 256),
        ("vit_base_patch32_clip_224.laion2b", 49),
    ):
        recipe = apply_overrides(registry.load("vit_b_dtm"), [f"teacher=timm:{name}"])
        for download in (True, False):
            with pytest.raises(ValueError, match=f"{name}: sees {patches} patches where the student has 196"):
                require_teacher("vit_b_dtm", recipe, download=download)
        with pytest.raises(ValueError, match=f"sees {patches} patches where the student has 196"):
            open_teacher(recipe)
    for name in ("vit_base_patch16_384", "eva02_base_patch16_clip_224", "samvit_base"):  # the image size is set
        recipe = apply_overrides(registry.load("vit_b_dtm"), [f"teacher=timm:{name}"])
        assert require_teacher("vit_b_dtm", recipe, download=True) == recipe


def test_a_timm_model_is_held_to_its_network_where_its_name_says_nothing(monkeypatch):
    """One of timm's, with random weights in the place of a download."""
    create = timm.create_model

    def without_weights(name: str, pretrained: bool, **arguments):
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr("engine.teachers.timm.create_model", without_weights)
    with pytest.raises(ValueError, match="teacher=timm:vit_tiny_r_s16_p8_224: sees 1 patches where the student has 16"):
        open_teacher(demo("teacher=timm:vit_tiny_r_s16_p8_224"))
    few = ("model.patch_size=16", "objective.max_steps=4", "objective.num_masked=1", "objective.min_block=1")
    teacher = open_teacher(demo("teacher=timm:vit_tiny_patch16_384", *few))
    assert (teacher.num_patches, teacher.width) == (4, 192)


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pixels_are_a_teacher_without_a_network(precision, monkeypatch):
    """The image's own patches as the student sees them, in fp32 whatever the precision; nothing to fetch."""
    nothing_is_built(monkeypatch)
    recipe = demo("teacher=pixels", f"precision={precision}")
    assert require_teacher("vit_ti_dtm_demo", recipe, download=False) == recipe
    teacher, images = open_teacher(recipe), torch.randn(2, 3, 32, 32)
    assert (teacher.width, teacher.num_patches, teacher.identity) == (192, 16, "pixels")
    targets = teacher(images)
    assert targets.dtype == torch.float32 and targets.shape == (2, 16, 192)
    assert torch.equal(targets[1, 6].view(8, 8, 3), images[1, :, 8:16, 16:24].permute(1, 2, 0))
    assert not list(teacher.parameters()) and not teacher.state_dict()


# --- the teacher's input --------------------------------------------------------------------------------------------


def test_teacher_norm_reaches_the_teacher(tmp_path):
    """From the recipe to the targets: CLIP gets the student's images, or with `clip` images as it was trained on."""
    weights, images = random_tower(), torch.randn(2, 3, 32, 32)
    save_file(weights, tmp_path / "clip.safetensors")
    recipe = demo(f"teacher={tmp_path / 'clip.safetensors'}")
    torch.testing.assert_close(open_teacher(recipe)(images), patch_targets(weights, images), rtol=1e-4, atol=1e-4)
    mean, std, clip_mean, clip_std = (
        torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std, CLIP_MEAN, CLIP_STD)
    )
    as_trained = (images * std + mean - clip_mean) / clip_std
    changed = open_teacher(apply_overrides(recipe, ["objective.teacher_norm=clip"]))(images)
    torch.testing.assert_close(changed, patch_targets(weights, as_trained), rtol=1e-4, atol=1e-4)
    assert (changed - open_teacher(recipe)(images)).abs().max() > 0.01


@pytest.mark.parametrize("teacher", ["pixels", "FOLDER", "timm:vit_base_patch8_224"])
def test_only_clip_can_be_given_clips_images(teacher, encoder_folder):
    recipe = demo(f"teacher={teacher.replace('FOLDER', str(encoder_folder))}", "objective.teacher_norm=clip")
    for opened in (lambda: open_teacher(recipe), lambda: require_teacher("vit_ti_dtm_demo", recipe, download=True)):
        with pytest.raises(ValueError, match="objective.teacher_norm=clip: teacher=.* is not CLIP"):
            opened()


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_missing_teacher_is_explained_on_one_screen(tmp_path):
    for teacher, reason in (("", "no teacher is named"), ("/no/such", "does not exist"), (str(tmp_path), "neither")):
        recipe = apply_overrides(registry.load("vit_b_dtm"), [f"teacher={teacher}"] if teacher else [])
        with pytest.raises(MissingTeacher, match=reason) as told:
            require_teacher("vit_b_dtm", recipe, download=True)
        assert len(str(told.value).splitlines()) < 24
        for fragment in ("=FILE", "=FOLDER", "--download teacher=timm:vit_base_patch16_clip_quick", "=pixels"):
            assert fragment in str(told.value)
    require_teacher("vit_b_mae", registry.load("vit_b_mae"), download=False)
    with pytest.raises(MissingTeacher, match="vit_b_mae_dtm learns from the patch features of a frozen teacher"):
        require_teacher("vit_b_mae_dtm", registry.load("vit_b_mae_dtm"), download=False)


def test_downloads_need_permission():
    recipe = apply_overrides(registry.load("vit_b_dtm"), ["teacher=timm:vit_base_patch16_clip_quickgelu_224.openai"])
    with pytest.raises(MissingTeacher, match="add --download"):
        require_teacher("vit_b_dtm", recipe, download=False)
    require_teacher("vit_b_dtm", recipe, download=True)


def test_a_teacher_may_move_but_not_change():
    """A resumed run is held to the weights of its teacher, not to their place."""
    assert is_harmless("teacher") and not is_harmless("objective.teacher_norm")
    rules = {"harmless": is_harmless, "structural": is_structural}
    facts = {"recipe": {"teacher": "a"}, "dataset": "d" * 64, "world_size": 1, "objective": {"teacher": "1" * 64}}
    moved = facts | {"recipe": {"teacher": "b"}}
    check_same_run(facts | {"step": 7}, moved, **rules, allow_changes=False)
    changed = facts | {"objective": {"teacher": "2" * 64}}
    with pytest.raises(CheckpointError, match="step 7 is of another run .*teacher: 1111.* -> 2222"):
        check_same_run(facts | {"step": 7}, changed, **rules, allow_changes=False)
    check_same_run(facts | {"step": 7}, changed, **rules, allow_changes=True)
