"""Comparison systems: what they answer is what transformers' classes say, computed apart, in pixels of the picture."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rft_lightning.baselines import SAM, BaselineModule, GroundedSAM, GroundingDINO, OVSegApproximation, SampleBatch
from rft_lightning.baselines.base import load_samples
from rft_lightning.baselines.ov_seg import region
from rft_lightning.callbacks import DetectionMAP, GroundingIoU, GroundingMaskIoU
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.masks import Region
from rft_lightning.sample import NOT_COUNTED, Answer, ClassTarget, DetectionTarget, GroundingTarget, Sample
from rft_lightning.segmenter import Segmenter, box_of_mask
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask
from tests.tiny_baselines import baseline_folder

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = [(80, 60), (50, 90), (80, 60), (64, 64)]
CLASSES = ["stop_sign", "star", "red star", "square"]
EXPRESSIONS = ["The red star.", "what is green ?", "the circle", "the yellow square"]


def picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def detections() -> list[Sample]:
    return [
        Sample(f"d{n}", picture(n), DetectionTarget([[5, 5, 30, 30]], name, n + 1), DetectionTask(), SIZES[n], n)
        for n, name in enumerate(CLASSES)
    ]


def groundings() -> list[Sample]:
    square = Region(((5, 5), (29, 5), (29, 29), (5, 29)))
    return [
        Sample(
            f"g{n}",
            picture(n),
            GroundingTarget([[5, 5, 30, 30]], words, image_size=SIZES[n], regions=(square,)),
            GroundingTask(),
            SIZES[n],
            n,
        )
        for n, words in enumerate(EXPRESSIONS)
    ]


def answered(module: BaselineModule, samples: list[Sample]) -> list[Answer]:
    return [item.answer for item in module.test_step(module.collate(samples), 0)["predictions"]]


def grounding_dino(**arguments) -> GroundingDINO:
    return GroundingDINO(baseline_folder("grounding-dino"), **arguments)


def grounded_sam() -> GroundedSAM:
    return GroundedSAM(baseline_folder("grounding-dino"), segmenter=baseline_folder("sam"))


def ov_seg(**arguments) -> OVSegApproximation:
    return OVSegApproximation(baseline_folder("maskformer"), clip=baseline_folder("clip"), **arguments)


@torch.no_grad()
def dino_boxes(image: Image.Image, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes xyxy in pixels of one picture and their scores, the highest first, without the processor's own reading."""
    from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer

    folder = baseline_folder("grounding-dino")
    words = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    outputs = AutoModelForZeroShotObjectDetection.from_pretrained(folder)(**words, **pixels)
    scores = outputs.logits[0].sigmoid().amax(-1).numpy().astype(np.float64)
    x, y, width, height = outputs.pred_boxes[0].double().numpy().T
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    order = np.argsort(-scores, kind="stable")
    return (boxes * ([*image.size] * 2))[order], scores[order]


def test_boxes_are_those_of_the_model_in_pixels_of_the_picture():
    """A batch of pictures of several sizes and prompts of several lengths, against one question at a time."""
    prompts = ["stop sign .", "star .", "red star .", "square ."]
    for sample, prompt, answer in zip(detections(), prompts, answered(grounding_dino(), detections()), strict=True):
        boxes, scores = dino_boxes(sample.load_image(), prompt)
        assert len(answer.boxes) == 12
        np.testing.assert_allclose(answer.confidences, scores, atol=1e-5)
        np.testing.assert_allclose(answer.boxes, boxes, atol=0.02)
        assert answer.parsed
        assert not answer.no_objects


def test_boxes_are_those_of_transformers_own_pipeline():
    from transformers import pipeline

    pipe = pipeline("zero-shot-object-detection", model=baseline_folder("grounding-dino"))
    sample = detections()[1]
    found = pipe(sample.load_image(), candidate_labels=["star."], threshold=0.01)
    answer = answered(grounding_dino(box_threshold=0.01), [sample])[0]
    assert len(found) == len(answer.boxes) > 1
    for item, box, score in zip(found, answer.boxes.tolist(), answer.confidences.tolist(), strict=True):
        assert item["score"] == pytest.approx(score, abs=1e-5)
        assert list(item["box"].values()) == pytest.approx(box, abs=1.01)  # the pipeline gives whole pixels


