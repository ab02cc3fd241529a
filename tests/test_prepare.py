"""`rft prepare`: what it checks, prints, writes and draws, and that it builds no model."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rft_lightning.cli import main
from rft_lightning.datamodules import HubDataModule, ShapesDataModule
from rft_lightning.datamodules.download import Download
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.prepare import check_pictures, prepare, preview_rows
from rft_lightning.sample import ClassTarget, Sample
from rft_lightning.tasks import ClassificationTask, DetectionTask

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def _no_model(monkeypatch, tmp_path):
    """Neither a policy nor a trainer is built; files are written into the test's folder."""

    def refuse(*args, **kwargs):
        raise AssertionError("rft prepare builds neither a model nor a trainer")

    # Not their own constructors, whose signatures the command line reads.
    monkeypatch.setattr("lightning.pytorch.LightningModule.__init__", refuse)
    monkeypatch.setattr("lightning.pytorch.trainer.trainer._AcceleratorConnector", refuse)
    monkeypatch.setattr("rft_lightning.callbacks.detection_map.COCOMeanAveragePrecision", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six pictures of two classes, and a configuration over them."""
    rows = []
    for number in range(6):
        Image.new("RGB", (60 + number, 40), (number * 40, 90, 90)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "problem": "Which?", "solution": ("rose", "tulip")[number % 3 == 0]})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "test.json").write_text(json.dumps(rows[:2]))
    data = {
        "class_path": "rft_lightning.datamodules.HubDataModule",
        "init_args": {"root": str(tmp_path / "train.json"), "test_root": str(tmp_path / "test.json"), "shots": 3},
    }
    base = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config = {**base, "config": str(CONFIGS / "base.yaml"), "data": data}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.filterwarnings("ignore:Fewer than")
def test_summary_manifest_and_preview(pictures, tiny_policy, capsys):
    command = ["prepare", "-c", "mine.yaml", "--model.policy", tiny_policy]
    main([*command, "--preview", "out/sheet.png", "--preview_samples", "2"])
    out = capsys.readouterr().out
    assert re.search(r"train\W+\d", out)
    assert "tulip (2)" in out
    written = pictures / "mine.manifest.json"
    assert len(json.loads(written.read_text())["splits"]["train"]["ids"]) == 5
    assert Image.open("out/sheet.png").width == 2 * 504
    written.rename("kept.json")
    main([*command, "--data.manifest", "kept.json", "--seed_everything", "7", "--manifest", "again.json"])
    assert Path("again.json").read_bytes() == Path("kept.json").read_bytes()
    assert not written.exists()


@pytest.mark.filterwarnings("ignore:Fewer than")
def test_overrides_work_as_for_fit(pictures, tiny_policy, capsys):
    main(["prepare", "--config", "mine.yaml", "--data.shots=1", "--trainer.max_steps", "5", "--model.group_size", "2"])
    assert len(json.loads(Path("mine.manifest.json").read_text())["splits"]["train"]["ids"]) == 2
    main(["prepare", "-c", "mine.yaml", "--data", "ShapesDataModule", "--data.train_size", "5"])
    assert re.search(r"train\W+5\W", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["prepare", "-c", "mine.yaml", "--data.shotz", "1"])
    assert "shotz" in capsys.readouterr().err


def test_every_seed_is_another_draw(pictures):
    def drawn(seed: int) -> list[str]:
        main(["prepare", "-c", "mine.yaml", "--data.shots=1", f"--seed_everything={seed}", "--manifest", "m.json"])
        return json.loads(Path("m.json").read_text())["splits"]["train"]["ids"]

    assert drawn(0) == drawn(0)
    assert any(drawn(seed) != drawn(0) for seed in range(1, 6))


def test_a_saved_configuration_is_read_too(tiny_policy, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), "--data.train_size", "3", "--print_config"])
    Path("saved.yaml").write_text(capsys.readouterr().out)
    main(["prepare", "-c", "saved.yaml", "--data.shots", "null"])
    assert re.search(r"train\W+3\W", capsys.readouterr().out)


def test_shapes_and_mixtures(capsys):
    main(["prepare", "-c", str(CONFIGS / "quickstart.yaml"), "--data.shots", "1", "--preview", "shapes.png"])
    assert Image.open("shapes.png").width == 4 * 504
    main(["prepare", "-c", str(CONFIGS / "mixture.yaml"), "--preview", "mixture.png", "--preview_samples", "1"])
    out = capsys.readouterr().out
    assert "0-ShapesDataModule train" in out
    assert "1-ShapesDataModule test" in out
    assert Image.open("mixture.png").width == 504
    with pytest.raises(ConfigConflictError, match="has no manifest"):
        main(["prepare", "-c", str(CONFIGS / "quickstart.yaml"), "--manifest", "m.json"])


@pytest.mark.filterwarnings("ignore:Fewer than")
def test_a_members_manifest_is_given_back_as_printed(pictures, capsys):
    config = yaml.safe_load(Path("mine.yaml").read_text())

    def drawn() -> tuple[list[str], str]:
        member = {
            "class_path": "rft_lightning.datamodules.MixtureDataModule",
            "init_args": {"members": [{"data": own}]},
        }
        Path("mix.yaml").write_text(yaml.safe_dump({**config, "data": member}))
        main(["prepare", "-c", "mix.yaml"])
        written = json.loads(Path("mix.manifest.0-HubDataModule.json").read_text())
        return written["splits"]["train"]["ids"], capsys.readouterr().out.replace("\n", " ")

    own = config["data"]
    own["init_args"] |= {"shots": 1, "seed": 1}
    rows, out = drawn()
    file, name = re.search(r"`manifest: (\S+)` in the init_args of member (\S+) uses", out).groups()
    assert (file, name) == ("mix.manifest.0-HubDataModule.json", "0-HubDataModule")
    assert "--data.manifest" not in out
    Path(file).rename("kept.json")
    own["init_args"] |= {"manifest": "kept.json", "seed": 5}
    assert drawn()[0] == rows


def test_what_is_wrong_is_named(pictures):
    with pytest.raises(ConfigConflictError, match="There is no data block"):
        main(["prepare"])
    with pytest.raises(ConfigConflictError, match=r"leave data\.processor out"):
        main(["prepare", "-c", "mine.yaml", "--data.processor", "other"])
    with pytest.raises(ConfigConflictError, match="shots >= 1"):
        main(["prepare", "-c", "mine.yaml", "--data.shots", "0"])
    with pytest.raises(DatasetNotFoundError, match="nothing to download"):
        main(["prepare", "-c", "mine.yaml", "--download", "true"])
    with pytest.raises(ConfigConflictError, match=r"a.xyz cannot be written.*another file with --preview"):
        main(["prepare", "-c", "mine.yaml", "--preview", "a.xyz"])
    with pytest.raises(ConfigConflictError, match=r"another file with --manifest"):
        main(["prepare", "-c", "mine.yaml", "--manifest", "0.png/m.json"])
    (pictures / "0.png").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"0\.png"):
        main(["prepare", "-c", "mine.yaml"])


def test_downloads_go_to_the_root(tmp_path, monkeypatch, tiny_policy):
    fetched = []
    monkeypatch.setattr("rft_lightning.datamodules.base.fetch_all", lambda *arguments: fetched.append(arguments))
    offers = [Download("http://localhost/a.zip", "a.zip", None, ".")]
    monkeypatch.setattr(HubDataModule, "downloads", offers, raising=False)
    with pytest.raises(DatasetNotFoundError):
        prepare(HubDataModule(root=tmp_path / "set"), download=True)
    assert fetched == [(offers, tmp_path / "set")]


def test_a_picture_of_another_size(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")

    def sample(size):
        return Sample("a", tmp_path / "a.png", ClassTarget("x"), ClassificationTask(), size)

    check_pictures([sample((30, 20))], "train")
    with pytest.raises(AnnotationError, match=r"a.png has 30x20 pixels, but the annotations of train state 20x30"):
        check_pictures([sample((20, 30))], "train")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetNotFoundError, match="cannot be read"):
        check_pictures([sample((30, 20))], "train")


def test_a_preview_shows_every_task():
    data = ShapesDataModule(task=[DetectionTask(), ClassificationTask()], train_size=9)
    rows = preview_rows(data, 2)
    assert [heading for heading, _ in rows] == ["detection / train", "classification / train"]
    assert [len(samples) for _, samples in rows] == [2, 2]
