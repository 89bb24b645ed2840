"""Measure a model's training step: packed beside padded, compiled or not, by precision.

It needs torch and numpy, but neither Ray, Lance nor tyro, so it runs as it is on a machine with a GPU and little else.
"""

import sys
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from jobs.bench.mixtures import ARMS, costs_of, made, of_lake, stream_of
from train.accounting import Sample, mfu, peak_flops, step_flops
from train.made import Lengths
from train.measure import Timing, Variant, Work, device_name, matmul_flops, measure, parameters_of
from train.models.build import config_named
from train.order import weights_by_size
from train.tokens import FAMILIES


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train on the packs of a mixture of 1, 2 and 3 cameras, and on the same samples in the published layout.

    Pictures and text hold random numbers, for the time does not depend on them; lengths are those of the mixture.
    """

    model: str = "pi05_tiny"
    """Name in train.models.config.CONFIGS: pi05 or groot_n15 on a GPU, with _tiny behind it elsewhere."""
    lake: str = ""
    """A lake whose last release gives the lengths, sources by size; empty makes them up."""
    shares: tuple[float, float, float] = (0.4, 0.4, 0.2)
    """Of samples with 1, 2 and 3 cameras, where lengths are made up."""
    states: tuple[int, int, int] = ARMS
    """Dimensions of their states, which are a part of pi-0.5's text: an arm, LIBERO's, ALOHA's two."""
    tokens: int = 8192
    """Budget of a pack; 16384 is meant for a GPU."""
    packs: int = 2
    """Packs of a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto takes a GPU where there is one."""
    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations; auto is bfloat16 on a GPU, float32 elsewhere."""
    compiled: Literal["both", "off", "on"] = "both"
    """Whether layers are compiled."""
    precisions: tuple[str, ...] = ("none", "emulate", "torchao")
    """Back ends of FP8 that are measured, packed; te where Transformer Engine is installed."""
    eager: bool = True
    """Measure openpi's own way too: all scores in memory, layers computed again in the backward pass."""
    frozen: tuple[str, ...] = ()
    """Parts of the model that are not trained."""
    repeats: int = 3
    """Timed steps of each variant, behind one that warms up. The median counts."""


def run(config: Config) -> dict[str, Any]:
    """Return {"what", "numbers", "rows"}.

    Raises:
        ValueError: an unknown model, or a device that is not there.
    """
    device = device_name(config.device)
    work = _work(config, device.kind)
    flops = step_flops(
        work.config,
        [Sample(tokens=each.tokens(work.config), images=each.views) for each in work.lengths],
        frozen=config.frozen,
    )
    peak = peak_flops(device.name)
    dtype = work.config.compute
    product = matmul_flops(device.kind, dtype)
    rows: list[dict[str, Any]] = []
    for variant in _variants(config, device.kind):
        try:
            timing = measure(work, variant, device=device.kind, repeats=config.repeats)
        except (ValueError, ImportError) as error:
            if variant.precision == "none":
                raise
            rows.append(asdict(variant) | {"left_out": str(error)})
        else:
            rows.append(asdict(variant) | _figures(work, timing, flops, (peak, product)))
        print(rows[-1], file=sys.stderr, flush=True)
    num_tokens = sum(each.tokens(work.config) for each in work.lengths)
    useful = num_tokens / (len(work.packs) * work.budgets.tokens)
    numbers = _ratios([row for row in rows if "left_out" not in row]) | {
        "samples": len(work.lengths),
        "fill_tokens": useful,
        "tflop_per_step": flops / 1e12,
        "tflops_of_a_product": product / 1e12,
        "peak_tflops": None if peak is None else peak / 1e12,
        "parameters": parameters_of(work.config, config.frozen),
        "device": device.name,
        "compute": dtype,
    }
    return {"what": f"a training step of {config.model}, packed beside padded", "numbers": numbers, "rows": rows}