def test_thresholds_and_number_of_boxes():
    sample = detections()[0]
    boxes, scores = dino_boxes(sample.load_image(), "stop sign .")
    threshold = float(scores[4] + scores[5]) / 2
    few = answered(grounding_dino(box_threshold=threshold), [sample])[0]
    assert len(few.boxes) == 5
    two = answered(grounding_dino(max_boxes=2), [sample])[0]
    np.testing.assert_allclose(two.boxes, boxes[:2], atol=0.02)
    none = answered(grounding_dino(box_threshold=0.999), [sample])[0]
    assert len(none.boxes) == 0
    assert none.no_objects
    assert none.parsed


@torch.no_grad()
def test_boxes_need_a_word_above_the_text_threshold():
    """The score of a box may come from the full stop or from what frames a prompt; the words stand between."""
    module, sample = grounding_dino(), detections()[0]
    module.configure_model()
    inputs = module.processor(images=sample.load_image(), text="stop sign .", return_tensors="pt")
    of_words = module.detector(**inputs).logits[0].sigmoid()[:, 1:3].amax(-1)  # [CLS] stop sign . [SEP]
    threshold = float(of_words.sort().values[5:7].mean())
    kept = answered(grounding_dino(text_threshold=threshold), [sample])[0]
    assert 0 < len(kept.boxes) == int((of_words > threshold).sum()) < 12


def test_grounding_takes_the_best_box_whatever_its_score():
    prompts = ["the red star .", "what is green ? .", "the circle .", "the yellow square ."]
    module = grounding_dino(box_threshold=0.9, text_threshold=0.9)
    predictions = module.test_step(module.collate(groundings()), 0)["predictions"]
    for prediction, prompt in zip(predictions, prompts, strict=True):
        boxes, scores = dino_boxes(prediction.sample.load_image(), prompt)
        assert prediction.sample.question == prompt
        np.testing.assert_allclose(prediction.answer.boxes, boxes[:1], atol=0.02)
        np.testing.assert_allclose(prediction.answer.confidences, scores[:1], atol=1e-5)


def test_long_expressions_are_cut_to_what_the_models_read():
    sample = groundings()[0]
    sample.target.expression = "the red star " * 30
    assert len(answered(grounding_dino(), [sample])[0].boxes) == 1
    assert answered(ov_seg(), [sample])[0].mask is not None


def test_grounded_sam_is_grounding_dino_and_then_sam():
    boxes = [answer.boxes for answer in answered(grounding_dino(), groundings())]
    images = [sample.load_image() for sample in groundings()]
    masks = Segmenter(baseline_folder("sam")).masks(images, torch.cat(boxes))
    for answer, box, mask in zip(answered(grounded_sam(), groundings()), boxes, masks, strict=True):
        assert torch.equal(answer.boxes, box)
        assert (answer.mask == mask).all()


def test_sam_marks_the_centre_or_the_right_answer():
    images, segmenter = [sample.load_image() for sample in groundings()], Segmenter(baseline_folder("sam"))
    centres = segmenter.masks(images, points=[(width / 2, height / 2) for width, height in SIZES])
    boxed = segmenter.masks(images, [[5, 5, 30, 30]] * 4)
    for prompt, expected, name in (("centre", centres, "SAM"), ("annotated_box", boxed, "SAM (annotated box)")):
        module = SAM(baseline_folder("sam"), prompt=prompt)
        assert module.name == name
        for answer, mask in zip(answered(module, groundings()), expected, strict=True):
            assert (answer.mask == mask).all()
            assert torch.equal(answer.boxes, box_of_mask(mask))


