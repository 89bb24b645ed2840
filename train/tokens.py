"""How many tokens a sample takes in a model, from the metadata of its episode alone.

Nothing is decoded and no state is read, so where the text depends on the state, room is kept for the longest one.

E is the number of episodes, D that of a state's dimensions.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from train.lanes import Costs

RESERVED = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Tokens that no text gives, by id; Gemma has the same four in the same order."""

Ints = npt.NDArray[np.int64]

_PIECE = re.compile(r"<\|?/?[a-z_]+\|?>| ?[A-Za-z]{1,6}|.", re.DOTALL)
_NUM_BINS = 256
_BIN_EDGES = np.linspace(-1, 1, _NUM_BINS + 1)[:-1]


class Tokenizer(Protocol):
    """What turns text into ids."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WordTokenizer:
    """A stand-in for the published tokenizers, where those are not at hand; no published weights fit its ids.

    A word is cut into pieces of up to six letters, the first of which takes the space before it. A special token such
    as <bos> or <|im_end|> is one token. So is any other character: each digit, punctuation mark, newline, letter
    outside ASCII, and space before one of those. The published ones treat digits alike, and their words come out at
    about as many tokens.
    """

    vocab_size: int = 32_768
    """Ids are below it. Pieces are hashed to ids, so two may share one, more often where it is small."""

    def __post_init__(self) -> None:
        """Raise ValueError where there is no id to give."""
        if self.vocab_size <= len(RESERVED):
            raise ValueError(
                f"vocab_size={self.vocab_size} leaves no id for text; give more than the {len(RESERVED)} reserved ones"
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; the same on every machine."""
        return [_id_of(piece, self.vocab_size) for piece in _PIECE.findall(text)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the samples of a model are made of."""

    text: str
    """The whole text: {views} are its images, {task} the instruction, {state} the state's bins with spaces between."""
    view: str = "{view}"
    """What stands for one of the images; {n} counts them from 1."""
    cleans_task: bool
    """Whether an instruction is stripped, and its underscores and newlines become spaces."""
    tokens_per_view: int = 256
    """Patches of 14 x 14 in an image of 224 x 224."""
    tokens_per_state_dim: int
    """Kept for a dimension of the state within the text."""
    padded_views: int | None
    """Views that the published trainer always pads to; None where it pads to the longest sample of a batch."""
    padded_text: int | None
    """Text tokens that the published trainer always pads to, or cuts off at; None as above."""
    state_tokens: int
    """In the action stream."""
    future_tokens: int
    """Learned queries in the action stream."""
    horizon: int
    """Actions of a chunk; each is a token of the action stream."""
    scheme: Literal["quantile", "min_max"]
    """How it was trained to see states and actions normalised."""
    state_dim: int
    """Width to which it pads states."""
    action_dim: int
    """Width to which it pads actions."""

    @property
    def action_tokens(self) -> int:
        """Tokens of the action stream, which runs beside that of views and text and counts apart."""
        return self.state_tokens + self.future_tokens + self.horizon

    @property
    def has_state_text(self) -> bool:
        """Whether the state is part of the text."""
        return "{state}" in self.text


FAMILIES = {
    # Source: openpi, models/tokenizer.py and models/pi0_config.py. A bin has at most three characters, and one more
    # parts it from the next; none takes more than a token.
    "pi05": Family(
        text="{views}<bos>Task: {task}, State: {state};\nAction: ",
        cleans_task=True,
        tokens_per_state_dim=4,
        padded_views=3,
        padded_text=200,
        state_tokens=0,
        future_tokens=0,
        horizon=50,
        scheme="quantile",
        state_dim=32,
        action_dim=32,
    ),
    # Source: Isaac-GR00T N1.5, eagle2_hg_model: the chat template of Qwen, and how its processor names images.
    "groot_n15": Family(
        text="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{views}{task}<|im_end|>\n"
        "<|im_start|>assistant\n",
        view="<image {n}><img>{view}</img>",
        cleans_task=False,
        tokens_per_state_dim=0,
        padded_views=None,
        padded_text=None,
        state_tokens=1,
        future_tokens=32,
        horizon=16,
        scheme="min_max",
        state_dim=64,
        action_dim=32,
    ),
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a published ``tokenizer.json`` of this machine.

    Raises:
        ValueError: there is no such file, or the package that reads it is not installed.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"no tokenizer at {path}: give the path of the tokenizer.json that is published with the model's weights, "
            "downloaded beforehand"
        )
    try:
        tokenizers = import_module("tokenizers")
    except ImportError as error:
        raise ValueError(f"reading {path} needs the package tokenizers: pip install tokenizers") from error
    inner = tokenizers.Tokenizer.from_file(str(path))
    # A file may ask for either, and both would falsify the counts.
    inner.no_padding()
    inner.no_truncation()
    return _Published(inner=inner)


def state_bins(state_D: npt.ArrayLike) -> Ints:
    """Return the bin of each dimension of a normalised state: 0 to 255 within [-1, 1), -1 below, 255 above [D].

    Source: openpi, models/tokenizer.py.
    """
    return np.searchsorted(_BIN_EDGES, np.asarray(state_D), side="right") - 1


def pieces(family: Family, *, task: str, num_views: int) -> tuple[list[str], str, str]:
    """Return the text before each view, that between the last view and the state, and that behind the state.

    Models whose text has no state have nothing behind it.
    """
    if family.cleans_task:
        task = task.strip().replace("_", " ").replace("\n", " ")
    before, _, after = family.text.partition("{views}")
    view_head, _, view_tail = family.view.partition("{view}")
    heads: list[str] = []
    for n in range(1, num_views + 1):
        heads.append(before + view_head.replace("{n}", str(n)))
        before = view_tail
    head, _, tail = (before + after).partition("{state}")
    return heads, head.replace("{task}", task), tail


def sample_costs(
    family: Family,
    *,
    task_texts: Sequence[Sequence[str]],
    num_views: Ints | int,
    state_dim: Ints | int,
    tokenizer: Tokenizer,
) -> Costs:
    """Return what a sample of each episode costs at most: tokens of its views and text, and images.

    Action tokens are not among them, since they are as many for every sample: ``family.action_tokens``.

    Args:
        task_texts: instructions of each episode; of several, the longest counts, and of none, an empty one [E].
        num_views: of each episode [E], or of all.
        state_dim: dimensions of each episode's state [E], or of all.

    Raises:
        ValueError: arguments that do not fit together.
    """
    views = _per_episode("num_views", num_views, len(task_texts))
    dims = _per_episode("state_dim", state_dim, len(task_texts))
    if any(isinstance(tasks, str) for tasks in task_texts):
        raise ValueError("task_texts holds a text where it should hold the texts of an episode; wrap it in a list")

    @cache
    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    @cache
    def text_tokens(task: str, num_views: int) -> int:
        heads, head, tail = pieces(family, task=task, num_views=num_views)
        # Apart, as a state will part them; together they could merge to fewer.
        return sum(map(count, [*heads, head, tail]))

    most = [
        max(text_tokens(task, int(n)) for task in tasks or ("",)) for tasks, n in zip(task_texts, views, strict=True)
    ]
    tokens = family.tokens_per_view * views + family.tokens_per_state_dim * dims + np.array(most, np.int64)
    return Costs(tokens=tokens, images=views)


def padded_tokens(family: Family) -> int:
    """Return the tokens of views and text that the published trainer spends on any sample, action tokens apart.

    Raises:
        ValueError: it has no fixed layout.
    """
    if family.padded_views is None or family.padded_text is None:
        raise ValueError("this model has no fixed layout: a batch is padded to its longest sample")
    return family.padded_views * family.tokens_per_view + family.padded_text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Published:
    """A tokenizer of the package tokenizers."""

    inner: Any

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=1 << 16)
def _id_of(piece: str, vocab_size: int) -> int:
    if piece in RESERVED:
        return RESERVED.index(piece)
    # Text of a source may hold half a surrogate pair, which UTF-8 refuses.
    digest = hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return len(RESERVED) + int.from_bytes(digest, "little") % (vocab_size - len(RESERVED))


def _per_episode(name: str, value: Ints | int, num_episodes: int) -> Ints:
    values = np.asarray(value)
    if values.shape not in ((), (num_episodes,)) or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} is an array {values.shape} of {values.dtype} for {num_episodes} episodes; give one integer, or "
            "one of each episode"
        )
    if values.size and values.min() < 0:
        raise ValueError(f"{name} is {values.min()} somewhere; it counts, so it is 0 or more")
    return np.broadcast_to(values, num_episodes).astype(np.int64)
