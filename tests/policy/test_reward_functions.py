"""Rewards of one's own: what functions are given, what becomes of what they give, and the rules that are built in."""

from __future__ import annotations

from decimal import Decimal

import pytest

from helpers.files import metric_lines
from helpers.recipes import quiet
from stable_rlhf.data import read_prompts, write_jsonl
from stable_rlhf.data.encoding import Encoded, encode_prompt
from stable_rlhf.data.prompts import EncodedPrompt
from stable_rlhf.data.records import PromptRow
from stable_rlhf.models.policy import PolicyModel
from stable_rlhf.policy.ppo import PPOTrainer
from stable_rlhf.policy.reward_functions import Rewards
from stable_rlhf.policy.reward_rules import last_number
from stable_rlhf.rollout.local import Rollout
from stable_rlhf.run.bounds import check
from stable_rlhf.settings.recipe import Recipe
from stable_rlhf.settings.stages import PPOArguments, RewardArguments

CHAT = [{"role": "user", "content": "2 + 2?"}]
ROWS = [
    PromptRow("1 + 1?", source="p.jsonl:1", meta={"answer": "It is\n#### 2", "hard": True}),
    PromptRow(CHAT, task="sums", source="p.jsonl:2", meta={"answer": 4}),
]
TEXTS = ("the sum is 2", "it is 5")

pytestmark = pytest.mark.usefixtures("one_process")


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout(Encoded((1, 2, *range(len(t))), 2), t, True) for t in texts]


@pytest.fixture
def rewards(tmp_path):
    """Rewards whose functions are written in a file, by name; built-in ones stay as they are."""

    def make(code: str, *names: str, **settings) -> Rewards:
        path = tmp_path / f"own{len(list(tmp_path.iterdir()))}.py"
        path.write_text("import asyncio, time\n" + code, encoding="utf-8")
        functions = [n if n in ("scorer", "exact_number", "regex", "length") else f"{path}:{n}" for n in names]
        return Rewards(RewardArguments(functions=functions, **settings), max_new_tokens=16)

    return make


def scores(made: Rewards, of_scorer=(0.0, 0.0)):
    return made.of(ROWS, rollouts(*TEXTS), of_scorer, step=3, steps=9)


def test_a_function_gets_what_trl_gives_and_every_column(rewards):
    code = """
def f(prompts, completions, completion_ids, answer, trainer_state, **others):
    assert prompts == ["1 + 1?", [{"role": "user", "content": "2 + 2?"}]]
    assert completions == ["the sum is 2", [{"role": "assistant", "content": "it is 5"}]]
    assert completion_ids == [list(range(12)), list(range(7))]
    assert answer == ["It is\\n#### 2", 4] and trainer_state.global_step == 3
    assert others["hard"] == [True, None] and others["task"] == [None, "sums"]
    prompts[1].clear()  # its own copy
    return [1, 0.5]
def g(responses, hard=None):
    assert responses == ["the sum is 2", "it is 5"] and hard == [True, None]
    return [True, None]
"""
    values, figures = scores(rewards(code, "f", "scorer", "g", weights=[2, 1, -1]), (0.25, 0.75))
    assert values == [2 + 0.25 - 1, 1 + 0.75]  # None: not applicable
    assert figures == {"reward/f": 0.75, "reward/scorer": 0.5, "reward/g": 1.0, "reward_failures": 0.0}
    assert ROWS[1].prompt == CHAT == [{"role": "user", "content": "2 + 2?"}]


def test_asynchronous_functions_run_at_the_same_time_and_in_one_loop(rewards):
    code = """
loops, met = set(), asyncio.Queue()
async def f(completions, **columns):
    loops.add(id(asyncio.get_running_loop()))
    await met.get()  # in turn it would wait for ever
    return [1.0, 2.0]
async def g(completions, **columns):
    await met.put(1)
    return [0.0, len(loops)]
"""
    made = rewards(code, "f", "g")
    assert scores(made)[0] == [1, 3] and scores(made)[0] == [1, 3]


