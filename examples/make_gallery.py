"""Run the examples and save their figures, small enough for a README, and what they print.

    python make_gallery.py [learning_rate batch_size ...] [--output gallery]

Each example runs as it does from the command line, in a process of its own. What it prints is
shown, and kept beside its figure: the numbers in the README and the documentation stand there
(tests/test_numbers.py). What the figures have too many are pixels and colours.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).parent
EXAMPLES = (
    "train_digits",
    "covariate_shift",
    "learning_rate",
    "depth",
    "before_after",
    "regularisation",
    "batch_size",
    "switchable",
    "single_sample",
    "layernorm_distributions",
    "fold_batchnorm",
    "masked_sequences",
    "rnn",
    "style",
    "custom_axes",
    "dataset_statistics",
)
WIDTH = 1200
BYTES = 60_000


def shrink(source, target):
    """Save a PNG with few enough pixels and colours to take less than `BYTES`."""
    with Image.open(source) as image:
        image = image.convert("RGB")
    if image.width > WIDTH:
        size = WIDTH, round(image.height * WIDTH / image.width)
        image = image.resize(size, Image.Resampling.LANCZOS)
    for colours in 128, 64, 32, 16:
        palette = image.quantize(colours, kmeans=1, dither=Image.Dither.NONE)
        palette.save(target, optimize=True)
        if target.stat().st_size < BYTES:
            return
    raise RuntimeError(f"{target}: {target.stat().st_size} bytes with 16 colours")


def run(script, figure):
    """Run an example, show what it prints, and return that without the line about the figure."""
    command = [sys.executable, "-u", script, "--output", figure]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if not line.startswith("Figure: "):
                lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(EXAMPLES)}")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "gallery",
        help="folder for figures and tables, default: gallery, beside the examples",
    )
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(EXAMPLES)
    if unknown:
        parser.error(f"no such example: {', '.join(sorted(unknown))}")

    args.output.mkdir(parents=True, exist_ok=True)
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        for name in tqdm(args.names or EXAMPLES, unit="example", disable=None):
            print(f"\n== {name}.py", flush=True)
            figure, target = Path(directory) / f"{name}.png", args.output / f"{name}.png"
            start = perf_counter()
            printed = run(HERE / f"{name}.py", figure)
            seconds = perf_counter() - start
            shrink(figure, target)
            target.with_suffix(".txt").write_text(printed, encoding="utf-8")
            lines.append(f"{name:<26}{seconds:>8.1f}{target.stat().st_size / 1000:>8.1f}")
    print(f"\n{'example':<26}{'seconds':>8}{'KB':>8}", *lines, sep="\n")


if __name__ == "__main__":
    main()