@torch.no_grad()
def test_ov_seg_takes_the_proposal_that_clip_finds_most_similar():
    from transformers import CLIPModel, CLIPProcessor, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

    proposer = MaskFormerForInstanceSegmentation.from_pretrained(baseline_folder("maskformer"))
    images = MaskFormerImageProcessor.from_pretrained(baseline_folder("maskformer"))
    clip, reader = (kind.from_pretrained(baseline_folder("clip")) for kind in (CLIPModel, CLIPProcessor))
    chosen = []
    for sample, answer in zip(groundings(), answered(ov_seg(), groundings()), strict=True):
        image = sample.load_image()
        outputs = proposer(**images(image, return_tensors="pt"))
        size = (image.height, image.width)
        logits = torch.nn.functional.interpolate(outputs.masks_queries_logits, size, mode="bilinear")[0]
        is_object = outputs.class_queries_logits[0].argmax(-1) < 4
        masks = [mask for mask, kept in zip((logits > 0).numpy(), is_object, strict=True) if kept and mask.any()]
        words = clip.get_text_features(**reader.tokenizer(sample.target.expression, return_tensors="pt")).pooler_output
        mean = tuple(round(value * 255) for value in reader.image_processor.image_mean)
        similarities = []
        for mask in masks:
            crop = reader.image_processor(region(image, mask, mean), return_tensors="pt")
            features = clip.get_image_features(**crop).pooler_output
            similarities.append(float(torch.cosine_similarity(words, features)))
        chosen.append(int(np.argmax(similarities)))
        assert len(masks) > 1
        assert np.mean(answer.mask != masks[chosen[-1]]) < 0.002
        assert torch.equal(answer.boxes, box_of_mask(answer.mask))
    assert len(set(chosen)) > 1


def test_ov_seg_looks_once_at_a_picture_that_several_questions_are_about(monkeypatch):
    samples = groundings()
    shared, other = samples[0].image, samples[1].image
    for number in (2, 3):
        samples[number].image, samples[number].image_size = shared, SIZES[0]
    twin = Image.fromarray(np.asarray(shared).copy())  # of the same pixels, but another picture
    samples.append(Sample("g4", twin, samples[1].target, GroundingTask(), SIZES[0], 4))
    module = ov_seg()
    alone = [answered(module, [sample])[0] for sample in samples]
    seen = {"proposer": 0, "clip": 0}
    for name in seen:
        plain = getattr(module, name).forward

        def forward(*, pixel_values, plain=plain, name=name, **inputs):
            seen[name] += len(pixel_values) if name == "proposer" else 1
            return plain(pixel_values=pixel_values, **inputs)

        monkeypatch.setattr(getattr(module, name), "forward", forward)
    together = answered(module, samples)
    assert seen == {"proposer": 3, "clip": 3}
    assert samples[1].image is other
    for answer, expected in zip(together, alone, strict=True):
        assert (answer.mask == expected.mask).all()
        assert torch.equal(answer.boxes, expected.boxes)
    assert (together[0].mask != together[2].mask).any()


def test_a_picture_of_several_samples_is_read_once(tmp_path, monkeypatch):
    samples, opened = groundings(), []
    for number, sample in enumerate(samples[:3]):
        sample.image = tmp_path / f"{number % 2}.png"
        picture(number % 2).save(sample.image)
    load = Sample.load_image
    monkeypatch.setattr(Sample, "load_image", lambda sample: (opened.append(sample.id), load(sample))[1])
    batch = load_samples(samples)
    assert opened == ["g0", "g1", "g3"]
    assert batch.images[0] is batch.images[2]
    for sample, image in zip(samples, batch.images, strict=True):
        assert (np.asarray(image) == np.asarray(load(sample))).all()
    sent = pickle.loads(pickle.dumps(batch))  # as by the processes that load data
    assert sent.images[0] is sent.images[2]
    assert load_samples(samples, images=False).images == []


