"""Convert a local LeRobot dataset from v2.1 to v3.0 with LeRobot's own converter, in its own environment.

    .venv-lerobot/bin/python tests/lerobot_convert.py V21 OUT

V21 is left as it is; OUT must not be there yet.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from lerobot_open import prepare


def main() -> None:
    """Convert the dataset at the first argument."""
    prepare()
    from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    if out.exists():
        sys.exit(f"{out} is there already")
    out.parent.mkdir(parents=True, exist_ok=True)
    # The converter works in place, beside what it converts.
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as scratch:
        shutil.copytree(source, Path(scratch) / "dataset")
        convert_dataset("dataset", root=scratch, push_to_hub=False)
        (Path(scratch) / "dataset").rename(out)


if __name__ == "__main__":
    main()
