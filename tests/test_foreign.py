"""Checkpoints of other programs: recognised, taken whole or refused with the list, and usable like our own."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import read, state
from runs import ROOT, train
from safetensors.torch import save_file
from torch import Tensor

from engine.objectives.build import build_objective
from engine.objectives.contract import AVERAGE
from engine.runtime import Runtime
from engine.weights.export import read_encoder, read_objective
from engine.weights.files import read_weight_file
from engine.weights.importing import import_weights
from engine.weights.initial import Source, open_source, place
from engine.weights.released import recognise
from recipes import registry
from recipes.overrides import apply_overrides
from recipes.schema import Recipe

# isort: split
import timm

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"))
SIZE = ["model.embed_dim=32", "model.depth=2", "model.num_heads=2"]
DECODER = ["objective.decoder_embed_dim=32", "objective.decoder_num_heads=2"]


def recipe(name: str, *overrides: str) -> Recipe:
    return apply_overrides(registry.load(name), [*SIZE, *overrides])


def mae() -> Recipe:
    return recipe("vit_ti_mae_demo", *DECODER)


def lut() -> Recipe:
    return recipe("vit_ti_lut_demo", *DECODER, "objective.head_hidden=64")


def dtm(*overrides: str) -> Recipe:
    return recipe("vit_ti_dtm_demo", "model.num_heads=4", *overrides)


@pytest.fixture(scope="module")
def released() -> dict[str, dict[str, Tensor]]:
    """Weights under the names that the released programs give them."""
    core, student = read("lut_core.npz"), read("dtm_student_both_rpb.npz")
    weights = {
        "lut": {name: value.float() for name, value in state(core, "s/").items()},
        "lut_teacher": {name: value.float() for name, value in state(core, "t/").items()},
        "dtm": {name: value.float() for name, value in state(student, "w.").items()},
    }
    weights["mae"] = {k: v for k, v in weights["lut"].items() if not k.startswith(("head.", "predictor."))}
    weights["mae_encoder"] = {k: v for k, v in weights["mae"].items() if "decoder" not in k and k != "mask_token"}
    weights["dtm_encoder"] = {k: v for k, v in weights["dtm"].items() if not k.startswith(("lm_head", "mask_token"))}
    weights["beit"] = beit_v2(weights["dtm"])
    return weights


def beit_v2(dtm_weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """BEiT v2's own layout: one shared table of positions, a head of 8,192 words, late layers for the class token."""
    rest = {k: v for k, v in dtm_weights.items() if ".attn.relative_position" not in k and not k.startswith("lm_head")}
    late = {k.replace("blocks.0.", "cls_pt_layers.0."): v for k, v in rest.items() if k.startswith("blocks.0.")}
    return rest | late | {"lm_head.weight": torch.zeros(8192, 32), "lm_head.bias": torch.zeros(8192)}


def saved(folder: Path, content: dict, name: str = "released.pth") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "title"),
    [
        ("mae", "MAE"),
        ("mae_encoder", "MAE"),
        ("lut", "LUT"),
        ("dtm", "DTM"),
        ("dtm_encoder", "DTM"),
        ("beit", "BEiT v2"),
    ],
)
def test_layouts_are_recognised(released, weights, title):
    assert recognise(released[weights]).title == title


def test_other_files_are_no_layout(released):
    assert recognise({"a": torch.zeros(1)}) is None
    clip = state(read("dtm_teacher_clip.npz"), "w.")
    assert recognise(clip) is None and recognise({f"visual.{name}": value for name, value in clip.items()}) is None


def test_a_whole_mae_gives_the_released_reconstruction(released, tmp_path):
    """Through the user's path, file and all: the loss of the released program."""
    core = read("mae_core.npz")
    weights = {name: value.float() for name, value in state(core, "s/").items()}
    file = saved(tmp_path, {"model": weights, "args": argparse.Namespace(lr=1), "epoch": 7, "optimizer": {"state": {}}})
    objective = build_objective(mae())
    placement = place(objective, open_source(file))
    assert placement.loaded.keys() == {"encoder", "decoder"} and not placement.fresh and not placement.unused
    images, noise = torch.from_numpy(core["imgs"]), torch.from_numpy(core["noise"])
    loss = objective(SimpleNamespace(views=(images,), noise=noise), 0)["loss"]
    assert loss.item() == pytest.approx(float(core["mae_loss"]), rel=1e-5)


def test_a_whole_lut_brings_its_teacher(released, tmp_path):
    file = saved(tmp_path, {"model": released["lut"], "model_ema": released["lut_teacher"]})
    objective = build_objective(lut())
    placement = place(objective, open_source(file))
    assert placement.averaged and placement.loaded.keys() == {"encoder", "decoder", "head", "predictor"}
    core = read("lut_core.npz")
    images = [torch.from_numpy(core[name]) for name in ("imgs1", "imgs2")]
    np.testing.assert_allclose(torch.cat(list(objective.targets(*images))), core["teacher_q"], atol=2e-5)


