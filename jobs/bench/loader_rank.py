"""One rank that only loads: what ``jobs.bench loader`` starts, a process of its own for each measurement."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lake import Lake
from lake.images import decode_jpeg
from train.augment import Augmentation
from train.loader import LoaderConfig, OrderConfig, PackConfig, ReadConfig, SampleConfig, open_loader, open_parts
from train.memory import own_memory_mib

_WARM_PACKS = 8


def main() -> None:
    """Load for some seconds; print what was seen as one line of JSON."""
    asked = json.loads(sys.argv[1])
    config = LoaderConfig(
        order=OrderConfig(lanes=asked["lanes"]),
        packs=PackConfig(family="pi05"),
        sample=SampleConfig(horizon=asked["horizon"]),
        augment=Augmentation() if asked["augment"] else None,
        read=ReadConfig(threads=asked["threads"], cache_dir=asked["cache_dir"]),
    )
    found = _decoder(asked, config) if asked["what"] == "decoder" else _load(asked, config)
    print(json.dumps(found | {"peak_rss_mib": own_memory_mib("VmHWM"), "own_mib": own_memory_mib("RssAnon")}))


def _load(asked: dict[str, Any], config: LoaderConfig) -> dict[str, Any]:
    began = time.perf_counter()
    release = Lake(asked["lake"]).release()
    with open_loader(release, config) as loader:
        next(loader)
        first_pack_s = time.perf_counter() - began
        for _ in range(_WARM_PACKS):
            next(loader)
        samples = images = 0
        fill: list[float] = []
        began, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < asked["seconds"]:
            batch = next(loader)
            if asked["floats"]:
                batch.images_ISSC.float().div_(127.5).sub_(1)
            samples += batch.num_samples
            images += batch.num_images
            fill.append(batch.num_tokens / loader.sizes.budgets.tokens)
        seconds = time.perf_counter() - began
        return {
            "samples": samples,
            "images": images,
            "seconds": seconds,
            "samples_per_s": samples / seconds,
            "images_per_s": images / seconds,
            "cpu_s": time.process_time() - cpu,
            "first_pack_s": first_pack_s,
            "fill_tokens": sum(fill) / len(fill),
        }


def _decoder(asked: dict[str, Any], config: LoaderConfig) -> dict[str, Any]:
    """Decode the release's pictures on as many threads, and do nothing else."""
    assembler, reader = open_parts(Lake(asked["lake"]).release(), config)
    blocks = reader.read(assembler.block_keys(0))
    rows = [(block, row) for block in blocks for row in range(len(block.task))]
    jpegs = [bytes(block.jpeg(row, view)) for block, row in rows for view in range(block.num_views(row))][:2000]

    def decode(thread: int) -> int:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < asked["seconds"]:
            for jpeg in jpegs[thread % 7 :: 7]:
                decode_jpeg(jpeg)
                count += 1
        return count

    with ThreadPoolExecutor(asked["threads"]) as executor:
        began = time.perf_counter()
        images = sum(executor.map(decode, range(asked["threads"])))
        seconds = time.perf_counter() - began
    size = sum(map(len, jpegs)) / len(jpegs)
    return {"images": images, "seconds": seconds, "images_per_s": images / seconds, "jpeg_bytes": size}


if __name__ == "__main__":
    main()