def _work(config: Config, device: str) -> Work:
    compute = config.compute
    if compute == "auto":
        compute = "bfloat16" if device == "cuda" else "float32"
    model = replace(config_named(config.model), compute=compute)
    family = FAMILIES[model.family]
    sources = of_lake(config.lake) if config.lake else made(60, states=config.states)
    shares = weights_by_size([int(each.lengths.sum()) for each in sources]) if config.lake else config.shares
    costs = [costs_of(family, each) for each in sources]
    stream = stream_of(sources, costs, tuple(shares), config.tokens)
    packs: list[tuple[Lengths, ...]] = []
    number = 0
    while len(packs) < config.packs:
        packs += [
            tuple(
                Lengths(views=int(views), text=int(tokens) - int(views) * model.vision.tokens)
                for tokens, views in zip(pack.tokens, pack.images, strict=True)
            )
            for pack in stream.window(number)
        ]
        number += 1
    packs = packs[: config.packs]
    padded_to = None
    if family.padded_text is not None and family.padded_views is not None:
        # openpi cuts text off that is longer; here all of it is kept.
        longest = max(each.text for pack in packs for each in pack)
        padded_to = Lengths(views=family.padded_views, text=max(family.padded_text, longest))
    return Work(
        config=model,
        packs=tuple(packs),
        budgets=stream.budgets,
        padded_to=padded_to,
        frozen=config.frozen,
    )


def _variants(config: Config, device: str) -> list[Variant]:
    compiled = {"both": (False, True), "off": (False,), "on": (True,)}[config.compiled]
    found = [Variant(layout="padded", attention="eager", again=True)] if config.eager else []
    found += [Variant(layout="padded", attention="eager")] if config.eager else []
    for each in compiled:
        found += [Variant(layout="padded", attention="sdpa", compiled=each), Variant(compiled=each)]
    # Compiled for a CPU, the casts to FP8 take ten times as long as by themselves.
    last = compiled[-1] and device == "cuda"
    return found + [Variant(compiled=last, precision=each) for each in config.precisions if each != "none"]


def _figures(work: Work, timing: Timing, flops: float, peaks: tuple[float | None, float]) -> dict[str, Any]:
    seconds = median(timing.seconds)
    num_tokens = sum(each.tokens(work.config) for each in work.lengths)
    peak, product = peaks
    return {
        "step_s": seconds,
        "seconds": timing.seconds,
        "first_s": timing.first_s,
        "micro_steps": timing.micro_steps,
        "samples_per_s": len(work.lengths) / seconds,
        "useful_tokens_per_s": num_tokens / seconds,
        "mfu": None if peak is None else mfu(flops, seconds, peak=peak),
        "of_a_product": mfu(flops, seconds, peak=product),
        "peak_gib": timing.peak_bytes / 2**30,
        "loss": timing.loss,
    }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return samples/s of pairs of variants, one over the other."""

    def rate(**wanted: Any) -> float | None:
        plain = asdict(Variant()) | wanted
        return next((row["samples_per_s"] for row in rows if plain.items() <= row.items()), None)

    def over(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    padded = {"layout": "padded", "attention": "sdpa"}
    eager = {"layout": "padded", "attention": "eager"}
    on = any(row["compiled"] for row in rows)
    best = rate(compiled=on)
    ratios = {
        "packed_over_padded": over(rate(), rate(**padded)),
        "packed_over_padded_eager": over(rate(), rate(**eager)),
        "packed_over_padded_compiled": over(rate(compiled=True), rate(**padded, compiled=True)),
        "attention_over_eager": over(rate(**padded), rate(**eager)),
        "attention_over_eager_computed_again": over(rate(**padded), rate(**eager, again=True)),
        "compiled_over_not": over(rate(compiled=True), rate()),
        "all_over_published": over(best, rate(**eager, again=True)),
        "samples_per_s": best,
    }
    if ratios["packed_over_padded"] is None:
        ratios["packed_over_padded"] = ratios["packed_over_padded_compiled"]
    for precision in sorted({row["precision"] for row in rows} - {"none"}):
        same = next(row["compiled"] for row in rows if row["precision"] == precision)
        ratios[f"{precision}_over_none"] = over(rate(compiled=same, precision=precision), rate(compiled=same))
    return ratios
