"""Rewards of the user's own: how they are called, what stops them, and what their failures count as."""

import copy
import csv
import ctypes
import functools
import logging
import math
import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rft_lightning.cli import main
from rft_lightning.config_files import merge_rewards
from rft_lightning.errors import ConfigConflictError, NonFiniteError, RewardError, RFTError
from rft_lightning.rewards import RewardWithOptions, detection_iou_reward, published, time_limit
from rft_lightning.rewards.guarded import MAX_LATE_CALLS, MAX_STUCK_CALLS, GuardedReward, as_number
from rft_lightning.rewards.time_limit import OutOfTimeError, call_within, stuck_calls
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget
from rft_lightning.tasks import ClassificationTask, DetectionTask

ANSWER, TARGET = Answer(text="<answer>rose</answer>", label="rose"), ClassTarget("rose")


def task(reward, **kwargs):
    return ClassificationTask(rewards={"mine": reward}, **kwargs)


def score(reward, **kwargs):
    """The value of one reward, and how often it failed."""
    failures = Counter()
    values = task(reward, **kwargs).score(ANSWER, TARGET, step=7, sample_id="flowers/3", failures=failures)
    assert values.dtype == torch.float32
    return values.tolist()[0], failures["mine"]


def spin(answer, target):
    while True:
        pass


@pytest.fixture
def impatient(monkeypatch):
    """Threads that cannot be stopped are given up at once, and let go at the end."""
    monkeypatch.setattr(time_limit, "_PATIENCE", 0.01)
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 20
    while stuck_calls() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stuck_calls() == 0


# What a reward is called with


class Full:
    def __call__(self, answer, target, *, rules, step):
        return float((rules, step) == ("paper", 7))


SHAPES = {
    "two": lambda answer, target: 1.0,
    "positional only": lambda answer, target, /: 1.0,
    "rules": lambda answer, target, rules: float(rules == "paper"),
    "step": lambda answer, target, *, step: float(step == 7),
    "both": lambda answer, target, *, rules, step: float((rules, step) == ("paper", 7)),
    "defaults": lambda answer, target, *, rules="strict", scale=1.0: scale * (rules == "paper"),
    "any": lambda answer, target, **kwargs: float(kwargs == {"rules": "paper", "step": 7}),
    "everything": lambda *args, **kwargs: float(args == (ANSWER, TARGET) and kwargs == {"rules": "paper", "step": 7}),
    "instance": Full(),
    "bound method": Full().__call__,
    "partial": functools.partial(lambda worth, answer, target: worth, 1.0),
    # In C, without a signature.
    "no signature": functools.partial(max, 1.0, key=lambda value: value == 1.0),
}


@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize("name", SHAPES)
def test_a_reward_gets_the_keywords_that_it_takes(name, limit):
    assert score(SHAPES[name], rules="paper", reward_time_limit=limit) == (1.0, 0)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda: 1.0, r"<lambda>\(\) cannot be called as a reward.*Expected \(answer, target\)"),
        (lambda answer, target, weight: 1.0, "missing a required argument: 'weight'"),
        (lambda answer, target, *, rules, weight: 1.0, "weight"),
        (lambda rules, step: 1.0, "multiple values"),
        (Full, r"found the class .*Full.*class_path and init_args"),
        ("my_rewards.fn", "found 'my_rewards.fn'"),
        (None, "found None"),
    ],
)
def test_what_cannot_be_called_is_refused_when_the_task_is_built(reward, words):
    with pytest.raises(ConfigConflictError, match=words):
        task(reward)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"reward_time_limit": 0}, "reward_time_limit > 0"),
        ({"reward_time_limit": math.nan}, "reward_time_limit > 0"),
        ({"failed_reward": math.nan}, "failed_reward"),
        ({"failed_reward": -math.inf}, "failed_reward"),
    ],
)
def test_settings_out_of_range(kwargs, words):
    with pytest.raises(ConfigConflictError, match=words):
        task(Full(), **kwargs)