def test_a_region_stands_alone_on_a_square():
    image, mask = picture(0), np.zeros((60, 80), dtype=bool)
    mask[10:20, 30:50] = True
    mask[10:15, 30:40] = False
    pixels, original = np.asarray(region(image, mask, (1, 2, 3))), np.asarray(image)
    assert pixels.shape == (20, 20, 3)
    assert (pixels[5:15][mask[10:20, 30:50]] == original[mask]).all()
    rest = np.ones((20, 20), dtype=bool)
    rest[5:15] = ~mask[10:20, 30:50]
    assert (pixels[rest] == (1, 2, 3)).all()


def test_ov_seg_without_proposals_finds_nothing():
    answer = answered(ov_seg(mask_threshold=0.9999999), groundings()[:1])[0]
    assert answer.mask.shape == (60, 80)
    assert not answer.mask.any()
    assert len(answer.boxes) == 0


@pytest.mark.parametrize("make", [grounding_dino, grounded_sam, ov_seg, lambda: SAM(baseline_folder("sam"))])
def test_answers_do_not_depend_on_the_batch(make):
    together = answered(make(), groundings())
    for sample, answer in zip(groundings(), together, strict=True):
        alone = answered(make(), [sample])[0]
        np.testing.assert_allclose(answer.boxes, alone.boxes, atol=0.02)
        if answer.mask is not None:
            assert np.mean(answer.mask != alone.mask) < 0.002


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_test_run_logs_the_metrics(make_trainer, precision):
    """In mixed precision too the models compute in their own dtype, so that the numbers are the same."""
    callbacks = [GroundingIoU(), GroundingMaskIoU(), DetectionMAP()]
    trainer = make_trainer(callbacks=callbacks, precision=precision)
    module = grounded_sam()
    trainer.test(module, DataLoader(groundings(), batch_size=3, collate_fn=module.collate), verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    direct = answered(grounded_sam(), groundings())
    others = [GroundingIoU(), GroundingMaskIoU()]
    predictions = grounded_sam().predict_step(SampleBatch(groundings(), [s.load_image() for s in groundings()]), 0)
    expected = {name: value for other in others for name, value in other.score(predictions)[0].items()}
    assert {name.removeprefix("test/"): value for name, value in logged.items()} == pytest.approx(expected, abs=1e-4)
    assert {"test/box_iou_mean", "test/mask_iou_mean", "test/mask_iou_cumulative"} <= logged.keys()
    assert all(answer.mask.any() for answer in direct)


def test_a_datamodule_gives_its_samples_to_a_system(make_trainer):
    data = ShapesDataModule(task=DetectionTask(), test_size=6, eval_batch_size=4)
    module, callback = grounding_dino(), DetectionMAP()
    data.collate = module.encoder_for(data)
    make_trainer(callbacks=[callback]).test(module, datamodule=data, verbose=False)
    samples = list(data.split("test"))
    expected, _ = DetectionMAP().score(module.predict_step(module.collate(samples), 0))
    assert callback.results == pytest.approx(expected, abs=1e-6)
    assert callback.results["parse_rate"] == 1
    assert callback.results["box_iou_mean"] > 0


def test_batches_are_made_without_the_models():
    module = grounding_dino()
    module.configure_model()
    assert len(pickle.dumps(module.encoder_for(None))) < 500


def test_samples_that_only_keep_company_get_no_prediction():
    samples = detections()[:2]
    samples[0].occurrence = NOT_COUNTED
    module = grounding_dino()
    predictions = module.predict_step(module.collate(samples), 0)
    assert [prediction.sample.id for prediction in predictions] == ["d1"]
    samples[1].occurrence = NOT_COUNTED
    assert module.predict_step(module.collate(samples), 0) == []


def test_samples_of_another_task_are_refused():
    flower = Sample("flower 1", picture(0), ClassTarget("rose"), ClassificationTask(), SIZES[0])
    with pytest.raises(ConfigConflictError, match=r"GroundingDINO answers detection and grounding .* 'flower 1'"):
        answered(grounding_dino(), [flower])
    for module in (grounded_sam(), ov_seg(), SAM(baseline_folder("sam"))):
        with pytest.raises(ConfigConflictError, match=f"{type(module).__name__} answers grounding samples"):
            answered(module, detections())


def test_samples_that_ask_for_nothing_are_refused():
    sample = Sample("free", picture(0), None, GroundingTask(), SIZES[0])
    for module in (grounding_dino(), ov_seg()):
        with pytest.raises(ConfigConflictError, match="'free' names none"):
            answered(module, [sample])
    with pytest.raises(ConfigConflictError, match="'free' has no annotated box"):
        answered(SAM(baseline_folder("sam"), prompt="annotated_box"), [sample])
    sample.asked = "the star"
    assert len(answered(grounding_dino(), [sample])[0].boxes) == 1


def test_training_is_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigConflictError, match=r"SAM is a comparison system .* rft evaluate"):
        make_trainer().fit(SAM("/no/such/folder"), DataLoader(groundings(), collate_fn=list))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigConflictError, match="Leave --ckpt_path out"):
        make_trainer().test(
            SAM("/no/such/folder"), DataLoader(groundings(), collate_fn=list), ckpt_path=str(tmp_path / "a.ckpt")
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroundingDINO(box_threshold=1.0), "box_threshold"),
        (lambda: GroundingDINO(text_threshold=-0.1), "text_threshold"),
        (lambda: GroundingDINO(max_boxes=0), "max_boxes"),
        (lambda: GroundingDINO(dtype="int8"), "dtype"),
        (lambda: OVSegApproximation(mask_threshold=1.0), "mask_threshold"),
        (lambda: SAM(prompt="corner"), "prompt"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ConfigConflictError, match=message):
        make()