RAISES = """
def plain(prompts, answer, **others):
    return [int(a) for a in answer]
async def asynchronous(prompts, answer, **others):
    return [int(a) for a in answer]
def late(prompts, **others):
    time.sleep(30)
async def late_too(prompts, **others):
    await asyncio.sleep(30)
async def blocking(prompts, **others):
    time.sleep(6)
def nan(prompts, **others):
    return [float("nan"), 4.0][:len(prompts)]
def text(prompts, **others):
    return ["1", 4.0][:len(prompts)]
def leaves(prompts, **others):
    raise SystemExit(3)
def few(prompts, **others):
    return [1.0]
def none(prompts, **others):
    return None
def inapplicable(prompts, **others):
    return [1.0, None][:len(prompts)]
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("plain", "ValueError: invalid literal"),
        ("asynchronous", "ValueError: invalid literal"),
        ("late", r"not done after 1 s \(rewards.timeout\)"),
        ("late_too", r"not done after 1 s \(rewards.timeout\)"),
        ("nan", "expected a finite number or None, got 'nan'"),
        ("text", "expected a finite number or None, got '1'"),
        ("leaves", "SystemExit: 3"),
    ],
)
def test_a_failure_names_the_function_and_the_row_or_counts_as_nothing(rewards, name, reason):
    timeout = 1.0 if "late" in name else 60.0
    with pytest.raises(ValueError, match=rf"rewards.functions: '{name}' gave no reward of row p.jsonl:1: {reason}"):
        scores(rewards(RAISES, name, timeout=timeout))
    values, figures = scores(rewards(RAISES, name, "length", timeout=timeout, on_failure="zero"))
    both = name in ("late", "late_too", "leaves")
    assert values == [12 / 16, 7 / 16 + (0 if both else 4)] and figures["reward_failures"] == 1 + both
    assert figures[f"reward/{name}"] == (0 if both else 2)


def test_a_coroutine_that_blocks_its_loop_does_not_hold_up_the_next_step(rewards):
    made = rewards(RAISES + "async def good(prompts, **others):\n    return [1.0, 2.0]\n", "blocking", "good",
                   timeout=1.0, on_failure="zero")  # fmt: skip
    assert scores(made)[1]["reward_failures"] >= 2
    made.functions = made.functions[1:]
    made.names, made.weights = made.names[1:], made.weights[1:]
    assert scores(made)[0] == [1, 2]


@pytest.mark.parametrize("policy", ["stop", "zero"])
def test_what_is_wrong_at_every_step_stops_whatever_the_settings_say(rewards, policy):
    for name, words in (
        ("few", "'few' gave 1 rewards for 2 responses"),
        ("none", "'none' gave NoneType, expected a list with a reward a response"),
        ("inapplicable", "no reward applies to a response to row p.jsonl:2: all gave None"),
    ):
        with pytest.raises(ValueError, match=f"rewards.functions: {words}"):
            scores(rewards(RAISES, name, on_failure=policy))


def test_what_is_wrong_is_found_before_the_first_step(rewards, tmp_path, capsys):
    for name, words in (
        ("few", "'few' gave 1 rewards for 2"), ("nan", "'nan' gave no reward of row p.jsonl:1: .*tried on an empty"),
        ("plain", "'plain' gave no reward of row p.jsonl:1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            rewards(RAISES, name).check(ROWS)
    rewards(RAISES, "plain", on_failure="zero").check(ROWS)
    assert "'plain' gave no reward of row p.jsonl:1" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="'f' takes 'solution', which is no column of the prompts; they have answer"):
        rewards("def f(completions, solution): pass", "f").check(ROWS)
    with pytest.raises(ValueError, match="'exact_number' takes 'gold', which is no column"):
        rewards("", "exact_number", answer="gold").check(ROWS)
    with pytest.raises(ValueError, match=r"has no 'correct'; did you mean 'correkt'\?"):
        rewards("def correkt(completions): pass", "correct")
    with pytest.raises(ValueError, match=r"cannot be imported: ZeroDivisionError"):
        rewards("1 / 0", "f")
    with pytest.raises(ValueError, match=r"rewards.functions: .*there is no file"):
        Rewards(RewardArguments(functions=[f"{tmp_path}/nowhere.py:f"]), 16)
    rewards("", "exact_number", "length").check(ROWS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"functions": []}, "rewards.functions: name at least one"),
        ({"functions": ["scorer", "scorer"]}, "rewards.functions: name at least one, each once"),
        ({"functions": ["exact"]}, "expected path/to/file.py:name or package.module:name, got 'exact'"),
        ({"weights": [1, 2]}, "rewards.weights: expected one for each of the 1 functions"),
        ({"weights": [0]}, "rewards.weights: all are 0"),
        ({"weights": [float("inf")]}, "rewards.weights must be"),
        ({"functions": ["regex"]}, "rewards.pattern and 'regex'"),
        ({"functions": ["regex"], "pattern": "("}, "rewards.pattern: not a regular expression"),
        ({"timeout": 0}, "rewards.timeout must be above 0"),
    ],
)
def test_settings_that_are_wrong_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        check(Recipe(rewards=RewardArguments(**settings)))
    check(Recipe(rewards=RewardArguments(functions=["scorer", "own.py:f"], weights=[1, -0.5])))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"), ("so 7 of 12.\n#### -5 apples, 3 left", "-5"), ("costs $1,000.50.", "1000.50"),
        ("10-3", "3"), ("it is −4", "-4"), ("(+3)", "3"), ("1, 2,3", "3"), ("-$7", "-7"), ("12,345,678", "12345678"),
        ("####", None), ("", None), ("none", None), ("5 ####", "5"), (".5", ".5"),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_built_in_rewards(rewards, tmp_path):
    made = rewards("", "exact_number", "length", "regex", weights=[1, -1, 10], pattern=r"^it\b")
    values, figures = scores(made)
    assert values == [1 - 12 / 16, -7 / 16 + 10]
    assert figures["reward/exact_number"] == 0.5 and figures["reward/regex"] == 0.5
    write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "3 times 400?", "answer": "3*400\n#### 1,200"}])
    rows = read_prompts(tmp_path / "gsm8k.jsonl").rows
    assert rewards("", "exact_number").of(rows, rollouts("1200.0"), [0.0])[0] == [1]
    assert rewards("", "exact_number").of(rows, rollouts("1201"), [0.0])[0] == [0]


def test_each_functions_own_rewards_are_kept_apart(rewards):
    """What an evaluation reports: no weights, no sum; a function that does not apply says nothing."""
    code = "def half(responses):\n    return [None, 0.5]\ndef odd(responses):\n    return ['x', 1]\n"
    made = rewards(code, "scorer", "half", "exact_number", weights=[1, 5, -1])
    assert made.each(ROWS, rollouts(*TEXTS)) == {"half": [None, 0.5], "exact_number": [1.0, 0.0]}
    assert rewards(code, "odd", on_failure="zero").each(ROWS, rollouts(*TEXTS)) == {"odd": [0.0, 1.0]}
    with pytest.raises(ValueError, match=r"'odd' gave no reward of row p\.jsonl:1: expected a finite number or None"):
        rewards(code, "odd").each(ROWS, rollouts(*TEXTS))


def test_ppo_without_a_scorer_learns_from_a_function(tiny_model, tokenizer, tmp_path):
    (tmp_path / "own.py").write_text(
        "def short(completion_ids, want):\n    return [w - len(ids) for w, ids in zip(want, completion_ids)]\n",
        encoding="utf-8",
    )
    texts = ("Reverse abcd", "Count q", "Upper pqrs", "Last of abc")
    prompts = [EncodedPrompt(PromptRow(t, meta={"want": 8}), encode_prompt(tokenizer, t)) for t in texts]
    ppo = PPOArguments(
        learning_rate=1e-3, total_steps=2, rollout_batch_size=4, per_device_train_batch_size=2, max_new_tokens=4,
        kl_coef=0.0, missing_eos_penalty=0.5,
    )  # fmt: skip
    recipe = quiet(ppo=ppo, rewards=RewardArguments(functions=[f"{tmp_path}/own.py:short"], weights=[2.0]))
    trainer = PPOTrainer(PolicyModel(tiny_model(), value_head=True), tokenizer, None, recipe, seed=7)
    curve = trainer.train(prompts, tmp_path / "run")["curve"]
    assert metric_lines(tmp_path / "run") == curve and len(curve) == 2
    for row in curve:
        assert row["reward/short"] == pytest.approx(8 - row["length"])
        assert row["score"] == pytest.approx(2 * row["reward/short"] - 0.5 * (1 - row["finished"]))