def test_published_rules_need_their_package(monkeypatch):
    monkeypatch.setattr(published, "math_verify_available", lambda: False)
    with pytest.raises(ConfigConflictError, match=r"pip install 'rft_lightning\[published-code\]'"):
        DetectionTask(rules="published_code")
    assert DetectionTask(rules="paper").rules == "paper"
    monkeypatch.setattr(published, "math_verify_available", lambda: True)
    assert DetectionTask(rules="published_code").rules == "published_code"


# What it returns


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        torch.tensor(0.5),
        torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
    ],
)
def test_numbers_of_all_kinds_are_taken(value):
    assert score(lambda answer, target: value) == (0.5, 0)


def test_truth_whole_numbers_and_not_applicable():
    assert score(lambda answer, target: True) == (1.0, 0)
    assert score(lambda answer, target: np.bool_(False)) == (0.0, 0)
    assert score(lambda answer, target: -3) == (-3.0, 0)
    value, failed = score(lambda answer, target: None)
    assert math.isnan(value)
    assert failed == 0


NO_NUMBERS = [math.nan, math.inf, -math.inf, "1", b"1", [1.0], (1.0,), {}, 1j, 10**400, 1e39, object()]
NO_NUMBERS += [torch.ones(2), torch.ones(1), np.ones(3), torch.tensor(math.nan), np.float32(np.inf)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}")
def test_what_is_no_finite_number_is_a_failure(value):
    assert score(lambda answer, target: value) == (0.0, 1)
    assert score(lambda answer, target: value, failed_reward=-1.5) == (-1.5, 1)
    with pytest.raises(NonFiniteError, match=r"'mine' .* returned .*finite number or None.*'flowers/3'.*rose"):
        score(lambda answer, target: value, failed_reward=None)


@given(st.one_of(st.floats(), st.integers(), st.none(), st.text(), st.booleans()))
def test_a_number_is_finite_in_float32_or_refused(value):
    number = as_number(value)
    if value is None:
        assert math.isnan(number)
    elif isinstance(value, str):
        assert number is None
    else:
        largest = (2 - 2**-23) * 2.0**127
        assert number == (float(value) if -largest <= value <= largest else None)


# What it raises


def faulty(answer, target):
    return 1 / 0


def test_an_exception_counts_as_the_failed_reward_and_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        assert score(faulty) == (0.0, 1)
    (record,) = caplog.records
    for words in ("'mine'", "test_custom_rewards.faulty", "ZeroDivisionError: division by zero", "'flowers/3'", "rose"):
        assert words in record.getMessage()
    assert "failed_reward=0" in record.getMessage()