def test_without_a_teacher_the_average_begins_as_the_student(released, tmp_path):
    """From MAE's encoder: decoder and heads begin random, which is said, and the average is the encoder's copy."""
    objective = build_objective(lut())
    placement = place(objective, open_source(saved(tmp_path, {"model": released["mae_encoder"]})))
    assert placement.fresh == ("decoder", "head", "predictor") and not placement.averaged
    assert "not in it: decoder, head, predictor" in str(placement)
    average, own = objective.outside[AVERAGE].state_dict(), objective.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in average.items())
    assert torch.equal(own["encoder.cls_token"], released["mae_encoder"]["cls_token"])


def test_parts_that_the_method_lacks_are_left_aside(released, tmp_path):
    placement = place(build_objective(mae()), open_source(saved(tmp_path, {"model": released["lut"]})))
    assert placement.unused == ("head", "predictor") and not placement.fresh


@pytest.mark.parametrize("prefix", ["module.", "ema.", "module.backbone.", "module._orig_mod.", "base_encoder."])
def test_wrappers_names_are_taken_off(released, tmp_path, prefix):
    wrapped = {prefix + name: value for name, value in released["mae"].items()}
    source = open_source(saved(tmp_path, {"state_dict": wrapped}))
    assert not place(build_objective(mae()), source).fresh


def test_safetensors_and_hash(released, tmp_path):
    import hashlib

    path = tmp_path / "mae.safetensors"
    save_file(released["mae"], path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_weight_file(path, "init").sha256 == digest and digest[:16] in open_source(str(path)).origin


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, weights: dict[str, Tensor], recipe: Recipe, fragment: str) -> None:
    objective = build_objective(recipe)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with pytest.raises(ValueError, match=fragment):
        place(objective, open_source(saved(tmp_path, {"model": weights})))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items()), "half loaded"


def test_a_file_that_matches_nothing_is_refused(released, tmp_path):
    refused(tmp_path, {"fc.weight": torch.zeros(2, 2)}, mae(), "begins with fc.weight.* none of its 1 tensors")
    decoder = {k: v for k, v in released["mae"].items() if "decoder" in k}
    refused(tmp_path, decoder, mae(), "none of its .* tensors would be used")
    clip = {name: value.float() for name, value in state(read("dtm_teacher_clip.npz"), "w.").items()}
    refused(tmp_path, clip, mae(), "is a teacher and no encoder to train")


def test_other_shapes_and_missing_pieces_are_listed(released, tmp_path):
    wide = released["mae"] | {"blocks.1.mlp.fc1.bias": torch.zeros(7)}
    refused(tmp_path, wide, mae(), r"1 of other shapes: encoder.blocks.1.mlp.fc1.bias \(7,\) \(here \(128,\)\)")
    short = {k: v for k, v in released["mae"].items() if k not in ("norm.weight", "decoder_norm.bias")}
    refused(tmp_path, short, mae(), "1 missing: encoder.norm.weight; 1 missing: decoder.norm.bias")
    extra = released["mae"] | {"fc_norm.weight": torch.zeros(32)}
    refused(tmp_path, extra, mae(), "1 unknown: encoder.fc_norm.weight")
    refused(tmp_path, released["dtm"], mae(), "encoder.blocks.0.attn.q_bias")


