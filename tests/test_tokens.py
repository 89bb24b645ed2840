"""Tests of train/tokens.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT

from train.tokens import (
    FAMILIES,
    RESERVED,
    Family,
    WordTokenizer,
    load_tokenizer,
    padded_tokens,
    pieces,
    sample_costs,
    state_bins,
)

WORDS = WordTokenizer()
PI05, GROOT = FAMILIES["pi05"], FAMILIES["groot_n15"]
STATES = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(-1.2, 1.2), max_size=20)
RELAXED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TINY = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    },
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    },
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"<pad>": 0, "<bos>": 1, "<unk>": 2, "push": 3, "the": 4, "button": 5},
        "unk_token": "<unk>",
    },
}


class Counting:
    """A tokenizer that remembers what it was asked for."""

    vocab_size = WORDS.vocab_size

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.asked.append(text)
        return WORDS.encode(text)


@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [
        ("", 0),
        ("push the button", 3),
        ("pick up pineapples", 4),  # pineap ples
        (" 127 -1", 7),
        ("<bos>Task", 2),
        ("<|im_end|></img>", 2),
        ("<image 1>", 5),
        ("a,b\n", 4),
        ("_", 1),
        ("\u62ff\u676f", 2),
        ("two  spaces", 3),
    ],
)
def test_pieces_are_as_counted_by_hand(text: str, num_tokens: int) -> None:
    assert len(WORDS.encode(text)) == num_tokens


@RELAXED
@given(text=st.text(), vocab_size=st.integers(len(RESERVED) + 1, 300_000))
def test_ids_lie_between_the_reserved_ones_and_the_vocabulary_size(text: str, vocab_size: int) -> None:
    ids = WordTokenizer(vocab_size=vocab_size).encode(text)
    least = 0 if any(each in text for each in RESERVED) else len(RESERVED)
    assert all(least <= each < vocab_size for each in ids)
    assert len(ids) <= len(text)
    assert bool(ids) == bool(text)


def test_ids_tell_words_apart() -> None:
    words = [f" {chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26)]
    # Of 676 pieces in 32,764 ids about 7 share one by chance.
    assert len({WORDS.encode(each)[0] for each in words}) > 650
    assert WORDS.encode("push") != WORDS.encode(" push")


def test_half_a_surrogate_pair_has_an_id() -> None:
    assert len(WORDS.encode("a\ud800b")) == 3


def test_ids_are_the_same_in_another_process() -> None:
    text = "Pick up the 2 cups,\nthen wait; \u00e9t\u00e9"
    code = f"import json\nfrom train.tokens import WordTokenizer\nprint(json.dumps(WordTokenizer().encode({text!r})))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert json.loads(done.stdout) == WORDS.encode(text)


def test_ids_do_not_change_from_release_to_release() -> None:
    # Weights that were trained with these ids know no others.
    assert WORDS.encode("push 1\n") == [13349, 11968, 13738, 19536]


def test_a_vocabulary_without_an_id_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=4 leaves no id"):
        WordTokenizer(vocab_size=4)


def test_importing_it_loads_neither_ray_nor_torch() -> None:
    code = "import sys, train.tokens\nprint({'ray', 'torch', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-7.0, -1), (-1.0, 0), (-0.9999, 0), (0.0, 128), (0.999, 255), (1.0, 255), (9.0, 255), (float("nan"), 255)],
)
def test_a_state_falls_into_256_bins(value: float, expected: int) -> None:
    assert state_bins([value]).tolist() == [expected]


def test_texts_are_as_published() -> None:
    assert pieces(PI05, task=" push_the\nbutton ", num_views=2) == (
        ["", ""],
        "<bos>Task: push the button, State: ",
        ";\nAction: ",
    )
    assert pieces(GROOT, task="Push it.", num_views=2) == (
        [
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image 1><img>",
            "</img><image 2><img>",
        ],
        "</img>Push it.<|im_end|>\n<|im_start|>assistant\n",
        "",
    )
    assert pieces(PI05, task="{state} {task}", num_views=0)[1] == "<bos>Task: {state} {task}, State: "


def test_pi05_costs_are_as_counted_by_hand() -> None:
    costs = sample_costs(
        PI05,
        task_texts=[["push the button"], ["push"], []],
        num_views=np.array([3, 1, 0]),
        state_dim=np.array([7, 14, 0]),
        tokenizer=WORDS,
    )
    # <bos> Task : push the button , State : and a space; ; newline Action : and a space
    text = np.array([1 + 9 + 5 + 28, 1 + 7 + 5 + 56, 1 + 7 + 5])
    assert costs.tokens.tolist() == (256 * np.array([3, 1, 0]) + text).tolist()
    assert costs.images.tolist() == [3, 1, 0]
    assert costs.tokens.dtype == costs.images.dtype == np.int64
    assert PI05.action_tokens == 50


def test_groot_costs_are_as_counted_by_hand() -> None:
    costs = sample_costs(
        GROOT, task_texts=[["push the button"]] * 4, num_views=np.arange(4), state_dim=29, tokenizer=WORDS
    )
    # system You are a helpful assistant . with its frame, 12; user, 3; <|im_end|> and assistant, 6; the task, 3
    frame = len(WORDS.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"))
    text = frame + len(WORDS.encode("push the button<|im_end|>\n<|im_start|>assistant\n"))
    assert costs.tokens.tolist() == [
        text,
        *(n * (256 + len(WORDS.encode("<image 1><img></img>"))) + text for n in (1, 2, 3)),
    ]
    assert costs.images.tolist() == [0, 1, 2, 3]
    assert GROOT.action_tokens == 49


@RELAXED
@given(
    episodes=st.lists(
        st.tuples(
            st.lists(st.sampled_from(["", "push", "pull the handle", "wait 10 s"]), max_size=3),
            st.integers(0, 4),
            st.integers(0, 20),
        ),
        max_size=12,
    ),
    family=st.sampled_from([PI05, GROOT]),
)
def test_together_is_the_same_as_one_by_one(episodes: list[tuple[list[str], int, int]], family: Family) -> None:
    tasks, views, dims = ([each[at] for each in episodes] for at in range(3))
    together = sample_costs(
        family,
        task_texts=tasks,
        num_views=np.array(views, np.int64),
        state_dim=np.array(dims, np.int64),
        tokenizer=WORDS,
    )
    one_by_one = [
        max(
            int(sample_costs(family, task_texts=[[task]], num_views=v, state_dim=d, tokenizer=WORDS).tokens[0])
            for task in texts or [""]
        )
        for texts, v, d in episodes
    ]
    assert together.tokens.tolist() == one_by_one
    assert together.images.tolist() == views


def test_each_task_is_tokenised_once() -> None:
    counting = Counting()
    tasks = [["push"], ["pull", "push"], ["push"], ["pull"]]
    sample_costs(GROOT, task_texts=tasks, num_views=1, state_dim=3, tokenizer=counting)
    assert sorted(
        each.removesuffix(GROOT.text.partition("{task}")[2]) for each in set(counting.asked) if "pu" in each
    ) == [
        "</img>pull",
        "</img>push",
    ]
    assert len(counting.asked) == len(set(counting.asked))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_texts": ["push", "pull"]}, "wrap it in a list"),
        ({"num_views": np.array([1])}, "num_views is an array"),
        ({"num_views": np.array([1, -1])}, "num_views is -1"),
        ({"state_dim": np.array([1.5, 2.0])}, "state_dim is an array .* of float64"),
        ({"state_dim": -3}, "state_dim is -3"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    arguments = {"task_texts": [["push"], ["pull"]], "num_views": 1, "state_dim": 7, "tokenizer": WORDS}
    with pytest.raises(ValueError, match=message):
        sample_costs(PI05, **(arguments | change))


def test_the_families_are_these() -> None:
    assert sorted(FAMILIES) == ["groot_n15", "pi05"]


def test_the_fixed_layout_of_openpi() -> None:
    assert padded_tokens(PI05) == 968
    assert padded_tokens(PI05) + PI05.action_tokens == 1018
    with pytest.raises(ValueError, match="no fixed layout"):
        padded_tokens(GROOT)


def test_no_sample_of_up_to_three_views_takes_more_than_the_fixed_layout() -> None:
    costs = sample_costs(PI05, task_texts=[["x " * 50]], num_views=3, state_dim=32, tokenizer=WORDS)
    assert costs.tokens[0] < padded_tokens(PI05)


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*absent\.json: give the path of the tokenizer\.json"):
        load_tokenizer(tmp_path / "absent.json")


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TINY))
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # Python's own way to say that it cannot be imported.
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(path)


def test_a_published_tokenizer_is_read_without_its_padding_or_special_tokens(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="published tokenizers need it; nothing else does")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TINY))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("push the red button") == [3, 4, 2, 5]