def test_wrong_checkpoints_are_refused():
    with pytest.raises(CheckpointError, match=r"is a 'sam' model\. Expected .* type grounding-dino"):
        answered(GroundingDINO(baseline_folder("sam")), detections())
    with pytest.raises(CheckpointError, match="type clip"):
        answered(OVSegApproximation(baseline_folder("maskformer"), clip=baseline_folder("sam")), groundings())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_run(dtype):
    exact, found = answered(grounding_dino(), detections()), answered(grounding_dino(dtype=dtype), detections())
    for a, b in zip(exact, found, strict=True):
        assert a.boxes.shape == b.boxes.shape
        assert b.boxes.isfinite().all()
    assert answered(ov_seg(dtype=dtype), groundings())[0].mask.shape == (60, 80)


@pytest.mark.parametrize("file", sorted((CONFIGS / "baselines").glob("*.yaml")), ids=lambda file: file.stem)
def test_overlays_state_all_arguments_and_leak_none(file, capsys):
    import yaml

    from rft_lightning.cli import main

    with pytest.raises(SystemExit):
        main(["evaluate", "-c", str(CONFIGS / "lisa.yaml"), "-c", str(file), "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]
    assert found == yaml.safe_load(file.read_text(encoding="utf-8"))["model"]


def test_an_evaluation_from_the_command_line(tmp_path):
    from rft_lightning.cli import main

    out = tmp_path / "out"
    files = [CONFIGS / "shapes_grounding.yaml", CONFIGS / "baselines" / "grounding_dino.yaml"]
    model = ["--model.checkpoint", baseline_folder("grounding-dino")]
    data = ["--data.test_size", "5", "--data.eval_batch_size", "2"]
    where = ["--output_dir", str(out), "--trainer.enable_progress_bar", "false"]
    main(["evaluate", *(word for file in files for word in ("-c", str(file))), *model, *data, *where])
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    record = json.loads((out / "metrics.json").read_text())
    assert len(rows) == record["samples"] == 5
    assert all(len(row["boxes"]) == 1 and row["question"].endswith(" .") for row in rows)
    assert record["experiment"]["method"] == "GroundingDINO"
    assert 0 <= record["metrics"]["box_iou_mean"] <= 1
    assert record["parse_failures"]["count"] == 0