class Acts:
    """A pickle that runs a command when it is opened."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


class Unpacked(torch.nn.Module):
    """TorchScript that overwrites a file when torch.jit.load unpacks it."""

    def __init__(self, victim: str) -> None:
        super().__init__()
        self.victim = victim
        self.register_buffer("weight", torch.arange(6.0).view(2, 3))

    def forward(self) -> Tensor:
        return self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[str, Tensor]:
        return (self.victim, self.weight)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, Tensor]) -> None:
        self.victim, self.weight = state
        self.training = False
        self.weight = torch.from_file(state[0], True, 16, dtype=torch.uint8).fill_(65)


@pytest.mark.filterwarnings("ignore")  # TorchScript is old, but so is OpenAI's file
def test_torchscript_is_read_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(16))
    torch.jit.save(torch.jit.script(Unpacked(str(victim))), tmp_path / "acts.pt")
    victim.write_bytes(bytes(16))
    with pytest.raises(ValueError, match="acts.pt"):
        open_source(str(tmp_path / "acts.pt"))
    assert victim.read_bytes() == bytes(16)
    torch.jit.load(tmp_path / "acts.pt")
    assert victim.read_bytes() == b"A" * 16, "the file would have acted"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({0: torch.zeros(1)}, "holds no tensors"),
        ({"model": {3: torch.zeros(1)}}, "holds no tensors"),
        ({"model": {"module.a": torch.zeros(1), "a": torch.zeros(1)}}, "a is there twice"),
        ({"model": {"a": torch.tensor([float("nan")])}}, "a holds numbers that are not finite"),
        ({"model": {"a": torch.zeros(1, dtype=torch.complex64)}}, "a is no plain tensor of real numbers"),
        ({"model": {"a": torch.eye(2).to_sparse()}}, "a is no plain tensor of real numbers"),
        ([torch.zeros(1)], "holds a list"),
    ],
)
def test_odd_files_are_refused_in_one_line(tmp_path, content, fragment):
    with pytest.raises(ValueError, match=fragment) as error:
        open_source(saved(tmp_path, content))
    assert "\n" not in str(error.value) and "released.pth" in str(error.value)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", b"\x80\x02}q\x00.", "\ufeffé".encode("utf-16")])
def test_files_that_are_no_weights_are_named(tmp_path, content):
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(ValueError, match="init=.*odd.pth"):
        open_source(str(tmp_path / "odd.pth"))


def test_a_moving_average_that_does_not_fit_changes_nothing(released, tmp_path):
    """MAE's average has no projector: the student's serves. One of other shapes or names is refused before anything."""
    file = saved(tmp_path, {"model": released["mae"], "model_ema": released["mae"]})
    objective = build_objective(lut())
    assert place(objective, open_source(file)).averaged == ("encoder",)
    average = objective.outside[AVERAGE].state_dict()
    assert torch.equal(average["head.0.weight"], objective.state_dict()["head.0.weight"])
    for wrong in ({"a": torch.zeros(1)}, released["lut_teacher"] | {"cls_token": torch.zeros(1, 1, 8)}):
        fresh = build_objective(lut())
        before = {name: value.clone() for name, value in fresh.state_dict().items()}
        with pytest.raises(ValueError, match="moving average"):
            place(fresh, open_source(saved(tmp_path, {"model": released["lut"], "model_ema": wrong})))
        assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_positions_that_are_learned_are_said(released, tmp_path):
    other = released["mae_encoder"] | {"pos_embed": torch.randn(1, 17, 32)}
    assert "not sine-cosine" in open_source(saved(tmp_path, {"model": other})).origin
    assert "not sine-cosine" not in open_source(saved(tmp_path, {"model": released["mae_encoder"]})).origin


def test_nothing_in_a_file_is_run(tmp_path):
    proof = tmp_path / "proof"
    file = saved(tmp_path, {"model": {"a": torch.zeros(1)}, "args": Acts(proof)})
    with pytest.raises(ValueError, match="released.pth: not a file of weights"):
        open_source(file)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Acts(proof)}, protocol=2))
    with pytest.raises(ValueError, match="plain.pth: not a file of weights"):
        open_source(str(tmp_path / "plain.pth"))
    assert not proof.exists()


# --- imported folders -----------------------------------------------------------------------------------------------


def test_an_imported_mae_is_a_checkpoint(released, tmp_path):
    """Whole: the objective comes back; its encoder is timm's model."""
    file, folder = saved(tmp_path, {"model": released["mae"]}), tmp_path / "imported"
    done = import_weights(file, folder, "vit_ti_mae_demo", mae(), ALONE)
    assert done.whole and json.loads((folder / "manifest.json").read_text())["source"] == done.source.origin
    objective, _ = read_objective(folder)
    assert torch.equal(objective.decoder.mask_token, released["mae"]["mask_token"])
    images = torch.randn(2, 3, 32, 32)
    network = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).eval()
    encoder, _ = read_encoder(folder, torch.device("cpu"))
    torch.testing.assert_close(network.forward_features(images), encoder(images))
    with pytest.raises(ValueError, match="imported: exists already"):
        import_weights(file, folder, "vit_ti_mae_demo", mae(), ALONE)


def test_an_imported_encoder_is_no_more_than_that(released, tmp_path):
    """Nothing random is written beside it, and the whole objective is refused."""
    folder = tmp_path / "encoder_only"
    done = import_weights(saved(tmp_path, {"model": released["mae_encoder"]}), folder, "vit_ti_mae_demo", mae(), ALONE)
    assert not done.whole and {path.name for path in folder.iterdir()} == {"encoder", "manifest.json"}
    with pytest.raises(ValueError, match="was imported without decoder"):
        read_objective(folder)
    assert place(build_objective(lut()), open_source(str(folder))).fresh == ("decoder", "head", "predictor")