def test_an_exception_stops_the_run_if_it_is_told_to():
    with pytest.raises(RewardError, match=r"'mine' .*ZeroDivisionError.*'flowers/3'.*rose.*failed_reward") as caught:
        score(faulty, failed_reward=None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert isinstance(caught.value, RFTError)


def test_warnings_stop_after_a_few_also_over_copies_of_the_task(caplog):
    original = ClassificationTask(rewards={"one": faulty, "two": faulty})
    failures = Counter()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            for mine in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
                mine.score(ANSWER, TARGET, failures=failures)
    assert failures == {"one": 15, "two": 15}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 6
    assert sum("counted without a word" in message for message in messages) == 2
    with caplog.at_level(logging.WARNING):
        score(faulty)  # another task, as in another run
    assert len(caplog.records) == 7


@pytest.mark.parametrize("limit", [None, 5.0])
def test_mistakes_in_the_configuration_are_no_failures(limit):
    def misconfigured(answer, target):
        raise ConfigConflictError("wrong option")

    with pytest.raises(ConfigConflictError, match="wrong option"):
        score(misconfigured, reward_time_limit=limit)
    target = DetectionTarget(torch.tensor([[0.0, 0, 10, 10]]))
    wrong = RewardWithOptions(detection_iou_reward, options={"matching": "best"})
    with pytest.raises(ConfigConflictError, match="matching"):
        DetectionTask(rewards={"iou": wrong}).score(ANSWER, target)
    with pytest.raises(ConfigConflictError, match="solution_text"):
        DetectionTask(rules="published_code").score(ANSWER, target)


def test_a_failure_leaves_the_other_rewards_alone():
    rewards = {"a": lambda answer, target: 0.25, "b": faulty, "c": lambda answer, target: None}
    failures = Counter()
    values = ClassificationTask(rewards=rewards, failed_reward=-1.0).score(ANSWER, TARGET, failures=failures).tolist()
    assert values[:2] == [0.25, -1.0]
    assert math.isnan(values[2])
    assert failures == {"b": 1}


# The time limit


def sleep(answer, target):
    time.sleep(2.5)
    return 1.0


def compute_in_c(answer, target):
    ctypes.CDLL(None).usleep(2_500_000)  # lets go of the interpreter, and cannot be stopped
    return 1.0


@pytest.mark.parametrize("reward", [spin, sleep, compute_in_c])
def test_a_reward_that_hangs_is_left_behind(reward, impatient, caplog):
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert score(reward, reward_time_limit=0.1) == (0.0, 1)
    assert time.monotonic() - start < 2.2
    assert "did not return within 0.1 seconds" in caplog.records[0].getMessage()
    assert score(lambda answer, target: 0.5) == (0.5, 0)  # the next call has a thread of its own
    with pytest.raises(RewardError, match=r"did not return within 0\.1 seconds.*'flowers/3'"):
        score(reward, reward_time_limit=0.1, failed_reward=None)


def test_a_loop_in_python_is_stopped():
    before = threading.active_count()
    assert score(spin, reward_time_limit=0.05) == (0.0, 1)
    assert stuck_calls() == 0
    assert threading.active_count() <= before + 1


def test_too_many_calls_that_cannot_be_stopped_end_the_run(impatient):
    def wait(answer, target):
        impatient.wait()

    mine = task(wait, reward_time_limit=0.01)
    for _ in range(MAX_STUCK_CALLS - 1):
        assert mine.score(ANSWER, TARGET).tolist() == [0.0]
    with pytest.raises(RewardError, match=r"'mine'.*8 such calls could not be stopped.*reward_time_limit"):
        mine.score(ANSWER, TARGET)


def test_a_reward_that_is_always_late_ends_the_run():
    """Each call is stopped, and yet a batch of them would take hours."""
    worth = {"late": True}

    def mostly_late(answer, target):
        while worth["late"]:
            pass
        return 1.0

    mine = task(mostly_late, reward_time_limit=0.02)
    for late in [True] * (MAX_LATE_CALLS - 1) + [False] + [True] * (MAX_LATE_CALLS - 1):
        worth["late"] = late
        assert mine.score(ANSWER, TARGET).tolist() == [0.0 if late else 1.0]
    with pytest.raises(RewardError, match=r"8 times in a row, last for sample 'x/1'; 0.02 seconds are too few"):
        mine.score(ANSWER, TARGET, sample_id="x/1")


def test_a_reward_that_exits_is_a_failure_like_others():
    def leave(answer, target):
        sys.exit("enough")

    for limit in (None, 5.0):
        assert score(leave, reward_time_limit=limit, failed_reward=0.25) == (0.25, 1)


def test_the_first_warning_says_where(caplog):
    mine = task(faulty)
    for _ in range(2):
        mine.score(ANSWER, TARGET)
    assert [record.exc_info is not None for record in caplog.records] == [True, False]


def test_the_limit_is_not_for_the_packages_own_rewards(monkeypatch):
    """They are bounded, and those under published_code need the main thread."""
    where = []

    def spy(answer, target):
        where.append(threading.current_thread())
        return 1.0

    monkeypatch.setattr("rft_lightning.rewards.published.detection_iou_reward", spy)
    with_options = RewardWithOptions(detection_iou_reward, options={"matching": "greedy"})
    rewards = {"a": detection_iou_reward, "b": functools.partial(detection_iou_reward), "c": with_options}
    target = DetectionTarget(torch.tensor([[0.0, 0, 10, 10]]), solution_text="")
    DetectionTask(rewards=rewards, rules="published_code").score(ANSWER, target)
    assert where == [threading.current_thread()] * 3
    wrapped = functools.wraps(detection_iou_reward)(lambda answer, target, **_: spy(answer, target))
    DetectionTask(rewards={"mine": wrapped}).score(ANSWER, target)
    assert where[3] is not threading.current_thread()


def test_the_modes_of_torch_are_those_of_the_caller():
    def modes():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

    contexts = [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
    for context in contexts:
        with context():
            assert call_within(5, modes) == modes()
    assert len({call_within(5, threading.current_thread) for _ in range(3)}) == 1


def test_an_exception_arrives_with_where_it_was_raised():
    with pytest.raises(ZeroDivisionError) as caught:
        call_within(5, lambda: faulty(None, None))
    assert "faulty" in [entry.name for entry in caught.traceback]


def test_a_timeout_that_the_reward_raises_is_its_own():
    def raises():
        raise TimeoutError("the judge does not answer")

    with pytest.raises(TimeoutError, match="judge"):
        call_within(5, raises)


def test_a_reward_may_score_with_another_task(impatient):
    inner = task(lambda answer, target: 0.5)
    assert score(lambda answer, target: inner.score(answer, target)[0]) == (0.5, 0)


def test_a_late_result_is_not_taken_for_the_next_one(impatient):
    release = threading.Event()
    with pytest.raises(OutOfTimeError):
        call_within(0.02, lambda: release.wait() and "late")
    release.set()
    assert [call_within(5, lambda i=i: i) for i in range(20)] == list(range(20))


def test_a_call_costs_little():
    def mine(answer, target):
        return 0.5

    guarded = GuardedReward("mine", mine, time_limit=10.0, failed_reward=0.0)

    def seconds():
        start = time.perf_counter()
        for _ in range(300):
            guarded(ANSWER, TARGET, rules="strict", step=0, sample_id="?")
        return (time.perf_counter() - start) / 300

    assert any(seconds() < 2e-4 for _ in range(50))  # a busy machine spoils some


# Travelling


class Worth:
    def __init__(self, worth):
        self.worth = worth

    def __call__(self, answer, target):
        return self.worth


def test_tasks_are_copied_and_pickled_after_they_have_scored():
    mine = task(Worth(0.25))
    mine.score(ANSWER, TARGET)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert other.score(ANSWER, TARGET).tolist() == [0.25]


def _score_in(queue, mine):
    queue.put(mine.score(ANSWER, TARGET).tolist())


def test_a_forked_process_has_a_thread_of_its_own():
    mine = task(Worth(0.25))
    mine.score(ANSWER, TARGET)  # the thread exists before the fork, but not in the child
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_score_in, args=(queue, mine))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert queue.get() == [0.25]


MODULE = '''
class Worth:
    def __init__(self, worth):
        self.worth = worth

    def __call__(self, answer, target):
        return self.worth


def collate(pairs):
    """The task, and what it says in the worker."""
    return [(task, task.score(answer, None).tolist()) for task, answer in pairs]
'''


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_tasks_travel_to_loader_workers_and_back(method, tmp_path, monkeypatch):
    (tmp_path / "travelling_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import travelling_rewards

    mine = ClassificationTask(rewards={"mine": travelling_rewards.Worth(0.25)})
    mine.score(ANSWER, TARGET)
    loader = DataLoader(
        [(mine, Answer(text="a")), (mine, Answer(text="b"))],
        batch_size=2,
        num_workers=1,
        collate_fn=travelling_rewards.collate,
        multiprocessing_context=method,
    )
    ((first, second),) = list(loader)
    sys.modules.pop("travelling_rewards")
    assert first[1] == second[1] == [0.25]
    assert first[0].score(ANSWER, TARGET).tolist() == [0.25]


# Options


def scaled(answer, target, *, rules="strict", step=None, scale: float, offset=0.0):
    return scale + offset + (step or 0)


def plain(answer, target, scale=1.0):
    return scale


def test_options_are_handed_on():
    assert score(RewardWithOptions(scaled, options={"scale": 0.5})) == (7.5, 0)
    assert score(RewardWithOptions(plain, options={"scale": 3})) == (3.0, 0)
    assert RewardWithOptions(plain, options={})(ANSWER, TARGET) == 1.0
    anything = RewardWithOptions(lambda answer, target, **options: options["x"], options={"x": 4})
    assert score(anything) == (4.0, 0)


def test_options_that_do_not_exist_are_refused_by_name():
    with pytest.raises(ConfigConflictError, match=r"scaled has no option 'scael'; its options: scale, offset"):
        RewardWithOptions(scaled, options={"scael": 1})
    with pytest.raises(ConfigConflictError, match=r"detection_iou_reward has no option 'x'.*matching"):
        RewardWithOptions(detection_iou_reward, options={"x": 1, "matching": "greedy"})
    with pytest.raises(ConfigConflictError, match=r"no option 'rules'; its options: scale, offset"):
        RewardWithOptions(scaled, options={"rules": "paper", "scale": 1})
    with pytest.raises(ConfigConflictError, match="no option 'answer'; its options: scale"):
        RewardWithOptions(plain, options={"answer": 1})
    with pytest.raises(ConfigConflictError, match=r"no option 'step'.*any but rules and step"):
        RewardWithOptions(lambda answer, target, **options: 1.0, options={"step": 1})
    with pytest.raises(ConfigConflictError, match="missing a required argument: 'scale'"):
        RewardWithOptions(scaled, options={"offset": 1})
    with pytest.raises(ConfigConflictError, match="found the class"):
        RewardWithOptions(Worth, options={})


def test_a_reward_with_options_says_what_it_is_and_travels():
    reward = RewardWithOptions(detection_iou_reward, options={"matching": "hungarian", "threshold": 0.6})
    assert repr(reward) == (
        "RewardWithOptions(rft_lightning.rewards.detection.detection_iou_reward, matching='hungarian', threshold=0.6)"
    )
    other = pickle.loads(pickle.dumps(reward))
    box = torch.tensor([[0.0, 0, 10, 10]])
    answer, target = Answer(text="x", boxes=box), DetectionTarget(box)
    assert other(answer, target) == reward(answer, target) == 1.0
    assert other(answer, ClassTarget("x")) is None


# The command line

CONFIGS = Path(__file__).parent.parent / "configs"
MINE = '''
import time

calls = 0


class Brevity:
    """1 for an answer of at most so many tokens."""

    def __init__(self, tokens: int = 40, worth: float = 1.0):
        self.tokens, self.worth = tokens, worth

    def __call__(self, answer, target):
        return self.worth * (len(answer.text) <= self.tokens)


def constant(answer, target, *, value: float = 0.25, **ignored):
    return value


def hang(answer, target):
    """Loops at first, sleeps then, and works in the end."""
    global calls
    calls += 1
    while calls == 1:
        pass
    time.sleep(1.5 if calls == 2 else 0)
    return 1.0


def faulty(answer, target):
    return answer.nothing
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, with my_rewards.py in it."""
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def overlay(folder, rewards, name="overlay.yaml", **arguments):
    settings = {"rewards": rewards, **arguments}
    (folder / name).write_text(yaml.safe_dump({"data": {"init_args": {"task": {"init_args": settings}}}}))
    return ["-c", name]


def quick(tiny_policy, *files):
    """Arguments that make the quickstart small."""
    return [
        "fit", "-c", str(CONFIGS / "quickstart.yaml"), *files, "--model.policy", tiny_policy, "--data.val_size", "2",
        "--data.test_size", "2", "--data.shots", "2", "--data.batch_size", "2", "--model.group_size", "2",
        "--model.max_completion_length", "8", "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


def logged(folder, column):
    (file,) = folder.rglob("metrics.csv")
    return [float(row[column]) for row in csv.DictReader(file.open()) if row.get(column)]


def task_of(capsys, *arguments):
    """The task's block as the command line sees it."""
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *arguments, "--print_config"])
    output = capsys.readouterr()
    assert stopped.value.code == 0, output.err
    return yaml.safe_load(output.out)["data"]["init_args"]["task"]["init_args"]


OPTIONS = {"class_path": "rft_lightning.rewards.RewardWithOptions"}


def test_a_run_with_rewards_of_the_users_folder(folder, tiny_policy):
    """A class, a function with options, one reward left out; the others of the file below stay."""
    rewards = {
        "brevity": {"class_path": "my_rewards.Brevity", "init_args": {"tokens": 10**6}},
        "constant": {**OPTIONS, "init_args": {"reward": "my_rewards.constant", "options": {"value": -3}}},
        "confidence": None,
    }
    main(quick(tiny_policy, *overlay(folder, rewards, reward_weights={"brevity": 0.5})))
    assert logged(folder, "train/rewards/brevity/mean") == [1, 1]
    assert logged(folder, "train/rewards/constant/mean") == [-3, -3]
    (file,) = folder.rglob("metrics.csv")
    columns = file.read_text().splitlines()[0].split(",")
    assert "train/rewards/iou/mean" in columns
    assert "train/rewards/confidence/mean" not in columns
    total = sum(logged(folder, f"train/rewards/{name}/mean")[0] for name in ("format", "iou", "constant")) + 0.5
    assert logged(folder, "train/reward")[0] == pytest.approx(total, abs=1e-5)
    (saved,) = folder.rglob("config.yaml")
    main(["fit", "-c", str(saved), "--trainer.max_steps", "1", "--trainer.default_root_dir", "again"])


def test_a_file_in_a_subfolder_finds_the_rewards_of_the_working_directory(folder, capsys):
    (folder / "more").mkdir()
    overlay(folder, {"brevity": "my_rewards.constant"}, "more/overlay.yaml")
    assert "brevity" in task_of(capsys, "-c", "more/overlay.yaml")["rewards"]


def test_the_example_of_the_documentation_runs(folder, tiny_policy):
    text = (CONFIGS.parent / "docs" / "rewards.md").read_text().split("## Your own reward")[1]
    python, configuration = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "yaml"))
    (folder / "my_rewards.py").write_text(python)
    (folder / "mine.yaml").write_text(configuration)
    main(quick(tiny_policy, "-c", "mine.yaml"))
    means = {name: logged(folder, f"train/rewards/{name}/mean") for name in ("count", "brevity", "says_why")}
    assert means["brevity"] == [1, 1]
    assert all(len(values) == 2 for values in means.values())
    assert logged(folder, "train/rewards/confidence/mean") == []
    assert logged(folder, "train/rewards/count/failed") == []


def test_a_reward_that_hangs_does_not_hang_a_run(folder, tiny_policy, impatient, caplog):
    with caplog.at_level(logging.WARNING):
        main(quick(tiny_policy, *overlay(folder, {"hang": "my_rewards.hang"}, reward_time_limit=0.2)))
    assert logged(folder, "train/rewards/hang/mean") == [0.5, 1]
    assert logged(folder, "train/rewards/hang/failed")[0] == 2
    assert sum("did not return within 0.2 seconds" in record.getMessage() for record in caplog.records) == 2


def test_a_failure_stops_a_run_that_says_so(folder, tiny_policy):
    arguments = overlay(folder, {"faulty": "my_rewards.faulty"}, failed_reward=None)
    with pytest.raises(RewardError, match=r"'faulty' \(my_rewards.faulty\) raised AttributeError.*'shapes/0/train"):
        main(quick(tiny_policy, *arguments))


def test_rewards_on_the_command_line(folder, capsys):
    init_args = "--data.task.init_args.rewards.brevity.init_args"
    task = task_of(
        capsys, "--data.task.rewards.brevity", "my_rewards.Brevity", f"{init_args}.tokens", "7",
        "--data.task.rewards.iou", str({**OPTIONS, "init_args": {"reward": "rft_lightning.rewards.detection_iou_reward",
        "options": {"matching": "hungarian"}}}), "--data.task.reward_time_limit", "3",
    )  # fmt: skip
    assert list(task["rewards"]) == ["format", "iou", "confidence", "brevity"]
    assert task["rewards"]["brevity"]["init_args"] == {"tokens": 7, "worth": 1.0}
    assert task["rewards"]["iou"]["init_args"]["options"] == {"matching": "hungarian"}
    assert task["reward_time_limit"] == 3
    files = overlay(folder, {"iou": task["rewards"]["iou"]})
    changed = task_of(capsys, *files, "--data.task.rewards.iou.options", "{matching: greedy}")
    assert changed["rewards"]["iou"]["init_args"]["options"] == {"matching": "greedy"}


def test_later_files_change_single_rewards(folder, capsys):
    brevity = {"class_path": "my_rewards.Brevity", "init_args": {"tokens": 7}}
    first = overlay(folder, {"brevity": brevity, "format": None}, "a.yaml", reward_weights={"iou": 2})
    second = overlay(folder, {"brevity": {"init_args": {"worth": 3}}, "x": "my_rewards.constant"}, "b.yaml")
    task = task_of(capsys, *first, *second)
    assert list(task["rewards"]) == ["iou", "confidence", "brevity", "x"]
    assert task["rewards"]["brevity"]["init_args"] == {"tokens": 7, "worth": 3}
    assert task["reward_weights"] == {"iou": 2, "confidence": 1}
    assert list(task_of(capsys)["rewards"]) == ["format", "iou", "confidence"]  # nothing is left of the last run


def test_rewards_of_another_task_are_not_merged():
    first = {"init_args": {"task": {"class_path": "DetectionTask", "init_args": {"rewards": {"a": "x.a"}}}}}
    state = merge_rewards(first, {})
    second = {"task": {"class_path": "GroundingTask", "init_args": {"rewards": {"b": "x.b"}}}}
    state = merge_rewards(second, state)
    assert second["task"]["init_args"]["rewards"] == {"b": "x.b"}
    third = {"task": {"rewards": {"c": "x.c"}}}
    merge_rewards(third, state)
    assert third == {"task": {"rewards": {"b": "x.b", "c": "x.c"}}}
    for untouched in ({}, {"init_args": None}, {"task": None}, {"task": [{"class_path": "DetectionTask"}]}):
        before = copy.deepcopy(untouched)
        assert merge_rewards(untouched, state) == state
        assert untouched == before


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("my_reward.constant", "No module named 'my_reward'. Got value: my_reward.constant\nModules are looked for"),
        ("my_rewards.constnat", "module 'my_rewards' has no attribute 'constnat'"),
        ({"class_path": "my_rewards.Brevitty"}, "module 'my_rewards' has no attribute 'Brevitty'"),
        ({"class_path": "my_rewards.Brevity", "init_args": {"token": 1}}, "Option 'token' is not accepted"),
        (
            {**OPTIONS, "init_args": {"reward": "my_rewards.constnat", "options": {}}},
            "module 'my_rewards' has no attribute 'constnat'",
        ),
    ],
)
def test_a_wrong_path_is_a_short_error(reward, words, folder, capsys):
    for arguments in (overlay(folder, {"mine": reward}), ["--data.task.rewards.mine", str(reward)]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "-c", str(CONFIGS / "quickstart.yaml"), *arguments])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) <= 4


def test_options_that_do_not_exist_are_an_error_of_the_command_line(folder, tiny_policy):
    arguments = {"reward": "rft_lightning.rewards.detection_iou_reward", "options": {"matchin": "greedy"}}
    with pytest.raises(ConfigConflictError, match=r"no option 'matchin'; its options: matching"):
        main(quick(tiny_policy, *overlay(folder, {"iou": {**OPTIONS, "init_args": arguments}})))


def test_a_console_script_finds_the_users_folder_behind_all_packages(folder):
    """`-P` keeps the working directory from the path, as a console script does."""
    (folder / "peft.py").write_text("raise RuntimeError('the wrong peft')")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "rft_lightning", "fit", "-c", str(CONFIGS / "quickstart.yaml"),
         *overlay(folder, {"mine": "my_rewards.constant"}), "--print_config"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "mine: my_rewards.constant" in result.stdout


def test_prepare_finds_the_users_folder_too(folder, capsys):
    files = ["-c", str(CONFIGS / "quickstart.yaml"), *overlay(folder, {"mine": {"class_path": "my_rewards.Brevity"}})]
    main(["prepare", *files, "--data.val_size", "2", "--data.test_size", "2", "--data.shots", "2"])
    assert "train" in capsys.readouterr().out


def test_arguments_without_types_are_taken(folder, capsys):
    (folder / "my_rewards.py").write_text(MINE.replace("tokens: int = 40, worth: float = 1.0", "tokens, worth=1.0"))
    brevity = {"class_path": "my_rewards.Brevity", "init_args": {"tokens": 5}}
    assert task_of(capsys, *overlay(folder, {"mine": brevity}))["rewards"]["mine"]["init_args"]["tokens"] == 5
