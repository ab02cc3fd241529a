"""`rft export`, HFExport, and the README's use of an exported folder by plain transformers."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from rft_lightning import SFTModule
from rft_lightning.callbacks import HFExport, RolloutCheckpoint
from rft_lightning.checkpointing import RECORD, export_policy
from rft_lightning.cli import main
from rft_lightning.datamodules import ImagesDataModule, ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.sample import DetectionTarget
from rft_lightning.tasks import DetectionTask

README = Path(__file__).parent.parent / "README.md"
MAX_PIXELS = 1600  # not the checkpoint's own 1764


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def fit(make_trainer, policy: str, run: Path, **kwargs) -> tuple[SFTModule, ShapesDataModule]:
    """One step of training with checkpoints in run/checkpoints and HFExport's folder at run/by_callback."""
    module = SFTModule(policy, optimizer=adamw, schedule="constant", **kwargs)
    data = ShapesDataModule(processor=policy, batch_size=2, train_size=4, max_pixels=MAX_PIXELS)
    callbacks = [RolloutCheckpoint(dirpath=str(run / "checkpoints")), HFExport(run / "by_callback")]
    make_trainer(1, callbacks=callbacks).fit(module, datamodule=data)
    return module, data


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("spelling", ["asset", "relative", "absolute"])
def test_a_checkpoint_becomes_what_the_callback_wrote(
    spelling, tiny_policy, make_trainer, tmp_path, monkeypatch, capsys
):
    """From another working directory than that of the run, and without its configuration."""
    monkeypatch.chdir(Path(tiny_policy).parent)
    policy = {"asset": "asset:tiny-qwen2-vl", "relative": Path(tiny_policy).name, "absolute": tiny_policy}[spelling]
    module, data = fit(make_trainer, policy, tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    main(["export", str(tmp_path / "run" / "checkpoints" / "last.ckpt")])
    folder = tmp_path / "run" / "policy"
    assert str(folder) in capsys.readouterr().out
    assert contents(folder) == contents(tmp_path / "run" / "by_callback")
    assert not list(elsewhere.iterdir())
    assert_loads_as_tuned(folder, module, data, start=tiny_policy if spelling == "relative" else policy)


def assert_loads_as_tuned(folder: Path, module: SFTModule, data: ShapesDataModule, *, start: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.image_processor.size["longest_edge"] == MAX_PIXELS
    batch = data.encoder([data.sample("val", 0)])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    models = (model, module.policy.eval(), load_policy(start).eval())
    with torch.no_grad():
        exported, tuned, before = (model(**inputs).logits for model in models)
    assert torch.equal(exported, tuned)
    assert (exported - before).abs().max() > 1e-3


def test_adapters_are_merged_into_the_same_folder(tiny_policy, make_trainer, tmp_path):
    from transformers import AutoModelForImageTextToText

    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    module, data = fit(make_trainer, tiny_policy, tmp_path / "run", lora=lora)
    main(["export", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), "--output_dir", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(tmp_path / "run" / "by_callback")
    batch = data.encoder([data.sample("val", 0)])
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.vision}
    models = (AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), module.policy.eval())
    with torch.no_grad():
        exported, tuned = (model(**inputs).logits for model in models)
    assert torch.allclose(exported, tuned, atol=1e-5)
    assert not torch.equal(tuned, load_policy(tiny_policy).eval()(**inputs).logits)


def test_files_are_as_readable_as_the_folder(tiny_policy, tmp_path):
    folder = export_policy(load_policy(tiny_policy), load_processor(tiny_policy), tmp_path / "policy")
    assert {oct(path.stat().st_mode & 0o777) for path in [folder, *folder.iterdir()]} == {"0o755", "0o644"}
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.fixture
def trained(tiny_policy, make_trainer, tmp_path) -> Path:
    """A run whose policy lay in tmp_path/base."""
    shutil.copytree(tiny_policy, tmp_path / "base")
    fit(make_trainer, str(tmp_path / "base"), tmp_path / "run", dtype="bfloat16")
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


def test_a_base_policy_that_moved_is_given_again(trained, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base.*--policy FOLDER"):
        main(["export", str(trained)])
    assert not (tmp_path / "run" / "policy").exists()
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be filled
    for _ in range(2):  # and an earlier export replaced
        main(["export", str(trained), "--policy", str(tmp_path / "moved"), "--output_dir", str(out)])
    assert contents(out) == contents(tmp_path / "run" / "by_callback")
    assert b"bfloat16" in (out / "config.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out", "run"]


def test_what_is_not_an_export_is_never_replaced(trained, tmp_path, make_trainer):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ConfigConflictError, match=r"mine exists and is no exported policy"):
        main(["export", str(trained), "--output_dir", str(mine)])
    with pytest.raises(ConfigConflictError, match=r"thesis.txt exists and is no exported policy"):
        main(["export", str(trained), "--output_dir", str(mine / "thesis.txt")])
    with pytest.raises(ConfigConflictError, match=r"base is the policy that training started from"):
        main(["export", str(trained), "--output_dir", str(tmp_path / "base")])
    module = SFTModule(str(tmp_path / "base"), schedule="constant")
    data = ShapesDataModule(processor=str(tmp_path / "base"), batch_size=2, train_size=4)
    with pytest.raises(ConfigConflictError, match=r"mine exists"):  # before training, not after it
        make_trainer(1, callbacks=[HFExport(mine)]).fit(module, datamodule=data)
    assert (mine / "thesis.txt").read_text() == "years"


def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path, trained):
    (tmp_path / "notes.ckpt").write_text("not a checkpoint")
    (tmp_path / "short.ckpt").write_bytes(trained.read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, words in {
        "gone.ckpt": "No checkpoint at",
        "notes.ckpt": "cannot be read",
        "short.ckpt": "cannot be read",
        "foreign.ckpt": "does not say which policy",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}.*{words}|{words}.*{name}"):
            main(["export", str(tmp_path / name)])


def test_the_record_is_plain_data(trained):
    saved = torch.load(trained, weights_only=True)
    assert saved[RECORD]["policy"] == str(trained.parents[2] / "base")
    assert saved[RECORD]["pixel_limits"]["max_pixels"] == MAX_PIXELS
    assert saved[RECORD]["settings"]["dtype"] == "bfloat16"


def test_the_lines_of_the_readme_give_our_answer(tmp_path, monkeypatch, make_trainer, capsys):
    """Executed as they stand on an exported policy; question, answer and boxes are those of `rft predict`."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "AutoModelForImageTextToText" in block]
    monkeypatch.chdir(tmp_path)
    policy = "asset:tiny-qwen2-vl"
    export_policy(load_policy(policy), load_processor(policy), Path("runs/quickstart/policy"))
    ShapesDataModule(eval_seed=3).sample("val", 5).image.resize((160, 90)).save("picture.png")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    data = ImagesDataModule(images="picture.png", classes=["circle"], processor="runs/quickstart/policy")
    module = SFTModule("runs/quickstart/policy")
    ((ours,),) = make_trainer().predict(module, datamodule=data)
    target = DetectionTarget([], category="circle")
    assert names["question"] == ours.sample.question == DetectionTask().question(target, data.encoder.frame)
    assert names["answer"] == ours.text
    assert len(names["boxes"]) >= 1
    assert torch.allclose(torch.tensor(names["boxes"], dtype=torch.float64), ours.answer.boxes)
    assert ours.text in capsys.readouterr().out
    assert os.listdir("runs/quickstart") == ["policy"]