def test_damage_of_a_folder_is_found(released, tmp_path):
    folder = tmp_path / "imported"
    import_weights(saved(tmp_path, {"model": released["mae"]}), folder, "vit_ti_mae_demo", mae(), ALONE)
    for name, damage in (("rest.safetensors", "missing"), ("encoder/model.safetensors", "changed")):
        copy = tmp_path / damage
        shutil.copytree(folder, copy)
        if damage == "missing":
            (copy / name).unlink()
        else:
            flipped = bytearray((copy / name).read_bytes())
            flipped[-1] ^= 1
            (copy / name).write_bytes(flipped)
        for use in (lambda at: open_source(str(at)), read_objective):
            with pytest.raises(ValueError, match=f"{name}: (is missing|has not the size or hash)"):
                use(copy)


def test_what_a_file_lacks_is_not_written_and_what_it_has_is(released, tmp_path):
    """MAE's decoder serves LUT by both ways in: from the file, and from the imported folder."""
    file, folder = saved(tmp_path, {"model": released["mae"]}), tmp_path / "imported"
    done = import_weights(file, folder, "vit_ti_lut_demo", lut(), ALONE)
    assert not done.whole and done.placement.loaded.keys() == {"encoder", "decoder"}
    by_folder, by_file = (place(build_objective(lut()), open_source(str(where))) for where in (folder, file))
    assert by_folder.loaded == by_file.loaded and by_folder.fresh == by_file.fresh == ("head", "predictor")


@pytest.mark.parametrize(
    ("weights", "overrides", "aside"),
    [
        ("dtm", [], ("mask_token", "head")),
        ("dtm_encoder", [], ()),
        ("beit", ["model.rel_pos_bias=false"], ("mask_token", "class_layers", "codebook_head")),
    ],
)
def test_beit_encoders(released, tmp_path, weights, overrides, aside):
    """Without a teacher the encoder is taken, and nothing else."""
    folder, asked = tmp_path / "imported", dtm(*overrides)
    done = import_weights(saved(tmp_path, {"model": released[weights]}), folder, "vit_ti_dtm_demo", asked, ALONE)
    assert not done.whole and set(done.placement.unused) == set(aside)
    encoder, _ = read_encoder(folder, torch.device("cpu"))
    assert torch.equal(encoder.blocks[1].gamma_2, released[weights]["blocks.1.gamma_2"])
    with pytest.raises(ValueError, match="does not fit this recipe's model"):
        import_weights(saved(tmp_path, {"model": released[weights]}), tmp_path / "b", "vit_ti_mae_demo", mae(), ALONE)
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".*importing"))


def test_the_command_says_what_came_from_where(released, tmp_path):
    file = saved(tmp_path, {"model": released["mae"]})
    tool = [sys.executable, str(ROOT / "tools/import_weights.py"), file, str(tmp_path / "out")]
    told = subprocess.run(
        [*tool, "--recipe", "vit_ti_mae_demo", *SIZE, *DECODER], capture_output=True, text=True, cwd="/"
    )
    assert told.returncode == 0, told.stderr
    assert "MAE layout, sha256" in told.stdout and "the whole objective" in told.stdout
    wrong = subprocess.run(
        [*tool[:-1], str(tmp_path / "no"), "--recipe", "vit_ti_mae_demo"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "of other shapes" in wrong.stderr and "Traceback" not in wrong.stderr


# --- training from them ---------------------------------------------------------------------------------------------


@pytest.mark.long  # whole runs; the parts are tested above
def test_a_run_begins_with_the_weights_and_goes_on_without_them(shards, tmp_path):
    """At a learning rate of nearly nothing the exported encoder is the one that it began with."""
    first = train(tmp_path / "first", f"data.train={shards}/train", "run.steps=2")
    begun = first.newest_checkpoint()
    changes = (f"data.train={shards}/train", f"init={first.folder}", "run.seed=5", "optim.lr=1e-12", "run.steps=2")
    second = train(tmp_path / "second", *changes, "run.stop_after=1")
    assert "loaded encoder" in second.output and f"{begun} (ours)" in second.output
    ours, theirs = (read_encoder(folder, torch.device("cpu"))[0] for folder in (second.newest_checkpoint(), begun))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    first.folder.rename(tmp_path / "gone")
    third = train(tmp_path / "second", *changes, "--resume", succeeds=False)
    assert third.returncode == 0, third.output
    kept = json.loads((third.newest_checkpoint() / "manifest.json").read_text())["init"]
    assert kept.startswith(f"{begun} (ours): loaded encoder") and kept in third.output
    missing = train(tmp_path / "fourth", *changes, succeeds=False)
    assert missing.returncode == 2 and "does not exist" in missing.output


def test_sources_carry_our_names():
    source = Source("here", {"encoder.a": torch.zeros(1)}, None)
    with pytest.raises(ValueError, match="init=here: does not fit"):
        place(build_objective(mae()), source)
